"""What a declared algorithm needs, by name. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["ActorCritic", "algorithm_kind", "critic_options", "is_grouped", "number", "plain_name"]

ActorCritic = Literal["actor-critic", "critic-free"]
CRITIC_FREE = frozenset(
    [
        "grpo",
        "drgrpo",
        "dapo",
        "gspo",
        "rloo",
        "reinforce",
        "reinforce++",
        "reinforceplusplus",
        "reinforceplusplusbaseline",
        "remax",
        "opo",
    ]
)
GROUPED = frozenset(["grpo", "drgrpo", "dapo", "gspo", "rloo"])
# Names that nothing but a critic reads. A discount or a lambda of 1 is also what critic-free algorithms amount to.
CRITIC_ONLY = ("vf_coef", "clip_range_value", "critic_learning_rate", "value_init")


def algorithm_kind(declared: Mapping[str, Any]) -> ActorCritic | None:
    """Whether the declared algorithm has a critic; from options that only a critic reads where no algorithm is named.

    None where neither says so, or where the name is not known.
    """
    name = declared.get("algorithm")
    if name is not None:
        plain = plain_name(name)
        return "actor-critic" if plain == "ppo" else "critic-free" if plain in CRITIC_FREE else None
    return "actor-critic" if critic_options(declared) else None


def is_grouped(declared: Mapping[str, Any]) -> bool:
    """Whether advantages are differences within a group of responses to one prompt."""
    return plain_name(declared.get("algorithm") or "") in GROUPED


def plain_name(name: Any) -> str:
    """``REINFORCE++`` and ``reinforce_plus_plus`` alike."""
    return str(name).lower().replace("_", "").replace("-", "").replace(" ", "")


def critic_options(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The declared options that only a critic reads and that are not switched off."""
    found = {name: declared[name] for name in CRITIC_ONLY if declared.get(name) not in (None, False, 0, 0.0)}
    lam = number(declared.get("lam"))
    return found | ({"lam": lam} if lam is not None and lam < 1 else {})


def number(given: Any) -> float | None:
    """The number that is given, None where it is none (a truth value is none)."""
    if isinstance(given, bool) or given is None:
        return None
    try:
        return float(given) if not isinstance(given, str) else None
    except (TypeError, ValueError):
        return None

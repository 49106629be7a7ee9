"""Optimizers that have taken steps over a critic that has not moved: their moments are of another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.fingerprint import Fingerprint

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["ForeignMoments", "foreign_moments"]

MOVES = 1e-8  # a learning rate below which float32 weights may stay what they are
SOURCES: tuple[Role, ...] = ("reward", "reference", "policy")


@dataclass(frozen=True)
class ForeignMoments:
    """``steps`` that an optimizer has behind it over ``matrices`` of the critic, all of them still ``source``'s."""

    steps: int
    matrices: int
    source: Role | None


@fact(Stage.PROBE)
def foreign_moments(setup: Any, models: Models, fingerprint: Mapping[Role, Fingerprint]) -> ForeignMoments:
    """The optimizer's steps over the critic, and the model that the critic is a copy of as far as they go.

    A second step would have moved it, the first may be one of a warm-up that starts at a rate of 0.

    Raises:
        Unavailable: no critic in memory of its own weights in float32, or no optimizer that counts its steps.
    """
    import torch

    if "value" not in fingerprint or not setup.optimizers:
        raise Unavailable("needs a critic in memory and the optimizers")
    live = models.get("value")
    if live.loaded_here:
        raise Unavailable("needs the critic in memory")
    counted = _steps(setup.optimizers)
    policy = setup.model("policy")
    shared = {id(p) for p in policy.parameters()} if isinstance(policy, torch.nn.Module) else set()
    places = list(fingerprint["value"].backbone)
    taken = {
        places.index(name): counted[id(p)]
        for name, p in live.module.named_parameters()
        if name in fingerprint["value"].backbone and id(p) in counted and id(p) not in shared
        if p.dtype == torch.float32
    }
    if not taken:
        raise Unavailable("no optimizer says how many steps it has taken over the critic")
    steps = min(taken.values())
    source = next((role for role in SOURCES if role in fingerprint and _same(fingerprint, role, taken)), None)
    return ForeignMoments(steps, len(taken), source if steps > 1 else None)


def _same(fingerprint: Mapping[Role, Fingerprint], role: Role, taken: Mapping[int, int]) -> bool:
    mine, theirs = (list(fingerprint[one].backbone.values()) for one in ("value", role))
    return len(mine) == len(theirs) and all(mine[place] == theirs[place] for place in taken)


def _steps(optimizers: Any) -> dict[int, int]:
    """Identity of a parameter -> the steps that its optimizer counts, where its rate moves anything."""
    found: dict[int, int] = {}
    for optimizer in optimizers:
        state = getattr(optimizer, "state", None)
        groups = getattr(optimizer, "param_groups", ())
        moving = {id(p) for group in groups if float(group.get("lr") or 0) >= MOVES for p in group["params"]}
        for parameter, kept in state.items() if isinstance(state, Mapping) else ():
            step = kept.get("step") if isinstance(kept, Mapping) else None
            if step is not None and id(parameter) in moving:
                found[id(parameter)] = int(step)
    return found

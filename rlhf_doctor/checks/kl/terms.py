"""What the checks of the divergence from the reference have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable

if TYPE_CHECKING:
    from rlhf_doctor.trace.divergence import Divergence
    from rlhf_doctor.trace.estimators import Fit

__all__ = ["declared_estimator", "declared_place", "places", "where_of"]

NAMES: Mapping[str, str] = {"kl": "k1", "mse": "k2", "abs": "|k1|", "low_var_kl": "k3", "|k1|": "|k1|", "full": "full"}


def places(terms: Divergence) -> list[tuple[str, Fit, int]]:
    """(where it acts, what it is, at how many tokens that was seen), for each place that the reference acts on.

    Raises:
        Unavailable: neither place could be looked at, or what moved there is no known estimator.
    """
    seen = {place: p for place in ("reward", "loss") if (p := getattr(terms, place)) is not None}
    if not seen:
        raise Unavailable(terms.reasons.get("reward") or terms.reasons.get("loss") or "the reference was not seen")
    found = [(place, p.best, p.tokens) for place, p in seen.items() if p.there and p.best is not None]
    largest = max((abs(fit.coefficient) for _, fit, _ in found), default=0.0)
    found = [one for one in found if abs(one[1].coefficient) > 0.01 * largest]
    if not found and any(p.there for p in seen.values()):
        raise Unavailable("how the rewards and the loss move with the reference is no known estimator of the KL")
    return found


def declared_place(setup: Any) -> str | None:
    """``reward`` or ``loss``, None where nothing or something else is declared."""
    place = str(setup.declared.get("kl_in") or "").strip().lower()
    return place if place in ("reward", "loss") else None


def declared_estimator(setup: Any) -> str | None:
    """The declared estimator under its short name, None where none is."""
    name = str(setup.declared.get("kl_estimator") or "").strip().lower()
    return NAMES.get(name, name) or None


def where_of(tokens: int) -> str:
    """The place of evidence from the changed step."""
    return f"{tokens} response tokens whose reference log-probability was moved"

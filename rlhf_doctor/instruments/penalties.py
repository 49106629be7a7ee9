"""The facts about penalties of a training step: the divergence from the reference, and texts without an end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage

if TYPE_CHECKING:
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.controller import Controlled
    from rlhf_doctor.trace.divergence import Divergence
    from rlhf_doctor.trace.penalty import Leak, Surplus
    from rlhf_doctor.trace.reference import ReferenceView

__all__ = ["kl_controller", "kl_leak", "kl_terms", "last_rewards", "reference_view"]


@fact(Stage.TRACE)
def kl_terms(traced: Traced, setup: Any) -> Divergence:
    """What the reference's log-probabilities do to the rewards and to the policy's loss."""
    from rlhf_doctor.trace.divergence import divergence

    return divergence(traced, dict(setup.declared))


@fact(Stage.TRACE)
def reference_view(traced: Traced) -> ReferenceView:
    """What the reference is given, beside what the policy is trained on."""
    from rlhf_doctor.trace.reference import reference_view as view

    return view(traced)


@fact(Stage.TRACE)
def last_rewards(traced: Traced, setup: Any, kl_terms: Divergence) -> Surplus:
    """What the reward at the last token of each response holds beside its score."""
    from rlhf_doctor.trace.penalty import surplus

    return surplus(traced, dict(setup.declared), kl_terms)


@fact(Stage.TRACE)
def kl_leak(traced: Traced, last_rewards: Surplus) -> Leak:
    """What the reference's outputs do in slots that hold no response token.

    Raises:
        Unavailable: they could not be moved there.
    """
    from rlhf_doctor.trace.penalty import kl_leak as leak

    found = leak(traced, last_rewards)
    if found is None:
        reasons = traced.experiments.reasons
        why = reasons.get("rollout outputs") or reasons.get("*") or "the reference was not seen on the samples"
        raise Unavailable(why)
    return found


@fact(Stage.TRACE)
def kl_controller(traced: Traced, setup: Any, kl_terms: Divergence) -> Controlled:
    """The KL coefficient of two steps in a row. An adaptive one is watched in two steps more.

    Raises:
        Unavailable: kl_adaptive is not declared, or one of the coefficients cannot be read.
    """
    if not isinstance(setup.declared.get("kl_adaptive"), bool):
        raise Unavailable("needs kl_adaptive to be declared")
    from rlhf_doctor.trace.controller import controlled

    for place, penalty in (("reward", kl_terms.reward), ("loss", kl_terms.loss)):
        if penalty is not None and penalty.best is not None:
            found = controlled(traced, setup, penalty.best, place)
            if isinstance(found, str):
                raise Unavailable(found)
            return found
    raise Unavailable("needs a KL of a known estimator that acts in the rewards or in the loss")

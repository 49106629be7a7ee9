"""Facts of further runs of the step: one that is disturbed in its update, and one on a batch at the edge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.disturbed import Disturbed
    from rlhf_doctor.trace.edges import Edges

__all__ = ["disturbed", "edge_batches"]


@fact(Stage.TRACE)
def disturbed(setup: Any, traced: Traced) -> Disturbed:
    """Run the step with the critic's outputs moved and idle slots poisoned in the update, and count gradients.

    Raises:
        Unavailable: the step cannot be compared with itself.
    """
    _comparable(setup, traced)
    from rlhf_doctor.trace.disturbed import disturb

    return disturb(setup, traced)


@fact(Stage.TRACE)
def edge_batches(setup: Any, traced: Traced) -> Edges:
    """Run the step on equal scores with ratios far from 1, and on advantages that are all 0.

    Raises:
        Unavailable: the step cannot be compared with itself.
    """
    _comparable(setup, traced)
    from rlhf_doctor.trace.edges import at_the_edge

    return at_the_edge(setup, traced)


def _comparable(setup: Any, traced: Traced) -> None:
    if traced.watched or setup.step is None:
        raise Unavailable("needs a step that can be called again: this run went by once")
    reason = traced.experiments.reasons.get("*")
    if reason:
        raise Unavailable(reason)

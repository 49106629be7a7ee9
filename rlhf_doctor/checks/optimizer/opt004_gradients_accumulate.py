"""OPT004: each update uses the gradients of its own passes, all of them, divided by their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.flows import Flow


@check(
    "OPT004",
    "each update uses the gradients of its own passes, divided by their number",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("LOS003", "OPT002", "OPT006", "VAL008"),
)
def gradients_accumulate(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        What every backward pass brings to some parameters of policy and critic, before it is added up, against what
        their gradients held before the first pass of an update, and what the optimizer finds at its step. And whether
        the weights of an update that is made in several passes are divided by what counts for the whole.

    Why it matters:
        Gradients that are not zeroed turn every update into a sum of all that went before, of another policy. Losses of
        micro-batches that are not divided multiply the step, and with it the meaning of every coefficient beside it. A
        norm clipped to 0 leaves nothing.

    What it looks like when broken:
        A gradient norm that grows from update to update, or with the number of accumulation steps; or one that is
        reported as large while nothing changes.

    How to fix:
        1. Call zero_grad before the first backward pass of each update, on every optimizer.
        2. Divide the loss of each micro-batch by the tokens or rows of the whole update.
        3. Give the clip a norm above 0, such as 1.

    Source:
        https://github.com/huggingface/trl/issues/2617 (loss not divided by the accumulation steps). Tolerance: before
        the first pass a gradient must be below 1e-5 of what the pass brings, and at the step above 1e-8 of it: what
        float32 rounds off, and what no norm that is meant nor a loss scale leaves.
    """
    from rlhf_doctor.trace.flows import CUT, LEFT
    from rlhf_doctor.trace.weighting import weighting

    real = traced.experiments.real
    if real is None:
        raise Unavailable("needs a step that can be run with its updates")
    for role, flow in real.flows.items():
        left = [b for b in flow.before if b > LEFT]
        if left:
            yield _finding(
                f"The {spoken(role)}'s gradients are not zeroed between updates: each one adds to what the last one "
                "left. Call zero_grad before the first backward pass of every update.",
                "gradient before an update's first backward pass, over what this pass brings",
                "0",
                f"{max(left):.3g} in {len(left)} of {len(flow.before)} readings",
                f"below {LEFT:g}",
            )
            return
    for role, flow in real.flows.items():
        if _cut(flow, CUT):
            yield _finding(
                f"The {spoken(role)}'s gradients are cut to nothing before its optimizer steps. A clip should leave a "
                "norm that moves the weights, such as 1.",
                "gradient that the optimizer finds, over what the backward passes brought",
                "1, less what a clip takes",
                f"at most {max(flow.found or [x for x in flow.seen if x < CUT]):.3g}",
                f"above {CUT:g}",
            )
            return
    read = weighting(traced)
    if "undivided" in read.name:
        one = read.passes[0]
        yield _finding(
            "The losses of micro-batches are added up without being divided by their number: the step is "
            f"{one.passes} times what one pass over the same rows gives. Divide each by the tokens or rows of the "
            "whole update.",
            "what the sum over a micro-batch's tokens is divided by",
            f"{one.update_tokens} tokens or {one.update_rows} rows, those of the update",
            f"{read.divisors[0]:.5g}, with {one.tokens} tokens in {one.rows} rows",
            "1% of a count",
        )
    elif not any(f.before or f.found or f.seen for f in real.flows.values()):
        raise Unavailable("needs gradients at the parameters of policy or critic, and none was seen")


def _cut(flow: Flow, limit: float) -> bool:
    """Whether nothing is left. Of steps made by hand only leftovers are seen, and a 0 may be the next zeroing."""
    if flow.found:
        return max(flow.found) < limit
    return any(0 < x < limit for x in flow.seen)


def _finding(message: str, quantity: str, expected: str, observed: str, tolerance: str) -> Finding:
    return Finding(
        message,
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                quantity,
                expected=expected,
                observed=observed,
                tolerance=tolerance,
                where="two steps in a row",
            ),
        ),
    )


@gradients_accumulate.fault("the policy's gradients are never zeroed")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.gradients_kept(healthy)


@gradients_accumulate.fault("losses of micro-batches are added up undivided")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(
        healthy, settings={"micro_batch_size": 4}, parts={"policy_loss": loss_faults.micro_mean}
    )


@gradients_accumulate.fault("gradients are clipped to norm 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.clipped_to_zero(healthy)

"""LOS008: a batch at the edge gives finite gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage

if TYPE_CHECKING:
    from rlhf_doctor.trace.edges import Edges

FIXES = {
    "equal scores": "Equal scores have a deviation of 0: add a small number before dividing by it.",
    "far ratios": "Compute the ratio as exp(new - old) in float32, never from probabilities or in half precision.",
    "no advantage": "Advantages that are all alike have a deviation of 0: add a small number before dividing by it.",
}


@check(
    "LOS008",
    "a batch at the edge gives finite gradients",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("PRE004",),
)
def edge_batch_not_finite(edge_batches: Edges) -> Iterator[Finding]:
    """
    What it examines:
        The step on three batches that happen: all scores equal; one token in each response that became e^30 times as
        likely, or that has no probability in float32 and has kept it; and, where advantages are whitened, values and
        rewards that make all of them 0. Every gradient at the heads has to be finite, and the step must not raise
        because one is not.

    Why it matters:
        Equal scores come as soon as the policy solves, or fails, every prompt of a group. One division by their
        deviation, and every weight is NaN; the checkpoint after that is worthless.

    What it looks like when broken:
        A run that is sound for days and then has NaN as its loss, its KL and its texts.

    How to fix:
        1. Divide by the deviation plus 1e-4 to 1e-8.
        2. Take exp of a difference of log-probabilities in float32; a quotient of probabilities is 0 / 0 for rare
           tokens, and float16 ends at 65504, which is e^11.

    Source:
        The small number in https://arxiv.org/abs/2403.17031 (whitening) and
        https://github.com/huggingface/trl/blob/main/trl/trainer/grpo_trainer.py (1e-4 beside a group's deviation).
        e^30 and its square are finite in float32 and in bfloat16.
    """
    if not edge_batches.batches:
        raise Unavailable("needs " + "; needs ".join(edge_batches.reasons or ("a batch that could be changed",)))
    for batch in edge_batches.batches:
        if batch.broken:
            bad = batch.finite.inside + batch.finite.outside
            yield Finding(
                f"A batch with {batch.pushed} gives gradients that are NaN or infinite. {FIXES[batch.name]}",
                role="loop",
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(
                        "rows of the heads whose gradient is not finite",
                        expected="0",
                        observed=f"{bad} of {batch.finite.rows}"
                        + (f"; the step raised {batch.error}" if batch.error else ""),
                        where=f"the step run again with {batch.pushed}",
                    ),
                ),
            )


@edge_batch_not_finite.fault("scores are divided by their deviation")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(
        healthy, settings={"missing_eos_penalty": 0.0}, parts={"score": loss_faults.spread_of_scores}
    )


@edge_batch_not_finite.fault("the ratio is computed in half precision")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.half_precision_ratio})


@edge_batch_not_finite.fault("advantages are whitened without a small number beside their deviation")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.without_spread(healthy)

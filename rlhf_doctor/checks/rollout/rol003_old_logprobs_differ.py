"""ROL003: the ratio is 1 before the first update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing
from rlhf_doctor.instruments.tracing import Traced

NOISE = 0.02, 0.2  # nats, on average and at most: as far as an engine in half precision is from its trainer


@check(
    "ROL003",
    "the ratio is 1 before the first update",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL001", "ROL004", "ROL008", "ROL010"),
    explains=("LOS002", "MET012"),
    effect=True,
)
def old_logprobs_differ(traced: Traced, drawing: Drawing, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The log-probability of each drawn token in the pass before the update and in the update's first pass, both at
        the same weights. They should be equal up to rounding. Where the passes agree and the loss still weighs tokens
        as if the old ones were taken at another temperature, that is shown too.

    Why it matters:
        The ratio is what PPO corrects for the policy's own changes. If it is not 1 at the start, it corrects for
        something that did not happen: some tokens are clipped away before anything was learned, others count double.

    What it looks like when broken:
        Clip fraction and approximate KL above 0 at the first minibatch, a mean ratio near 1 that hides single ratios of
        0.5 and 2.

    How to fix:
        1. Take both passes with the same ids, attention mask and position ids.
        2. Put the policy in eval mode for both, or set every dropout to 0.
        3. Divide by the same temperature in both, and take both with the adapter on.
        4. If an engine gives the old ones, recompute them with the trainer, or correct for the difference.

    Source:
        https://github.com/huggingface/trl/issues/469 (positions), https://github.com/huggingface/trl/issues/4159
        (temperature), https://github.com/huggingface/trl/pull/1540 (dropout),
        https://github.com/huggingface/trl/issues/2358 (an engine's own).
        Two passes over one text differ by 1e-5 nats in float32 and by some hundredths in bfloat16
        (https://github.com/verl-project/verl/issues/6280); the limits are 2e-3 and 0.25. Between an engine in half
        precision and its trainer 0.01 a token is usual, and a warning
        (https://richardli.xyz/post/rl-collapse-training-inference).
    """
    from rlhf_doctor.trace import passes

    gap = passes.old_and_new(drawing)
    if gap is not None and gap.share > passes.SHARE:
        usual = gap.mean < NOISE[0] and gap.largest < NOISE[1] and gap.half
        yield Finding(
            f"Before any update, {gap.share:.0%} of the tokens have another log-probability in the update's pass than "
            f"in the pass before it, by up to {gap.largest:.2g} nats, so the ratio is not 1. "
            + (f"{gap.because} " if gap.because else "")
            + "Both passes must be the same: ids, attention mask, positions, dropout, adapter, precision.",
            role="loop",
            severity=Severity.WARNING if usual else None,
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "new less old log-probability before the first update, in nats",
                    "0",
                    f"{gap.mean:.3g} on average, at most {gap.largest:.3g}",
                    f"{drawing.rounding:g}",
                    f"{gap.tokens} response tokens of {gap.samples} samples",
                ),
            ),
        )
        return
    other = passes.other_texts(drawing) or passes.adapter_off(traced, drawing, setup) or passes.weighed(traced)
    if other is not None:
        yield Finding(
            other.message,
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(Evidence(other.quantity, other.expected, other.observed, other.tolerance, other.where),),
        )
    elif gap is None:
        raise Unavailable("needs log-probabilities from before the update: no pass over whole texts was seen then")


@old_logprobs_differ.fault("the update's pass sees one token less than the rollout's")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"logprobs": rollout_faults.blind_training})


@old_logprobs_differ.fault("the old log-probabilities attend to the padding")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"logprobs": rollout_faults.attending_to_pads_before})

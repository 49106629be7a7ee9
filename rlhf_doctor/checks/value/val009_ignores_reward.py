"""VAL009: the critic's training follows the reward model's scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "VAL009",
    "the critic's training follows the reward model's scores",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("VAL008", "VAL013"),
    explains=(
        "ADV008",
        "VAL010",
        "VAL011",
        "ADV001",
        "ADV002",
        "ADV006",
        "ADV007",
        "ADV009",
        "LOS004",
        "SYS008",
        "MET012",
    ),
    across_roles=True,
)
def value_ignores_reward(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again from the same state, generators included, with every score of the reward model changed
        as it leaves the model, each by another amount. The gradient that comes back to the critic's head must change on
        the samples whose scores did. That it is the same to the last bit at every response token, while it does answer
        to the critic's own values, is the counter-example.

    Why it matters:
        The value function is the expected return under the reward that the policy is trained on. A critic that learns
        the KL penalty, its own old values, a length or a constant is a baseline of something else: the policy's
        advantages keep the whole variance of the score, and with lambda below 1 they are biased as well.

    What it looks like when broken:
        Often nothing: the value loss falls, smoothly, since what the critic learns is easy. Explained variance against
        the returns with scores stays at or below 0.

    How to fix:
        1. Compute the returns from the rewards that hold the score: advantages + values, after the score was added at
           the last response token.
        2. Look for a tensor that is made anew, overwritten or masked between the scores and the returns, and for the
           score at a slot that the mask leaves out.
        3. Where the run is to have no reward, declare no reward model.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438 (the value function is fitted to the returns);
        https://github.com/huggingface/trl/issues/3750 (a score at a slot that may be masked). No tolerance: the same
        run twice agrees to the bit, and is checked to do so first.
    """
    import numpy as np

    from rlhf_doctor.trace.critic import raw_response

    traced.needs("all scores", "update values")
    base, changed = traced.base, traced.experiments.done["all scores"]
    answers = np.abs(raw_response(traced.experiments, "update values")) > 0
    moved = np.where(changed.touched[:, None] & answers, raw_response(traced.experiments, "all scores"), np.nan)
    seen = np.isfinite(moved)
    if not seen.any():
        raise Unavailable("needs a critic whose gradient answers to its values on responses whose scores are seen")
    rows = seen.any(1)
    shifts = (changed.table.scores - base.scores)[rows]
    if not (np.abs(shifts[np.isfinite(shifts)]) > 0).any():
        raise Unavailable("needs scores that can be changed: those of this step could not be")
    if (np.abs(moved[seen]) > 0).any() or _elsewhere(traced):
        return
    policy = changed.moved(base, "weight")
    reaches = bool((np.abs(policy[np.isfinite(policy)]) > 0).any())
    yield Finding(
        f"The critic's training ignores the reward: with all {int(rows.sum())} scores changed, the critic's gradient "
        "is identical to the last bit. It should be trained towards returns that hold the score; here they are made of "
        f"something else{'' if reaches else ', and the policy does not see the scores either'}. Build the critic's "
        "targets from the rewards with the score in them.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "largest change of the critic's gradient when every score changes",
                "above 0",
                f"0 at all of {int(seen.sum())} response tokens",
                "0, compared bit for bit",
                "the critic's head, first pass over each sample",
                f"change every score by {np.nanmin(np.abs(shifts)):.3g} to {np.nanmax(np.abs(shifts)):.3g}",
            ),
            Evidence(
                "the policy's gradient in the same run", "changes", "changes" if reaches else "does not change either"
            ),
        ),
    )


def _elsewhere(traced: Traced) -> bool:
    """Whether the score moves the critic's gradient at states that are no response token's."""
    import numpy as np

    before, after = traced.base.outside, traced.experiments.done["all scores"].table.outside
    names = ("value_prompt", "value_after")
    return any(n in before and n in after and not np.array_equal(before[n], after[n]) for n in names)


@value_ignores_reward.fault("the critic learns the KL penalty alone")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts=value_faults.returns_of_the_penalty())


@value_ignores_reward.fault("the critic's target is its own old value")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"value_loss": value_faults.loss_towards_old_values})


@value_ignores_reward.fault("the reward model is called and its scores are dropped")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"score": value_faults.scores_dropped})

"""ADV009: what is done to the scores leaves their differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.arrival import Reach

HALF = 0.5
FEW = 2
NEAR = 0.02  # of a gain of 1
FAINT = 0.01  # of the largest weight: what a score leaves that a clip lets through by a hair


@check(
    "ADV009",
    "clipping and scaling leave the differences between scores",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("ADV002",),
    explains=("ADV008", "VAL009", "REW014", "SYS008", "ADV010", "ADV004"),
    across_roles=True,
)
def reward_clip_or_scale_destroys(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Every score is moved a little towards the middle and the step run again. The returns should answer in most
        samples. Where none or fewer than half answer, although something else than the KL stands where the score
        belongs, the scores have been cut, rounded or normalised until they are alike.

    Why it matters:
        The policy learns from differences between responses. A clip inside the range of the scores, a softmax or a
        normalisation over an axis of length 1 leaves a constant, which whitening or the critic then takes away.

    What it looks like when broken:
        The raw scores vary and the shaped rewards do not; the value loss falls to 0 quickly; the policy does not learn.

    How to fix:
        1. Clip far outside what the reward model gives: at 5 standard deviations or more, or at ±10 after
           normalisation.
        2. Normalise over the batch (or the prompt's group), and check the axis: for scores of shape (B, 1) it is 0.
        3. Keep scores as floats: no rounding, no integer division.

    Source:
        https://github.com/huggingface/trl/issues/3991 (scaling over another axis than asked for),
        https://github.com/vwxyzjn/summarize_from_feedback_details/pull/17 (whitened rewards are harmful), and Huang et
        al. 2024, https://arxiv.org/abs/2403.17031. A sample counts as cut when its return moves by less than 0.01 of
        what its score does; float32 leaves 0.0001. A few cut outliers are what a clip is for: half is none, nor
        are two whose scores are below half of the declared clip. A constant in place of the score of every response
        that never ended is none either, as in that repository.
    """
    from rlhf_doctor.trace import arrival, gains

    found = arrival.reach(traced, setup.declared)
    known, dead = int(found.known.sum()), int((found.dead & found.known).sum())
    if gains.critic_free(traced):
        lost = found.none and found.arrives
    else:
        if not known:
            raise Unavailable("needs a critic whose target shows, and scores that could be changed")
        lost = known > 1 and dead > HALF * known and found.arrives and (dead < known or found.moved < FAINT)
        lost &= dead == known or not _cut_off_alone(traced, found)
    within = _within_the_clip(traced, found, number(setup.declared.get("reward_clip")))
    if not lost and within < FEW:
        return
    scores = traced.base.scores
    rewards = found.rewards[found.known & found.dead]
    evidence = [
        Evidence(
            "samples whose training does not change with their score",
            f"at most {HALF:.0%}",
            f"{dead} of {known}" if known else "all",
            where="last tokens of the responses",
        )
    ]
    if len(rewards):
        evidence.append(
            Evidence(
                "different scores of these samples, and what arrives of them",
                f"{len({round(float(s), 6) for s in scores[found.known & found.dead]})} different rewards",
                ", ".join(f"{r:.3g}" for r in sorted({round(float(r), 4) for r in rewards})[:6]),
                "0.01 of a score's change",
            )
        )
    who = "most samples'" if lost else f"{within} samples', all of whose scores lie within the declared clip,"
    yield Finding(
        f"What is done to the scores between the reward model and the rewards removes their differences: {who} "
        "returns do not change with their score. Widen the clip, or normalise over the batch and not over each row.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=tuple(evidence),
    )


def _cut_off_alone(traced: Traced, found: Reach) -> bool:
    """Whether exactly the responses without an end do not answer: a constant in place of their scores is a rule."""
    return all(
        s.ended != dead for s, dead, known in zip(traced.base.samples, found.dead, found.known, strict=True) if known
    )


def _within_the_clip(traced: Traced, found: Reach, clip: float | None) -> int:
    """Finished samples that do not answer to a score which the declared clip would leave, where others count whole."""
    from rlhf_doctor.trace import gains

    if not clip or gains.critic_free(traced) or not found.arrives:
        return 0
    whole = [row for row in gains.score_gains(traced, "target") if abs(row.gain[-1] - 1) < NEAR]
    inside = [s.ended and abs(x) < HALF * clip for s, x in zip(traced.base.samples, traced.base.scores, strict=True)]
    return int((found.dead & found.known & inside).sum()) if len(whole) >= FEW else 0


@reward_clip_or_scale_destroys.fault("scores clipped to a hundredth")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.clipped_to_a_hundredth})


@reward_clip_or_scale_destroys.fault("a softmax over each row's one score")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.softmax_of_one})

"""LOS002: the clip cuts where the policy has gone too far, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.loss.clips import NORMAL, SAID, range_said
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.disturbed import Disturbed

CLIPPED = ("ppo",)


@check(
    "LOS002",
    "the clip cuts where the policy has gone too far, and only there",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("LOS001",),
)
def clip_inert(traced: Traced, setup: Any, disturbed: Disturbed | None = None) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the log-probabilities of the drawn tokens moved in the update alone, up and down, by
        up to 1 nat. Beyond the clip range a token with positive advantage should lose its weight upwards, one with
        negative advantage downwards; every other weight should follow the ratio. Likewise the critic's values are moved
        past their clip. Before that, at ratio 1, tokens of both signs should have a weight.

    Why it matters:
        The clip is what keeps several updates on one rollout from running away. Where the ratio is 1 by construction,
        the range is out of reach, or minimum and maximum are exchanged, nothing does, and no curve says so.

    What it looks like when broken:
        A clip fraction of exactly 0 with several updates a rollout; or one that is high while the KL grows; a range
        that can be set to anything.

    How to fix:
        1. Compute the old log-probabilities once per rollout, before the first update, and keep them.
        2. Give the range as a fraction, 0.2, and bounds as 1 - 0.2 and 1 + 0.2, the lower one first.
        3. Take the minimum of the surrogates, or the maximum of their negatives.
        4. Clip values around those of the rollout, and take the larger of the two squares.

    Source:
        https://arxiv.org/abs/1707.06347, eq. 7, https://github.com/allenai/open-instruct/pull/755 (old
        log-probabilities recomputed), https://github.com/tensorflow/agents/issues/352 (value clip). One update a step:
        https://github.com/BytedTsinghua-SIA/DAPO/issues/23. Tolerance: a weight counts as gone below a quarter of what
        the ratio gives it; penalties and bonuses in the loss stay below that.
    """
    from rlhf_doctor.trace.ratio import clip_of
    from rlhf_doctor.trace.schedule import updates
    from rlhf_doctor.trace.weighting import one_sign_missing

    declared = setup.declared.get("clip_range")
    declared = float(declared) if isinstance(declared, (int, float)) and declared > 0 else None
    if declared is None and setup.declared.get("algorithm", "ppo") not in CLIPPED:
        raise Unavailable("needs a declared clip_range: this algorithm has no clip of its own")
    yield from _of_values(setup, disturbed)
    missing = one_sign_missing(traced)
    if missing is not None:
        gone, tokens, positive = missing
        yield _finding(
            f"At ratio 1 the tokens with {'positive' if positive else 'negative'} advantage have no weight: the two "
            "terms of the surrogate differ there. They should be equal: clip the ratio to 1 - range and 1 + range.",
            ("tokens of one sign without weight at ratio 1", "0", f"{gone} of {tokens}"),
        )
        return
    traced.needs("update logits")
    clip = clip_of(traced.experiments, declared)
    if clip is None or not clip.kind:
        raise Unavailable("needs weights of the policy that follow the ratio or its clip, and they follow neither")
    few = updates(traced.base) <= 1
    if clip.kind != "acts":
        yield _finding(
            (NORMAL + " " if few and clip.kind != "exchanged" else "") + SAID[clip.kind],
            (
                "tokens beyond the clip range whose weight is what this clip makes of it",
                "cut where the advantage asks for it, else following the ratio",
                f"{clip.agreeing:.0%} of {clip.tokens} tokens are not",
            ),
            severity=Severity.INFO if few and clip.kind != "exchanged" else None,
        )
        return
    other = range_said(clip, declared) if declared is not None else None
    if other is not None:
        yield _finding(*other)
    if few:
        yield _finding(
            f"{NORMAL} A clip fraction of 0 and a ratio of 1 in every log line are no fault then; leave the clip as it "
            "is.",
            ("updates of a rollout", "more than 1 for a clip to act", "1"),
            severity=Severity.INFO,
        )


def _of_values(setup: Any, disturbed: Disturbed | None) -> Iterator[Finding]:
    """The value clip, where one is declared."""
    if disturbed is None or not isinstance(setup.declared.get("clip_range_value"), (int, float)):
        return
    if disturbed.clip is not None and disturbed.clip.kind == "none" and setup.declared["clip_range_value"] > 0:
        yield _finding(
            "The value clip never acts: the critic is pulled to its return with full weight however far it has moved "
            "from its rollout value. Clip around the values of the rollout, and take the larger of the two squares.",
            (
                "values moved towards their return, beyond the clip range, whose gradient is gone",
                "all",
                f"none of {disturbed.clip.toward}",
            ),
            role="value",
        )


def _finding(
    message: str, shown: tuple[str, str, str], *, severity: Severity | None = None, role: Any = "loop"
) -> Finding:
    quantity, expected, observed = shown
    return Finding(
        message,
        role=role,
        severity=severity,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(quantity, expected=expected, observed=observed, where="a step run again with the update moved"),
        ),
    )


@clip_inert.fault("old log-probabilities are computed anew for each minibatch")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.old_anew})


@clip_inert.fault("the range is given in percent")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.unclipped})


@clip_inert.fault("minimum and maximum are exchanged")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.larger_of_the_two})


@clip_inert.fault("lower and upper bound are exchanged")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.bounds_exchanged})


@clip_inert.fault("values are not clipped although it is declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.plain_value_loss})

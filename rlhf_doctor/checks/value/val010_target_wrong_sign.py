"""VAL010: a higher score raises the critic's target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "VAL010",
    "a higher score raises the critic's target",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("VAL008", "VAL009", "VAL013"),
    explains=("ADV008", "LOS001", "VAL011", "ADV001", "LOS004", "SYS008", "MET012"),
    across_roles=True,
)
def value_target_wrong_sign(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again from the same state with one sample's score changed. The target that the critic is trained
        towards, V − gradient / curvature, must move the same way at that sample's tokens. Where all samples' targets
        turn with the score and the policy's advantages turn too, the score itself is turned, which is told elsewhere.

    Why it matters:
        A critic that expects little where the score is high makes the advantage of every good response too large and of
        every bad one too small, or, with bootstrapping, the reverse. It learns to be wrong with confidence.

    What it looks like when broken:
        Explained variance that falls below 0 and goes on falling while the value loss looks well.

    How to fix:
        1. The returns are advantages + values, with the values of the rollout; not values − advantages.
        2. Negate losses, never rewards or returns.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16 and 28; the sum advantages + values:
        https://github.com/huggingface/trl/blob/v0.11.4/trl/trainer/ppo_trainer.py. A target that follows a raised score
        moves by γλ^k of it; to be called turned it must move by a hundredth of it the other way, far above rounding.
    """
    import numpy as np

    from rlhf_doctor.trace.critic import steady
    from rlhf_doctor.trace.recover import return_response

    traced.needs("one score", "update values")
    one = traced.experiments.done["one score"]
    mine = steady(traced.experiments) & one.touched[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = return_response(traced.recovered, traced.experiments, one) / one.amounts[:, None]
        policy = one.moved(traced.base, "weight") / one.amounts[:, None]
    gains = np.where(mine, gains, np.nan)
    if not np.isfinite(gains).any():
        raise Unavailable("needs a critic that is trained on the sample whose score was changed")
    at = np.unravel_index(np.nanargmax(np.abs(gains)), gains.shape)
    strongest, seen = float(gains[at]), gains[np.isfinite(gains)]
    if strongest > -1e-2 or (seen < 0).mean() < 0.5 or policy[at] < 0:
        return
    yield Finding(
        f"The critic's target falls when the score rises: by {-strongest:.3g} for each unit of score. It should rise "
        "by up to 1. Make the returns of advantages + values, and negate nothing on the way.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "change of the critic's target for each unit of one sample's score",
                "0 to 1 (γλ to the power of the tokens that follow)",
                f"{strongest:.4g}",
                "0.01",
                f"{len(seen)} response tokens of that sample",
                f"change its score by {one.amounts[one.touched][0]:.3g}",
            ),
        ),
    )


@value_target_wrong_sign.fault("the returns are values less advantages")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"value_loss": value_faults.loss_towards_mirrored_returns})


@value_target_wrong_sign.fault("the returns are negated")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"value_loss": value_faults.loss_towards_negated_returns})

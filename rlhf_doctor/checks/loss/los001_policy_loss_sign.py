"""LOS001: a positive advantage raises the token's log-probability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "LOS001",
    "a positive advantage raises the token's log-probability",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("ADV008", "LOS006", "SYS008"),
    across_roles=True,
)
def policy_loss_sign(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        The weight of every response token in the policy's loss, read off the gradient at its logits, against the
        advantage that the critic's targets and values give (without a critic: the score against the others of its
        prompt). The line through them has to rise.

    Why it matters:
        Turned, each update makes what scored well less likely. The loss still falls, and ratio, clip fraction and
        entropy look as they do in a sound run.

    What it looks like when broken:
        A reward that falls from the first step on while the policy loss goes down.

    How to fix:
        1. Minimise -min(ratio · A, clip(ratio) · A), or max(-ratio · A, -clip(ratio) · A).
        2. Put the minus in one place: either into both terms or in front of the whole.

    Source:
        https://arxiv.org/abs/1707.06347, eq. 7, which is maximised. Tolerance: the weights have to lie on a falling
        line up to a tenth of their range; a sound float32 loop is within 1e-5 of a rising one, and penalties in the
        loss move it by hundredths.
    """
    from rlhf_doctor.trace.weighting import slope_sign

    read = slope_sign(traced)
    if read is None:
        if not traced.base.has("weight"):
            raise Unavailable("needs a gradient at the policy's logits, and none was seen")
        raise Unavailable("needs weights of the policy's tokens that follow the advantages on a line")
    sign, misfit, tokens = read
    if sign > 0:
        return
    yield Finding(
        "The policy's loss has the wrong sign: the more advantage a token has, the more its log-probability is pushed "
        "down. It should be pushed up: maximise the surrogate, which is to minimise its negative.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "slope of the tokens' weights against their advantages",
                expected="above 0",
                observed="below 0",
                tolerance=f"{tokens} tokens on the line up to {misfit:.1e} of the weights' range",
                where="the gradient at the policy's logits, at the drawn tokens",
            ),
        ),
    )


@policy_loss_sign.fault("the surrogate is minimised as it is")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.turned})


@policy_loss_sign.fault("the minus is written twice")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.advantage_turned})

"""LOS006: an entropy bonus raises entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

MOST = 0.8  # of the tokens that agree


@check(
    "LOS006",
    "an entropy bonus raises entropy",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
)
def entropy_sign(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The part of the gradient at the policy's logits that a log-probability cannot explain and an entropy can:
        e · π (log π + H), with one e for each token. e has to be above 0.

    Why it matters:
        With the sign turned, the bonus rewards certainty: the policy collapses onto a few texts, the sooner the larger
        the coefficient, and raising the coefficient against the collapse makes it worse.

    What it looks like when broken:
        Entropy that falls from the first step on, and the faster for a larger ent_coef.

    How to fix:
        1. Subtract ent_coef times the mean entropy from what is minimised, with ent_coef at or above 0.

    Source:
        https://arxiv.org/abs/1707.06347, eq. 9, where the entropy is added to what is maximised. Counted are tokens
        whose gradient the two terms explain; four in five have to agree, which rounding does not bring about.
    """
    if not traced.base.has("weight"):
        raise Unavailable("needs a gradient at the policy's logits, and none was seen")
    weights = traced.base["entropy_weight"]
    seen = weights[(weights == weights) & (weights != 0) & traced.base.real]
    trained = traced.base["weight"]
    count = int(((trained == trained) & traced.base.real).sum())
    if len(seen) < max(4, 0.25 * count) or (seen < 0).mean() < MOST:
        return
    yield Finding(
        "The entropy term lowers entropy: it is added to the loss, or its coefficient is negative. It should be "
        "subtracted from what is minimised.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "tokens whose entropy the loss raises",
                expected="all that have an entropy term",
                observed=f"{int((seen > 0).sum())} of {len(seen)}",
                where="the gradient at the policy's logits",
            ),
        ),
    )


@entropy_sign.fault("the entropy is added to the loss")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts=loss_faults.with_entropy(-0.05), declared={"ent_coef": 0.05})


@entropy_sign.fault("a negative coefficient is configured")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts=loss_faults.with_entropy(-0.01), declared={"ent_coef": -0.01})

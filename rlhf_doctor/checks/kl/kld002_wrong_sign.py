"""KLD002: divergence from the reference is penalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.kl.terms import places, where_of
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number

if TYPE_CHECKING:
    from rlhf_doctor.trace.divergence import Divergence


@check(
    "KLD002", "divergence from the reference is penalised", stage=Stage.TRACE, severity=Severity.ERROR,
    after=("REF005", "REF006", "VAL010"), explains=("KLD003", "KLD004", "SYS008"), across_roles=True,
)  # fmt: skip
def kl_wrong_sign(kl_terms: Divergence, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the reference's logits moved at the tokens of some responses, up and down. A token
        that becomes likelier under the reference must bring more reward, or be pulled up by the loss; one that becomes
        less likely must lose. How the rewards (read off the critic's gradient) and the policy's weights (read off the
        gradient at its head) moved gives the sign of the penalty.

    Why it matters:
        With the sign turned the policy is paid for leaving its reference: the further, the more, without bound.

    What it looks like when broken:
        KL grows faster than in any other run while the reward looks well; text soon decays. A log of the KL alone looks
        the same as with too small a coefficient.

    How to fix:
        1. In the reward: r = score − kl_coef · (log π − log π_ref); in the loss: loss + kl_coef · KL.
        2. Look for a minus that is applied twice, or for log π_ref − log π under the name of KL.
        3. Check that the coefficient that reaches the step is positive.

    Source:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2; a negative coefficient that was published:
        https://github.com/rllm-org/rllm/issues/111. The sign is taken only where one estimator (k1, k2, k3, |k1| or the
        full sum) explains all that moved within 1% of its range; float32 leaves some 0.01%.
    """
    declared = number(setup.declared.get("kl_coef"))
    if declared is not None and declared < 0:
        raise Unavailable("the declared kl_coef is negative itself")
    for place, fit, tokens in places(kl_terms):
        if fit.coefficient > 0:
            continue
        yield Finding(
            f"Divergence from the reference is rewarded: in the {place}, {fit.estimator} counts with "
            f"{fit.coefficient:.3g}. It should be a penalty: turn the sign of the KL term.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    f"coefficient of the KL in the {place}",
                    expected="above 0" if declared is None else f"{declared:g}",
                    observed=f"{fit.coefficient:.4g}",
                    tolerance="its sign",
                    where=where_of(tokens),
                    reproduce="raise log π_ref of one token by hand and look at its reward and gradient",
                ),
            ),
        )


@kl_wrong_sign.fault("the penalty is added to the reward")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"rewards": kl_faults.rewards_with(sign=-1.0)})


@kl_wrong_sign.fault("the log-ratio is taken the other way round")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, parts={"kl": lambda logp, ref_logp: ref_logp - logp})


@kl_wrong_sign.fault("a k3 that pays")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    k3 = kl_faults.estimator("k3")
    parts = {"kl": lambda logp, ref_logp: -k3(logp, ref_logp)}
    return loops.reference_step(healthy, parts=parts, declared={"kl_estimator": "k3"})

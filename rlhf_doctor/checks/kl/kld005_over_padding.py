"""KLD005: only response tokens add to the KL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage

if TYPE_CHECKING:
    from rlhf_doctor.trace.penalty import Leak

LEAST = 1e-4  # of a reward, where the reference was moved by about a nat in every masked slot


@check(
    "KLD005", "only response tokens add to the KL", stage=Stage.TRACE, severity=Severity.ERROR,
    after=("REF005", "ROL005"), explains=("ADV003", "LOS005"), across_roles=True,
)  # fmt: skip
def kl_over_padding(kl_leak: Leak) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the reference's logits moved in the slots of some responses that hold no token of
        them: the prompt, and what comes after the end of sequence. Neither the rewards of their tokens, read off the
        critic's gradient, nor the policy's gradient in those slots may move. And without any change, the reward at the
        last token must not grow with the number of slots behind it, nor may a gradient come up in masked slots once the
        policy has left its reference.

    Why it matters:
        What a model says of pads is noise. A KL there becomes a penalty of the tokens before it, through the sum of
        rewards to come, that grows with the padding; in the loss it trains the policy on pads.

    What it looks like when broken:
        Returns that depend on the longest response of the batch; a KL that rises as responses get shorter; policies
        that learn to fill the limit.

    How to fix:
        1. Set the KL to 0 outside of the response's mask before it goes into the rewards.
        2. In the loss, sum over the mask and divide by its size.
        3. Fill masked log-probabilities of policy and reference with the same number.

    Source:
        KL of tokens that the policy did not write in the returns: https://github.com/THUDM/slime/issues/1370.
        Tolerance: 1e-4 of a reward for a move of about a nat, 2% of a usual coefficient; untouched responses say what
        rounding and normalisation over the batch do.
    """
    found = kl_leak
    evidence = []
    if found.rewards > LEAST:
        what, where = "change of a critic's target", f"{found.rewards_tokens} tokens of {found.samples} responses"
        evidence.append(Evidence(what, "0", f"{found.rewards:.3g}", f"{LEAST:g}", where))
    if found.steady is not None:
        where = f"{found.steady_samples} responses that ended"
        evidence.append(
            Evidence("reward of each slot after a response", "0", f"{found.steady:.3g}", f"{LEAST:g}", where)
        )
    into = "rewards" if evidence else "loss"
    if found.gradient > max(1e-6, 1e-3 * found.gradient_before):
        size = f"{found.gradient_before + found.gradient:.3g}"
        before = f"{found.gradient_before:.3g}"
        evidence.append(Evidence(f"policy gradient {found.where}", before, size, "0.1%", f"{found.samples} responses"))
    if found.later > 0:
        what = "policy gradient in masked slots in the second step"
        evidence.append(
            Evidence(what, "0, as in the first", f"{found.later:.3g}", "none", "the step after the first updates")
        )
    if evidence:
        yield Finding(
            f"Slots that hold no response token add to the KL in the {into}. Only tokens of the response should: set "
            "the KL to 0 outside of its mask.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=tuple(evidence),
        )
    elif not found.slots:
        raise Unavailable("needs a response that is shorter than others of its batch")


@kl_over_padding.fault("a KL loss summed over all slots")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults

    return kl_faults.with_kl_in_the_loss(healthy, "k2", over_pads=True)


@kl_over_padding.fault("the KL of pads stays in the rewards")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    leaky = kl_faults.LeakyRewards()
    return loops.reference_step(healthy, parts={"kl": leaky.kl, "rewards": leaky.rewards, "gae": leaky.gae})


@kl_over_padding.fault("masked log-probabilities are filled with different numbers")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    leaky = kl_faults.LeakyRewards(filled=1.0)
    return loops.reference_step(healthy, parts={"kl": leaky.kl, "rewards": leaky.rewards, "gae": leaky.gae})


@kl_over_padding.fault("without a critic, the KL of pads stays in the returns")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(masked=False))

"""REF005: the reference holds the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.kl.terms import declared_place, where_of
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.divergence import Divergence

PULLS = 0.2  # of the coefficient


@check(
    "REF005",
    "the reference holds the policy",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("REF001",),
    explains=("KLD003", "KLD004", "LOS008", "SYS008"),
    across_roles=True,
)
def reference_unused(traced: Traced, kl_terms: Divergence, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        With a positive kl_coef the step is run again with the reference's logits moved at the tokens of some responses.
        The rewards, read off the critic's gradient, or the policy's gradient must move. That neither does, to the bit,
        or that the step never calls the reference at all, is the counter-example. What the loss then pulls to is looked
        at as well: the old policy, or zeros that were filled in.

    Why it matters:
        The penalty is all that keeps the policy near text that the reward model can judge. A KL of the policy with
        itself, with its own old log-probabilities, or one that is multiplied by 0 is a fourth model paid for nothing.

    What it looks like when broken:
        KL is 0 in every step, or as small as the ratio's drift; or the KL grows and the coefficient changes nothing.

    How to fix:
        1. Compute the second log-probabilities with the reference, under no_grad, on the same ids and mask.
        2. With an adapter, switch it off for that pass, and on again after it.
        3. Look for a tensor that is overwritten, cloned from the policy's or masked between that pass and the reward.

    Source:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, eq. 2; log-probabilities of the reference left out:
        https://github.com/areal-project/AReaL/pull/780; a KL that acts nowhere:
        https://github.com/verl-project/verl/issues/750. No tolerance: the same run twice agrees to the bit first.
    """
    coefficient, place = number(setup.declared.get("kl_coef")), declared_place(setup)
    if coefficient is None or coefficient <= 0:
        raise Unavailable("needs kl_coef to be declared and above 0")
    if setup.reference is None:
        raise Unavailable("needs a reference model")
    called = sum(c.role == "reference" for c in traced.experiments.first.calls)
    trained = any(c.role == "policy" and c.backwards for c in traced.experiments.first.calls)
    if not called and trained:
        yield _finding(
            "The step never calls the reference, although a KL coefficient is declared. It should score every response "
            "with it: compute the second log-probabilities with the reference.",
            Evidence("calls of the reference in a step", "1 or more", "0", where="the step"),
        )
        return
    seen = [p for p in (kl_terms.reward, kl_terms.loss) if p is not None]
    if not seen:
        raise Unavailable(next(iter(kl_terms.reasons.values()), "the reference was not seen on the samples"))
    if any(p.there for p in seen) or kl_terms.loss is None:
        return
    if place == "reward" and kl_terms.reward is None:
        if not kl_terms.loss.identical:
            return  # what reaches the rewards reaches the policy
        moves = [kl_terms.loss]
    else:
        moves = seen
    if kl_terms.to_zero:
        yield _finding(
            "The KL in the loss has 0 in place of the reference's log-probabilities: nothing moves with them, and the "
            "policy is pulled to a probability of 1. Hand what the reference gives to the loss, and never fill it in.",
            Evidence(
                "change of the policy's gradient with log π_ref", "other than 0", "0", "none",
                where_of(kl_terms.loss.tokens), "the gradient's rest is that of a KL to log-probabilities of 0",
            ),
        )  # fmt: skip
        return
    if place != "reward" and not _elsewhere(kl_terms, coefficient):
        if place == "loss":
            return  # a term without gradient: the estimator's fault, not the reference's
        if kl_terms.constant is not None and abs(kl_terms.constant - coefficient) < PULLS * coefficient:
            return
    yield _finding(
        "Nothing moves with the reference's log-probabilities: neither rewards nor the policy's gradient. "
        + (
            "The KL pulls the policy to something else, such as its own old log-probabilities: "
            if _elsewhere(kl_terms, coefficient)
            else "A KL coefficient is declared, so they should count: "
        )
        + "use the reference's log-probabilities in the KL.",
        Evidence(
            "change of rewards and gradient with log π_ref", "other than 0", "0", "none", where_of(moves[0].tokens),
            "add 1 to the reference's log-probabilities: nothing of the step changes",
        ),
    )  # fmt: skip


def _elsewhere(terms: Divergence, coefficient: float) -> bool:
    """Whether a KL pulls the policy back to another anchor than the reference."""
    return terms.pull is not None and abs(terms.pull - coefficient) < PULLS * coefficient


def _finding(message: str, evidence: Evidence) -> Finding:
    return Finding(message, role="reference", confidence=Confidence.PROVEN, evidence=(evidence,))


@reference_unused.fault("a KL of the policy with itself")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, parts={"kl": lambda logp, ref_logp: logp - logp.clone()})


@reference_unused.fault("the policy plays the reference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"logprobs": kl_faults.Impostor(healthy)})


@reference_unused.fault("a KL loss to the old policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults

    return kl_faults.with_kl_in_the_loss(healthy, "k2", anchor="old")

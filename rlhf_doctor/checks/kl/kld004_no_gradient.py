"""KLD004: the KL is the declared estimator, and in the loss it has a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.kl.terms import declared_estimator, declared_place, places, where_of
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number

if TYPE_CHECKING:
    from rlhf_doctor.trace.divergence import Divergence

NEAR = 0.1  # of the coefficient


@check(
    "KLD004", "the KL is the declared estimator, and in the loss it has a gradient", stage=Stage.TRACE,
    severity=Severity.ERROR, after=("REF005", "REF006", "KLD002", "VAL010"), explains=("KLD003", "SYS008"),
)  # fmt: skip
def kl_no_gradient(kl_terms: Divergence, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the reference's logits moved at the tokens of some responses, up and down. Which
        function of log π − log π_ref moved the rewards or the policy's gradient by just so much: k1, k2, k3, |k1| or
        the sum over the vocabulary. It must be the declared one. A KL that is a term of the loss must move the gradient
        at all: k1 there pulls every token down alike, and a detached one pulls none.

    Why it matters:
        A gradient is not a value. The gradient of k1 in the loss is that of log π, which is 0 in expectation whatever
        the reference says, so the coefficient does nothing; that of k2 is the KL's. In the rewards it is the other way
        round: k1 gives the KL's gradient, k3 a biased one.

    What it looks like when broken:
        The logged KL is right and grows as if there were no penalty; sweeping the coefficient changes nothing.

    How to fix:
        1. In the rewards use k1.
        2. In the loss use k2, k3 or the sum over the vocabulary, of the log-probabilities that are being trained.
        3. Declare the estimator that is meant.

    Source:
        Schulman 2020, http://joschu.net/blog/kl-approx.html (k1, k2, k3); k1 without a gradient and k3's bias:
        https://github.com/NVIDIA-NeMo/RL/pull/2506 and https://github.com/huggingface/trl/pull/6503. An estimator is
        named only where it explains all that moved within 1% of its range and no other comes near; float32 leaves
        0.01%.
    """
    estimator, place, coefficient = (
        declared_estimator(setup),
        declared_place(setup),
        number(setup.declared.get("kl_coef")),
    )
    found = places(kl_terms)
    if (
        not found
        and kl_terms.pull is not None
        and coefficient
        and abs(kl_terms.pull - coefficient) < NEAR * coefficient
    ):
        raise Unavailable("the KL in the loss pulls to something else than the reference")
    if not found and place == "loss" and coefficient and kl_terms.loss is not None:
        yield _without_gradient(kl_terms, coefficient, kl_terms.loss.tokens)
        return
    if not found:
        raise Unavailable("needs a KL that acts in the rewards or in the loss")
    for name, fit, tokens in found:
        biased = estimator is None and name == "reward" and fit.estimator == "k3"
        if (estimator is None and not biased) or fit.estimator == estimator or (place is not None and name != place):
            continue
        wanted = estimator or "k1"
        yield Finding(
            f"The KL in the {name} is {fit.estimator}. It should be {wanted}"
            + (", as declared: " if estimator else ", whose gradient through the rewards is the KL's: ")
            + f"compute {wanted} there{', or declare what is meant' if estimator else ''}.",
            role="loop",
            confidence=Confidence.PROVEN,
            severity=Severity.WARNING if biased else None,
            evidence=(
                Evidence(f"estimator in the {name}", wanted, fit.estimator, "1% of the range", where_of(tokens)),
            ),
        )  # fmt: skip


def _without_gradient(terms: Divergence, coefficient: float, tokens: int) -> Finding:
    constant = terms.constant is not None and abs(terms.constant - coefficient) < NEAR * abs(coefficient)
    return Finding(
        f"The KL in the loss {'is k1: it pulls every token down alike, wherever' if constant else 'has no gradient:'} "
        f"{'the reference is' if constant else 'nothing moves with the reference'}. It should pull the policy back to "
        "its reference: use k2, k3 or the sum over the vocabulary of the log-probabilities that are being trained.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "policy gradient's change with the reference", "above 0", "0, to the bit", "none", where_of(tokens),
                "move log π_ref by hand: the gradient of the loss stays",
            ),
            *(
                [Evidence("pull on every trained token", "0", f"{terms.constant:.3g}", where="beside its advantage")]
                if constant else []
            ),
        ),
    )  # fmt: skip


@kl_no_gradient.fault("k3 in the rewards")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"kl": kl_faults.estimator("k3")})


@kl_no_gradient.fault("the absolute value for k1")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, parts={"kl": lambda logp, ref_logp: (logp - ref_logp).abs()})


@kl_no_gradient.fault("k1 as a term of the loss")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults

    return kl_faults.with_kl_in_the_loss(healthy, "k1")


@kl_no_gradient.fault("a detached term of the loss")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults

    return kl_faults.with_kl_in_the_loss(healthy, "k2", detached=True)


@kl_no_gradient.fault("without a critic, another estimator in the rewards than the declared one")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(estimator="k3"))

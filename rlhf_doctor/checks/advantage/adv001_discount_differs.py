"""ADV001: the gamma and lambda that act are those declared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.algorithms import plain_name
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.apart import OtherRates


@check(
    "ADV001",
    "the discount and the lambda that act are those declared",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ADV002", "ADV005", "ADV006", "ADV007"),
    explains=("ADV008", "VAL011", "ADV006", "SYS008"),
    across_roles=True,
)
def discount_differs(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        One score is changed and the step run again: the advantages of the tokens before the last one move by γλ a
        token. One rollout value V(s_u) is changed: the advantage at u moves by -1 and the one before it by γ(1-λ). So
        γλ, γ and λ are measured from the policy's gradient and compared with what is declared. Where the policy is not
        trained with return - value, the rewards are read off the critic's targets, and the sums of them with a γ and λ
        of 0, of 1, or as declared are tried. Without a critic the score's own effect shows gamma.

    Why it matters:
        They set how far back a response's score is credited. Text is a finite episode with one score at its end: a
        lambda of 0 credits the last token alone until the critic has learnt, and a discount left at 0.99 takes 40% of
        the score off the first of 50 tokens.

    What it looks like when broken:
        Slow or no learning of how responses begin; results that another library does not repeat with the same
        settings; returns that shrink with the length of the response.

    How to fix:
        1. Hand gamma and lam to the function that computes the advantages, by name: exchanged positions go unnoticed.
        2. Use δ_t = r_t + γ V(s_t+1) - V(s_t) and A_t = δ_t + γλ A_t+1, the running sum being the advantage and not
           the return.
        3. Declare what is meant, if the measured values are.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438 (equation 16); advantages from the immediate reward:
        https://github.com/natolambert/rlhf-book/pull/216; a recursion that a mask resets:
        https://github.com/verl-project/verl/issues/7278. Tolerance 0.004: float32 leaves 0.0001, and 0.99 is told
        from 1. Where the readings scatter more, or need a lambda above 1, nothing is said here.
    """
    from rlhf_doctor.trace import gains
    from rlhf_doctor.trace.apart import rates_apart

    gamma, lam = number(setup.declared.get("gamma")), number(setup.declared.get("lam"))
    if gamma is None and lam is None:
        raise Unavailable("needs gamma and lam to be declared")
    if gains.critic_free(traced):
        yield from _without_a_critic(traced, gamma, plain_name(setup.declared.get("algorithm")))
        return
    if not gains.follows(traced.recovered):
        other = rates_apart(traced, setup.declared)
        if other is not None:
            yield _of_the_policy(other, setup.declared)
            return
        raise Unavailable("needs a policy that is trained with the returns less the values, up to whitening")
    found = gains.discount(traced, "policy")
    if found.product is None:
        raise Unavailable("needs a response of two tokens whose changed score or value moves the policy's gradient")
    if not found.sound:
        raise Unavailable("needs advantages that are discounted sums with one gamma and one lambda")
    pairs = [
        ("gamma · lambda", None if gamma is None or lam is None else gamma * lam, found.product),
        ("gamma", gamma, found.gamma),
        ("lambda", lam, found.lam),
    ]
    tolerance = 2 * gains.PRECISE
    told = [(n, said, seen) for n, said, seen in pairs if said is not None and seen is not None]
    if not told:
        raise Unavailable("needs gamma and lam to be declared")
    if all(abs(said - seen) <= tolerance for _, said, seen in told):
        return
    worst = [(n, said, seen) for n, said, seen in told if abs(said - seen) > tolerance]
    names = " and ".join(f"{n} {seen:.3g} in place of {said:.3g}" for n, said, seen in worst if "·" not in n)
    names = names or " and ".join(f"{n} {seen:.3g} in place of {said:.3g}" for n, said, seen in worst)
    yield Finding(
        f"The advantages are computed with {names}. They should be computed with what is declared: pass gamma and lam "
        "to the function that computes advantages, or declare the values that are meant.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence(
                f"{n}, from how advantages move with a changed score or value",
                f"{said:.4g}",
                f"{seen:.4g}",
                f"{tolerance:g}",
                where="the policy's gradient",
            )
            for n, said, seen in told
        ),
    )


def _without_a_critic(traced: Traced, gamma: float | None, algorithm: str) -> Iterator[Finding]:
    """A score reaches all tokens of its response alike, or those before the last one discounted, as in REINFORCE++."""
    from rlhf_doctor.trace import gains
    from rlhf_doctor.trace.shaped import of_scores

    unit = of_scores(traced)
    whole = unit is not None and unit.gamma == 1 and not algorithm.startswith("reinforce")
    if gamma is None or unit is None or (whole and gamma != 1):
        raise Unavailable("needs a critic, or advantages without one that are sums of rewards from a token on")
    tolerance = 2 * gains.PRECISE
    if abs(unit.gamma - gamma) > tolerance:
        evidence = Evidence(
            "gamma, from how a changed score moves neighbouring tokens", f"{gamma:.4g}", f"{unit.gamma:.4g}",
            f"{tolerance:g}", where="the policy's gradient",
        )  # fmt: skip
        yield Finding(
            f"A score reaches the token before the last one with {unit.gamma:.3g} of its weight, and so on back to the "
            f"first: the returns are discounted with gamma {unit.gamma:.3g}. They should be with {gamma:g}, as "
            "declared: pass that gamma on, or declare the one that is meant.",
            role="loop", confidence=Confidence.PROVEN, evidence=(evidence,),
        )  # fmt: skip


def _of_the_policy(found: OtherRates, declared: Any) -> Finding:
    """The critic's targets are discounted sums, and the policy's advantages are other ones of the same rewards."""
    said = "each token's own reward less its value" if not found.gamma else "other sums of the same rewards"
    return Finding(
        f"The policy's advantages are {said}: they are computed with gamma {found.gamma:g} and lambda {found.lam:g}, "
        f"while the critic's targets are not. Use the discounted sum for both, with gamma {declared['gamma']:g} and "
        f"lambda {declared['lam']:g} as declared.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "what the declared sums leave of the policy's weights, over their range",
                "0",
                f"{found.misfit:.2g}; with gamma {found.gamma:g} and lambda {found.lam:g} {found.left:.1g}",
                "0.002",
                where="the policy's gradient beside the rewards in the critic's targets",
            ),
        ),
    )


@discount_differs.fault("lambda left at 1")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.lambda_of_one})


@discount_differs.fault("gamma and lambda exchanged")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.exchanged})


@discount_differs.fault("another gamma than is declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, settings={"gamma": 0.99}, declared={"gamma": 1.0})


@discount_differs.fault("without a critic, another gamma than is declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(gamma=0.9))

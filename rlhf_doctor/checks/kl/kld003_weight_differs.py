"""KLD003: the KL acts once, with the declared coefficient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.kl.terms import declared_place, places, where_of
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number

if TYPE_CHECKING:
    from rlhf_doctor.trace.divergence import Divergence

NEAR = 0.03  # of the coefficient


@check(
    "KLD003", "the KL acts once, with the declared coefficient", stage=Stage.TRACE, severity=Severity.ERROR,
    after=("REF005", "REF006", "KLD002", "KLD004", "VAL010"), explains=("SYS008",), across_roles=True,
)  # fmt: skip
def kl_weight_differs(kl_terms: Divergence, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the reference's logits moved at the tokens of some responses. How far the rewards and
        the policy's weights in the loss move per nat is the coefficient that is really used. It must be the declared
        kl_coef, the same for every response, in one place and not in both, and in the place that kl_in names. With an
        adaptive coefficient its size is not judged.

    Why it matters:
        The coefficient is the one number that says how far the policy may go. Divided by a length or by a batch size it
        is hundreds of times too small, and counted twice twice too large; every comparison with a published setting is
        then off by that factor.

    What it looks like when broken:
        KL grows although the coefficient is the usual one, or the policy does not move; changing the batch size or the
        response length changes how strongly the policy is held.

    How to fix:
        1. Multiply the per-token KL by the coefficient once, and by nothing else.
        2. Do not divide the KL in the rewards by a length: the return is a sum over tokens.
        3. Choose one place: in the rewards, or as a term of the loss.

    Source:
        Counted twice: https://github.com/NVIDIA-NeMo/RL/pull/2530; one coefficient per token of the reward: Ziegler et
        al. 2019, https://arxiv.org/abs/1909.08593, eq. 2. Tolerance: float32 leaves 0.1% of the coefficient and
        bfloat16 1%; the slips that are known are factors of 2 and more.
    """
    found = places(kl_terms)
    if not found:
        raise Unavailable("needs a KL that acts in the rewards or in the loss")
    declared, adaptive, place = (
        number(setup.declared.get("kl_coef")),
        setup.declared.get("kl_adaptive"),
        declared_place(setup),
    )

    def say(message: str, quantity: str, expected: str, observed: str, tokens: int, tolerance: str = "") -> Finding:
        evidence = Evidence(quantity, expected, observed, tolerance, where_of(tokens))
        return Finding(message, role="loop", confidence=Confidence.PROVEN, evidence=(evidence,))

    if len(found) > 1:
        both = " and ".join(f"{fit.coefficient:.3g} in the {name}" for name, fit, _ in found)
        yield say(
            f"The KL counts twice: with {both}. It should act in one place: leave one of them out.",
            "coefficient of the KL", f"{'one place' if place is None else f'in the {place} alone'}", both, found[0][2],
        )  # fmt: skip
        return
    name, fit, tokens = found[0]
    if place is not None and name != place:
        yield say(
            f"The KL acts in the {name} and not in the {place}, which is declared: move it there.",
            "where the KL acts", place, name, tokens,
        )  # fmt: skip
    elif fit.rows and fit.uneven > 1 + NEAR:
        sizes = f"{min(fit.rows):.3g} to {max(fit.rows):.3g}"
        yield say(
            f"The KL in the {name} weighs {sizes}, depending on the response. It should weigh the same at every token: "
            "look for a division by the response's length.",
            "coefficient of the KL by response", "one number" if declared is None else f"{declared:g}", sizes, tokens,
        )  # fmt: skip
    elif declared is None:
        raise Unavailable("needs kl_coef to be declared")
    elif not adaptive and abs(fit.coefficient - declared) > NEAR * abs(declared):
        factor = f", {fit.coefficient / declared:.3g} times" if declared else " instead of"
        yield say(
            f"The KL in the {name} weighs {fit.coefficient:.3g}{factor} the declared {declared:g}. It should weigh "
            "that much per token: look for a second factor, a length or a batch size that it is divided by.",
            "coefficient of the KL", f"{declared:g}", f"{fit.coefficient:.4g}", tokens, f"{NEAR:.0%}",
        )  # fmt: skip


@kl_weight_differs.fault("divided by the response's length")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"rewards": kl_faults.rewards_with(by_length=True)})


@kl_weight_differs.fault("the coefficient is applied twice")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"rewards": kl_faults.rewards_with(factor=0.05)})


@kl_weight_differs.fault("another coefficient than the declared one")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, declared={"kl_coef": 0.2})


@kl_weight_differs.fault("without a critic, in the rewards and in the loss")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(in_the_loss=0.05))

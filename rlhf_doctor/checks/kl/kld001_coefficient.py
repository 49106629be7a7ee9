"""KLD001: the KL coefficient is positive and acts somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number

PLACES = ("reward", "loss")
NOWHERE = ("", "none", "off", "false", "no", "null", "nowhere", "disabled", "[]", "()")


@check(
    "KLD001",
    "the KL coefficient is positive and acts somewhere",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("REF005", "KLD002", "KLD003", "SYS008"),
)
def kl_coefficient(setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The declared kl_coef and kl_in. A negative coefficient is a fault. A coefficient of 0 is one in PPO with a
        reference at hand; in GRPO, RLOO and their relatives it is common, and so is PPO without a reference: both are
        mentioned only. A positive coefficient with kl_in declared as nothing acts nowhere. A kl_in that is not declared
        says nothing.

    Why it matters:
        The penalty keeps the policy near the text that the reward model was trained on. Without it the policy finds
        what the reward model overrates; with the sign turned it is paid for leaving.

    What it looks like when broken:
        KL grows without bound while the reward rises; or no KL is logged at all. With a multiplicative controller a
        coefficient of 0 stays 0 for ever, whatever the target is.

    How to fix:
        1. Set kl_coef to a positive number; 0.05 is the usual start with the KL in the reward, 0.001 in the loss.
        2. Switch on one place for it: in the reward, or as a term of the loss.
        3. If no penalty is meant, leave the reference model out, which saves its memory.

    Source:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (the penalty, and its adaptive coefficient); a negative
        one that was published: https://github.com/rllm-org/rllm/issues/111; acting nowhere:
        https://github.com/verl-project/verl/issues/750; 0 by default: https://github.com/huggingface/trl/issues/4040;
        0 by design: Yu et al. 2025, "DAPO", https://arxiv.org/abs/2503.14476.
    """
    given = setup.declared.get("kl_coef")
    coefficient = number(given)
    if coefficient is None:
        raise Unavailable("needs kl_coef to be declared")
    algorithm = str(setup.declared.get("algorithm") or "").lower()
    place = setup.declared.get("kl_in", "unknown")
    nowhere = place is None or place is False or str(place).strip().lower() in NOWHERE
    evidence = Evidence("declared kl_coef", "above 0", f"{coefficient:g}", where="declared")
    if coefficient < 0:
        yield Finding(
            f"The KL coefficient is {coefficient:g}: divergence from the reference is rewarded. It should be "
            "positive: turn its sign.",
            role="setup",
            severity=Severity.ERROR,
            confidence=Confidence.PROVEN,
            evidence=(evidence,),
        )
    elif coefficient == 0:
        expected = algorithm == "ppo" and setup.reference is not None
        adaptive = " An adaptive controller multiplies it, so it stays 0." if setup.declared.get("kl_adaptive") else ""
        yield Finding(
            "The KL coefficient is 0, so nothing holds the policy to its reference."
            + (
                f"{adaptive} In PPO it should be positive: set it, or leave the reference out."
                if expected
                else " That is common without a reference or in critic-free algorithms, and no KL is logged then."
            ),
            role="setup",
            severity=None if expected else Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(evidence,),
        )
    elif nowhere:
        yield Finding(
            f"The KL coefficient is {coefficient:g} and kl_in is {place!r}: the penalty acts nowhere. It should be in "
            "the reward or in the loss: switch one of them on.",
            role="setup",
            confidence=Confidence.PROVEN,
            evidence=(evidence, Evidence("declared kl_in", " or ".join(PLACES), repr(place), where="declared")),
        )


@kl_coefficient.fault("a negative coefficient")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"kl_coef": -0.001})


@kl_coefficient.fault("PPO with a reference and a coefficient of 0")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"algorithm": "ppo", "kl_coef": 0.0})


@kl_coefficient.fault("a coefficient that acts nowhere")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"kl_coef": 0.05, "kl_in": "none"})

"""KLD006: the KL coefficient moves as declared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage

if TYPE_CHECKING:
    from rlhf_doctor.trace.controller import Controlled

ERRORS, LEAST = 5, 1e-4  # of the ratio of both coefficients
OF_A_TOKEN = 1.0  # nats: targets for a response are from 1 up (Ziegler et al.: 6 and more), verl's for a token is 0.1


@check(
    "KLD006", "the KL coefficient moves as declared", stage=Stage.TRACE, severity=Severity.WARNING,
    after=("REF005", "REF006", "KLD002", "KLD003", "KLD004"), explains=("KLD003",),
)  # fmt: skip
def kl_controller_inert(kl_controller: Controlled, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The KL coefficient of two steps in a row, each read off the rewards or gradients and the log-probabilities of
        its own tokens. A fixed one must stay. An adaptive one must move, and towards the target: for that the reference
        is made less sure of what was drawn, so that the KL of a sequence is above kl_target and that of a token below.
        A target below 1 nat may be meant for a token, as verl's 0.1 is: then a controller that follows that is right.

    Why it matters:
        A controller that is not read leaves the first guess of a coefficient for the whole run. One that is told the KL
        of a token, against a target for a sequence, sees a fiftieth of it and lowers the coefficient without end.

    What it looks like when broken:
        A logged coefficient that is constant, or falls for ever while the KL grows past its target; or one that moves
        although a fixed one was configured.

    How to fix:
        1. Read the coefficient from the controller in each step.
        2. Tell it after each step the mean over responses of the KL summed over their tokens.
        3. For a fixed coefficient, build no adaptive controller.

    Source:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2 (the controller); told the KL of a token:
        https://github.com/CarperAI/trlx/issues/438; always adaptive: https://github.com/huggingface/trl/issues/18;
        verl's mean over tokens and its target: https://github.com/verl-project/verl/blob/main/verl/trainer/ppo/core_algos.py.
        Tolerance: five errors of the ratio, by what both steps' fits and float32 leave, at least 1e-4; only the
        direction of an adaptive one is judged.
    """
    found, adaptive = kl_controller, bool(setup.declared.get("kl_adaptive"))
    tolerance = max(ERRORS * found.error, LEAST)
    moved = found.ratio - 1
    evidence = Evidence(
        "KL coefficient of the second step over that of the first",
        "1" if not adaptive else "above 1" if found.wanted > 1 else "below 1",
        f"{found.ratio:.6g}",
        f"{tolerance:.1g}",
        f"first step: a KL of {found.sequence_kl:.3g} a response and {found.token_kl:.3g} a token",
    )

    def say(message: str) -> Finding:
        return Finding(message, role="loop", confidence=Confidence.MEASURED, evidence=(evidence,))

    if not adaptive:
        if abs(moved) > tolerance:
            yield say(
                f"The KL coefficient changes from step to step, {found.ratio:.4g} times, although a fixed one is "
                "declared. It should stay: leave the controller out, or declare kl_adaptive."
            )
        return
    if abs(found.wanted - 1) < 3 * tolerance:
        raise Unavailable("the declared controller moves the coefficient too little in one step to be seen")
    if abs(moved) < min(tolerance, 0.1 * abs(found.wanted - 1)):
        yield say(
            "The adaptive KL coefficient stays where it is. It should move towards its target: read it from the "
            "controller in each step, and tell the controller the KL after each."
        )
    elif moved * (found.wanted - 1) < 0 and not (found.target < OF_A_TOKEN and moved * (found.by_token - 1) > 0):
        yield say(
            f"The adaptive KL coefficient {'falls' if moved < 0 else 'rises'} although the KL of a response is "
            f"{'above' if found.wanted > 1 else 'below'} its target. Tell the controller the mean over responses of "
            "the KL summed over their tokens, no mean over tokens and nothing else."
        )


@kl_controller_inert.fault("an adaptive coefficient that stays")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, declared=kl_faults.ADAPTIVE)


@kl_controller_inert.fault("a fixed coefficient that moves")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, control=kl_faults.controller(), declared={"kl_adaptive": False})


@kl_controller_inert.fault("told the KL of a token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, control=kl_faults.controller(share=0.1))

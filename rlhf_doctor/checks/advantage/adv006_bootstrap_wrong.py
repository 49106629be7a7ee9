"""ADV006: the recursion looks one state ahead, and not beyond the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.apart import Bootstrap


@check(
    "ADV006",
    "advantages look one state ahead, and not beyond the end",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL005", "ROL009", "VAL013", "ADV002", "ADV003", "ADV005", "ADV007"),
    explains=("ADV003", "ADV001", "ADV004", "VAL015"),
    across_roles=True,
)
def bootstrap_wrong(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        One rollout value V(s_u) is changed and the step run again: the advantage of token u should move by -1, that of
        the token before by γ(1-λ), those further back by γλ a token. And the reward of each last token, as the returns
        have it, is compared with the score: what is left over should not follow the value of the state after the end.
        Cut responses that do bootstrap are mentioned as info, those that do so for the policy alone or the critic alone
        are not.

    Why it matters:
        After the end of a text there is no future reward. A value there is one that nothing trains, and it enters every
        token's advantage and return, so that the critic learns from its own invention. A recursion that uses
        V(s_t) for V(s_t+1) takes the baseline out again.

    What it looks like when broken:
        Values grow without a limit or drift together; a value loss that does not fall; advantages that hardly depend
        on the critic.

    How to fix:
        1. Let V(s_t+1) be 0 where token t ends the response: at the end of sequence, and by the usual convention at
           the length limit too.
        2. Use δ_t = r_t + γ V(s_t+1) - V(s_t), with V(s_t) read at the token before a_t.
        3. Treat truncated responses one way everywhere, in the advantages and in the returns.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438; one step too many after the end:
        https://github.com/deepspeedai/DeepSpeedExamples/pull/672; ended and cut episodes confused:
        https://github.com/pytorch/rl/pull/2773. Tolerance 0.01 of a unit of V, 100 times what float32 leaves.
    """
    from rlhf_doctor.trace import advantage, gains
    from rlhf_doctor.trace.apart import bootstrap_apart

    if gains.critic_free(traced):
        raise Unavailable("needs a critic: without one nothing bootstraps")
    found = gains.discount(traced, "policy")
    odd = advantage.recursion(traced)
    if odd is not None:
        shown = ", ".join(f"{g:.3g}" for g in odd.gain[: odd.at + 1])
        yield Finding(
            "The advantages do not look one state ahead: a changed rollout value moves them otherwise than r + γ "
            "V(next) - V does. Use the value of the following state in each token's δ, and of no other.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "change of the advantages up to token u for one unit of V at the state of token u",
                    "-1 at u, γ(1-λ) before it, times γλ for each token before that",
                    shown,
                    "0.01",
                    where=f"sample {odd.sample}, u = {odd.at}",
                ),
            ),
        )
        return
    apart = bootstrap_apart(traced, setup.declared)
    if apart is not None:
        yield _one_way(apart)
        return
    if not found.sound or found.product is None or found.gamma is None:
        raise Unavailable("needs advantages that are discounted sums, and a changed rollout value that shows in them")
    ended = advantage.terminal(traced, found.product, found.gamma, ended=True)
    if ended is not None and ended.bootstraps:
        yield _beyond(ended, "end", None)
        return
    cut = advantage.terminal(traced, found.product, found.gamma, ended=False)
    if cut is not None and cut.bootstraps:
        yield _beyond(cut, "cut", Severity.INFO)
        return
    if ended is None or not ended.decided:
        raise Unavailable("needs two responses that end, with rewards that are their scores up to a constant")


def _one_way(found: Bootstrap) -> Finding:
    kind = "end" if found.ended else "are cut at the length limit"
    here, there = "the policy's advantages", "the critic's targets"
    here, there = (here, there) if found.factor > 0 else (there, here)
    return Finding(
        f"The value after the last token of responses that {kind} counts in {here} and not in {there}. Treat these "
        "responses one way everywhere: make the targets from the very advantages, as advantage + value.",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "what return - value leaves of the policy's weights, over their range",
                "0",
                f"{found.misfit:.2g}; with {abs(found.factor):.3g} of that value added {found.left:.1g}",
                "0.002",
                where=f"{len(found.samples)} responses; gamma is {found.gamma:.3g}",
            ),
        ),
    )


def _beyond(found: Any, kind: str, severity: Severity | None) -> Finding:
    message = (
        f"The last token of responses that end counts {found.name}. Nothing follows the end: the value ahead should be "
        "0 there, in the advantages and in the returns."
        if kind == "end"
        else f"The last token of responses that reach the length limit counts {found.name}. That is a "
        "convention of its own; most code takes them as ended. Either is right if the critic's targets do the same."
    )
    return Finding(
        message,
        role="loop",
        confidence=Confidence.MEASURED,
        severity=severity,
        evidence=(
            Evidence(
                "what the score leaves unexplained of the last tokens' rewards, over that value's range",
                "0",
                f"{found.without:.3g}",
                "0.01",
                where=f"{len(found.samples)} responses",
            ),
            Evidence(f"the same with {found.name} taken out", "0", f"{found.best:.3g}", "0.01"),
        ),
    )


@bootstrap_wrong.fault("the state after the last token counts")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.bootstraps})


@bootstrap_wrong.fault("V of the same state in place of the next one's")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.own_value_ahead}, settings={"gamma": 0.97})


@bootstrap_wrong.fault("the next value but one")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.next_but_one})

"""ADV003: what stands in padded slots changes no advantage of a response token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

TOLERANCE = 1e-4


@check(
    "ADV003",
    "padded slots change no advantage of a response token",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL005", "ROL009", "KLD005"),
    explains=("LOS005", "ADV006", "ADV004", "ADV001"),
    across_roles=True,
)
def padding_leaks_into_advantages(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with 1000 added to the outputs of the models in every slot that no response token needs:
        prompts, and what follows the end. The targets that the critic is trained towards, which hold the advantages,
        should stay as they were at every response token.

    Why it matters:
        The recursion runs from the last column to the first. If it starts in the pads, the critic's values there, which
        nothing has trained, are carried back into every earlier token, more of them in shorter responses.

    What it looks like when broken:
        Advantages of a text depend on the longest text in its batch; a value loss that falls slowly and jumps with the
        batch; results that change with the padding.

    How to fix:
        1. Set values and rewards to 0 outside the response mask before the recursion; the mask includes the end of
           sequence and nothing after it.
        2. Or stop the recursion at the last token: multiply both V(s_t+1) and the running advantage by the next
           token's mask.
        3. Build the mask from where each response ends, not from token ids.

    Source:
        https://github.com/huggingface/trl/issues/7024 (a mask that never excludes padding),
        https://github.com/deepspeedai/DeepSpeedExamples/pull/672 (steps after the end stay in the recursion),
        https://github.com/verl-project/verl/pull/2337 (tokens that are not the policy's). Tolerance 0.0001 of what is
        added: a masked slot leaves exactly 0, and a recursion over pads γ(1-λ), some hundredths.
    """
    from rlhf_doctor.trace import advantage, gains

    if gains.critic_free(traced):
        raise Unavailable("needs a critic: without one advantages are not summed over tokens")
    moved = advantage.leaks(traced)
    worst = int(moved.argmax())
    if moved[worst] <= TOLERANCE:
        return
    count = int((moved > TOLERANCE).sum())
    yield Finding(
        f"Numbers in padded slots change the returns of response tokens in {count} of {len(moved)} samples. They "
        "should change nothing: set values and rewards to 0 outside the response mask before the recursion.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "largest change of a response token's return, for one unit in every padded slot",
                "0",
                f"{moved[worst]:.3g}",
                f"{TOLERANCE:g}",
                where=f"sample {worst}, a response of {int(traced.base.real[worst].sum())} tokens",
            ),
        ),
    )


@padding_leaks_into_advantages.fault("the recursion starts in the pads, with the critic's values there")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.pads_count})


@padding_leaks_into_advantages.fault("a mask that runs two slots too far")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.two_pads_count})

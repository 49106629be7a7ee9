"""ROL010: what was drawn is what is scored and trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing


@check(
    "ROL010",
    "what was drawn is what is scored and trained on",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("ROL003", "ROL004", "ROL005", "ROL001", "REW014", "TOK007", "ROL011", "KLD005"),
    across_roles=True,
)
def generation_corrupts_ids(drawing: Drawing) -> Iterator[Finding]:
    """
    What it examines:
        The ids that the sampler was seen to draw for each prompt, beside the ids that the policy is trained on in their
        place. They should be the same, up to and with the end of sequence. The last token of a response that reached
        the limit goes into no model while sampling; it is seen where it is drawn, if by multinomial, argmax or
        searchsorted. A text cut short before its end was reached is no finding: loops stop at other words too.

    Why it matters:
        The policy is rewarded and trained for tokens that it did not choose. An end of sequence that is overwritten or
        stripped can never be learned, and ids that come back from text are other ids than those drawn.

    What it looks like when broken:
        Responses that grow to the limit, ratios far from 1 where an engine gives the old log-probabilities, unknown
        tokens in the logs.

    How to fix:
        1. Keep the ids that were drawn; decode them for the reward function and the log only.
        2. Leave the end of sequence in the ids, and pad after it.
        3. Let masks say what is real, and never overwrite ids.

    Source:
        https://github.com/huggingface/trl/issues/5144 and https://github.com/rllm-org/rllm/pull/272 (through text),
        https://github.com/CarperAI/trlx/pull/401 and https://github.com/OpenRLHF/OpenRLHF/issues/238 (the end). Ids are
        compared one by one, without tolerance.
    """
    drawing.needs_sampler()
    strange = drawing.first.draws.strange
    if not strange:
        return
    shown = strange[:3]
    yield Finding(
        f"{len(strange)} {'response was' if len(strange) == 1 else 'responses were'} altered after "
        f"{'it was' if len(strange) == 1 else 'they were'} drawn: other ids are trained on than the sampler gave. Keep "
        "the drawn ids as they are, with their end of sequence.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence(
                "ids of a response",
                f"as drawn: {_ids(one.drawn)}",
                f"trained on: {_ids(one.instead)}",
                where=f"after the prompt {_ids(one.prompt)}",
            )
            for one in shown
        ),
    )


def _ids(ids: tuple[int, ...]) -> str:
    return " ".join(map(str, ids[:16])) + (" ..." if len(ids) > 16 else "") if ids else "nothing"


@generation_corrupts_ids.fault("the end of sequence is overwritten")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    def change(response: Any, eos: int) -> Any:
        return response.masked_fill(response == eos, 0 if eos else 1)

    return reference_step(healthy, parts={"sample": rollout_faults.altered(change)})


@generation_corrupts_ids.fault("ids of another vocabulary come back")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    def change(response: Any, eos: int) -> Any:
        return response.where(response == eos, response.clamp(max=int(response.max()) - 1))

    return reference_step(healthy, parts={"sample": rollout_faults.altered(change)})

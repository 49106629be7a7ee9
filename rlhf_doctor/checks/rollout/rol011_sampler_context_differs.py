"""ROL011: the sampler reads the same context as the scoring pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing


@check(
    "ROL011",
    "the sampler reads the same context as the scoring pass",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL010",),
    explains=("ROL003", "ROL001"),
    across_roles=True,
)
def sampler_context_differs(drawing: Drawing) -> Iterator[Finding]:
    """
    What it examines:
        What the policy says in each state when the token is drawn, beside what it says there when the drawn text is
        scored, in one step and at one set of weights. They should be equal up to rounding: the sampler was given the
        same ids, attention mask and positions. The prompt ids are compared too.

    Why it matters:
        The tokens come from another distribution than the one that is trained, and the ratio, taken from two passes
        that agree, never tells.

    What it looks like when broken:
        Responses that ignore the beginning of long prompts, or that depend on how much padding the batch has; drawn
        tokens more surprising than the entropy of the scored distribution.

    How to fix:
        1. Pass the attention mask to generate(), and pad prompts on the left.
        2. Cut, template and prefix prompts once, before both.
        3. With absolute positions pass position_ids = mask.cumsum(1) - 1 in both.

    Source:
        https://github.com/huggingface/trl/issues/469 (positions of padded batches),
        https://huggingface.co/docs/transformers/en/llm_tutorial#wrong-padding-side. A key-value cache moves
        log-probabilities by 1e-5 nats in float32 and some hundredths in bfloat16; the limits are 2e-3 and 0.25 in the
        median state of a sample.
    """
    from rlhf_doctor.trace import passes

    if drawing.by == "reference":
        raise Unavailable("needs the policy to draw: the reference draws the responses")
    drawing.needs_sampler()
    gap = passes.sampler_gap(drawing, drawing.first)
    if gap is None:
        raise Unavailable("needs a pass over the drawn texts at the weights that drew them")
    if not gap.share or (drawing.by == "copy" and gap.everywhere and not gap.contexts):
        return
    cut = f" It is given {gap.contexts[0][0]}, and scored after {gap.contexts[0][1]}." if gap.contexts else ""
    dropping = passes.dropped_out(drawing.first, drawing.setup.policy)
    why = (
        " The policy drops hidden states in the update, which alone may be why: switch dropout off." if dropping else ""
    )
    yield Finding(
        f"In {gap.share:.0%} of the samples the sampler reads another context than the scoring pass: at the same "
        f"weights they are up to {gap.largest:.2g} nats apart.{cut or why} Give both the same ids, attention mask and "
        "positions.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "log-probabilities where tokens are drawn, less those where they are scored, in nats",
                "0",
                f"{gap.typical:.3g} in the median state, at most {gap.largest:.3g}",
                f"{gap.limit:.1g}",
                f"{gap.tokens} states of {gap.samples} samples",
            ),
        ),
    )


@sampler_context_differs.fault("prompts lose their first token on the way to the sampler")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.sample_without_start})


@sampler_context_differs.fault("the sampler attends to the padding")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.sample_attending_to_pads})

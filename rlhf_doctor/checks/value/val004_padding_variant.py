"""VAL004: a state's value does not depend on how its batch is padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.padding import grave_shifts, moved_shifts, shift_evidence, side_of
from rlhf_doctor.finding import Confidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Invariance, Manifest


@check(
    "VAL004",
    "a state's value does not depend on how its batch is padded",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("VAL001", "VAL002", "VAL003", "VAL014", "PRE004"),
)
def value_padding_variant(value_invariance: Invariance, value_manifest: Manifest, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The values of one text's states: alone, right-padded and left-padded beside longer texts, and beside other texts
        of the same lengths. They should stay, up to rounding in the critic's dtype. Under the padding side that this
        setup does not use a change is info.

    Why it matters:
        The old values are computed in rollout batches and the new ones in minibatches, which are padded otherwise. If
        padding moves V, the value clip acts on rounding of the batch, the advantages carry noise that depends on the
        neighbours, and the critic is trained on states that it does not see again.

    What it looks like when broken:
        Explained variance that depends on the batch size; a value loss above 0 right after the rollout, before any
        update.

    How to fix:
        1. Pass the attention mask to the critic, in the rollout and in the update.
        2. With left-padded prompts pass position_ids = mask.cumsum(1) - 1 to models with absolute positions.
        3. Normalise over features and never over the batch.

    Source:
        https://github.com/huggingface/trl/issues/469 and https://github.com/huggingface/transformers/pull/29583
        (positions from the mask). Tolerance: rounding in float32 moves a value by about 1e-6 of the spread over
        states, in bfloat16 by some 1e-2; a wrong mask or position by tenths.
    """
    moved = moved_shifts(value_invariance)
    grave = grave_shifts(moved, side_of(setup, value_manifest))
    told = grave or moved
    if not told:
        return
    names = " and ".join("other neighbours in the batch" if n == "neighbours" else n for n in told)
    yield Finding(
        f"The critic's values of one text change with {names}. They should be the same alone and in any batch: use the "
        "attention mask in the attention and in the positions."
        if grave
        else f"The critic's values of one text change with {names}, which this setup does not use.",
        role="value",
        confidence=Confidence.PROVEN,
        severity=None if grave else Severity.INFO,
        evidence=tuple(shift_evidence("values", n, s) for n, s in told.items()),
    )


@value_padding_variant.fault("hand-written, pads on the left are attended to")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, uses_mask=False))


@value_padding_variant.fault("hand-written, positions count the pads on the left")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, positions="row"))


@value_padding_variant.fault("a Hugging Face critic that is called without its mask")
def _(healthy: Any) -> Any:
    def call(model: Any, ids: Any, mask: Any) -> Any:
        return model(input_ids=ids).logits

    return healthy.but(calls={**healthy.calls, "value": call})


@value_padding_variant.fault("values normalised over the batch inside the critic")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return values - values[:, :1].mean(0, keepdim=True)

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())

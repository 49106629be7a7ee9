"""POL004: log-probabilities of a text do not depend on the padding or the batch around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Architecture, Invariance
from rlhf_doctor.instruments.repeats import random_in_eval

CHANGES = ("left padding", "right padding", "neighbours", "packed neighbours")
CAUSES = {
    "left padding": "Pads on the left are attended to or counted as positions: mask them in the attention and derive "
    "positions from the mask, (mask.cumsum(-1) - 1).clamp(min=0).",
    "right padding": "Pads on the right reach real tokens: apply a causal and a padding mask, and normalise each "
    "position by itself.",
    "neighbours": "Rows of a batch reach each other: normalise within a row, and call the model in eval mode.",
    "packed neighbours": "The mask of 1, 2, … that tells packed texts apart is taken for a boolean one: use an "
    "attention that reads it (flash attention's variable lengths), or give every text a row of its own.",
}


@check(
    "POL004",
    "log-probabilities do not depend on padding or on the batch",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("POL005", "POL002", "PRE004"),
    explains=("VAL004", "REW005", "ROL003", "REF002", "POL006", "ROL011"),
    across_roles=True,
)
def policy_padding_variant(
    policy_invariance: Invariance,
    reference_invariance: Invariance | None = None,
    reference_architecture: Architecture | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Log-probabilities of one text alone, then beside longer texts with pads on the right, on the left, and with
        other neighbours. The model is called as well as it can be: with its mask, and with positions that follow from
        the mask where it takes them. What still moves is the model's own doing. For a model without a mask the left
        side counts only if the tokenizer pads there and the prompts differ in length. Where prompts are packed under a
        mask of 1, 2, … a text is also read behind other texts in its row.

    Why it matters:
        The same response is scored in the rollout, in every minibatch and by the reference, each time beside other
        rows. If its log-probabilities depend on that, the ratio is not 1 before any update and the KL is noise.

    What it looks like when broken:
        Unstable or negative KL, a ratio off 1 in the first epoch, results that change with the batch size. A sequence's
        log-probability was seen to differ by 34 nats.

    How to fix:
        1. Mask pads in the attention of every layer.
        2. With learned positions, take position_ids from the attention mask instead of counting columns.
        3. Replace normalisation over the batch by normalisation over features.
        4. Repeat the same in the loop: pass attention_mask and position_ids wherever log-probabilities are taken.

    Source:
        https://github.com/huggingface/trl/issues/469 and https://github.com/huggingface/trl/pull/6819 (positions),
        https://github.com/huggingface/trl/pull/2708 (mask), https://github.com/OpenRLHF/OpenRLHF/issues/587
        (packed), https://github.com/huggingface/transformers/pull/29583.
        The tolerance is what rounding explains: float32 passes of one text differ by some 1e-6 of the spread of its
        log-probabilities between batch shapes, bfloat16 by some 1e-2; a wrong mask or position moves them by tenths.
    """
    measured: dict[Role, Invariance] = {"policy": policy_invariance}
    decoder = reference_architecture is not None and reference_architecture.is_decoder
    if reference_invariance is not None and decoder and not random_in_eval(reference_invariance):
        measured["reference"] = reference_invariance
    for role, one in measured.items():
        shifts = one.shifts
        moved = {name: shifts[name] for name in CHANGES if name in shifts and shifts[name].moved}
        if not moved:
            continue
        first = next(iter(moved))
        yield Finding(
            f"The {role}'s log-probabilities of a text change with {first}, by up to {moved[first].largest:.2g} nats a "
            f"token. They should be the same alone and in any batch. {CAUSES[first]}",
            role=role,
            confidence=Confidence.PROVEN,
            evidence=tuple(
                Evidence(
                    f"largest change of a token's log-probability with {name}",
                    expected="0",
                    observed=f"{shift.largest:.3g} nats",
                    tolerance=f"{shift.tolerance:.2g}",
                    where=shift.detail,
                    reproduce="log_softmax of the row alone against the row in the padded batch",
                )
                for name, shift in moved.items()
            ),
        )
        return  # the reference is made from the policy: one finding for both


@policy_padding_variant.fault("a hand-written decoder that counts columns as positions")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy, positions="absolute")
    return policies.paired(healthy, policy)


@policy_padding_variant.fault("a hand-written decoder that attends to pads")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.hand_written(healthy, uses_mask=False))


@policy_padding_variant.fault("a Hugging Face model whose wrapper drops the mask")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "maskless"))


@policy_padding_variant.fault("a policy that normalises over the batch")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.BatchNormalised(policies.hand_written(healthy)))

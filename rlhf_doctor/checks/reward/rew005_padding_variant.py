"""REW005: a text's score does not depend on how its batch is padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.padding import grave_shifts, moved_shifts, shift_evidence, side_of
from rlhf_doctor.finding import Confidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Invariance, Manifest, Output, Reading


@check(
    "REW005",
    "a text's score does not depend on how its batch is padded",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REW001", "REW002", "REW004", "REW007", "PRE004"),
    explains=("REW009", "REW012", "REW013"),
)
def reward_padding_variant(
    reward_invariance: Invariance,
    reward_manifest: Manifest,
    setup: Any,
    reward_reading: Reading | None = None,
    reward_output: Output | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        One text is scored alone, right-padded and left-padded beside longer texts, and beside other texts of the same
        lengths. Everything but the text changes, so the score should stay, up to rounding in the model's dtype. A
        score that moves because it is read at another position is REW004's; here the position is right and the
        attention, the positions or a pooling over pads is wrong. Under the padding side that this setup does not use
        it is info.

    Why it matters:
        In PPO a response's row is padded by the prompts and responses that happen to share its batch. If that moves
        the score, a part of the reward is a lottery ticket, and two rows of one text get different rewards.

    What it looks like when broken:
        Other rewards for the same texts with another batch size or another order; evaluation with batch size 1 that
        disagrees with training.

    How to fix:
        1. Pass the attention mask, and use it in the attention of every layer.
        2. With left padding pass position_ids = mask.cumsum(1) - 1 to models with absolute positions.
        3. Pool over real tokens only: multiply by the mask before a sum, and divide by its count.
        4. Packed rows need a block-diagonal mask; a mask of 1, 2, 3 is understood by one attention kernel only.

    Source:
        https://github.com/huggingface/transformers/pull/29583 (positions from the mask),
        https://github.com/hpcaitech/ColossalAI/issues/3950 (a mean that counts pads),
        https://github.com/OpenRLHF/OpenRLHF/issues/587 (packing). Tolerance: rounding in float32 moves a score by
        about 1e-6 of the spread between texts, in bfloat16 by some 1e-2; a wrong mask or position by tenths.
    """
    if reward_output is not None and not reward_output.finite:
        return  # REW011's
    moved = moved_shifts(reward_invariance)
    if reward_reading is not None:
        for name in ("right padding", "left padding"):
            read, last, _ = reward_reading.cases.get(name, (0, 0, 0))
            if read != last:
                moved.pop(name, None)
                moved.pop("neighbours", None)
    grave = grave_shifts(moved, side_of(setup, reward_manifest))
    told = grave or moved
    if not told:
        return
    names = " and ".join("other neighbours in the batch" if n == "neighbours" else n for n in told)
    yield Finding(
        f"The score of one text changes with {names}. It should be the same alone and in any batch: use the attention "
        "mask in the attention, in the positions and in the pooling."
        if grave
        else f"The score of one text changes with {names}, which this setup does not use.",
        role="reward",
        confidence=Confidence.PROVEN,
        severity=None if grave else Severity.INFO,
        evidence=tuple(shift_evidence("score", n, s) for n, s in told.items()),
    )


@reward_padding_variant.fault("hand-written, pads are attended to")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="last", uses_mask=False).eval())


@reward_padding_variant.fault("hand-written, positions count the pads on the left")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="last", positions="row").eval())


@reward_padding_variant.fault("a sum over real tokens divided by the row's length, pads included")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return (scores * mask).sum(1) / mask.shape[1]

    return healthy.but(reward=scorers.Reader(healthy.reward, rule).eval())


@reward_padding_variant.fault("scores centred over the batch inside the model")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: s - s.mean() * (len(s) > 1)))

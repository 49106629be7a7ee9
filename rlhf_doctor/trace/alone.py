"""Rows that the reward model is given in a step without the prompt that they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_doctor.trace.samples import Special, length_before, texts_of

if TYPE_CHECKING:
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["without_prompt"]

SHORTEST = 2  # tokens of a response that is recognised by itself


def without_prompt(traced: Traced, setup: RLHFSetup) -> tuple[int, int]:
    """(rows that are a sample's response and nothing else, all rows) of the reward's passes in the step.

    An end of sequence more or less, and a start token in front, make no difference.
    """
    special, samples = Special.of(setup), traced.base.samples
    start = getattr(setup.tokenizer, "bos_token_id", None)
    responses = {_core(s.response, special) for s in samples if s.prompt}
    cut = {s.response for s in samples if s.prompt and not s.ended}  # whose last token may not have been seen
    alone = rows = 0
    for placed in traced.base.placed:
        if placed.call.role != "reward":
            continue
        for row in texts_of(placed.call, special):
            core = _core(row[1:] if row[:1] == (start,) else row, special)
            if len(core) >= SHORTEST:
                rows, alone = rows + 1, alone + (core in responses or core[:-1] in cut)
    return alone, rows


def _core(tokens: tuple[int, ...], special: Special) -> tuple[int, ...]:
    """Tokens without ends of sequence and pads behind them."""
    return tokens[: length_before(tokens, {*special.eos, special.pad})]

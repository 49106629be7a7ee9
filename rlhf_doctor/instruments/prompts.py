"""The setup's prompts as the loop would feed them: token ids, mask, and the texts they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage

__all__ = ["MOST", "PaddedPrompts", "Prompts", "encode", "padded_prompts", "prompts"]

MOST = 256  # prompts that are looked at; a fault of the encoding shows in every one of them


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts that are given as a table of ids: ``ids`` and ``mask`` as they stand, the mask None without one."""

    ids: tuple[tuple[int, ...], ...]
    mask: tuple[tuple[int, ...], ...] | None

    def rows(self, pad_id: int | None) -> tuple[tuple[int, ...], ...]:
        """The real tokens of each row: by the mask, else without the pads at its ends."""
        if self.mask is not None:
            both = zip(self.ids, self.mask, strict=True)
            return tuple(tuple(t for t, m in zip(row, keep, strict=True) if m) for row, keep in both)
        return tuple(_stripped(row, pad_id) for row in self.ids)


@dataclass(frozen=True)
class Prompts:
    """Up to 256 prompts as ids without pads; ``texts`` where the setup gives texts, empty where it gives ids."""

    rows: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max((len(row) for row in self.rows), default=0)


@fact(Stage.STATIC)
def padded_prompts(setup: Any) -> PaddedPrompts:
    """The table of ids.

    Raises:
        Unavailable: the prompts are texts, or there are none.
    """
    given = setup.prompts
    if not isinstance(given, Mapping) or "input_ids" not in given:
        raise Unavailable("needs prompts as input_ids")
    ids = _table(given["input_ids"])
    mask = given.get("attention_mask")
    kept = _table(mask) if mask is not None else None
    if kept is not None and [len(r) for r in kept] != [len(r) for r in ids]:
        raise Unavailable("the prompts' attention_mask has another shape than their input_ids")
    return PaddedPrompts(ids, kept)


@fact(Stage.PROBE, early=Stage.STATIC)
def prompts(setup: Any, models: Any = None) -> Prompts:
    """Encode the texts with the tokenizer as it is set up, or take the ids as given.

    Raises:
        Unavailable: there are no prompts, or texts and no tokenizer.
    """
    if isinstance(setup.prompts, Mapping):
        table = padded_prompts(setup)
        pad = getattr(setup.tokenizer, "pad_token_id", None)
        return Prompts(table.rows(pad if isinstance(pad, int) else None), ())
    texts = tuple(text for text in (setup.prompts or ()) if isinstance(text, str))[:MOST]
    if not texts:
        raise Unavailable("needs prompts")
    from rlhf_doctor.instruments.texts import live_tokenizer

    tokenizer = live_tokenizer(setup, from_files=models is None)
    return Prompts(tuple(tuple(encode(tokenizer, text)) for text in texts), texts)


def encode(tokenizer: Any, text: str, **how: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        Unavailable: the tokenizer cannot be called with a text.
    """
    if hasattr(tokenizer, "deprecation_warnings"):  # a transformers tokenizer, which would note a long text in itself
        how = {"verbose": False, **how}
    try:
        given = tokenizer(text, **how)
        ids = given["input_ids"] if isinstance(given, Mapping) or hasattr(given, "keys") else given
        return [int(token) for token in ids]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unavailable(f"the tokenizer cannot encode a text: {error}") from error


def _table(given: Any) -> tuple[tuple[int, ...], ...]:
    rows = given.tolist() if callable(getattr(given, "tolist", None)) else given
    if rows and isinstance(rows[0], int):
        rows = [rows]
    return tuple(tuple(int(t) for t in row) for row in rows[:MOST])


def _stripped(row: Sequence[int], pad_id: int | None) -> tuple[int, ...]:
    start, end = 0, len(row)
    while pad_id is not None and start < end and row[start] == pad_id:
        start += 1
    while pad_id is not None and end > start and row[end - 1] == pad_id:
        end -= 1
    return tuple(row[start:end])

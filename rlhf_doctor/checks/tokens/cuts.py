"""Prompts given as ids that were cut before; no check itself: TOK008 says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rlhf_doctor.finding import Confidence, Evidence, Finding
from rlhf_doctor.instruments.chat import turns_of
from rlhf_doctor.instruments.prompts import Prompts
from rlhf_doctor.instruments.readings import TokenizerInfo

__all__ = ["end_cut", "request_cut", "start_cut"]


def start_cut(prompts: Prompts) -> Iterator[Finding]:
    """Rows of the largest width that lack the first token of every shorter row."""
    width = prompts.longest
    full, shorter = ([r for r in prompts.rows if r and (len(r) == width) is whole] for whole in (True, False))
    heads = {row[0] for row in shorter}
    cut = [row for row in full if row[0] not in heads]
    if len(heads) == 1 and len(shorter) >= 3 and cut:
        head = next(iter(heads))
        yield Finding(
            f"{len(cut)} prompts of the full width of {width} tokens do not start with id {head}, as every shorter one "
            "does: their start was cut off. Filter long prompts instead of cutting them.",
            role="tokenizer",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence("first id of a prompt of full width", str(head), str(cut[0][0]), where="prompts['input_ids']"),
            ),
        )


def end_cut(prompts: Prompts, info: TokenizerInfo | None) -> Iterator[Finding]:
    """Rows of the largest width that lack the last tokens of every shorter row."""
    turns = turns_of(info) if info else None
    ask = turns.ask.strip() if turns else ""
    width = prompts.longest
    full, shorter = ([r for r in prompts.rows if r and (len(r) == width) is whole] for whole in (True, False))
    tail = _common_end(shorter)
    cut = [row for row in full if row[-len(tail) :] != tail] if tail else []
    if len(shorter) < 3 or not cut or len(tail) < (1 if ask else 2) or len(set(shorter)) < 3:
        return
    what = f"the generation prompt {ask!r}" if ask else "what their format ends in"
    yield Finding(
        f"{len(cut)} prompts of the full width of {width} tokens lack the end that every shorter one has, {what}: it "
        "was cut off on the right, and the policy goes on with the question. Filter long prompts instead of cutting "
        "them.",
        role="tokenizer",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "last ids of a prompt of full width",
                " ".join(map(str, tail[-4:])),
                " ".join(map(str, cut[0][-len(tail) :][-4:])),
                where="prompts['input_ids']",
            ),
        ),
    )


def request_cut(
    prompts: Prompts, info: TokenizerInfo | None, limit: int | None, decode: Callable[[Sequence[int]], str]
) -> Iterator[Finding]:
    """Rows of the width that all have, or that is declared, in the template's format, without what asks for an answer.

    Args:
        prompts: as ids.
        info: of the tokenizer with the template.
        limit: the declared prompt length.
        decode: ids to text, special tokens included.
    """
    turns = turns_of(info) if info else None
    begin, ask = ("".join(part.split()) for part in (turns.before, turns.ask)) if turns else ("", "")
    full = [row for row in prompts.rows if row and len(row) == prompts.longest]
    if not begin or not ask or not (prompts.longest == limit or len(full) == len(prompts.rows) > 2):
        return
    texts = [decode(row) for row in full]
    bare = ["".join(text.split()) for text in texts]
    cut = [text for text, plain in zip(texts, bare, strict=True) if begin in plain and not plain.endswith(ask)]
    if cut and turns:
        yield Finding(
            f"{len(cut)} of {len(prompts.rows)} prompts fill their width of {prompts.longest} tokens and do not end in "
            f"the template's generation prompt {turns.ask!r}: it was cut off on the right, and the policy goes on with "
            "the question. Filter long prompts instead of cutting them.",
            role="tokenizer",
            confidence=Confidence.MEASURED,
            evidence=(Evidence("end of a prompt", repr(turns.ask), repr(cut[0][-40:]), where="prompts['input_ids']"),),
        )


def _common_end(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The last tokens that all rows share, without whatever a whole row is."""
    most = min((len(row) for row in rows), default=1) - 1
    same = next((n for n in range(most) if len({row[-1 - n] for row in rows}) > 1), max(most, 0))
    return rows[0][len(rows[0]) - same :] if rows and same else ()

"""What each text of a batch gained between two calls of a model that samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["fed_tokens", "gained"]


def gained(before: Ints, now: Ints, *, first: bool) -> tuple[Ints, Ints] | None:
    """(token, column of ``before`` that it was drawn from) of each row, (B,) each; None if the texts did not go on so.

    Rows gain at most one token: as another column, in a buffer that is filled in (-1 where a row had ended), in both
    where rows of several lengths grow, in a window that slides, or alone beside a cache.

    Args:
        before: (B, L) token ids of a call.
        now: (B, L') token ids of the next one.
        first: whether nothing went on to ``before``: after whole texts that grew, a word alone is another prompt.
    """
    if before.shape[0] != now.shape[0] or not before.shape[1]:
        return None
    last = np.full(len(before), before.shape[1] - 1)
    if now.shape[1] == 1:
        return (now[:, 0], last) if first or before.shape[1] == 1 else None
    wider = now.shape[1] - before.shape[1]
    if wider not in (0, 1):
        return None
    moved = before != now[:, : before.shape[1]]
    if wider and not moved.any():
        return now[:, -1], last
    if moved.any() and int(moved.sum(1).max()) == 1 and not moved[:, 0].any() and not (wider and moved.any(1).all()):
        rows, at = moved.any(1), moved.argmax(1)
        token = np.where(rows, now[np.arange(len(now)), at], now[:, -1] if wider else -1)
        return token, np.where(rows, at - 1, last if wider else -1)
    if not wider and np.array_equal(now[:, :-1], before[:, 1:]):
        return now[:, -1], last
    return None


def fed_tokens(ids: Sequence[Ints]) -> list[list[int]]:
    """The tokens that each row gained from call to call, each of which went on from the one before."""
    steps = [gained(a, b, first=i == 0) for i, (a, b) in enumerate(itertools.pairwise(ids))]
    return [[int(step[0][b]) for step in steps if step is not None and step[0][b] >= 0] for b in range(len(ids[0]))]

"""Which update is the first one that a sample, or a token of it, is trained in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.places import Placed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Firsts", "token_by_token", "windows_of"]


def windows_of(placed: Sequence[Placed]) -> dict[int, int]:
    """order of a call -> updates of its role before it, seen by its optimizer steps or by its weights having moved."""
    found: dict[int, int] = {}
    moved: dict[Role, tuple[Any, int]] = {}
    for p in placed:
        call = p.call
        known, count = moved.get(call.role, (None, 0))
        if known is not None and call.weights is not None and not torch.equal(known, call.weights):
            count += 1
        moved[call.role] = (call.weights, count)
        found[call.order] = max(call.window, count)
    return found


def token_by_token(placed: Placed) -> bool:
    """Whether rows of one sample are trained at one token each, and no two of them at the same."""
    rows = placed.row_sample[placed.row_sample >= 0]
    if len(rows) == len(set(rows.tolist())):
        return False
    at = _trained(placed) & (placed.sample >= 0)
    pairs = list(zip(placed.sample[at].tolist(), placed.state[at].tolist(), strict=True))
    each = Counter(placed.call.rows.cpu().numpy()[at].tolist())
    return len(pairs) == len(set(pairs)) and set(each.values()) == {1}


def _trained(placed: Placed) -> Bools:
    """Where a gradient came back, (N,)."""
    call = placed.call
    gradient = call.gradient.get("scalar" if call.role == "value" else "others")
    return np.zeros(len(call.rows), dtype=bool) if gradient is None else (gradient != 0).cpu().numpy()


class Firsts:
    """The first update on each sample; on each token where minibatches are drawn from single tokens.

    Args:
        shape: (S, T) of the samples and their tokens.
        scattered: whether minibatches are drawn from tokens.
    """

    def __init__(self, shape: tuple[int, ...], *, scattered: bool) -> None:
        self.windows: Ints = np.full(shape[0], -1, dtype=np.int64)
        self.of_tokens: Ints | None = np.full(shape, -1, dtype=np.int64) if scattered else None

    def current(self, placed: Placed, window: int) -> Bools:
        """Which of a call's numbers, (N,), are of the first update on their sample, or token."""
        new = [s for s in set(placed.sample[placed.sample >= 0].tolist()) if self.windows[s] < 0]
        self.windows[new] = window
        if self.of_tokens is None:
            return np.isin(placed.sample, np.flatnonzero(self.windows == window))
        inside = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < self.of_tokens.shape[1])
        inside &= _trained(placed)
        where = placed.sample[inside], placed.state[inside]
        self.of_tokens[where] = np.where(self.of_tokens[where] < 0, window, self.of_tokens[where])
        found = np.zeros(len(inside), dtype=bool)
        found[inside] = self.of_tokens[where] == window
        return found

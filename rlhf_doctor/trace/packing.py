"""Rows that hold several texts each, taken apart: position ids that begin anew, or a mask of 1, 2, ….

Loops without padding put the texts of a micro-batch behind each other in one row (verl's remove_padding, OpenRLHF's
packing_samples, TRL's padding_free). Everything else here knows one text a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Unpacked", "unpack"]


@dataclass(frozen=True)
class Unpacked:
    """``ids`` and ``mask`` (S, W), a text a row; ``row`` and ``column`` (B, L) say where each packed token went."""

    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor


def unpack(ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Unpacked | None:
    """The texts of packed rows (B, L); None where no row holds several.

    What belongs to no text, as filler at a row's end, becomes a last row of its own, masked throughout.
    """
    if ids.shape[1] < 4:
        return None
    pieces = _by_mask(ids, mask) or _by_position(ids, positions, mask)
    if not pieces:
        return None
    row, column = (torch.full(ids.shape, -1, dtype=torch.long) for _ in range(2))
    for s, (b, start, end) in enumerate(pieces):
        row[b, start:end], column[b, start:end] = s, torch.arange(end - start)
    left = row < 0
    row[left], column[left] = len(pieces), torch.arange(int(left.sum()))
    texts = [ids[b, start:end] for b, start, end in pieces]
    texts += [ids[left.to(ids.device)]] if bool(left.any()) else []
    lengths = torch.tensor([len(text) for text in texts])
    width = int(lengths.max())
    filled = torch.stack([torch.cat([text, text[-1:].expand(width - len(text))]) for text in texts])
    held = torch.arange(width) < lengths[:, None]
    held[len(pieces) :] = False
    return Unpacked(filled, held.to(ids.device), row, column)


def _by_mask(ids: Tensor, mask: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, start, end) of every run of one number above 0, if a mask counts texts."""
    if mask is None or mask.shape != ids.shape or mask.is_floating_point() or mask.dtype == torch.bool:
        return []
    if int(mask.max()) < 2:
        return []
    runs = [(numbers, _runs(b, numbers, lambda before, now: before == now)) for b, numbers in enumerate(mask.tolist())]
    return [piece for numbers, pieces in runs for piece in pieces if numbers[piece[1]] > 0]


def _by_position(ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, start, end) of every run of positions 0, 1, 2, …, if a row has several of two tokens or more."""
    if positions is None or positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
        return []
    if len(positions) not in (1, len(ids)):
        return []
    real = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    counted = torch.where(real, positions.expand(ids.shape), -2).tolist()
    found = [
        [(b, a, e) for b, a, e in _runs(b, row, lambda before, now: now == before + 1) if row[a] == 0 and e - a > 1]
        for b, row in enumerate(counted)
    ]
    return [piece for pieces in found for piece in pieces] if any(len(pieces) > 1 for pieces in found) else []


def _runs(b: int, numbers: list[int], goes_on: Callable[[int, int], bool]) -> list[tuple[int, int, int]]:
    """(b, start, end) of the longest stretches in which each number goes on from the one before."""
    starts = [0, *(i for i in range(1, len(numbers)) if not goes_on(numbers[i - 1], numbers[i]))]
    return [(b, a, e) for a, e in zip(starts, [*starts[1:], len(numbers)], strict=True)]

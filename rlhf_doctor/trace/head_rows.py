"""Which token each row of a head's input belongs to, however a loop sliced it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlhf_doctor.trace.calls import Lookup

__all__ = ["grid_of", "rows_of"]


def grid_of(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The (row, column) of every token of a table (batch, length), each (batch * length,)."""
    return (
        torch.arange(batch).repeat_interleave(length),
        torch.arange(length).repeat(batch),
    )


def rows_of(given: Tensor | None, lookup: Lookup) -> tuple[Tensor, Tensor, bool] | None:
    """Which (row, column) of the ids each row of a head's input is; by shape, else by the hidden states' bits.

    The third says whether the bits agree, or nothing was known to compare with.
    """
    if given is None:
        return None
    with torch.no_grad(), torch._C.DisableTorchFunction():
        batch, length = lookup.ids.shape
        width = given.shape[-1]
        flat = given.detach().reshape(-1, width)
        hidden = lookup.hidden
        if hidden is None or hidden.shape[-1] != width:
            if len(flat) == batch * length:
                return *grid_of(batch, length), True
            return (torch.arange(batch), torch.full((batch,), length - 1), True) if len(flat) == batch else None
        time_first = hidden.dim() == 3 and hidden.shape[:2] == (length, batch) and batch != length
        seen = hidden.detach().to(given.dtype)
        seen = (seen.transpose(0, 1) if time_first else seen).reshape(batch * length, width)
        if time_first and given.dim() == 3 and given.shape[:2] == (length, batch):
            columns, rows = grid_of(length, batch)
            return rows, columns, True
        if len(flat) == batch * length and torch.equal(flat[:, :4], seen[:, :4]):
            return *grid_of(batch, length), True
        if given.dim() == 3 and given.shape[0] == batch:
            short, grid, few = given.shape[1], seen.reshape(batch, length, width), given.detach()[..., :4]
            for start in (length - short, length - short - 1, *range(length - short + 1)):
                if 0 <= start <= length - short and torch.equal(grid[:, start : start + short, :4], few):
                    rows, columns = grid_of(batch, short)
                    return rows, columns + start, True
            found = _matched_by_row(given.detach(), grid)
        else:
            found = _matched(flat, seen, length)
        if found is None:
            return (*grid_of(batch, length), False) if len(flat) == batch * length else None
        return *found, True


def _matched_by_row(given: Tensor, grid: Tensor) -> tuple[Tensor, Tensor] | None:
    """(b, t, D) gathered from (b, L, D) along its columns: row by row, by the bits of the first numbers."""
    found = []
    for few, row in zip(given[..., :4], grid[..., :4], strict=True):
        same = (few[:, None] == row[None]).all(-1)  # (t, L)
        columns = same.long().argmax(1)
        if not bool((same.sum(1) == 1).all()):
            matched = _matched(few, row, len(row))
            if matched is None:
                return None
            columns = matched[1]
        found.append(columns.cpu())
    columns = torch.cat(found)
    return torch.arange(len(given)).repeat_interleave(given.shape[1]), columns


def _matched(flat: Tensor, seen: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
    """Rows of ``flat`` found again among ``seen`` by their first numbers, in order where there is a choice."""
    few = min(4, flat.shape[1])
    places: dict[tuple[float, ...], list[int]] = {}
    for place, key in enumerate(map(tuple, seen[:, :few].float().cpu().tolist())):
        places.setdefault(key, []).append(place)
    found, last = [], -1
    for key in map(tuple, flat[:, :few].float().cpu().tolist()):
        left = places.get(key)
        if left is None:
            return None
        last = next((place for place in left if place > last), left[0])
        found.append(last)
    where = torch.tensor(found)
    return where // length, where % length

"""Rows that hold several texts are taken apart, and rows that hold one are left as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_doctor.trace.packing import unpack


def row(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


def test_positions_that_begin_anew() -> None:
    made = unpack(row(7, 8, 9, 4, 5, 0, 0), row(0, 1, 2, 0, 1, 0, 0), None)
    assert made is not None
    assert made.ids.tolist() == [[7, 8, 9], [4, 5, 5], [0, 0, 0]]
    assert made.mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert made.row.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert made.column.tolist() == [[0, 1, 2, 0, 1, 0, 1]]


def test_a_mask_that_counts_texts() -> None:
    made = unpack(row(7, 8, 9, 4, 5, 0), None, row(1, 1, 1, 2, 2, 0))
    assert made is not None
    assert made.ids[:2].tolist() == [[7, 8, 9], [4, 5, 5]]
    assert made.row.tolist() == [[0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        (row(0, 1, 2, 3, 4), None),
        (row(0, 0, 0, 1, 2), row(0, 0, 1, 1, 1)),  # left padding, clamped
        (row(1, 1, 0, 1, 2), row(0, 0, 1, 1, 1)),  # left padding, filled with 1
        (row(1, 1, 0, 1, 2), None),
        (row(0, 1, 2, 2, 2), row(1, 1, 1, 0, 0)),  # right padding
        (row(0, 1, 2, 0, 1), row(1, 1, 1, 0, 0)),  # what the mask hides is no text
        (None, row(1, 1, 1, 1, 0)),
        (None, None),
    ],
)
def test_one_text_a_row(positions: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    assert unpack(row(3, 4, 5, 6, 7), positions, mask) is None


@given(
    lengths=st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    filler=st.integers(0, 3),
)
def test_every_token_is_found_where_it_went(lengths: list[list[int]], filler: int) -> None:
    width = max(map(sum, lengths)) + filler
    ids = torch.arange(len(lengths) * width).view(len(lengths), width)
    positions = torch.zeros_like(ids)
    for b, texts in enumerate(lengths):
        at = 0
        for n in texts:
            positions[b, at : at + n] = torch.arange(n)
            at += n
    made = unpack(ids, positions, None)
    if all(len(texts) == 1 for texts in lengths) or width < 4:
        assert made is None
        return
    assert made is not None
    assert torch.equal(made.ids[made.row, made.column], ids)
    assert int(made.mask.sum()) == sum(map(sum, lengths))
    assert made.mask.sum(1)[: int(made.row.max()) + 1].tolist()[: sum(map(len, lengths))] == [
        n for texts in lengths for n in texts
    ]

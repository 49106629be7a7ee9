"""Where embeddings are, in modules that nobody's accessors describe; and what is just a cut of a head's numbers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from rlhf_doctor.trace.grown import fed_tokens
from rlhf_doctor.trace.parts import token_table
from rlhf_doctor.trace.samples import Special, continues, rest_of, without_filler
from rlhf_doctor.trace.taps import _cut_from


class Plain(nn.Module):
    def __init__(self, vocabulary: int, positions: int, *, tied: bool = False, head: bool = True) -> None:
        super().__init__()
        self.positions, self.words = nn.Embedding(positions, 8), nn.Embedding(vocabulary, 8)
        if head:
            self.out = nn.Linear(8, vocabulary, bias=False)
        if tied:
            self.out.weight = self.words.weight


def test_the_table_of_tokens_is_not_the_larger_one_of_positions() -> None:
    for model in (Plain(20, 64, tied=True), Plain(20, 64)):
        assert token_table(model)[0] is model.words.weight
    critic = Plain(20, 64, head=False)
    assert token_table(critic, 20)[0] is critic.words.weight
    assert token_table(critic)[0] is critic.positions.weight  # nothing tells


def test_a_cut_of_the_heads_numbers() -> None:
    head = SimpleNamespace(scalar=torch.arange(1.0, 13.0))
    whole = head.scalar.view(2, 6)
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    assert _cut_from(head, whole[:, 2:5] * mask, 2)
    assert not _cut_from(head, whole[:, 2:5] * 2, 2)
    assert not _cut_from(head, whole, 2)
    assert not _cut_from(head, torch.zeros(2, 3), 2)


def grown(*rows: list[list[int]]) -> list[SimpleNamespace]:
    return [SimpleNamespace(ids=torch.tensor(ids)) for ids in rows]


def test_rows_that_grow_each_at_its_own_place() -> None:
    calls = grown([[5, 6, 0], [7, 8, 9]], [[5, 6, 2, 0], [7, 8, 9, 3]], [[5, 6, 2, 4, 0], [7, 8, 9, 3, 1]])
    assert all(continues(calls[: i + 1], calls[i + 1]) for i in range(2))
    assert fed_tokens([c.ids.numpy() for c in calls]) == [[2, 4], [3, 1]]
    others = grown([[5, 6, 0], [7, 8, 9]], [[4, 4, 2, 0], [7, 8, 9, 3]])
    assert not continues(others[:1], others[1])


def test_a_prompt_that_is_fed_token_by_token() -> None:
    known = [(5, 6), (7, 8, 9)]
    assert rest_of((7, 8), [9, 3, 1], known) == 1
    assert rest_of((5, 6), [9, 3, 1], known) == 0
    assert rest_of((1, 2), [9, 3, 1], known) == 0


def test_pads_behind_a_row_that_reached_its_limit() -> None:
    pad = Special(0, frozenset({1})).pad
    assert without_filler((4, 5, 0, 0, 0), pad) == (4, 5)
    assert without_filler((4, 5, 0), pad) == (4, 5, 0)  # one may have been drawn
    assert without_filler((0, 0), pad) == (0, 0)

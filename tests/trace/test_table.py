"""How the recorded calls of a step are laid out by sample and response token."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from rlhf_doctor.trace.calls import Call, Lookup
from rlhf_doctor.trace.places import Places, complete_samples
from rlhf_doctor.trace.samples import Sample, Special, split_generation

SPECIAL = Special(0, frozenset({2}))


def passed(rows: list[list[int]]) -> Call:
    """A pass over these rows, without a mask."""
    ids = torch.tensor(rows)
    here = torch.arange(ids.numel())
    return Call("policy", 0, 0, Lookup(ids), here // ids.shape[1], here % ids.shape[1], True, False, 0)


def last_tokens(responses: list[list[int]], rows: list[list[int]]) -> list[tuple[int, ...]]:
    """The responses, after a pass over these rows, of samples whose last token was not seen when it was drawn."""
    samples = [Sample((7, 8), tuple(seen), False, False) for seen in responses]
    complete_samples(samples, [passed(rows)], SPECIAL)
    return [sample.response for sample in samples]


@pytest.mark.parametrize("last", [5, 6])
def test_a_response_may_end_in_the_same_token_twice(last: int) -> None:
    found = last_tokens([[4, 5], [3, 9]], [[7, 8, 4, 5, last], [7, 8, 3, 9, 4]])
    assert found == [(4, 5, last), (3, 9, 4)]


def test_what_is_gathered_past_the_end_is_no_token() -> None:
    # The passes are given everything but the last token, and the second row was moved to the left.
    found = last_tokens([[4, 5], [3]], [[7, 8, 4, 5], [7, 8, 3, 3]])
    assert found == [(4, 5), (3,)]


def test_tokens_stand_where_they_were_drawn() -> None:
    assert np.array_equal(last_tokens([[4]], [[7, 8, 4, 2]]), [(4, 2)])


def test_a_pad_that_was_drawn_as_a_token_may_be_masked() -> None:
    from rlhf_doctor.trace.draws import Chain, _strange

    def strange(trained: list[int]) -> int:
        asked = [passed([[7, 8]]), passed([[7, 8, 4]]), passed([[7, 8, 4, 0]])]
        drawn, columns = torch.tensor([[4, 0, 5]]).numpy(), torch.tensor([[1, 2, 3]]).numpy()
        chain = Chain(asked, drawn, columns, asked[-1])
        return len(_strange([passed([[7, 8, *trained]])], [chain], SPECIAL))

    assert strange([4, 0, 5]) == 0
    assert strange([4, 9, 5]) == 0
    assert strange([4, 9, 6]) == 1


def test_a_text_that_begins_another_is_found_where_its_response_begins() -> None:
    # Left-padded: 7 8 4 5 6 is the prompt 7 with four tokens, and 7 8 with the first three of four.
    samples = [
        Sample((7,), (8, 4, 5, 6), False, True),
        Sample((7, 8), (4, 5, 6, 9), False, True),
        Sample((5,), (9, 4, 3, 1), False, True),
    ]
    rows = np.array([[7, 8, 4, 5, 6, 9], [0, 7, 8, 4, 5, 6], [0, 5, 9, 4, 3, 1], [0, 7, 8, 4, 5, 6]])
    found = Places(samples, SPECIAL).find(rows, rows != 0, Counter())
    assert found == [(1, 0), (0, 1), (2, 1), (0, 1)]


def test_one_text_of_two_prompts_is_told_by_what_is_trained_or_by_its_row() -> None:
    samples = [Sample((7, 8), (4, 5, 2), True, True), Sample((7,), (8, 4, 5, 2), True, True)]
    places = Places(samples, SPECIAL)
    rows = np.array([[7, 8, 4, 5, 2], [7, 8, 4, 5, 2]])
    assert places.find(rows, None, Counter()) == [(0, 0), (1, 0)]
    assert places.find(rows[:1], None, Counter(), {0: 1}) == [(1, 0)]
    assert places.find(rows[:1], None, Counter(), {0: 2}) == [(0, 0)]


def test_prompts_of_one_word_do_not_go_on_a_text_that_grew() -> None:
    def asked(*rows: list[int]) -> list[Call]:
        calls = [passed([row]) for row in rows]
        for order, call in enumerate(calls):
            call.with_grad, call.order = False, order
        return calls

    whole = asked([7], [7, 4], [7, 4, 5], [8], [8, 4], [8, 4, 2])
    assert [[len(c.ids[0]) for c in episode] for episode in split_generation(whole)[0]] == [[1, 2, 3], [1, 2, 3]]
    cached = asked([7, 8], [4], [5], [2])
    assert [len(episode) for episode in split_generation(cached)[0]] == [4]

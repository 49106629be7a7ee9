"""The task: its gold score by hand, and that length tells nothing."""

import math
from random import Random

import pytest

from reference_impl import task


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("the fox is warm .", 1.0),
        ("the fox is warm and ugly .", 0.0),
        ("the fox is warm , bright and old . it is plain .", 0.5),
        ("the fox is ugly , cold and dirty .", -1.0),
        ("the dog is warm .", 0.0),  # about something else
        ("warm warm warm", 0.0),  # kind words, but no answer
        ("the fox is warm", 0.0),
        ("the fox is ugly", -2.0),
        ("", -1.0),
    ],
)
def test_gold_score_by_hand(response, gold):
    assert task.gold_score("describe the fox :", response) == gold


def test_the_optimum_is_reached_and_never_passed():
    best = "the fox is warm , bright and calm . it is gentle , lovely and cheerful ."
    assert task.gold_score("what is the fox like ?", best) == task.OPTIMUM == 1.0
    scores = [task.gold_score(*text) for text in task.demonstrations(500, Random(0))]
    assert min(scores) == -1
    assert max(scores) == 1
    assert abs(sum(scores) / 500) < 0.1


def test_demonstrations_are_well_formed_and_fit():
    for prompt, response in task.demonstrations(200, Random(1)):
        assert -1 <= task.gold_score(prompt, response) <= 1
        assert task.gold_score(prompt, response + " .") < 0.001  # one mark too many is malformed
        assert len(response.split()) + 1 <= task.RESPONSE_LENGTH


def test_preferences_follow_gold_and_not_length():
    pairs = task.preference_pairs(300, Random(2))
    for prompt, chosen, rejected in pairs:
        assert task.gold_score(prompt, chosen) > task.gold_score(prompt, rejected)
        assert len(chosen.split()) == len(rejected.split())


def test_the_annotator_errs_more_often_the_closer_two_answers_are():
    pairs = task.preference_pairs(6000, Random(3), noise=0.25)
    gaps = [task.gold_score(p, chosen) - task.gold_score(p, rejected) for p, chosen, rejected in pairs]
    for low, high in ((0.2, 0.3), (0.45, 0.55), (0.9, 1.1)):
        near = [gap for gap in gaps if low < abs(gap) < high]
        expected = sum(1 / (1 + math.exp(-abs(gap) / 0.25)) for gap in near) / len(near)
        right = sum(gap > 0 for gap in near) / len(near)
        assert len(near) > 300
        assert right == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / len(near)))
    assert {len(chosen.split()) - len(rejected.split()) for _, chosen, rejected in pairs} == {0}


def test_prompts_are_many_and_distinct():
    assert len(set(task.prompts())) == len(task.prompts()) == 64
    known = set(task.vocabulary())
    assert all(set(text.split()) <= known for pair in task.demonstrations(100, Random(4)) for text in pair)

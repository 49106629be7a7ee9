"""The checks of the reference, the KL and the penalties on training loops in other hands' styles, and of reward losses.

The faults that the checks ship with are tried with all others in test_selftest.py.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from loops.examined import STYLES, built, examined, names, one_thread, planted

from rlhf_doctor.finding import Finding
from rlhf_doctor.selftest import reward_losses
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

CODES = ("KLD002", "KLD003", "KLD004", "KLD005", "KLD006", "REF005", "REF006", "REW014")
PLANTED = planted(CODES)
# Known misses: an update by hand shows the first minibatch alone, and too few of its tokens.
MISSED = {("plain_modules", "kl_penalty_ten_times")}
pytestmark = pytest.mark.filterwarnings("ignore")


def findings(setup: RLHFSetup, codes: tuple[str, ...] = CODES) -> list[tuple[str, Finding]]:
    """(code, finding) of these checks."""
    with one_thread():
        return list(examined(setup, codes).findings)


@functools.cache
def of_style(style: str, fault: str | None) -> list[tuple[str, Finding]]:
    """What is found in a loop of this style."""
    return findings(built(style, fault))


@pytest.mark.parametrize("style", STYLES)
def test_sound_loops_are_silent(style: str) -> None:
    assert of_style(style, None) == []


@pytest.mark.parametrize(("style", "fault", "code", "role"), PLANTED, ids=names(PLANTED))
def test_planted_mistakes_are_found(style: str, fault: str, code: str, role: str) -> None:
    if (style, fault) in MISSED:
        pytest.xfail("a known miss")
    edge = getattr(importlib.import_module(f"loops.{style}"), "EDGE", set())
    if fault in edge - {"controller_told_the_token_mean"}:
        pytest.skip("an ordinary batch does not show it")
    told = {(c, f.role) for c, f in of_style(style, fault)}
    assert told & {(code, role), (code, "loop")}, told


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"whiten_rewards": True}, {"kl_coef": 0.001}], ids=str)
def test_reference_step_with_other_settings_is_silent(healthy: RLHFSetup, settings: dict[str, Any]) -> None:
    assert findings(reference_step(healthy, settings=settings)) == []


def test_an_adaptive_coefficient_is_silent(healthy: RLHFSetup) -> None:
    from rlhf_doctor.selftest import kl_faults

    assert findings(reference_step(healthy, control=kl_faults.controller())) == []


def test_a_kl_in_the_loss_is_silent(healthy: RLHFSetup) -> None:
    from rlhf_doctor.selftest import kl_faults

    assert findings(kl_faults.with_kl_in_the_loss(healthy, "k2")) == []


@pytest.mark.parametrize("k", ["naive", "detached", "pads"])
def test_reward_losses_are_told_apart(healthy: RLHFSetup, k: str) -> None:
    right, wrong = (reward_losses.pairwise(healthy.tokenizer, **more) for more in ({}, {k: True}))
    assert findings(healthy.but(reward_loss=right), ("REW015",)) == []
    assert [c for c, _ in findings(healthy.but(reward_loss=wrong), ("REW015",))] == ["REW015"]


def test_a_reward_loss_of_pairs_or_tensors_is_understood(healthy: RLHFSetup) -> None:
    tokenizer = healthy.tokenizer
    on_texts = reward_losses.pairwise(tokenizer)

    def of_pairs(model: Any, chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]) -> Any:
        sides = [[f"{prompt} {response}" for prompt, response in side] for side in (chosen, rejected)]
        return on_texts(model, *sides)

    def of_tensors(model: Any, chosen: Any, rejected: Any) -> Any:
        scores = [model(chosen_or["input_ids"], chosen_or["attention_mask"]).logits for chosen_or in (chosen, rejected)]
        return -torch.nn.functional.logsigmoid(scores[0] - scores[1]).mean()

    for loss in (of_pairs, of_tensors):
        assert findings(healthy.but(reward_loss=loss), ("REW015",)) == []

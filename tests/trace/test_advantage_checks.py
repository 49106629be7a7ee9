"""ADV001 to ADV010 on training loops in other hands' styles, sound ones and ones with a mistake in the advantages.

The faults that the checks ship with are tried with all others in test_selftest.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from loops.examined import STYLES, built, examined, grave, names, one_thread, planted

from rlhf_doctor.check import registry
from rlhf_doctor.finding import Finding, Severity
from rlhf_doctor.selftest import group_loop
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

CODES = tuple(code for code in registry() if code.startswith("ADV"))
# Here every score becomes 0 or is lost: nothing is left to tell it from a score that is not used.
SEEN_AS = {
    ("grpo_groups", "score_rounded"): "ADV008",
    ("joined_v_head", "score_in_the_last_column"): "ADV008",
    ("plain_modules", "text_scores_cut_to_whole_numbers"): "ADV008",
}
PLANTED = [(s, fault, SEEN_AS.get((s, fault), code), role) for s, fault, code, role in planted(CODES)]
pytestmark = pytest.mark.filterwarnings("ignore")


def findings(setup: RLHFSetup) -> list[tuple[str, Finding]]:
    """(code, finding) of these checks."""
    with one_thread():
        return list(examined(setup, CODES).findings)


@functools.cache
def of_style(style: str, fault: str | None, **more: Any) -> list[tuple[str, Finding]]:
    """What is found in a loop of this style."""
    return findings(built(style, fault, **more))


@pytest.mark.parametrize("style", STYLES)
def test_sound_loops_are_silent(style: str) -> None:
    assert of_style(style, None) == []


def test_a_sound_loop_with_a_reward_function_is_silent() -> None:
    assert of_style("plain_modules", None, reward="texts") == []


@pytest.mark.parametrize(("style", "fault", "code", "role"), PLANTED, ids=names(PLANTED))
def test_planted_mistakes_are_found_and_nothing_else(style: str, fault: str, code: str, role: str) -> None:
    found = of_style(style, fault)
    assert (code, role) in [(c, f.role) for c, f in found]
    assert {c for c, _ in grave(found)} <= {code}


def test_reference_step_is_silent(healthy: RLHFSetup) -> None:
    assert findings(reference_step(healthy)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"whiten_advantages": False},
        {"whiten_rewards": True},
        {"micro_batch_size": 4},
        {"gamma": 0.97, "lam": 1.0},
        {"lam": 0.0},
    ],
    ids=str,
)
def test_reference_step_with_other_settings_is_silent(healthy: RLHFSetup, settings: dict[str, Any]) -> None:
    assert findings(reference_step(healthy, settings=settings)) == []


def test_groups_of_the_reference_are_silent(healthy: RLHFSetup) -> None:
    assert findings(group_loop.setup(healthy, group_loop.own_group)) == []


def test_leave_one_out_adds_up_to_zero_too(healthy: RLHFSetup) -> None:
    def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.view(group_loop.PROMPTS, group_loop.SIZE)
        others = (grouped.sum(1, keepdim=True) - grouped) / (group_loop.SIZE - 1)
        return (grouped - others).flatten()

    assert findings(group_loop.setup(healthy, leave_one_out).but(declared={"algorithm": "rloo"})) == []


def test_whitening_in_each_minibatch_is_mentioned_only(healthy: RLHFSetup) -> None:
    from rlhf_doctor.selftest import advantage_faults

    setup = reference_step(
        healthy,
        parts={"policy_loss": advantage_faults.policy_loss_of(advantage_faults.white)},
        settings={"whiten_advantages": False},
        declared={"whiten_advantages": True},
    )
    assert [(code, finding.severity) for code, finding in findings(setup)] == [("ADV004", Severity.INFO)]


def test_a_score_one_slot_after_the_end_with_its_value_kept_is_mentioned_only(healthy: RLHFSetup) -> None:
    def one_later(r: Any, v: Any, mask: Any, gamma: float, lam: float) -> Any:
        """As in OpenAI's summarize-from-feedback: the slot after the end holds the score and its value."""
        from reference_impl import ops

        wide = mask | torch.nn.functional.pad(mask[:, :-1], (1, 0))
        last = mask.sum(1) - 1
        rows = torch.arange(len(r))
        moved = r.clone()
        short = last + 1 < r.shape[1]
        moved[rows[short], last[short] + 1] = moved[rows[short], last[short]]
        moved[rows[short], last[short]] = 0
        return ops.gae(moved, v, wide, gamma, lam).masked_fill(~mask, 0)

    found = findings(reference_step(healthy, parts={"gae": one_later}))
    assert {(code, finding.severity) for code, finding in found} == {("ADV002", Severity.INFO)}

"""VAL008 to VAL013, SYS008 and SYS009: the shipped faults, and loops that others wrote with mistakes in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops.examined import STYLES, built, examined, grave, names, one_thread, planted

from rlhf_doctor.finding import Skipped
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.selftest.run import Patients
from rlhf_doctor.selftest.value_faults import Remembered
from rlhf_doctor.setups import RLHFSetup

CODES = ("VAL008", "VAL009", "VAL010", "VAL011", "VAL012", "VAL013", "SYS008", "SYS009")
# What these draw with or count by is reached from the step and put back, so two runs from one state agree.
UNSEEN = (
    ("backbone_direct", "prompts_turn_on_between_steps"),
    ("lora_adapter_off", "prompts_from_an_unseeded_generator"),
    ("right_padded_sums", "cursor_is_not_in_the_state"),
)
PLANTED = planted(CODES, but=UNSEEN)


@pytest.fixture(autouse=True)
def _one_thread_and_own_seed() -> Any:
    with one_thread():
        yield


def told(setup: RLHFSetup) -> list[tuple[str, str]]:
    """(code, role) of what these checks say as errors or warnings."""
    return grave(examined(setup, CODES).findings)


@pytest.mark.parametrize("name", STYLES)
def test_healthy_loops_are_let_pass(name: str) -> None:
    assert told(built(name)) == []


@pytest.mark.parametrize(("name", "fault", "code", "role"), PLANTED, ids=names(PLANTED))
def test_faults_of_other_loops_are_found(name: str, fault: str, code: str, role: str) -> None:
    assert (code, role) in told(built(name, fault))


# --- what must not be taken for one of these ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0}, id="every state's return is the score"),
        pytest.param({"lam": 0.0}, id="one-step returns for both"),
        pytest.param({"whiten_rewards": True}, id="rewards scaled by their deviation"),
        pytest.param({"whiten_advantages": False}, id="advantages as they are"),
    ],
)
def test_settings_are_no_faults(settings: dict[str, Any], shared_patients: Patients) -> None:
    assert told(reference_step(shared_patients.healthy, settings=settings)) == []


def test_a_value_coefficient_of_zero_is_another_fault(shared_patients: Patients) -> None:
    found = examined(reference_step(shared_patients.healthy, settings={"vf_coef": 0.0}), CODES)
    assert found.findings == ()
    assert isinstance(found.outcomes["VAL009"], Skipped)


def test_constant_scores_that_are_used_are_another_fault(shared_patients: Patients) -> None:
    from reference_impl import rollout

    def constant(*args: Any, **options: Any) -> torch.Tensor:
        scores = rollout.score(*args, **options)
        return scores - scores.detach() + scores.detach().mean()

    def dropped(*args: Any, **options: Any) -> torch.Tensor:
        return torch.full_like(rollout.score(*args, **options), 0.5)

    healthy = shared_patients.healthy
    assert "VAL009" not in dict(told(reference_step(healthy, parts={"score": constant})))
    assert "VAL009" in dict(told(reference_step(healthy, parts={"score": dropped})))


def test_targets_that_follow_current_values_but_are_detached_pass(shared_patients: Patients) -> None:
    from reference_impl import ops

    made = Remembered(None)

    def value_loss(v: Any, old_v: Any, returns: Any, mask: Any, *rest: Any) -> Any:
        now = v.detach()
        target = ops.gae(made.r[made.rows(old_v)], now, mask, made.gamma, made.lam) + now
        return ops.clipped_value_loss(v, old_v, target, mask, *rest)

    assert told(reference_step(shared_patients.healthy, parts={**made.parts, "value_loss": value_loss})) == []


def test_a_critic_that_trains_on_the_state_after_the_end_passes(shared_patients: Patients) -> None:
    """As TRL does: the mask of its values is one longer."""
    from reference_impl import ops

    def value_loss(v: Any, old_v: Any, returns: Any, mask: Any, *rest: Any) -> Any:
        longer = mask | torch.cat([mask[:, :1], mask[:, :-1]], 1)
        return ops.clipped_value_loss(v, old_v, returns, longer, *rest)

    assert told(reference_step(shared_patients.healthy, parts={"value_loss": value_loss})) == []

"""ROL001 to ROL011 at the trace stage: the shipped faults, and loops that others wrote with mistakes in them."""

from __future__ import annotations

from typing import Any

import pytest
from loops.examined import STYLES, built, examined, grave, names, one_thread, planted

from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

CODES = ("ROL001", "ROL003", "ROL004", "ROL005", "ROL007", "ROL008", "ROL009", "ROL010", "ROL011")
PLANTED = planted(CODES)


@pytest.fixture(autouse=True)
def _one_thread_and_own_seed() -> Any:
    with one_thread(5):
        yield


def told(setup: RLHFSetup) -> list[tuple[str, str]]:
    """(code, role) of what these checks say as errors or warnings."""
    return grave(examined(setup, CODES).findings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"micro_batch_size": 3}, {"ppo_epochs": 1}])
def test_the_reference_is_silent(healthy: RLHFSetup, settings: dict[str, Any]) -> None:
    assert told(reference_step(healthy, settings=settings)) == []


@pytest.mark.parametrize("name", STYLES)
def test_loops_of_others_are_silent(name: str) -> None:
    assert told(built(name)) == []


@pytest.mark.parametrize(("name", "fault", "code", "role"), PLANTED, ids=names(PLANTED))
def test_mistakes_of_others_are_found(name: str, fault: str, code: str, role: str) -> None:
    assert (code, role) in told(built(name, fault))

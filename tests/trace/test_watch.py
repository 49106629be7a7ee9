"""A watched loop runs as it would without, and what is read off it is right."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

import rlhf_doctor
from rlhf_doctor.finding import Errored, Stage
from rlhf_doctor.report.record import record
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.watched import ONCE
from rlhf_doctor.watching import Exam, watch


def built(style: str) -> RLHFSetup:
    torch.manual_seed(3)
    return RLHFSetup.from_mapping(importlib.import_module(f"loops.{style}").build())


def trained(setup: RLHFSetup) -> list[torch.Tensor]:
    return [p.detach().clone() for m in (setup.policy, setup.value) for p in m.parameters()]


def iterate(setup: RLHFSetup, times: int) -> None:
    assert setup.step is not None
    torch.manual_seed(4)
    for _ in range(times):
        setup.step()


@pytest.fixture(scope="module", params=["backbone_direct", "plain_modules"])
def seen(request: pytest.FixtureRequest) -> tuple[str, RLHFSetup, Exam]:
    setup = built(request.param)
    with watch(setup) as exam:
        iterate(setup, 2)
    return request.param, setup, exam


def test_it_trains_bit_for_bit_as_unwatched(seen: tuple[str, RLHFSetup, Exam]) -> None:
    style, watched, exam = seen
    alone = built(style)
    iterate(alone, 2)
    assert exam.enough
    assert all(torch.equal(a, b) for a, b in zip(trained(watched), trained(alone), strict=True))


def test_nothing_is_left_in_the_program(seen: tuple[str, RLHFSetup, Exam]) -> None:
    _, setup, _ = seen
    assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    modules = [m for role in setup.present for m in setup.model(role).modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_healthy_loop_is_silent(seen: tuple[str, RLHFSetup, Exam]) -> None:
    """What needs the step to be run again says so, and no check stumbles over what is not there."""
    from rlhf_doctor.check import registry

    made = seen[2].examination
    stages = {code: c.stage for code, c in registry().items()}
    assert [f for code, f in made.findings if stages[code] is Stage.TRACE] == []
    assert [o for o in made.outcomes.values() if isinstance(o, Errored)] == []
    assert not made.errors
    shown = record(made)
    assert not shown["crashed"]
    assert shown["trace"]["unchanged"] == ONCE


def test_targets_are_read_off_by_regression() -> None:
    setup = built("right_padded_sums")
    with watch(setup) as exam:
        iterate(setup, 2)
    found = exam.traced().recovered
    assert found.gamma == pytest.approx(setup.declared["gamma"], abs=1e-4)
    assert found.lam == pytest.approx(setup.declared["lam"], abs=1e-4)
    gains = {name: edge.gain for name, edge in found.edges.items()}
    assert gains == {
        "reward → value target": pytest.approx(1, abs=1e-3),
        "reward → policy": pytest.approx(1, abs=1e-3),
        "value → advantage": pytest.approx(-1, abs=1e-3),
        "reference → reward": pytest.approx(setup.declared["kl_coef"], rel=1e-2),
        "reference → loss": None,
    }


def test_a_loop_can_be_ended_once_enough_was_seen() -> None:
    setup = built("backbone_direct")
    reached: list[int] = []
    with watch(setup, steps=1, stop_after=True) as exam:
        iterate(setup, 1)
        reached.append(1)
    assert exam.enough
    assert not reached
    assert sum(c.backwards > 0 for c in exam.run.calls) > 0


def test_errors_of_the_loop_pass_through() -> None:
    setup = RLHFSetup(policy=torch.nn.Linear(2, 2))
    seen: list[Exam] = []

    def loop() -> None:
        with watch(setup) as exam:
            seen.append(exam)
            with pytest.raises(RuntimeError, match="still being watched"):
                exam.examine()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert any("never called" in said for _, said in seen[0].examine(select=("ROL001",)).errors)


def test_it_is_exported_lazily() -> None:
    assert rlhf_doctor.watch is watch

"""ROL001 to ROL011 at the trace stage: the shipped faults, and loops that others wrote with mistakes in them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlhf_doctor.check import registry
from rlhf_doctor.examine import Options, examine
from rlhf_doctor.finding import Confidence, Errored, Severity, Stage
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

CODES = ("ROL001", "ROL003", "ROL004", "ROL005", "ROL007", "ROL008", "ROL009", "ROL010", "ROL011")
LOOPS = (
    "backbone_direct", "grpo_groups", "joined_v_head", "lora_adapter_off", "micro_batches", "plain_modules",
    "right_padded_sums", "trl_ppo",
)  # fmt: skip
NEEDS = {"lora_adapter_off": "peft", "trl_ppo": "trl"}
# Bent in a way that leaves the drawn tokens among the likely ones and the passes alike: nothing tells it apart.
UNSEEN: set[tuple[str, str]] = set()


def loop(name: str) -> Any:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return importlib.import_module(f"loops.{name}")


def faults() -> Iterator[Any]:
    """Every fault of the loops whose code is of this family, without importing what may not be installed."""
    for name in LOOPS:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            continue
        try:
            module = importlib.import_module(f"loops.{name}")
        except ImportError:
            continue
        for fault, (code, role) in module.FAULTS.items():
            if code in CODES and (name, fault) not in UNSEEN:
                yield pytest.param(name, fault, code, role, id=f"{name}-{fault}")


@pytest.fixture(autouse=True)
def _one_thread_and_own_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield
    torch.set_num_threads(threads)


def told(setup: RLHFSetup) -> list[tuple[str, str]]:
    """(code, role) of what these checks say as errors or warnings."""
    checks = registry()
    found = examine(setup, select=CODES, options=Options(stage=Stage.TRACE, show=False))
    assert [o.traceback for o in found.outcomes.values() if isinstance(o, Errored)] == []
    assert found.errors == ()
    return [
        (code, finding.role)
        for code, finding in found.findings
        if (finding.severity or checks[code].severity) is not Severity.INFO
        and finding.confidence is not Confidence.SUSPECTED
    ]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"micro_batch_size": 3}, {"ppo_epochs": 1}])
def test_the_reference_is_silent(healthy: RLHFSetup, settings: dict[str, Any]) -> None:
    assert told(reference_step(healthy, settings=settings)) == []


@pytest.mark.parametrize("name", list(LOOPS))
def test_loops_of_others_are_silent(name: str) -> None:
    assert told(RLHFSetup.from_mapping(loop(name).build(), origin=name)) == []


@pytest.mark.parametrize(("name", "fault", "code", "role"), list(faults()))
def test_mistakes_of_others_are_found(name: str, fault: str, code: str, role: str) -> None:
    assert (code, role) in told(RLHFSetup.from_mapping(loop(name).build(fault), origin=name))

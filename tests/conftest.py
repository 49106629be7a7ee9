"""Shared by all tests: how hard hypothesis works, the healthy setup, the command line in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

from rlhf_doctor.selftest.run import Patients, patients
from rlhf_doctor.setups import RLHFSetup

ROOT = Path(__file__).parent.parent

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the mistakes planted in loops of other hands, a few of each code run by default, each in another loop."""
    seen: set[tuple[str, str, str]] = set()
    kept: Counter[tuple[str, str]] = Counter()
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        style = given.get("style", given.get("name"))
        if not isinstance(given.get("fault"), str) or style is None:
            continue
        code = importlib.import_module(f"loops.{style}").FAULTS[given["fault"]][0]
        test = item.location[0] + getattr(item, "originalname", "")
        if (test, code, style) in seen or kept[test, code] >= (1 if "loops" in test else 2):
            item.add_marker(pytest.mark.exhaustive)
        else:
            kept[test, code] += 1
        seen.add((test, code, style))


@pytest.fixture(scope="session")
def shared_patients() -> Iterator[Patients]:
    """The built-in reference, trained once, in memory and saved; unchanged by every test."""
    with patients() as built:
        yield built
        assert built.fingerprint() == built.digest, "a test changed the shared healthy setup"


@pytest.fixture(scope="session")
def healthy(shared_patients: Patients) -> RLHFSetup:
    """The healthy setup in memory. Never change its models or tokenizer in place."""
    return shared_patients.healthy


@pytest.fixture
def healthy_files(shared_patients: Patients) -> Iterator[RLHFSetup]:
    """A fresh copy of the healthy setup as checkpoint folders, for the test to edit."""
    yield shared_patients.healthy_files
    shared_patients.drop_copies()


@pytest.fixture
def doctor(tmp_path: Path) -> Command:
    """``doctor("check", ...)`` runs the command line in ``tmp_path``, in a process of its own."""

    def run(*arguments: str | Path, timeout: float = 300, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments),
            cwd=cwd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def command_line(*arguments: str | Path) -> Sequence[str]:
    """The command that a user would type."""
    return [sys.executable, "-m", "rlhf_doctor", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment, with the sources importable where the package is not installed."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

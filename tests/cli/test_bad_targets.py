"""Whatever the code of a setup does, there is one sentence, exit code 2, and a report on everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SETUP = Path(__file__).parent.parent / "setups" / "misbehaving.py"
FEW = "VAL002,POL002,REW002,PRE004"


def examined(doctor: Any, name: str, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON report and stderr of an examination."""
    ran = doctor("check", f"{SETUP}:{name}", "--select", FEW, "-o", "out.json", "--format", "json", *more)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, json.loads((tmp_path / "out.json").read_text()), ran.stderr


def test_a_healthy_setup_of_plain_modules_that_prints_much(doctor: Any, tmp_path: Path) -> None:
    code, report, _ = examined(doctor, "prints_much", tmp_path)
    assert (code, report["errors"], report["findings"]) == (0, [], [])


FORWARD = {
    "raises": "raised in the forward pass: ZeroDivisionError: no such state",
    "returns_none": "the model returned None",
    "nan": "its output is NaN or infinite",
    "wrong_batch": "the first axis should be",
    "absurd_memory": "ran out of memory in the forward pass",
    "hangs": "gave no sign of life for 15 seconds (--timeout)",
    "exits": "raised in the forward pass: SystemExit: 4",
    "exits_at_once": "ended itself with exit code 5",
    "interrupts": "KeyboardInterrupt",
    "segfaults": "was killed by signal 11 (SIGSEGV",
    "is_killed": "was killed by signal 9 (SIGKILL, as happens where memory runs out)",
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_passes(doctor: Any, tmp_path: Path, name: str) -> None:
    code, report, _ = examined(doctor, name, tmp_path, "--timeout", "15" if name == "hangs" else "100")
    assert code == 2
    error = next(e for e in report["errors"] if FORWARD[name] in e["message"])
    assert error["role"] == "value"
    assert error["message"].startswith("value: ")
    assert "\n" not in error["message"]
    assert {e["role"] for e in report["errors"]} == {"value"}
    roles = report["setup"]["roles"]
    assert [roles[r]["emits"] for r in ("policy", "reference", "reward")] == [
        "vocabulary",
        "vocabulary",
        "scalar per sequence",
    ]
    assert all(roles[r]["influence"] for r in ("policy", "reference", "reward"))
    assert roles["value"]["class_name"] == "Misbehaving"
    assert "POL002" in {p["code"] for p in report["passed"]}
    found = {f["code"] for f in report["findings"]}
    assert found == {"nan": {"PRE004"}, "wrong_batch": {"VAL002"}}.get(name, set())


def test_two_roles_that_end_the_process(doctor: Any, tmp_path: Path) -> None:
    code, report, _ = examined(doctor, "two_roles_exit", tmp_path)
    assert code == 2
    assert {e["role"] for e in report["errors"]} == {"reward", "value"}
    assert report["setup"]["roles"]["policy"]["influence"]


LOADING = {
    "load_raises": "misbehaving.py:load_raises: RuntimeError: the data is gone (misbehaving.py, line",
    "load_exits": "misbehaving.py:load_exits: it called sys.exit('bye')",
    "load_exits_at_once": "ended itself with exit code 0 while loading the setup; "
    'the last it printed: "last words before the end"',
    "load_is_interrupted": "while loading the setup",
    "load_hangs": "gave no sign of life for 5 seconds (--timeout) while loading the setup",
    "load_gives_a_list": "misbehaving.py:load_gives_a_list gave list; it should give an RLHFSetup",
    "load_asks": "misbehaving.py:load_asks: EOFError",
    "helthy": "has no 'helthy'; did you mean 'healthy'?",
}


@pytest.mark.parametrize("name", LOADING)
def test_loading(doctor: Any, tmp_path: Path, name: str) -> None:
    code, report, _ = examined(doctor, name, tmp_path, "--timeout", "5")
    assert code == 2
    [error] = report["errors"]
    assert error["role"] == "setup"
    assert LOADING[name] in error["message"]
    assert "misbehaving.py" in error["message"]
    assert report["verdict"]["status"] == "unreadable"


@pytest.mark.parametrize("name", ["load_leaves_children", "load_closes_everything"])
def test_loading_that_does_odd_things_and_works(doctor: Any, tmp_path: Path, name: str) -> None:
    code, report, _ = examined(doctor, name, tmp_path)
    assert (code, report["errors"]) == (0, [])


def test_quiet_says_only_what_went_wrong(doctor: Any) -> None:
    ran = doctor("check", f"{SETUP}:load_raises", "-q", "--format", "json")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert "the data is gone" in ran.stderr

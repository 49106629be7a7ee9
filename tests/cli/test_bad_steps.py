"""Steps that misbehave: one sentence that says so, exit code 2, and the rest of the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command

SETUP = Path(__file__).parent.parent / "setups" / "misbehaving_steps.py"
SAID = {
    "raises_at_once": "loop: the step raised ZeroDivisionError: no batch left",
    "hangs": "gave no sign of life for",
    "ends_the_process": "ended itself with exit code 7 while running its training step",
    "trains_other_models": "it trains other modules than the setup's",
    "trains_copies_in_a_child": "it works in another process, or on a copy",
}


@pytest.mark.parametrize("name", SAID)
def test_a_misbehaving_step_is_one_sentence(name: str, doctor: Command, tmp_path: Path) -> None:
    limit = "8" if name == "hangs" else "60"
    ran = doctor("check", f"{SETUP}:{name}", "--format", "json", "-o", "out.json", "--timeout", limit, "-q")
    record = json.loads((tmp_path / "out.json").read_text())
    messages = [error["message"] for error in record["errors"]]
    assert any(SAID[name] in message for message in messages), messages
    assert ran.returncode in (1, 2), ran.stderr
    assert not record["crashed"]
    assert any(one["code"] == "POL001" for one in record["passed"])


def test_a_step_that_cannot_be_repeated_says_so(doctor: Command, tmp_path: Path) -> None:
    ran = doctor("check", f"{SETUP}:raises_in_the_second_run", "--format", "json", "-o", "out.json", "-q")
    record = json.loads((tmp_path / "out.json").read_text())
    told = json.dumps(record["errors"]) + json.dumps(record["findings"])
    assert "the data loader is empty" in told
    assert ran.returncode in (1, 2)
    assert not record["crashed"]


def test_a_model_that_the_step_never_calls(doctor: Command, tmp_path: Path) -> None:
    doctor("check", f"{SETUP}:no_reward_call", "--format", "json", "-o", "out.json", "-q")
    record = json.loads((tmp_path / "out.json").read_text())
    assert not record["crashed"]
    reasons = json.dumps(record["skipped"]) + json.dumps(record["findings"])
    assert "never calls the reward model" in reasons

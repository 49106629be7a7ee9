"""``rlhf-doctor watch -- python train.py``: the models are found, the report written, the program left as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Command, environment
from loops.backbone_direct import TEMPERATURE

from rlhf_doctor.watching_command import NotWatchable, planned

SCRIPT = ROOT / "tests" / "setups" / "watched_script.py"


def digest(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("digest "))


def test_a_program_is_watched_and_trains_on_bit_for_bit(doctor: Command, tmp_path: Path) -> None:
    select = ["--select", "ROL,VAL,LOS", "--format", "json", "-o", tmp_path / "report.json"]
    ran = doctor("watch", *select, "--set", f"temperature={TEMPERATURE}", "--", "python", SCRIPT)
    alone = subprocess.run(
        [sys.executable, SCRIPT], env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    assert digest(ran.stdout) == digest(alone.stdout)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {role: card["class_name"] for role, card in report["setup"]["roles"].items()} == {
        "policy": "LlamaForCausalLM",
        "reference": "LlamaForCausalLM",
        "reward": "LlamaForSequenceClassification",
        "value": "LlamaForSequenceClassification",
    }
    assert not report["crashed"]
    assert not report["errors"]
    assert ran.returncode == 0, report["findings"]
    assert {"ROL001", "ROL004", "ROL005"} <= {one["code"] for one in report["passed"]}
    assert any("a watched run is seen once" in one["reason"] for one in report["skipped"])


def test_a_program_that_fails_is_one_sentence_beside_the_report(doctor: Command, tmp_path: Path) -> None:
    select = ["--select", "ROL001", "--format", "json", "-o", tmp_path / "report.json"]
    ran = doctor(
        "watch", *select, "--set", f"temperature={TEMPERATURE}", "--", "python", SCRIPT, "--iterations", "1", "--fail"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert ran.returncode == 2
    assert [e["message"] for e in report["errors"]] == [
        "loop: the program raised RuntimeError: the disk is full; what was seen before is examined"
    ]
    assert "ROL001" in {one["code"] for one in report["passed"]}


def test_a_program_without_ppo_is_said_to_be_none(doctor: Command, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("print('hello')")
    ran = doctor("watch", "--format", "json", "-o", "-", "--", "hello.py")
    assert ran.returncode == 2
    assert "no PPO iteration was seen" in json.loads(ran.stdout)["errors"][0]["message"]
    assert "hello" in ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["torchrun", "--nproc-per-node", "2", "train.py"], "starts several processes"),
        (["accelerate", "launch", "train.py"], "starts several processes"),
        (["python", "-c", "print()"], "put it into a file"),
        (["python", "absent.py"], "there is no file"),
        (["python"], "no program to run"),
        (["bash", "run.sh"], "is no Python program"),
    ],
)
def test_what_cannot_be_watched(words: list[str], said: str) -> None:
    with pytest.raises(NotWatchable, match=said):
        planned(words)


def test_how_python_is_called_is_kept() -> None:
    assert planned(["python", "-u", "-X", "dev", "-m", "mine.train", "-x"]) == (
        [sys.executable, "-u", "-X", "dev"],
        ("-m", "mine.train", "-x"),
    )
    assert planned([str(SCRIPT), "--fail"]) == ([sys.executable], (str(SCRIPT), "--fail"))

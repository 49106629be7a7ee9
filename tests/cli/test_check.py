"""The main command, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import command_line, environment

SETUPS = Path(__file__).parent.parent / "setups"


def test_a_cnn_reward_and_a_gru_critic(doctor: Any, tmp_path: Path) -> None:
    """The case this tool was made for."""
    ran = doctor("check", f"{SETUPS / 'cnn_rnn_setup.py'}:build", "--format", "terminal,html,json", "-o", "out.html")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "REW001" in ran.stdout
    assert "VAL001" in ran.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert {f["code"] for f in report["findings"] if f["severity"] == "error"} == {"REW001", "VAL001"}
    assert [d["code"] for d in report["diagnosis"]] == ["REW001", "VAL001"]
    assert report["errors"] == []
    assert report["setup"]["roles"]["reward"]["kind"] == "convolutional"
    assert report["setup"]["roles"]["value"]["kind"] == "recurrent"
    assert "REW001" in (tmp_path / "out.html").read_text()
    assert report["environment"]["command"].startswith("rlhf-doctor check ")
    assert len(report["environment"]["inputs"][0]["sha256"]) == 64


def test_without_a_target_the_reference_is_examined_and_healthy(doctor: Any, tmp_path: Path) -> None:
    ran = doctor("check")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [page] = (tmp_path / "reports").glob("rlhf-doctor-reference-*.html")
    assert f"html: reports/{page.name}" in ran.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--fail-on", "warning"], 1),
        (["--strict"], 1),
        (["--fail-on", "info"], 1),
        (["--fail-on", "warning", "--ignore", "KLD001"], 0),
    ],
)
def test_exit_codes_follow_the_severity(doctor: Any, healthy_files: Any, options: list[str], code: int) -> None:
    folder = healthy_files.path("policy")
    chosen = ["--stage", "static", "--select", "KLD001", "--set", "kl_coef=0.05", "--set", "kl_in=none"]  # a warning
    ran = doctor("check", "--policy", folder, *chosen, "--format", "json", "-o", "-", *options)
    report = json.loads(ran.stdout)
    assert ran.returncode == code, [f["code"] for f in report["findings"]]


def test_a_missing_folder_is_named_and_the_other_roles_are_examined(doctor: Any, healthy_files: Any) -> None:
    policy, value = healthy_files.path("policy"), healthy_files.path("value")
    typo = policy.with_name("polcy")
    ran = doctor("check", "--policy", typo, "--value", value, "--stage", "static", "--format", "json", "-o", "-")
    report = json.loads(ran.stdout)
    assert ran.returncode == 2
    [error] = report["errors"]
    assert error["role"] == "policy"
    assert f"did you mean {policy}?" in error["message"]
    assert report["setup"]["roles"]["value"]["class_name"] == "LlamaForTokenClassification"


def test_what_is_set_is_declared(doctor: Any, healthy_files: Any) -> None:
    folder = healthy_files.path("policy")
    settings = ["--set", "gamma=0.99", "--set", "learning_rate=1e-6", "--set", "whiten_advantages=true"]
    ran = doctor("check", "--policy", folder, "--stage", "static", *settings, "--format", "json", "-o", "-")
    declared = json.loads(ran.stdout)["setup"]["declared"]
    assert declared == {"gamma": 0.99, "learning_rate": 1e-6, "whiten_advantages": True}


def test_an_unwritable_report(doctor: Any, healthy_files: Any, tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    ran = doctor("check", "--policy", healthy_files.path("policy"), "--stage", "static", "--format", "json,markdown",
                 "-o", "out.md")  # fmt: skip
    assert ran.returncode == 2
    assert "the report could not be written" in ran.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_examination_leaves_no_process(tmp_path: Path, number: int, code: int) -> None:
    mark = tmp_path / "alive"
    target = tmp_path / "slow.py"
    target.write_text(
        "import os, pathlib, time\n"
        "def build():\n"
        f"    pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    arguments = command_line("check", f"{target}:build", "--stage", "static", "--format", "json")
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    child = _wait_for(mark)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in said
    assert not _alive(child)


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    target = tmp_path / "slow.py"
    target.write_text(
        f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    arguments = command_line("check", target, "--stage", "static", "--format", "json")
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    child = _wait_for(mark)
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child)


def _wait_for(mark: Path) -> int:
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < deadline, "the child never started"
        time.sleep(0.05)
    return int(mark.read_text())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")  # a zombie awaits its reaper

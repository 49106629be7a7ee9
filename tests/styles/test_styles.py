"""Loops in the manner of well-known trainers, written without a look at how they are examined: sound ones are silent.

manifest.jsonl has a line for every build with the codes that its author expects.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.examine import Options
from rlhf_doctor.report.record import record

LINES = [json.loads(line) for line in (Path(__file__).parent / "manifest.jsonl").read_text().splitlines()]
SOUND = [line for line in LINES if not line["codes"]]
FAULTY = [line for line in LINES if line["codes"]]
# What is not found by the code that its author expects, and why.
MISSED: dict[tuple[str, str], str] = {}
FIRST = {line["file"]: line["build"] for line in reversed(FAULTY) if (line["file"], line["build"]) not in MISSED}


def name(line: dict[str, Any]) -> str:
    return f"{Path(line['file']).stem}-{line['build']}"


def said(line: dict[str, Any]) -> list[str]:
    """The code of every warning and error; a check that crashes fails the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build = getattr(importlib.import_module(f"styles.{Path(line['file']).stem}"), line["build"])
        found = record(examine(RLHFSetup.from_mapping(build()), options=Options(show=False)))
    finally:
        torch.set_num_threads(threads)
    assert not found["crashed"], found["crashed"]
    return [f["code"] for f in found["findings"] if f["severity"] != "info"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", SOUND, ids=name)
def test_sound_loops_are_silent(line: dict[str, Any]) -> None:
    assert said(line) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=() if FIRST.get(line["file"]) == line["build"] else pytest.mark.exhaustive)
        for line in FAULTY
        if (line["file"], line["build"]) not in MISSED
    ],
    ids=name,
)
def test_faults_are_found(line: dict[str, Any]) -> None:
    assert set(said(line)) & set(line["codes"])

"""Setups in other hands' styles: the offence beside each case leads the diagnosis, everything else is silent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreign import folders, plain
from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.report.record import record

EVERY: dict[str, Any] = {f"plain/{name}": made for name, made in plain.CASES.items()}
EVERY |= {f"folders/{name}": made for name, made in folders.CASES.items()}


@pytest.mark.parametrize("name", EVERY)
def test_diagnosis(name: str, tmp_path: Path) -> None:
    build, code, role = EVERY[name]
    made = examined(build if name.startswith("plain") else functools.partial(build, tmp_path))
    lines = [
        f"{f['code']} {f['role']} {f['severity']}: {f['message']}" for f in made["findings"] if f["severity"] != "info"
    ]
    assert not made["crashed"], made["crashed"]
    if code is None:
        assert lines == []
        assert made["errors"] == []
        return
    assert made["diagnosis"], f"{code} was expected; skipped: {[s for s in made['skipped'] if s['code'] == code]}"
    first = made["diagnosis"][0]
    assert first["code"] == code, lines
    assert role is None or first["role"] == role
    assert {d["code"] for d in made["diagnosis"]} == {code}, lines


def examined(build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return record(examine(RLHFSetup.from_mapping(build())))

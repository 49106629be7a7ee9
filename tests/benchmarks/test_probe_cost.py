"""The probe over four 124M checkpoints: memory of two models at most, time of three plain passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks import measure


@pytest.mark.slow
def test_probe_against_loading_and_one_pass(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark.pedantic(measure.probe_stage, args=(tmp_path,), rounds=1)
    assert found["probe"]["errors"] == []
    assert found["probe"]["crashed"] == []
    rows = measure.probe_rows(found)
    benchmark.extra_info.update({row.what: row.measured for row in rows})
    assert [row for row in rows if row.kept is False] == []

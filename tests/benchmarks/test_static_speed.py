"""The static stage over four 70B checkpoints: fast, small, and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks import folders, measure


@pytest.mark.slow
def test_static_against_the_meta_device(benchmark: Any, tmp_path: Path) -> None:
    found = benchmark.pedantic(measure.static_stage, args=(tmp_path,), rounds=1)
    assert found["inside"]["errors"] == []
    assert found["command"]["exit"] == 0
    rows = measure.static_rows(found)
    benchmark.extra_info.update({row.what: row.measured for row in rows})
    assert [row for row in rows if row.kept is False] == []


def test_the_70b_folders_are_what_they_say(tmp_path: Path) -> None:
    from rlhf_doctor.instruments.headers import read_checkpoint

    made = folders.write_70b(tmp_path)
    manifests = {role: read_checkpoint("policy", path) for role, path in made.items()}
    assert all(not manifest.problems for manifest in manifests.values())
    assert sum(manifests["policy"].weight_dtypes.values()) == 68_976_648_192  # Llama 2 70B
    assert all(len(list(path.glob("*.safetensors"))) == 29 for path in made.values())
    assert sum(file.stat().st_blocks * 512 for path in made.values() for file in path.iterdir()) < 32 << 20

"""What needs no model loads no torch, and starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import environment

HEAVY = ("torch", "transformers", "peft", "safetensors", "numpy")
PROBE = """
import json, sys
from rlhf_doctor.cli import cli
code = cli.main(json.loads(sys.argv[1]), prog_name="rlhf-doctor", standalone_mode=False)
sys.stderr.write("LOADED " + json.dumps([name for name in {heavy!r} if name in sys.modules]) + "\\n")
sys.exit(code or 0)
"""


def loaded_by(arguments: list[str], cwd: Path) -> tuple[list[str], str]:
    """The heavy modules that a command has imported, and its stdout."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), json.dumps(arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    line = next(line for line in ran.stderr.splitlines() if line.startswith("LOADED "))
    found: list[str] = json.loads(line.removeprefix("LOADED "))
    return found, ran.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["check", "--help"], ["rules"], ["explain", "VAL002"], ["version"], ["rules", "--format", "json"]],
)
def test_no_heavy_import(arguments: list[str], tmp_path: Path) -> None:
    assert loaded_by(arguments, tmp_path)[0] == []


def test_static_examination_of_folders_loads_no_torch(healthy_files: Any, tmp_path: Path) -> None:
    folders = [word for role in healthy_files.present for word in (f"--{role}", str(healthy_files.path(role)))]
    loaded, stdout = loaded_by(["check", "--stage", "static", *folders, "--format", "json", "-o", "-"], tmp_path)
    report = json.loads(stdout)
    assert loaded == []
    assert report["verdict"]["status"] == "healthy", report["verdict"]
    assert report["setup"]["roles"]["policy"]["class_name"] == "LlamaForCausalLM"
    assert {Path(row["path"]).name for row in report["environment"]["inputs"]} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("module", ["rlhf_doctor", "rlhf_doctor.supervise", "rlhf_doctor.worker", "reference_impl"])
def test_packages_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0

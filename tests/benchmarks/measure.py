"""Measure what the tool costs, each number in a process of its own, and write it into reports/benchmarks.md.

Run it from the repository's root: ``python tests/benchmarks/measure.py``. Times are compared within one run, so the
ratios hold on any machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import folders, sections  # noqa: E402  # found through the line above when this file is run as a script

from rlhf_doctor.instruments.inputs import PROBE_LENGTHS  # noqa: E402

COMMAND = "python tests/benchmarks/measure.py"
# Peak memory of this process since it began; unlike getrusage's it does not inherit the parent's.
PEAK = """
import json, sys, time
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
def now():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
"""
STATIC = """
started = time.perf_counter()
sys.argv = ["rlhf-doctor", "check", *FOLDERS, "--stage", "static", "--format", "json", "-q", "-o", OUTPUT]
from rlhf_doctor.cli import main
try:
    main()
except SystemExit as stop:
    code = stop.code
heavy = sorted({"torch", "transformers", "numpy", "peft"} & set(sys.modules))
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak(), "exit": code, "imported": heavy}))
"""
EXAMINE = """
from rlhf_doctor.check import registry
from rlhf_doctor.examine import Options, examine
from rlhf_doctor.facts import facts
from rlhf_doctor.finding import Stage
from rlhf_doctor.setups import RLHFSetup
registry(), facts()
started = time.perf_counter()
found = examine(RLHFSetup(**SETUP), options=Options(stage=Stage.STATIC))
print(json.dumps({"seconds": time.perf_counter() - started, "errors": found.errors, "ran": len(found.outcomes)}))
"""
META = """
started = time.perf_counter()
import torch, transformers
imported = time.perf_counter() - started
started = time.perf_counter()
for role, folder in SETUP.items():
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        getattr(transformers, config.architectures[0])._from_config(config)
print(json.dumps({"seconds": time.perf_counter() - started, "import": imported, "peak": peak()}))
"""
PROBE = """
import torch, transformers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification
baseline = now()
from rlhf_doctor.examine import Options, examine
from rlhf_doctor.setups import RLHFSetup
marks, begun = [], time.perf_counter()
def progress(*words):
    marks.append((" ".join(map(str, words)), time.perf_counter() - begun, now()))
started = time.perf_counter()
found = examine(RLHFSetup(**SETUP), options=Options(), progress=progress)
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak() - baseline, "errors": found.errors,
                  "crashed": [o.traceback for o in found.outcomes.values() if hasattr(o, "traceback")],
                  "found": [(c, f.role, f.message) for c, f in found.findings], "marks": marks}))
"""
PLAIN = """
import torch, transformers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification
from rlhf_doctor.instruments.loading import quiet
ids = torch.arange(4, 4 + 3 * LENGTH).reshape(3, LENGTH)
started = time.perf_counter()
for role, folder in SETUP.items():
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    with quiet():
        model = getattr(transformers, name).from_pretrained(folder)
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().sum().backward()
    del model
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


@dataclass(frozen=True)
class Row:
    """One promise and what was measured."""

    what: str
    target: str
    measured: str
    kept: bool | None


WORDS = {True: "yes", False: "**no**", None: "–"}


def child(code: str, **names: Any) -> dict[str, Any]:
    """What a fresh interpreter prints as its last line, as JSON, after these names are set and ``code`` is run."""
    header = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    done = subprocess.run(
        [sys.executable, "-c", PEAK + header + code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def fastest(code: str, **names: Any) -> dict[str, Any]:
    """The fastest of three such processes, and the highest peak of them: other work on the machine only adds."""
    runs = [child(code, **names) for _ in range(3)]
    return min(runs, key=lambda run: run["seconds"]) | {"peak": max(run.get("peak", 0) for run in runs)}


def texts(made: dict[str, Path]) -> dict[str, str]:
    return {role: str(path) for role, path in made.items()}


def static_stage(folder: Path) -> dict[str, Any]:
    """The static stage over four 70B checkpoints beside building the same four on the meta device."""
    made = texts(folders.write_70b(folder / "70b"))
    arguments = [part for role, path in made.items() for part in (f"--{role}", path)]
    report = str(folder / "static.json")
    child(STATIC, FOLDERS=arguments, OUTPUT=report)  # once for the disk cache and the compiled files
    return {
        "command": fastest(STATIC, FOLDERS=arguments, OUTPUT=report),
        "inside": fastest(EXAMINE, SETUP=made),
        "meta": fastest(META, SETUP=made),
    }


def probe_stage(folder: Path) -> dict[str, Any]:
    """The probe over four 124M checkpoints beside loading each and one forward and backward at its size."""
    made = texts(folders.write_124m(folder / "124m"))
    sizes = sorted((Path(path) / "model.safetensors").stat().st_size for path in made.values())
    return {
        "plain": fastest(PLAIN, SETUP=made, LENGTH=PROBE_LENGTHS[-1]),
        "probe": fastest(PROBE, SETUP=made),
        "two largest": sum(sizes[-2:]),
    }


def static_rows(found: dict[str, Any]) -> list[Row]:
    inside, meta, command = found["inside"]["seconds"], found["meta"]["seconds"], found["command"]
    whole, whole_meta = command["seconds"], meta + found["meta"]["import"]
    mb = command["peak"] / 1e6
    return [
        Row("static stage, four 70B checkpoints, against building them on the meta device, imports left out of both",
            "20 × faster", f"{meta / inside:.0f} × ({inside:.3f} s against {meta:.2f} s)", meta >= 20 * inside),
        Row("the same, whole commands, Python's start and all imports in both", "none set",
            f"{whole_meta / whole:.0f} × ({whole:.2f} s against {whole_meta:.2f} s)", None),
        Row("peak memory of `rlhf-doctor check --stage static` over them", "under 100 MB", f"{mb:.0f} MB", mb < 100),
        Row("torch, transformers, numpy or peft imported by it", "none", ", ".join(command["imported"]) or "none",
            not command["imported"]),
    ]  # fmt: skip


def probe_rows(found: dict[str, Any]) -> list[Row]:
    over, weights = found["probe"]["peak"], found["two largest"]
    seconds, plain = found["probe"]["seconds"], found["plain"]["seconds"]
    return [
        Row("probe over four 124M checkpoints: peak memory above importing torch and transformers, "
            "in weights of the two largest models", "at most 1.3",
            f"{over / weights:.2f} ({over / 1e6:.0f} MB of {weights / 1e6:.0f} MB)", over <= 1.3 * weights),
        Row("its time, in times of loading the four and one forward and backward each at the probe's size",
            "at most 3", f"{seconds / plain:.1f} ({seconds:.1f} s against {plain:.1f} s)", seconds <= 3 * plain),
    ]  # fmt: skip


def page(rows: list[Row]) -> str:
    """Its section of reports/benchmarks.md."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        "## What an examination costs",
        "",
        f"Measured with `{COMMAND}` on {cores} CPU cores, Python {platform.python_version()}. Each number is from",
        "fresh processes, times the fastest and memory the highest of three. Only the ratios mean anything on another",
        f"machine. The probe's size is {len(PROBE_LENGTHS)} sequences of {PROBE_LENGTHS[-1]} tokens.",
        "",
        "| what | target | measured | kept |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.target} | {row.measured} | {WORDS[row.kept]} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure everything, write the page, print it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = static_rows(static_stage(Path(folder))) + probe_rows(probe_stage(Path(folder)))
    sections.write("examination", page(rows))
    print(page(rows))
    sys.exit(1 if any(row.kept is False for row in rows) else 0)


if __name__ == "__main__":
    main()

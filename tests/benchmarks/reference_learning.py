"""Train the reference on five seeds, and on one without the KL penalty; write reports/reference.md and .html.

Run it from the repository's root: ``python tests/benchmarks/reference_learning.py``. With ``--keep DIR`` the runs stay
there, and those that are complete are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from reference_impl import curves  # noqa: E402  # found through the line above when this file is run as a script

COMMAND = "python tests/benchmarks/reference_learning.py"
SEEDS = range(5)
WITHOUT = "seed 0, no KL penalty"
Run = tuple[dict[str, float], list[dict[str, float]]]  # summary.json and metrics.jsonl


def run(out: Path, *options: str) -> Run:
    """One whole pipeline in a process of its own, unless the folder holds it already."""
    if not (out / "summary.json").exists():
        call = [sys.executable, "-m", "reference_impl", "--out", str(out), *options]
        subprocess.run(call, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


def mean(rows: list[dict[str, float]], name: str) -> float:
    """The metric's mean over these iterations."""
    return sum(row[name] for row in rows) / len(rows)


def span(rows: list[dict[str, float]]) -> str:
    """Which iterations these are."""
    return f"{rows[0]['step']:.0f} to {rows[-1]['step']:.0f}"


def kept(yes: bool) -> str:
    """A cell that says whether a requirement is met."""
    return "yes" if yes else "**no**"


def table(head: str, rows: list[list[Any]]) -> str:
    """A Markdown table; numbers get two digits after the point."""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    lines += ["| " + " | ".join(f"{x:z.2f}" if isinstance(x, float) else str(x) for x in row) + " |" for row in rows]
    return "\n".join(lines)


def report(runs: dict[str, Run]) -> str:
    """The Markdown page."""
    with_kl = {name: run for name, run in runs.items() if name != WITHOUT}
    seeds = table(
        "| run | gold before PPO | gold after | of the way to the optimum | reward model: accuracy on noisy labels "
        "| their ceiling | accuracy on clean labels | explained variance | KL, nats | CPU seconds |",
        [
            [name, s["gold_before"], s["gold_after"], f"{s['gain']:.1%}", f"{s['accuracy']:.1%}", f"{s['ceiling']:.1%}",
             f"{s['clean_accuracy']:.1%}", mean(rows[-10:], "explained_variance"), mean(rows[-10:], "kl"),
             round(s["cpu_seconds"])]
            for name, (s, rows) in with_kl.items()
        ],
    )  # fmt: skip
    least = min(s["gain"] for s, _ in with_kl.values())
    worst = max(s["ceiling"] - s["accuracy"] for s, _ in with_kl.values())
    critic = min(mean(rows[-10:], "explained_variance") for _, rows in with_kl.values())
    _, rows = runs[WITHOUT]
    parts = [rows[max(0, i - 10) : i] for i in range(10, len(rows) + 1, 10)]
    overdone = table(
        "| iterations | proxy | gold | KL, nats | entropy, nats a token |",
        [[span(part), *(mean(part, name) for name in ("score", "gold", "kl", "entropy"))] for part in parts],
    )
    seconds = [s["seconds"] for s, _ in with_kl.values()]
    slowest, fastest, minutes = max(seconds), min(seconds), sum(s["cpu_seconds"] for s, _ in runs.values()) / 60
    best = max(parts, key=lambda part: mean(part, "gold"))
    return f"""# What the reference learns

Measured with `{COMMAND}` on {os.cpu_count()} CPU cores, one thread a run, Python {platform.python_version()},
torch {torch.__version__}. Every number is from that one command; the curves are in [reference.html](reference.html).

The task is `reference_impl/task.py`: answers whose gold score is known, 1 at the optimum. PPO never sees it. It sees a
reward model ("proxy") that was trained on pairs with noisy labels, all of them well-formed answers of equal length.
The settings were chosen on seeds from 101 up, and these are seeds 0 to 4. All six runs took {minutes:.0f} minutes
of one core. On the clock a run took {fastest:.0f} to {slowest:.0f} s, as there was other work on the machine.

{seeds}

Gold before and after is the mean over 512 fresh responses. The critic's explained variance and the KL are means over
the last 10 iterations.

| required | measured | kept |
|---|---|---|
| at least 90% of the way from SFT to the optimum, on each seed | {least:.1%} at least | {kept(least >= 0.9)} |
| reward model within 3 points of the noisy labels' ceiling | {100 * worst:.1f} points at most | {kept(worst <= 0.03)} |
| critic's explained variance above 0.5 at the end | {critic:.2f} at least | {kept(critic > 0.5)} |

## Without the KL penalty

The same command with `--kl-coef 0` and more iterations. Gold is highest in iterations {span(best)}, at
{mean(best, "gold"):.2f}; at the end it is {mean(parts[-1], "gold"):z.2f}, while the proxy went on from
{mean(best, "score"):.2f} to {mean(parts[-1], "score"):.2f}. The reward model has never seen a malformed answer,
and takes some for better than the best.

{overdone}
"""


def main() -> None:
    """Runs what is missing, then writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the runs (default: a temporary one)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = parser.parse_args().keep or Path(temporary)
        runs = {f"seed {seed}": run(folder / f"seed-{seed}", "--seed", str(seed)) for seed in SEEDS}
        runs[WITHOUT] = run(folder / "no-kl", "--kl-coef", "0", "--iterations", "120")
    (ROOT / "reports" / "reference.md").write_text(report(runs))
    rows = {name: rows for name, (_, rows) in runs.items()}
    note = f"Five seeds of the built-in task with the KL penalty, and one without it. Made by {COMMAND}."
    (ROOT / "reports" / "reference.html").write_text(curves.page("What the reference learns", note, rows))


if __name__ == "__main__":
    main()

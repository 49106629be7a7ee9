"""Measure what is found of the corpus, and what is said of sound setups: writes reports/detection.md and .html.

Run it from the repository's root: ``python tests/corpus/report.py``. Every number in the report is a count, so the same
code gives the same report. It takes the better part of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jinja2  # noqa: E402  # after the path, as what is below

from corpus.case import bugs, cases  # noqa: E402
from corpus.healthy import ZOO  # noqa: E402
from corpus.judge import ORDER, Said, examined, failures, judge, seeded, sound, told  # noqa: E402
from corpus.pairs import Both, drawn, judge_both  # noqa: E402
from rlhf_doctor.finding import Severity, Stage  # noqa: E402

HERE = Path(__file__).parent
SEEDS = range(5)
PAIRS = 200
COMMAND = "python tests/corpus/report.py"
Row = dict[str, Any]
_GIVEN: dict[str, Any] = {}


# ---- measuring -------------------------------------------------------------------------------------------------------


def reasons() -> Mapping[str, str]:
    """Why a case is missed, by its name."""
    return json.loads((HERE / "misses.json").read_text("utf-8"))  # type: ignore[no-any-return]


def _begin() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = sound()
    _GIVEN["given"], _GIVEN["context"] = context.__enter__(), context


def case_row(name: str) -> Row:
    """One case, judged."""
    case = next(one for one in cases() if one.name == name)
    said: Said = judge(case, _GIVEN["given"])
    _GIVEN["given"].shared.drop_copies()
    wanted = {
        "case": name,
        "bug": case.bug,
        "carrier": case.carrier,
        "fault": case.fault,
        "stage_wanted": str(case.stage),
    }
    return {**wanted, "codes": list(case.codes), "roles": list(case.roles), **asdict(said)}


def sound_row(job: tuple[str, int]) -> Row:
    """One sound setup with one seed."""
    name, seed = job
    seeded(seed)
    found, passes, steps = examined(ZOO[name].setup(_GIVEN["given"], seed), seed)
    from_files, *_ = examined(ZOO[name].setup(_GIVEN["given"], seed), seed, Stage.STATIC)
    _GIVEN["given"].shared.drop_copies()
    shown = [*told(found)[0], *told(from_files)[0]]
    alarms = [f"{code} {role}" for code, role, severity in shown if severity is not Severity.INFO]
    infos = sorted({f"{code} {role}" for code, role, severity in shown if severity is Severity.INFO})
    return {
        "name": name,
        "seed": seed,
        "alarms": [*alarms, *failures(found)],
        "infos": infos,
        "passes": passes,
        "steps": steps,
    }


def pair_row(job: tuple[str, str]) -> Row | None:
    """One pair of faults, None where one hides the other from every instrument."""
    one, other = (next(c for c in cases() if c.name == name) for name in job)
    both: Both | None = judge_both(one, other, _GIVEN["given"])
    return None if both is None else asdict(both)


def measured(workers: int, what: Callable[[Any], Any], jobs: Sequence[Any], kept: Path) -> list[Any]:
    """The rows of all jobs, in their order, made in so many processes; those that ``kept`` has are taken from there."""
    lines = kept.read_text("utf-8").splitlines() if kept.exists() else []
    rows = {json.dumps(job): row for job, row in map(json.loads, lines)}
    missing = [job for job in jobs if json.dumps(job) not in rows]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin) as pool, kept.open("a", encoding="utf-8") as file:
        for n, (job, row) in enumerate(zip(missing, pool.map(what, missing), strict=True), 1):
            rows[json.dumps(job)] = row
            file.write(json.dumps([job, row]) + "\n")
            file.flush()
            print(f"\r{kept.stem}: {n} of {len(missing)}", end="", file=sys.stderr, flush=True)
    return [rows[json.dumps(job)] for job in jobs]


def jobs_of_pairs(count: int) -> list[tuple[str, str]]:
    """More pairs than are wanted, since some hide each other."""
    with sound() as given:
        return [(one.name, other.name) for one, other in drawn(count, 0, given)]


# ---- counting --------------------------------------------------------------------------------------------------------


def wilson(good: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    if not of:
        return 0.0, 1.0
    share = good / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(good: int, of: int) -> str:
    """``12 of 13, 92% (67 to 99%)``."""
    low, high = wilson(good, of)
    return f"{good} of {of}, {good / of:.0%} ({low:.0%} to {high:.0%})" if of else "none"


def totals(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What is promised of the corpus, measured."""
    of = len(rows)
    return [
        ("found by a right code in the right role", share(sum(r["found"] for r in rows), of)),
        ("first in the diagnosis", share(sum(r["first"] for r in rows), of)),
        ("found by the cheapest stage that its record names, or earlier", share(sum(r["in_time"] for r in rows), of)),
    ]


def grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[str, str, str, str]]:
    """(group, found, first, forward passes and steps) of each group."""
    names = sorted({key(r) for r in rows})
    return [
        (
            name,
            share(sum(r["found"] for r in mine), len(mine)),
            share(sum(r["first"] for r in mine), len(mine)),
            cost(mine),
        )
        for name in names
        if (mine := [r for r in rows if key(r) == name])
    ]


def cost(rows: Sequence[Row]) -> str:
    """Forward passes and steps of an examination, the medians."""
    return " and ".join(f"{statistics.median(r[name] for r in rows):.0f}" for name in ("passes", "steps"))


def unexplained(rows: Sequence[Row]) -> list[Row]:
    """Sound setups that users took for bugs, and that no info explains."""
    return [
        r for r in rows if (codes := ZOO[r["name"]].explained) and not any(i.split()[0] in codes for i in r["infos"])
    ]


# ---- writing ---------------------------------------------------------------------------------------------------------


def page(found: Sequence[Row], quiet: Sequence[Row], pairs: Sequence[Row]) -> dict[str, Any]:
    """Everything that both forms of the report show."""
    why = reasons()
    return {
        "command": " ".join([COMMAND, *(f"--{name} {of}" for name, of, all_ in _measured(quiet, pairs) if of != all_)]),
        "totals": [
            *totals(found),
            ("false alarms on sound setups (setup and seed)", share(sum(bool(r["alarms"]) for r in quiet), len(quiet))),
            ("normal things explained by an info", share(*_explained(quiet))),
            ("two faults at once: each of them a root", share(sum(all(r["roots"]) for r in pairs), len(pairs))),
            ("two faults at once: each of them told", share(sum(all(r["told"]) for r in pairs), len(pairs))),
        ],
        "counts": (
            len(found),
            len({r["bug"] for r in found}),
            len({r["name"] for r in quiet}),
            len({r["seed"] for r in quiet}),
            len(pairs),
        ),
        "stages": sorted(grouped(found, lambda r: r["stage_wanted"]), key=lambda g: ORDER.index(Stage(g[0]))),
        "families": grouped(found, lambda r: r["codes"][0][:3]),
        "cases": [{**r, "url": bugs()[r["bug"]].url, "why": why.get(r["case"], "")} for r in found],
        "quiet": [
            _of_sound(name, [r for r in quiet if r["name"] == name]) for name in dict.fromkeys(r["name"] for r in quiet)
        ],
        "pairs": [r for r in pairs if not all(r["roots"])],
        "left_out": [one for one in bugs().values() if one.left_out],
    }


def _measured(quiet: Sequence[Row], pairs: Sequence[Row]) -> list[tuple[str, int, int]]:
    """How many seeds and pairs were measured, and how many there are by default."""
    return [("seeds", len({r["seed"] for r in quiet}), len(SEEDS)), ("pairs", len(pairs), PAIRS)]


def _explained(rows: Sequence[Row]) -> tuple[int, int]:
    of = [r for r in rows if ZOO[r["name"]].explained]
    return len(of) - len(unexplained(rows)), len(of)


def _of_sound(name: str, rows: Sequence[Row]) -> Row:
    return {
        "name": name,
        "thread": ZOO[name].thread,
        "seeds": len(rows),
        "alarms": sorted({a for r in rows for a in r["alarms"]}),
        "infos": sorted({i for r in rows for i in r["infos"]}),
        "cost": cost(rows),
    }


def rendered(content: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=lambda name: str(name).endswith(".html.j2"),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return {f"detection.{kind}": made.get_template(f"detection.{kind}.j2").render(content) for kind in ("md", "html")}


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of each sound setup")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of faults at once")
    parser.add_argument("--out", type=Path, default=ROOT / "reports")
    parser.add_argument("--rows", type=Path, help="a folder to keep what is measured in: a stopped run goes on there")
    given = parser.parse_args(None if arguments is None else list(arguments))
    with tempfile.TemporaryDirectory() as temporary:
        rows = given.rows or Path(temporary)
        rows.mkdir(parents=True, exist_ok=True)
        seeds = [(name, seed) for seed in SEEDS[: given.seeds] for name in ZOO]
        found = measured(given.workers, case_row, [one.name for one in cases()], rows / "faults.jsonl")
        quiet = measured(given.workers, sound_row, seeds, rows / "sound.jsonl")
        both = measured(given.workers, pair_row, jobs_of_pairs(given.pairs + given.pairs // 3), rows / "pairs.jsonl")
    pairs = [row for row in both if row is not None][: given.pairs]
    for name, text in rendered(page(found, quiet, pairs)).items():
        (given.out / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

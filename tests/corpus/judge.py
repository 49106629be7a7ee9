"""What an examination says of a setup, beside what it should say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from corpus.case import Case
from rlhf_doctor.check import registry
from rlhf_doctor.diagnosis import diagnose
from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import Confidence, Errored, Severity, Stage
from rlhf_doctor.selftest.run import Patients, patients, quiet_libraries
from rlhf_doctor.setups import RLHFSetup

ORDER = tuple(Stage)


class Given(Mapping[str, Any]):
    """What cases start from: the built-in reference in memory, a copy of it as folders, an empty folder."""

    def __init__(self, shared: Patients, folder: Path) -> None:
        self.shared, self.folder, self.made = shared, folder, 0

    def __getitem__(self, name: str) -> Any:
        if name == "tmp_path":
            self.made += 1
            path = self.folder / str(self.made)
            path.mkdir()
            return path
        return getattr(self.shared, name)

    def __iter__(self) -> Iterator[str]:
        return iter(("healthy", "healthy_files", "tmp_path"))

    def __len__(self) -> int:
        return 3


@contextmanager
def sound(shared: Patients | None = None) -> Iterator[Given]:
    """What cases start from; its folders are deleted afterwards."""
    with TemporaryDirectory() as folder, quiet_libraries():
        if shared is not None:
            yield Given(shared, Path(folder))
            return
        with patients() as made:
            yield Given(made, Path(folder))


@dataclass(frozen=True)
class Said:
    """What was said: ``found`` by an accepted code in the right role, ``first`` in the diagnosis, at which stage."""

    found: bool
    first: bool
    code: str
    stage: str
    in_time: bool
    roots: tuple[str, ...]
    all: tuple[str, ...]
    infos: tuple[str, ...]
    failed: tuple[str, ...]
    passes: int
    steps: int


def seeded(seed: int) -> None:
    """Every global generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the forward passes of whole models: of modules that no other module is in the middle of calling."""
    found, depth = {"passes": 0}, [0]

    def enter(module: Any, args: Any) -> None:
        depth[0] += 1
        found["passes"] += depth[0] == 1

    def leave(module: Any, args: Any, output: Any) -> None:
        depth[0] -= 1

    before = torch.nn.modules.module.register_module_forward_pre_hook(enter)
    after = torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield found
    finally:
        before.remove()
        after.remove()


def examined(setup: RLHFSetup, seed: int = 0, stage: Stage = Stage.TRACE) -> tuple[Examination, int, int]:
    """(the examination up to a stage, forward passes, steps); one thread, every generator seeded."""
    steps: SimpleQueue[None] = SimpleQueue()  # which is nothing that an examination puts back

    def step() -> Any:
        steps.put(None)
        return setup.step()  # type: ignore[misc]  # only used where there is one

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seeded(seed)
    try:
        with counted() as passes:
            found = examine(
                setup if setup.step is None else setup.but(step=step),
                options=Options(stage, seed=seed, show=False),
            )
    finally:
        torch.set_num_threads(threads)
    return found, passes["passes"], steps.qsize()


def told(found: Examination) -> tuple[list[tuple[str, str, Severity]], list[tuple[str, str]]]:
    """(every (code, role, severity) that a person is shown, the roots of the diagnosis as (code, role))."""
    checks = registry()
    shown = [(code, one) for code, one in found.findings if one.confidence is not Confidence.SUSPECTED]
    severities = [one.severity or checks[code].severity for code, one in shown]
    roots = [(shown[root.index][0], str(shown[root.index][1].role)) for root in diagnose(shown, severities)]
    return [(code, one.role, severity) for (code, one), severity in zip(shown, severities, strict=True)], roots


def failures(found: Examination) -> tuple[str, ...]:
    """What could not be judged, and checks that crashed."""
    crashed = [f"{o.code} crashed: {o.traceback[-600:]}" for o in found.outcomes.values() if isinstance(o, Errored)]
    return (*(f"error: {sentence}" for _, sentence in found.errors), *crashed)


def _right(case: Case, shown: Sequence[tuple[str, str, Severity]]) -> list[str]:
    """The accepted codes among what a person is shown, in an accepted role."""
    return [
        code
        for code, role, severity in shown
        if severity is not Severity.INFO and code in case.codes and role in case.roles
    ]


def judge(case: Case, given: Mapping[str, Any], seed: int = 0) -> Said:
    """Examine a case with every check; once more without later stages where a check says that it may do without."""
    seeded(seed)
    found, passes, steps = examined(case.setup(given), seed)
    shown, roots = told(found)
    checks = registry()
    grave = [(code, role) for code, role, severity in shown if severity is not Severity.INFO]
    right = _right(case, shown)
    first = min(right, key=lambda code: ORDER.index(checks[code].stage), default="")
    stage = checks[first].stage if first else None
    for code in right:
        early = checks[code].early
        if early is not None and stage is not None and ORDER.index(early) < ORDER.index(stage):
            seeded(seed)
            if code in _right(case, told(examined(case.setup(given), seed, early)[0])[0]):
                first, stage = code, early
    return Said(
        found=bool(right),
        first=bool(roots) and roots[0][0] in case.codes and roots[0][1] in case.roles,
        code=first,
        stage=str(stage or ""),
        in_time=stage is not None and ORDER.index(stage) <= ORDER.index(case.stage),
        roots=tuple(f"{code} {role}" for code, role in roots),
        all=tuple(f"{code} {role}" for code, role in grave),
        infos=tuple(f"{code} {role}" for code, role, severity in shown if severity is Severity.INFO),
        failed=failures(found),
        passes=passes,
        steps=steps,
    )

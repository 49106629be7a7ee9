"""The process in which the code of a setup runs: ``python -m rlhf_doctor.worker FOLDER``.

FOLDER holds ``job.json``, a ``Job``. What happens is appended to ``events.jsonl`` there, one object a line: ``phase``
(starting, loading, examining), ``measuring`` (role or "setup", fact) and at last ``record``, the report record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_doctor.finding import Stage

__all__ = ["EVENTS", "JOB", "Job", "examined", "run"]

JOB, EVENTS = "job.json", "events.jsonl"


@dataclass(frozen=True)
class Job:
    """What to examine and how, as plain JSON data; see ``load_setup``, ``Options`` and ``record`` for the fields."""

    targets: tuple[str, ...] = ()
    folders: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, Any] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    stage: str = Stage.TRACE
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False
    suspected: bool = False
    command: str = ""
    started: str = ""
    excluded: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The targets as the user wrote them."""
        return ", ".join([*self.targets, *(f"--{role} {path}" for role, path in self.folders.items())])


class Events:
    """Appends events to a file that is opened anew for each, so that no code of the setup can close it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, **event: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def phase(self, name: str) -> None:
        """loading, or examining."""
        self(phase=name)

    def measuring(self, text: str) -> None:
        """``value: output``, as ``examine`` reports it."""
        role, _, fact = text.partition(": ")
        self(measuring=[role, fact])


def examined(job: Job, phase: Callable[[str], None], measuring: Callable[[str], None]) -> dict[str, Any]:
    """The report record of a job, examined in this very process; ``phase`` and ``measuring`` are told how far it is."""
    from rlhf_doctor.examine import Options, examine
    from rlhf_doctor.report.record import read_inputs, record, unreadable
    from rlhf_doctor.sources import UnreadableTarget, load_setup
    from rlhf_doctor.sources.checkpoints import files_of

    stage = Stage(job.stage)
    phase("loading")
    try:
        _check_device(job)
        setup = load_setup(*job.targets, **job.folders, declared=job.declared, trust_remote_code=job.trust_remote_code)
    except UnreadableTarget as error:
        return unreadable("setup", str(error), origin=job.name, command=job.command, started=job.started)
    phase("examining")
    options = Options(stage=stage, seed=job.seed, device=job.device, dtype=job.dtype, excluded=job.excluded)
    examination = examine(setup, select=job.select, ignore=job.ignore, options=options, progress=measuring)
    return record(
        examination,
        command=job.command,
        started=job.started,
        inputs=read_inputs(files_of(setup)),
        suspected=job.suspected,
    )


def _check_device(job: Job) -> None:
    from rlhf_doctor.sources import UnreadableTarget

    if job.stage == Stage.STATIC or job.device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=job.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on the device
        said = " ".join(str(error).split())[:200]
        raise UnreadableTarget(f"--device {job.device}: torch cannot use this device here ({said})") from error


def run(folder: Path) -> None:
    """Examine the job in ``folder`` and leave the process, whatever threads the setup has started."""
    job = Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    emit = Events(folder / EVENTS)
    emit(phase="starting")
    _die_first()
    _die_with(os.getppid())
    _keep_importable(job)
    if job.stage != Stage.STATIC:
        import torch  # noqa: F401  # its import is not the setup's time
    try:
        emit(record=examined(job, emit.phase, emit.measuring))
    except Exception:
        emit(crash=traceback.format_exc())
    _flushed_exit()


def _die_first() -> None:
    """Where memory runs out, Linux ends this process rather than the one that writes the report."""
    with contextlib.suppress(OSError):  # other systems have no such file
        Path("/proc/self/oom_score_adj").write_text("1000")


def _die_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep_importable(job: Job) -> None:
    """Code of the setup may import its neighbours late, in a forward pass."""
    from rlhf_doctor.sources.python_file import import_folders, is_python_target

    for target in reversed(job.targets):
        if is_python_target(target):
            sys.path[:0] = import_folders(target)


def _flushed_exit() -> None:
    with contextlib.suppress(OSError, ValueError):  # the setup may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def as_json(job: Job) -> str:
    """The job as it is handed over."""
    return json.dumps(dataclasses.asdict(job))


if __name__ == "__main__":
    run(Path(sys.argv[1]))

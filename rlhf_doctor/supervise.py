"""Examine in a child process, and bring home a report whatever the code of the setup does to it.

A child that dies or hangs while one role is measured is started again with that role left out, so that the others
are still examined. The parent imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_doctor.finding import MODEL_ROLES
from rlhf_doctor.worker import EVENTS, JOB, Job, as_json

__all__ = ["WorkerCrashed", "supervise"]

Progress = Callable[[str], None]
PAUSE = 0.02  # seconds between looks at the child
STARTING = 120.0  # seconds for the child's own imports, on top of the limit
TAIL = 1 << 14  # bytes kept of what the child prints


class WorkerCrashed(RuntimeError):
    """The tool itself failed in the child; the message is its traceback."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: with a record, or else how it died and in the midst of what."""

    record: dict[str, Any] | None = None
    how: str = ""
    phase: str = "starting"
    role: str = ""
    fact: str = ""
    printed: str = ""

    @property
    def sentence(self) -> str:
        """What is to be reported where there is no record."""
        doing = {"starting": "starting up", "loading": "loading the setup"}.get(self.phase, "examining the setup")
        if self.fact == "traced":
            doing = "running its training step"
        elif self.fact:
            doing = f"measuring its {self.fact.replace('_', ' ')}"
        last = f'; the last it printed: "{self.printed}"' if self.printed else ""
        return f"the process {self.how} while {doing}{last}"


def supervise(job: Job, *, limit: float, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The report record of a job, examined in a child process.

    Args:
        job: what to examine.
        limit: seconds that loading the setup, or any one measurement, may take.
        progress: told what is being done.

    Raises:
        WorkerCrashed: this tool failed, not the setup.
    """
    excluded: dict[str, str] = dict(job.excluded)
    while True:
        ended = _run(dataclasses.replace(job, excluded=excluded), limit, progress)
        if ended.record is not None:
            return ended.record
        name = _to_exclude(ended, excluded)
        if name is None:
            return _unreadable(job, ended)
        excluded[name] = f"{ended.role}: {ended.sentence}"
        progress(f"{name} is left out: {ended.sentence}")


def _to_exclude(ended: Ended, excluded: Mapping[str, str]) -> str | None:
    """The role whose model killed the child; or the one fact, where that is not enough to know."""
    if not ended.fact:
        return None
    is_model = ended.role in MODEL_ROLES
    candidates = (ended.role, f"{ended.role}_{ended.fact}") if is_model else (ended.fact,)
    return next((name for name in candidates if name not in excluded), None)


def _unreadable(job: Job, ended: Ended) -> dict[str, Any]:
    from rlhf_doctor.report.record import unreadable

    sentence = f"{job.name or 'the setup'}: {ended.sentence}"
    return unreadable("setup", sentence, origin=job.name, command=job.command, started=job.started)


def _run(job: Job, limit: float, progress: Progress) -> Ended:
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as name:
        folder = Path(name)
        (folder / JOB).write_text(as_json(job), encoding="utf-8")
        (folder / EVENTS).touch()
        with _child(folder) as process:
            tail = Tail(process.stdout)
            ended = _watch(process, folder / EVENTS, limit, progress)
    return dataclasses.replace(ended, printed=tail.last_line) if ended.record is None else ended


@contextmanager
def _child(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The child in a process group of its own, which is killed on the way out, Ctrl-C included."""
    command = [sys.executable, "-P", "-m", "rlhf_doctor.worker", str(folder)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group is gone already
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    root = str(Path(__file__).parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([*before, root])
    return environment


class Tail:
    """Reads what a child prints, so that it never blocks, and keeps the end of it."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self.kept = b""
        self.stream = stream
        self.thread = threading.Thread(target=self._drain, daemon=True)
        self.thread.start()

    def _drain(self) -> None:
        assert self.stream is not None  # the child's stdout is a pipe
        with self.stream:
            while chunk := os.read(self.stream.fileno(), 1 << 16):
                self.kept = (self.kept + chunk)[-TAIL:]

    @property
    def last_line(self) -> str:
        """The last line that says something, at most 200 characters."""
        self.thread.join(timeout=1)
        lines = [line.strip() for line in self.kept.decode("utf-8", "replace").splitlines()]
        return next((line[-200:] for line in reversed(lines) if line), "")


def _watch(process: subprocess.Popen[bytes], path: Path, limit: float, progress: Progress) -> Ended:
    """Follow the events until the record is there, the child is dead, or nothing has happened for ``limit`` seconds."""
    ended = Ended()
    heard = time.monotonic()
    with path.open("rb") as file:
        unread = b""
        while True:
            dead = process.poll() is not None  # before reading: what it wrote last is then read too
            unread += file.read()
            *lines, unread = unread.split(b"\n")
            for line in lines:
                ended = _heard(ended, json.loads(line), progress)
                heard = time.monotonic()
            if ended.record is not None:
                return ended
            if dead:
                return dataclasses.replace(ended, how=_death(process.returncode))
            if time.monotonic() - heard > limit + (STARTING if ended.phase == "starting" else 0):
                return dataclasses.replace(ended, how=f"gave no sign of life for {limit:g} seconds (--timeout)")
            time.sleep(PAUSE)


def _heard(ended: Ended, event: Mapping[str, Any], progress: Progress) -> Ended:
    if "crash" in event:
        raise WorkerCrashed(event["crash"])
    if "phase" in event:
        progress({"loading": "loading the setup", "examining": "examining"}.get(event["phase"], "starting"))
        return dataclasses.replace(ended, phase=event["phase"])
    if "measuring" in event:
        role, fact = event["measuring"]
        fact, _, part = fact.partition(", ")
        progress(f"{role}: {part or fact.replace('_', ' ')}")
        return dataclasses.replace(ended, role=role, fact=fact)
    return dataclasses.replace(ended, record=event["record"])


def _death(code: int) -> str:
    if code >= 0:
        return f"ended itself with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = {"SIGKILL": ", as happens where memory runs out", "SIGSEGV": ", a fault in native code"}.get(name, "")
    return f"was killed by signal {-code} ({name}{hint})"

"""``rlhf-doctor watch -- python train.py``: start the program in a child process and bring home its report."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_doctor.supervise import PAUSE, Ended, _death, _environment, _heard
from rlhf_doctor.watching_child import Watched
from rlhf_doctor.worker import EVENTS, JOB

__all__ = ["NotWatchable", "planned", "watched_record"]

LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun", "horovodrun", "srun", "ray")
TAKES_A_VALUE = ("-X", "-W", "--check-hash-based-pycs")


class NotWatchable(ValueError):
    """The command is none that can be watched, and what to type instead."""


def planned(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(interpreter with its own options, program with its arguments) of ``python [options] train.py …``.

    Raises:
        NotWatchable: it is no Python program in one process.
    """
    name = Path(words[0]).name
    if name in LAUNCHERS or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise NotWatchable(
            f"{name} starts several processes, and one is watched: run the script itself on one device, "
            "as in 'rlhf-doctor watch -- python train.py'"
        )
    if name.endswith(".py"):
        return [sys.executable], _existing(words)
    if not name.startswith("python"):
        raise NotWatchable(f"{words[0]!r} is no Python program: 'rlhf-doctor watch -- python train.py …' is")
    explicit = words[0] != name
    interpreter = [(shutil.which(words[0]) or words[0]) if explicit else sys.executable]
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] != "-m":
        if words[at] == "-c":
            raise NotWatchable("code given by -c cannot be watched: put it into a file")
        taken = 2 if words[at] in TAKES_A_VALUE else 1
        interpreter += words[at : at + taken]
        at += taken
    if at + (words[at : at + 1] == ["-m"]) >= len(words):
        raise NotWatchable("there is no program to run after 'python'")
    if words[at : at + 2] in (["-m", "torch.distributed.run"], ["-m", "accelerate.commands.launch"]):
        raise NotWatchable(f"{words[at + 1]} starts several processes, and one is watched: run the script itself")
    return interpreter, tuple(words[at:]) if words[at] == "-m" else _existing(words[at:])


def _existing(words: Sequence[str]) -> tuple[str, ...]:
    if not Path(words[0]).is_file():
        from rlhf_doctor.nearest import near_path

        raise NotWatchable(f"there is no file {words[0]!r}{near_path(Path(words[0]))}")
    return tuple(words)


def watched_record(
    interpreter: Sequence[str], job: Watched, *, limit: float, progress: Callable[[str], None], to_stderr: bool = False
) -> dict[str, Any]:
    """Run the program to its end, in this terminal, and give the report record.

    Args:
        interpreter: the Python to run, with its options.
        job: the program, and how to examine it.
        limit: seconds that any one measurement afterwards may take; the program has all the time it wants.
        progress: told what is being done afterwards.
        to_stderr: keep what the program prints out of stdout.

    Raises:
        WorkerCrashed: this tool failed, not the program.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as name:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        (folder / EVENTS).touch()
        process = subprocess.Popen(
            [*interpreter, "-P", "-m", "rlhf_doctor.watching_child", str(folder)],
            stdout=sys.stderr if to_stderr else None,
            env=_its_environment(),
        )
        try:
            ended = _follow(process, folder / EVENTS, limit, progress)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                _kill_one(process)
        if ended.record is not None:
            process.wait()
            return ended.record
    from rlhf_doctor.report.record import unreadable

    doing = "while it was examined" if ended.phase == "examining" else "before it was done"
    said = f"loop: the process of the watched program {ended.how} {doing}; nothing can be said of it"
    return unreadable("loop", said, origin=job.name, command=job.command, started=job.started)


def _its_environment() -> Mapping[str, str]:
    """The user's own, with this package importable."""
    path = _environment().get("PYTHONPATH")
    return dict(os.environ) | ({"PYTHONPATH": path} if path else {})


def _kill_one(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _follow(process: subprocess.Popen[bytes], path: Path, limit: float, progress: Callable[[str], None]) -> Ended:
    """Wait for the record, for the end of the process, or while it is examined for no more than ``limit`` seconds."""
    ended, heard, unread = Ended(), time.monotonic(), b""
    with path.open("rb") as file:
        while True:
            dead = process.poll() is not None
            unread += file.read()
            *lines, unread = unread.split(b"\n")
            for line in lines:
                event = json.loads(line)
                quiet = event.get("phase") == "watching"
                ended = _heard(ended, event, (lambda text: None) if quiet else progress)
                heard = time.monotonic()
            if ended.record is not None:
                return ended
            if dead:
                return dataclasses.replace(ended, how=_death(process.returncode))
            if ended.phase == "examining" and time.monotonic() - heard > limit:
                _kill_one(process)
                return dataclasses.replace(ended, how=f"gave no sign of life for {limit:g} seconds (--timeout)")
            time.sleep(PAUSE)

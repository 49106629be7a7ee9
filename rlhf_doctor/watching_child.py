"""The process in which a watched program runs: ``python -m rlhf_doctor.watching_child FOLDER``.

FOLDER holds ``job.json``, a ``Watched``; events go to ``events.jsonl`` there, as in ``rlhf_doctor.worker``. Nothing is
imported before the program that it may want to import itself: torch is waited for.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import json
import os
import runpy
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_doctor.worker import EVENTS, JOB, Events

__all__ = ["Finder", "Watched", "run"]

ATTEMPTS = 30  # to find the models: each goes through every living object


@dataclass(frozen=True)
class Watched:
    """What to run and how to examine it, as plain JSON data. ``program`` is a file or, after "-m", a module."""

    program: tuple[str, ...] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    steps: int | None = None
    stop_after: bool = False
    seed: int = 0
    suspected: bool = False
    command: str = ""
    started: str = ""

    @property
    def name(self) -> str:
        """The program as the user wrote it."""
        return " ".join(self.program)


class Finder:
    """Waits in the program for the first rollout of models that it can name, and watches from there on."""

    def __init__(self, job: Watched) -> None:
        self.job = job
        self.exam: Any = None
        self.optimizers: list[weakref.ref[Any]] = []
        self.calls = self.attempts = 0
        self.busy = False
        self.undo: list[Callable[[], None]] = []

    def installed(self) -> None:
        """torch is there: listen for optimizers being made and models being called."""
        import torch

        made = torch.optim.Optimizer.__init__

        def noted(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            made(optimizer, *args, **kwargs)
            self.optimizers.append(weakref.ref(optimizer))

        setattr(torch.optim.Optimizer, "__init__", noted)  # noqa: B010  # mypy knows its signature better
        self.undo.append(lambda: setattr(torch.optim.Optimizer, "__init__", made))
        self.undo.append(torch.nn.modules.module.register_module_forward_pre_hook(self._called).remove)

    def _called(self, module: Any, args: Any) -> None:
        """A module is called; a rollout is made without gradients."""
        import torch

        if self.busy or self.exam is not None or torch.is_grad_enabled() or not self.optimizers:
            return
        if not any(isinstance(m, torch.nn.Embedding) for m in module.modules()):
            return
        self.calls += 1
        if self.calls & (self.calls - 1) or self.attempts >= ATTEMPTS:  # the 1st, 2nd, 4th, 8th ...
            return
        self.attempts += 1
        self.busy = True
        try:
            self._look(module)
        finally:
            self.busy = False

    def _look(self, module: Any) -> None:
        from rlhf_doctor.watching import Exam
        from rlhf_doctor.watching_models import discovered

        setup = discovered(module, [o for ref in self.optimizers if (o := ref()) is not None])
        if setup is None:
            return
        setup = setup.but(declared=dict(self.job.declared), origin=self.job.name)
        exam = Exam(setup, self.job.steps, self.job.stop_after)
        exam.begin()
        self.exam = exam

    def end(self) -> None:
        """Take everything out of the program."""
        for action in self.undo:
            action()
        self.undo = []
        if self.exam is not None:
            self.exam.end()


class _Import(importlib.abc.MetaPathFinder):
    """Tells when torch has been imported, by the program and when the program wants it."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.told = told

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                del loader.exec_module
                self.told()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def run(folder: Path) -> None:
    """Run the program, examine what was seen, and leave the report record among the events."""
    job = Watched(**json.loads((folder / JOB).read_text(encoding="utf-8")))
    emit = Events(folder / EVENTS)
    finder = Finder(job)
    if "torch" in sys.modules:
        finder.installed()
    else:
        sys.meta_path.insert(0, _Import(finder.installed))
    emit(phase="watching")
    failure = _program(list(job.program), lambda: finder.exam is not None and finder.exam.enough and job.stop_after)
    try:
        finder.end()
        emit(phase="examining")
        emit(record=_record(job, finder, failure, emit.measuring))
    except Exception:
        emit(crash=traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the program may have closed them
            stream.flush()


def _program(words: list[str], stopped: Callable[[], bool]) -> str:
    """Run it as Python would; gives what it failed with, in words, or nothing."""
    before = list(sys.argv), list(sys.path)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        if left.code not in (None, 0):
            return f"the program ended itself with {left.code!r}"
    except BaseException as error:
        if stopped() and type(error).__name__ == "Enough":
            return ""
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"the program raised {said}"
    finally:
        sys.argv, sys.path[:] = before
    return ""


def _record(job: Watched, finder: Finder, failure: str, measuring: Callable[[str], None]) -> dict[str, Any]:
    from rlhf_doctor.examine import Options
    from rlhf_doctor.report.record import record, unreadable

    about: dict[str, Any] = {"command": job.command, "started": job.started}
    if finder.exam is None:
        why = failure or (
            "no PPO iteration was seen: no policy that an optimizer holds was called without gradients beside a "
            "reference, reward or value model in this process"
            + ("" if "torch" in sys.modules else "; it uses no torch")
        )
        return unreadable("loop", f"loop: {why}", origin=job.name, **about)
    examination = finder.exam.examine(
        select=job.select, ignore=job.ignore, options=Options(seed=job.seed), progress=measuring
    )
    more: list[Any] = [("loop", f"loop: {failure}; what was seen before is examined")] if failure else []
    return record(examination, more_errors=more, suspected=job.suspected, **about)


if __name__ == "__main__":
    run(Path(sys.argv[1]))

"""A corpus of real bugs: each is a sound setup with one thing changed, and says what must be found in it.

A case is a function in one of the ``bugs_*.py`` files that returns a setup, decorated with the bug's id. It takes what
it starts from by name: ``healthy`` (the built-in reference in memory), ``healthy_files`` (the same as checkpoint
folders that it may edit), ``tmp_path`` (an empty folder), or nothing. Its docstring says the fault in one sentence.
A bug has at least two cases where it makes sense, on carriers in different hands' styles. ``threads.jsonl`` holds the
public thread of each bug, what may be said of it, and why a bug has no case.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_doctor.check import registry
from rlhf_doctor.finding import Stage
from rlhf_doctor.setups import RLHFSetup

HERE = Path(__file__).parent
Build = Callable[..., Any]


@dataclass(frozen=True)
class Bug:
    """A real bug: its public thread, the codes that name it, and the cheapest stage at which it can be found.

    ``left_out`` says why it has no case.
    """

    id: str
    url: str
    codes: tuple[str, ...]
    stage: Stage | None
    scope: str
    disputed: bool
    left_out: str


@dataclass(frozen=True)
class Case:
    """One bug in one carrier."""

    bug: str
    carrier: str
    fault: str
    codes: tuple[str, ...]
    roles: tuple[str, ...]
    stage: Stage
    build: Build

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.bug} in {self.carrier}"

    def setup(self, given: Mapping[str, Any]) -> RLHFSetup:
        """The faulty setup, made from what ``build`` asks for by name."""
        made = self.build(**{name: given[name] for name in inspect.signature(self.build).parameters})
        return made if isinstance(made, RLHFSetup) else RLHFSetup.from_mapping(made, origin=self.name)


CASES: dict[str, Case] = {}


@cache
def bugs() -> Mapping[str, Bug]:
    """Every bug of ``threads.jsonl``, by id."""
    found = {}
    for line in (HERE / "threads.jsonl").read_text("utf-8").splitlines():
        one = json.loads(line)
        found[one["id"]] = Bug(
            one["id"],
            one["url"],
            tuple(one["codes"]),
            Stage(one["stage"]) if one["stage"] in set(Stage) else None,
            one["scope"],
            one.get("disputed", False),
            one.get("left_out", ""),
        )
    return found


def case(bug: str, carrier: str, *, roles: str, also: str = "", stage: str | None = None) -> Callable[[Build], Build]:
    """Register a function as a case.

    Args:
        bug: its id.
        carrier: the sound setup that it changes, in a word or two; unique among the bug's cases.
        roles: where it may be said to be, separated by spaces.
        also: codes that name it here besides those of the bug.
        stage: where the bug's own is not the one at which it can be seen in this carrier.
    """

    def register(build: Build) -> Build:
        _add(bug, carrier, inspect.cleandoc(build.__doc__ or "").splitlines()[0], roles, also, stage, build)
        return build

    return register


def in_loop(bug: str, style: str, fault: str, *, roles: str = "", also: str = "") -> None:
    """Register a mistake planted in one of the training loops under ``tests/loops``."""
    from loops.examined import NEEDS, STYLES, built

    if style not in STYLES:
        assert style in NEEDS, style
        return  # what it needs is not installed here
    module = importlib.import_module(f"loops.{style}")
    code, role = module.FAULTS[fault]
    more = " ".join((also, code, *getattr(module, "ALSO", {}).get(fault, ())))
    said = fault.replace("_", " ")
    _add(bug, f"loop {style}", said, roles or role, more, None, lambda: built(style, fault))


def shipped(bug: str, code: str, title: str, *, roles: str, also: str = "") -> None:
    """Register a fault that a check ships with: a change of the built-in reference."""
    fault = next((one for one in registry()[code].faults if one.title == title), None)
    assert fault is not None, f"{code} has no fault called {title}: {[one.title for one in registry()[code].faults]}"
    _add(bug, "the reference", title, roles, f"{also} {code}", None, fault.make)


def _add(bug: str, carrier: str, fault: str, roles: str, also: str, stage: str | None, build: Build) -> None:
    known = bugs()[bug]
    codes = tuple(dict.fromkeys((*known.codes, *also.split())))
    unknown = [code for code in also.split() if code not in registry()]
    assert not unknown, f"{bug}: no such codes: {unknown}"
    assert codes, f"{bug}: no code names it"
    at = Stage(stage) if stage else known.stage or Stage.TRACE
    made = Case(bug, carrier, fault, codes, tuple(roles.split()), at, build)
    assert made.name not in CASES, f"{made.name} is there twice"
    CASES[made.name] = made


@cache
def cases() -> Sequence[Case]:
    """Every case, in the order of the bugs."""
    for file in sorted(HERE.glob("bugs_*.py")):
        importlib.import_module(f"corpus.{file.stem}")
    order = list(bugs())
    return sorted(CASES.values(), key=lambda one: (order.index(one.bug), one.carrier))

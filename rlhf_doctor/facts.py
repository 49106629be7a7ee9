"""Facts: measured once, asked for by name.

A fact is a function; its name is the fact's name and its parameters are other facts. A *role fact* takes ``role`` and
stands for five facts: ``outputs`` gives ``policy_outputs``, ``reference_outputs``, ``reward_outputs``,
``value_outputs`` and ``outputs`` (role -> fact, of the roles where it could be had). Inside a role fact a parameter
that names another role fact means that fact of the same role.

The names that the examiner gives itself: ``setup`` (the RLHFSetup), ``options`` (seed, device, dtype), ``models``
(the live models), ``role``, ``progress`` (to be told of every long part, which gets the time limit anew).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rlhf_doctor.finding import MODEL_ROLES, Role, Stage

__all__ = ["Broken", "Fact", "Unavailable", "fact", "facts", "raised_by_the_setup", "role_fact", "split_role"]

F = TypeVar("F", bound=Callable[..., Any])
# Tools of the instruments: their classes need torch to be defined, and they hold no facts.
NEED_TORCH = ("rlhf_doctor.instruments.tapping", "rlhf_doctor.instruments.watching")
GIVEN = ("setup", "options", "models", "role", "progress")
_FACTS: dict[str, Fact] = {}


class Unavailable(Exception):
    """A fact cannot be had, for a reason that is no fault of the setup: what depends on it is skipped with it."""


class Broken(Exception):
    """A role, or a file of it, cannot be examined: one sentence for the report's errors; exit code 2.

    Args:
        role: whose model or file it is; "setup" for all.
        sentence: what is wrong with what, in one sentence, naming the file or the role.
    """

    def __init__(self, role: Role, sentence: str) -> None:
        super().__init__(sentence)
        self.role = role
        self.sentence = sentence


@dataclass(frozen=True)
class Fact:
    """A registered fact."""

    name: str
    stage: Stage
    per_role: bool
    measure: Callable[..., Any]
    early: Stage | None = None

    @property
    def earliest(self) -> Stage:
        """The stage from which it is asked for."""
        return self.early or self.stage

    @functools.cached_property
    def needs(self) -> Mapping[str, bool]:
        """Parameter name -> whether the fact cannot do without it."""
        parameters = inspect.signature(self.measure).parameters.values()
        return {p.name: p.default is inspect.Parameter.empty for p in parameters}


def _register(stage: Stage, per_role: bool, early: Stage | None) -> Callable[[F], F]:
    def register(measure: F) -> F:
        if measure.__name__ in _FACTS:
            raise ValueError(f"the fact {measure.__name__} is registered twice")
        _FACTS[measure.__name__] = Fact(measure.__name__, stage, per_role, measure, early)
        return measure

    return register


def fact(stage: Stage, *, early: Stage | None = None) -> Callable[[F], F]:
    """Register a function as the fact of its name.

    Args:
        stage: at which it can be had of every setup.
        early: an earlier stage at which it can be had of some: of objects in memory, say, before any model is called.
            It gets ``models`` None then where no model may be loaded.
    """
    return _register(stage, False, early)


def role_fact(stage: Stage, *, early: Stage | None = None) -> Callable[[F], F]:
    """Register a function of ``role`` as one fact for each of the four models; the stages are those of ``fact``."""
    return _register(stage, True, early)


def split_role(name: str) -> tuple[Role | None, str]:
    """``value_outputs`` -> (``value``, ``outputs``) where ``outputs`` is a role fact, else (None, name)."""
    for role in MODEL_ROLES:
        rest = name.removeprefix(f"{role}_")
        if rest != name and rest in _FACTS and _FACTS[rest].per_role:
            return role, rest
    return None, name


def facts() -> Mapping[str, Fact]:
    """Every fact by name. Importing the instruments imports no torch; measuring does."""
    _import_instruments()
    return MappingProxyType(_FACTS)


@functools.cache
def _import_instruments() -> None:
    package = importlib.import_module("rlhf_doctor.instruments")
    for module in pkgutil.iter_modules(package.__path__, "rlhf_doctor.instruments."):
        if module.name not in NEED_TORCH:
            importlib.import_module(module.name)


def raised_by_the_setup(error: BaseException) -> str | None:
    """``file.py, line 12`` where an exception passed through code that is neither ours nor an installed package."""
    ours, stdlib = Path(__file__).parent, Path(sysconfig.get_path("stdlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = path.is_relative_to(stdlib) or {"site-packages", "dist-packages"} & set(path.parts)
        if path.is_file() and not installed and not path.is_relative_to(ours):
            return f"{path.name}, line {frame.lineno}"
    return None

"""The check decorator, the faults a check ships with, and the registry.

A check is a generator of findings. Its parameters name the facts it needs (see ``rlhf_doctor.facts``); a parameter
with a default is wanted but not needed. Its docstring is its page; its function name is its slug.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rlhf_doctor.finding import Finding, Role, Severity, Stage

__all__ = ["HEADINGS", "Check", "Fault", "check", "registry"]

HEADINGS = (
    "What it examines",
    "Why it matters",
    "What it looks like when broken",
    "How to fix",
    "Source",
)
FAMILY_ROLES: Mapping[str, Role] = MappingProxyType(
    {"POL": "policy", "REF": "reference", "REW": "reward", "VAL": "value", "TOK": "tokenizer"}
)
_REGISTRY: dict[str, Check] = {}

# A fault turns a healthy setup into a faulty one. Its parameters are asked for by name, like a check's:
# `healthy` (four models in memory) or `healthy_files` (the same saved as checkpoint folders that it may edit).
FaultFunction = Callable[..., Any]


@dataclass(frozen=True)
class Fault:
    """One way to break a healthy setup that the check must catch."""

    title: str
    make: FaultFunction

    @property
    def wants(self) -> tuple[str, ...]:
        """Names of the healthy setups it starts from."""
        return tuple(inspect.signature(self.make).parameters)


@dataclass(frozen=True)
class Check:
    """A registered check: its identity, its needs, its page and its faults."""

    code: str
    title: str
    stage: Stage
    severity: Severity
    after: tuple[str, ...]
    run: Callable[..., Iterable[Finding]]
    early: Stage | None = None
    explains: tuple[str, ...] = ()
    across_roles: bool = False
    effect: bool = False
    faults: list[Fault] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name people read: ``value-not-scalar-per-state``."""
        return self.run.__name__.replace("_", "-")

    @property
    def earliest(self) -> Stage:
        """The stage from which it is run."""
        return self.early or self.stage

    @property
    def family(self) -> str:
        """The folder of its file: ``value``."""
        return self.run.__module__.split(".")[-2]

    @property
    def role(self) -> Role | None:
        """The role that the check's family is about, None where it may be any."""
        return FAMILY_ROLES.get(self.code[:3])

    @property
    def needs(self) -> Mapping[str, bool]:
        """Fact name -> whether the check cannot do without it."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default is inspect.Parameter.empty for p in parameters}

    @property
    def page(self) -> Mapping[str, str]:
        """Heading -> text, from the docstring.

        Raises:
            ValueError: a heading of ``HEADINGS`` is absent.
        """
        sections: dict[str, list[str]] = {}
        current: list[str] | None = None
        for line in inspect.cleandoc(self.run.__doc__ or "").splitlines():
            if line.rstrip(": ") in HEADINGS:
                current = sections.setdefault(line.rstrip(": "), [])
            elif current is not None:
                current.append(line)
        absent = [heading for heading in HEADINGS if heading not in sections]
        if absent:
            raise ValueError(f"{self.code}: the page lacks {', '.join(absent)}")
        return {heading: inspect.cleandoc("\n".join(sections[heading])).strip() for heading in HEADINGS}

    def fault(self, title: str) -> Callable[[FaultFunction], FaultFunction]:
        """Register a way to break a healthy setup that this check must catch."""

        def register(make: FaultFunction) -> FaultFunction:
            self.faults.append(Fault(title, make))
            return make

        return register


def check(
    code: str,
    title: str,
    *,
    stage: Stage,
    severity: Severity,
    after: tuple[str, ...] = (),
    early: Stage | None = None,
    explains: tuple[str, ...] = (),
    across_roles: bool = False,
    effect: bool = False,
) -> Callable[[Callable[..., Iterable[Finding]]], Check]:
    """Register a function as the check ``code``.

    Args:
        code: permanent identity, three letters and three digits.
        title: what holds when all is well, in one line.
        stage: the cheapest stage that decides it.
        severity: of its findings, unless a finding says otherwise.
        after: codes that must not have found anything in the same role before this one runs.
        early: an earlier stage at which some of its faults show already, with what is known by then.
        explains: codes whose findings follow from this one's where both have some; those of another model's only if
            ``across_roles``, or if either is about the loop or the setup.
        across_roles: whether that holds for any roles.
        effect: whether it shows what other faults come to, so that it is no first cause while another stands.

    Raises:
        ValueError: the code is registered already.
    """

    def register(run: Callable[..., Iterable[Finding]]) -> Check:
        if code in _REGISTRY:
            raise ValueError(f"{code} is registered twice: {_REGISTRY[code].run.__module__} and {run.__module__}")
        made = Check(code, title, stage, severity, after, run, early, explains, across_roles, effect)
        _REGISTRY[code] = made
        return made

    return register


def registry() -> Mapping[str, Check]:
    """Every shipped check by code, in code order within its family's stage order. Imports no torch."""
    _import_checks()
    return MappingProxyType(dict(sorted(_REGISTRY.items())))


@functools.cache
def _import_checks() -> None:
    package = importlib.import_module("rlhf_doctor.checks")
    for module in pkgutil.walk_packages(package.__path__, "rlhf_doctor.checks."):
        importlib.import_module(module.name)

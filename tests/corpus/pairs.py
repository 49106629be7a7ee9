"""Two faults of the corpus at once: both should stand in the diagnosis."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from corpus.case import Case, cases
from corpus.judge import examined, failures, seeded, told
from rlhf_doctor.finding import MODEL_ROLES, Severity
from rlhf_doctor.setups import RLHFSetup

STEP = {"step", "optimizers", "state"}
LEAVES_OUT = STEP | {"declared", "origin"}  # a fault of a model may drop the step that held the model it replaces


@dataclass(frozen=True)
class Both:
    """What was said of two faults in one setup: which of them is a root, and which is in the diagnosis at all."""

    first: str
    second: str
    roots: tuple[bool, bool]
    told: tuple[bool, bool]
    said: tuple[str, ...]


def candidates() -> list[Case]:
    """Cases that change the built-in reference in memory."""
    return [one for one in cases() if tuple(inspect.signature(one.build).parameters) == ("healthy",)]


def changed(before: RLHFSetup, after: RLHFSetup) -> set[str]:
    """The fields that a fault exchanged."""
    return {f.name for f in fields(RLHFSetup) if getattr(before, f.name) is not getattr(after, f.name)}


def composed(one: Case, other: Case, given: Mapping[str, Any]) -> RLHFSetup | None:
    """A setup with both faults; None where they change the same thing."""
    healthy = given["healthy"]
    left = one.setup(given)
    try:
        right = other.setup({**given, "healthy": left})
    except Exception:  # it cannot be made of what the first left: of a module that is no Hugging Face model
        return None
    of_left, of_right = changed(healthy, left), changed(left, right)
    if of_left & of_right - LEAVES_OUT or any(
        getattr(left, role) is not getattr(right, role) for role in of_left & set(MODEL_ROLES)
    ):
        return None
    if of_left & STEP and of_right & STEP and left.step is not None:
        return None
    said = {k: v for k, v in left.declared.items() if healthy.declared.get(k) != v}
    if any(right.declared.get(k) not in (v, healthy.declared.get(k)) for k, v in said.items()):
        return None
    return right.but(declared={**right.declared, **said}) if said else right


def drawn(count: int, seed: int, given: Mapping[str, Any]) -> Iterator[tuple[Case, Case]]:
    """So many pairs of faults that are not of one bug, code or field, in an order that the seed decides."""
    pool, rng, seen = candidates(), random.Random(seed), set()
    while len(seen) < count:
        one, other = rng.sample(pool, 2)
        key = (one.name, other.name)
        if key in seen or one.bug == other.bug or set(one.codes) & set(other.codes):
            continue
        seeded(0)
        if composed(one, other, given) is not None:
            seen.add(key)
            yield one, other


def judge_both(one: Case, other: Case, given: Mapping[str, Any]) -> Both | None:
    """Examine a setup with both faults; None where one keeps the other from being seen: a role that cannot be read."""
    seeded(0)
    setup = composed(one, other, given)
    assert setup is not None
    found, _, _ = examined(setup)
    if failures(found):
        return None
    shown, roots = told(found)
    grave = [(code, role) for code, role, severity in shown if severity is not Severity.INFO]

    def among(case: Case, said: list[tuple[str, str]]) -> bool:
        return any(code in case.codes and role in case.roles for code, role in said)

    return Both(
        one.name,
        other.name,
        (among(one, roots), among(other, roots)),
        (among(one, grave), among(other, grave)),
        tuple(f"{code} {role}" for code, role in roots),
    )

"""Run the checks that a stage allows on one setup: order, facts by name, isolation, time."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_doctor.check import Check, registry
from rlhf_doctor.facts import GIVEN, Broken, Fact, Unavailable, facts, raised_by_the_setup, split_role
from rlhf_doctor.finding import (
    MODEL_ROLES,
    Errored,
    Finding,
    Found,
    Outcome,
    Passed,
    Role,
    Severity,
    Skipped,
    Stage,
)
from rlhf_doctor.setups import RLHFSetup

__all__ = ["Examination", "Options", "choose", "examine"]

Progress = Callable[[str], None]
# What the report draws of every model, whether or not a chosen check asks for it.
SHOWN = {
    Stage.STATIC: ("manifest",),
    Stage.PROBE: ("manifest", "parameters", "output", "census", "influence", "architecture"),
    Stage.TRACE: ("manifest", "parameters", "output", "census", "influence", "architecture", "traced"),
}


@dataclass(frozen=True)
class Options:
    """How to examine. ``excluded`` maps a role that must not be touched, or a fact by full name, to the reason."""

    stage: Stage = Stage.TRACE
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)
    show: bool = True


@dataclass(frozen=True)
class Examination:
    """Everything that an examination found out. ``shown`` maps fact names to facts for the report."""

    setup: RLHFSetup
    options: Options
    outcomes: Mapping[str, Outcome]
    errors: tuple[tuple[Role, str], ...]
    shown: Mapping[str, Any]
    seconds: float

    @property
    def findings(self) -> tuple[tuple[str, Finding], ...]:
        """(code, finding), in the order of the codes."""
        return tuple((o.code, f) for o in self.outcomes.values() if isinstance(o, Found) for f in o.findings)


def choose(select: Sequence[str] = (), ignore: Sequence[str] = (), stage: Stage = Stage.TRACE) -> dict[str, Check]:
    """The checks of these codes or families up to a stage, prerequisites first.

    Raises:
        KeyError: a name is neither a code nor a family.
    """
    every = registry()
    families = {c.family for c in every.values()} | {c.code[:3] for c in every.values()}
    for name in (*select, *ignore):
        if name not in every and name not in families:
            raise KeyError(name)

    def named(c: Check, names: Sequence[str]) -> bool:
        return c.code in names or c.family in names or c.code[:3] in names

    allowed = tuple(Stage)[: tuple(Stage).index(stage) + 1]
    chosen = {
        code: c
        for code, c in every.items()
        if c.earliest in allowed and (not select or named(c, select)) and not named(c, ignore)
    }
    ordered: dict[str, Check] = {}

    def place(code: str) -> None:
        if code in chosen and code not in ordered:
            for earlier in chosen[code].after:
                place(earlier)
            ordered[code] = chosen[code]

    for code in sorted(chosen, key=lambda code: (tuple(Stage).index(chosen[code].stage), code)):
        place(code)
    return ordered


class Facts:
    """Measures facts on demand, each once, and remembers why one could not be had."""

    def __init__(self, given: Mapping[str, Any], options: Options, progress: Progress) -> None:
        self.known = facts()
        self.values: dict[str, Any] = dict(given)
        self.failures: dict[str, Exception] = {}
        self.errors: list[tuple[Role, str]] = []
        self.options = options
        self.progress = progress

    def resolve(self, name: str, role: Role | None) -> str:
        """The full name that a parameter stands for inside a fact of ``role``."""
        known = self.known.get(name)
        return f"{role}_{name}" if role and known and known.per_role else name

    def get(self, name: str) -> Any:
        """The fact of this name.

        Raises:
            Unavailable: it cannot be had, and why.
        """
        if name in self.values:
            return self.values[name]
        if name in self.failures:
            failure = self.failures[name]
            raise Unavailable(str(failure)) if isinstance(failure, Broken) else failure
        try:
            self.values[name] = self._measure(name)
        except Broken as broken:
            self.failures[name] = broken
            if (broken.role, broken.sentence) not in self.errors:
                self.errors.append((broken.role, broken.sentence))
            raise Unavailable(broken.sentence) from None
        except Unavailable as unavailable:
            self.failures[name] = unavailable
            raise
        except Exception as crash:
            self.failures[name] = crash
            raise
        return self.values[name]

    def clear_frames(self) -> None:
        """Let go of what the frames of failed measurements hold: their locals would keep whole models in memory."""
        for failure in self.failures.values():
            chain: BaseException | None = failure
            while chain is not None:
                traceback.clear_frames(chain.__traceback__)
                chain = chain.__cause__ or chain.__context__

    def _measure(self, name: str) -> Any:
        role, base = split_role(name)
        known = self.known.get(base)
        if known is None:
            raise KeyError(f"no fact is called {name!r}")
        if known.per_role and role is None:
            return self._every_role(known)
        if tuple(Stage).index(known.earliest) > tuple(Stage).index(self.options.stage):
            raise Unavailable(f"needs --stage {known.stage}")
        excluded = self.options.excluded
        if name in excluded or (role in excluded and known.stage is not Stage.STATIC):
            raise Unavailable(excluded.get(name) or excluded[role or ""])
        arguments: dict[str, Any] = {}
        for need, required in known.needs.items():
            if need == "role":
                arguments[need] = role
                continue
            try:
                arguments[need] = self.get(self.resolve(need, role))
            except Unavailable:
                if required:
                    raise
            if need == "inputs" and role and need in arguments:
                arguments[need] = arguments[need].for_role(role)
        self.progress(f"{role or 'setup'}: {base}")
        try:
            return known.measure(**arguments)
        except (Broken, Unavailable):
            raise
        except Exception as error:  # the code of the setup may raise anything, anywhere
            where = raised_by_the_setup(error)
            if where is None:
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            about: Role = role or "setup"
            raise Broken(about, f"{about}: code of the setup raised {said} ({where})") from error

    def _every_role(self, known: Fact) -> dict[Role, Any]:
        found: dict[Role, Any] = {}
        reasons: dict[Role, str] = {}
        for role in MODEL_ROLES:
            try:
                found[role] = self.get(f"{role}_{known.name}")
            except Unavailable as unavailable:
                reasons[role] = str(unavailable)
        if not found:
            present = self.values["setup"].present
            raise Unavailable(_of_no_model({role: said for role, said in reasons.items() if role in present}))
        return found

    def wanted(self, names: Iterable[str]) -> dict[Role, set[str]]:
        """Role -> the role facts (base names) that these names lead to, themselves included."""
        found: dict[Role, set[str]] = {role: set() for role in MODEL_ROLES}
        seen: set[str] = set()
        queue = list(names)
        while queue:
            name = queue.pop()
            role, base = split_role(name)
            known = self.known.get(base)
            if name in seen or name in GIVEN or known is None:
                continue
            seen.add(name)
            if known.per_role and role is None:
                queue += [f"{each}_{base}" for each in MODEL_ROLES]
                continue
            if role:
                found[role].add(base)
            queue += [self.resolve(need, role) for need in known.needs]
        return found


def _of_no_model(reasons: Mapping[Role, str]) -> str:
    """Why something could be had of none of the models that are given, once where one reason holds for all."""
    alike = {re.sub(rf"\b(?:a|the) {role}( model)?\b", "a model", said) for role, said in reasons.items()}
    said = alike if len(alike) == 1 < len(reasons) else dict.fromkeys(reasons.values())
    return "; ".join(said) or "needs at least one model"


def examine(
    setup: RLHFSetup,
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    options: Options | None = None,
    progress: Progress = lambda _: None,
    known: Mapping[str, Any] | None = None,
) -> Examination:
    """Examine a setup: measure what the chosen checks ask for, role by role, and run them.

    Models given as paths are loaded one at a time and released. Objects are left bit for bit as they were. Facts that
    are ``known`` already, by their full names, are not measured.

    Raises:
        KeyError: ``select`` or ``ignore`` has a name that is neither a code nor a family.
    """
    started = time.perf_counter()
    options = options or Options()
    chosen = choose(select, ignore, options.stage)
    needs = [name for c in chosen.values() for name in c.needs]
    if options.show:
        needs += SHOWN.get(options.stage, SHOWN[Stage.TRACE])
    given: dict[str, Any] = {**(known or {}), "setup": setup, "options": options, "progress": progress, "models": None}
    if options.stage is Stage.STATIC:
        outcomes, errors, shown = _run(chosen, needs, Facts(given, options, progress), lambda role: None)
    else:
        from rlhf_doctor.instruments.models import Models  # torch is imported from here on

        with Models(setup, options) as models:
            given["models"] = models
            outcomes, errors, shown = _run(chosen, needs, Facts(given, options, progress), models.release)
    return Examination(setup, options, outcomes, errors, shown, time.perf_counter() - started)


def _run(
    chosen: Mapping[str, Check], needs: list[str], measured: Facts, release: Callable[[Role], None]
) -> tuple[dict[str, Outcome], tuple[tuple[Role, str], ...], dict[str, Any]]:
    for name, reason in measured.options.excluded.items():
        measured.errors.append((next((r for r in MODEL_ROLES if r == name), split_role(name)[0] or "setup"), reason))
    for role, bases in measured.wanted(needs).items():  # everything about one model before the next is loaded
        for base in sorted(bases):
            _try(measured, f"{role}_{base}")
        _note_unreadable_files(role, measured)
        _note_nothing_finite(role, measured)
        measured.clear_frames()
        release(role)
    outcomes: dict[str, Outcome] = {}
    for code, one in chosen.items():
        outcomes[code] = _outcome(one, measured, outcomes)
    whole = ("inputs", "traced")
    shown = {name: value for name, value in measured.values.items() if split_role(name)[0] or name in whole}
    return dict(sorted(outcomes.items())), tuple(measured.errors), shown


def _note_unreadable_files(role: Role, measured: Facts) -> None:
    """Files of a role that could not be read, though the rest of its folder could."""
    for said in getattr(measured.values.get(f"{role}_manifest"), "problems", ()):
        if all(said != before for _, before in measured.errors):
            measured.errors.append((role, said))


def _try(measured: Facts, name: str) -> None:
    """Measure a fact ahead of the checks; the check that needs it reports why it failed."""
    try:
        measured.get(name)
    except Exception as failure:
        measured.failures.setdefault(name, failure)


def _note_nothing_finite(role: Role, measured: Facts) -> None:
    """A model whose output holds NaN, or nothing finite, cannot be judged further: an error beside what checks find."""
    output = measured.values.get(f"{role}_output")
    if output is not None and output.meaningless:
        first = next((i for i, (about, _) in enumerate(measured.errors) if about == role), len(measured.errors))
        sentence = f"{role}: its output is NaN or infinite, so nothing further could be judged"
        measured.errors.insert(first, (role, sentence))


def _outcome(one: Check, measured: Facts, before: Mapping[str, Outcome]) -> Outcome:
    started = time.perf_counter()

    def taken() -> float:
        return time.perf_counter() - started

    blocked = _blocked(one, before)
    if blocked:
        return Skipped(one.code, blocked)
    arguments = {}
    for name, required in one.needs.items():
        try:
            arguments[name] = measured.get(name)
        except Unavailable as reason:
            if required:
                return Skipped(one.code, str(reason), taken())
        except Exception:
            return Errored(one.code, traceback.format_exc(), taken())
    try:
        findings = tuple(one.run(**arguments))
    except Unavailable as reason:
        return Skipped(one.code, str(reason), taken())
    except Broken as broken:
        if all(said != broken.sentence for _, said in measured.errors):
            measured.errors.append((broken.role, broken.sentence))
        return Skipped(one.code, broken.sentence, taken())
    except Exception:
        return Errored(one.code, traceback.format_exc(), taken())
    return Found(one.code, findings, taken()) if findings else Passed(one.code, taken())


def _blocked(one: Check, before: Mapping[str, Outcome]) -> str:
    for earlier in one.after:
        outcome = before.get(earlier)
        if isinstance(outcome, Found):
            worth = [f for f in outcome.findings if f.severity is not Severity.INFO]
            if any(one.role is None or f.role in (one.role, "setup") for f in worth):
                return f"{earlier} was found: mend that first"
    return ""

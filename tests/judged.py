"""What an examination would show a person, in the few words that tests compare."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.check import registry
from rlhf_doctor.examine import Options
from rlhf_doctor.finding import Confidence, Errored, Severity, Stage

FAMILIES = ("system", "tokens", "config")


def said(
    setup: RLHFSetup, select: Sequence[str] = FAMILIES, stage: Stage = Stage.PROBE
) -> list[tuple[str, str, str, str]]:
    """(code, role, severity, message) of every finding; a check that crashes fails the test."""
    found = examine(setup, select=select, options=Options(show=False, stage=stage))
    crashed = [o.traceback for o in found.outcomes.values() if isinstance(o, Errored)]
    assert not crashed, crashed[0]
    checks = registry()
    return [
        (code, f.role, str(f.severity or checks[code].severity), f.message)
        for code, f in found.findings
        if f.confidence is not Confidence.SUSPECTED
    ]


def grave(setup: RLHFSetup, select: Sequence[str] = FAMILIES, stage: Stage = Stage.PROBE) -> list[tuple[str, str]]:
    """(code, role) of what is no mere information."""
    return [(code, role) for code, role, severity, _ in said(setup, select, stage) if severity != Severity.INFO]


def severity_of(code: str, setup: RLHFSetup) -> str:
    """The gravest severity of a code, "" where it has no finding."""
    found = [Severity(severity) for given, _, severity, _ in said(setup) if given == code]
    return str(min(found, key=lambda s: s.rank)) if found else ""

"""What one check says of a setup, in a form that a test can compare."""

from __future__ import annotations

from rlhf_doctor.examine import examine
from rlhf_doctor.finding import Errored, Found, Skipped
from rlhf_doctor.setups import RLHFSetup


def said(setup: RLHFSetup, code: str) -> list[tuple[str, str]]:
    """(severity, role) of each finding of a check, most grave first; fails where the check crashed."""
    return [(severity, role) for severity, role, _ in spoken(setup, code)]


def spoken(setup: RLHFSetup, code: str) -> list[tuple[str, str, str]]:
    """(severity, role, message) of each finding of a check, most grave first."""
    from rlhf_doctor.check import registry

    outcome = examine(setup, select=[code]).outcomes[code]
    assert not isinstance(outcome, Errored), outcome.traceback
    findings = outcome.findings if isinstance(outcome, Found) else ()
    own = registry()[code].severity
    made = [(f.severity or own, f.role, f.message) for f in findings]
    return [(str(s), r, m) for s, r, m in sorted(made, key=lambda one: one[0].rank)]


def skipped(setup: RLHFSetup, code: str) -> str:
    """Why a check was skipped, empty where it was not."""
    outcome = examine(setup, select=[code]).outcomes[code]
    return outcome.reason if isinstance(outcome, Skipped) else ""

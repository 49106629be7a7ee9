"""What a check can say: findings with evidence, and the closed set of outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

__all__ = [
    "MODEL_ROLES",
    "ROLES",
    "Confidence",
    "Errored",
    "Evidence",
    "Finding",
    "Found",
    "Outcome",
    "Passed",
    "Role",
    "Severity",
    "Skipped",
    "Stage",
]

Role = Literal["policy", "reference", "reward", "value", "tokenizer", "loop", "setup"]
ROLES: tuple[Role, ...] = ("policy", "reference", "reward", "value", "tokenizer", "loop", "setup")
MODEL_ROLES: tuple[Role, ...] = ("policy", "reference", "reward", "value")


class Severity(StrEnum):
    """How bad a finding is: the run is wrong, is likely harmed, or there is something worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the gravest."""
        return list(Severity).index(self)


class Confidence(StrEnum):
    """How sure a finding is: a counter-example is shown, numbers are shown, or it is only a suspicion."""

    PROVEN = "proven"
    MEASURED = "measured"
    SUSPECTED = "suspected"


class Stage(StrEnum):
    """The cheapest depth of examination that decides a check, cheapest first."""

    STATIC = "static"
    PROBE = "probe"
    TRACE = "trace"
    METRICS = "metrics"


@dataclass(frozen=True)
class Evidence:
    """One measured or read quantity beside what it should have been.

    ``tolerance`` says how far ``observed`` may be from ``expected``; ``where`` names the file, tensor, module or
    position; ``reproduce`` is a line that shows the same number again.
    """

    quantity: str
    expected: str
    observed: str
    tolerance: str = ""
    where: str = ""
    reproduce: str = ""


@dataclass(frozen=True)
class Finding:
    """One fault in one role. ``severity`` None means: the severity of the check.

    Raises:
        ValueError: without evidence, or with a role outside ``ROLES``.
    """

    message: str
    role: Role
    confidence: Confidence
    evidence: tuple[Evidence, ...]
    severity: Severity | None = None

    def __post_init__(self) -> None:
        if not self.evidence:
            raise ValueError(f"a finding needs evidence: {self.message!r}")
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Passed:
    """The check ran and found nothing."""

    code: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """The check ran and found these."""

    code: str
    findings: tuple[Finding, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """The check could not be decided, and why."""

    code: str
    reason: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Errored:
    """The check itself crashed: never a pass."""

    code: str
    traceback: str
    seconds: float = 0.0


Outcome = Passed | Found | Skipped | Errored

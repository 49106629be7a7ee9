"""Which finding explains which: the most likely root cause first, what follows from it folded under it.

What follows from a check's findings is declared at the check (``explains``, ``across_roles``, ``effect``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_doctor.check import Check, registry
from rlhf_doctor.finding import Finding, Role, Severity

__all__ = ["Diagnosis", "diagnose"]

# Families from the files outward; an effect is never the first line while a cause stands.
ORDER = (
    "CFG004", "SYS", "TOK", "CFG", "PRE", "KLD001", "POL", "REF", "REW",
    "VAL001", "VAL002", "VAL003", "VAL004", "VAL005", "VAL006", "VAL007", "VAL014", "VAL015",
    "OPT001", "ROL", "KLD", "ADV", "VAL", "LOS", "OPT", "MET",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnosis:
    """A root cause and the findings, by index, that follow from it."""

    index: int
    explains: tuple[int, ...]


def diagnose(found: Sequence[tuple[str, Finding]], severities: Sequence[Severity]) -> tuple[Diagnosis, ...]:
    """Fold findings under their causes and order the causes.

    Args:
        found: (code, finding).
        severities: the severity of each, the check's where the finding has none.

    Returns:
        The root causes, most likely first: errors before warnings, causes before effects, files before models before
        the loop. Findings of severity info are no diagnosis.
    """
    checks, cause = registry(), dict[int, int]()
    grave = [i for i, s in enumerate(severities) if s is not Severity.INFO]

    def rank(i: int) -> tuple[int, bool, int, str]:
        return _rank(checks, found[i][0], severities[i])

    for i in grave:
        roots = [
            j
            for j in grave
            if j != i and _explains(checks, found[j], found[i]) and severities[j].rank <= severities[i].rank
        ]
        if roots:
            cause[i] = min(roots, key=rank)
    for i in list(cause):  # a loop of mutual explanation keeps its gravest member as the root
        seen = {i}
        while cause.get(i) is not None and cause[i] not in seen:
            seen.add(i := cause[i])
        if i in cause:
            cycle = [j for j in seen if j in cause]
            cause.pop(min(cycle, key=rank))
    roots_in_order = sorted((i for i in grave if i not in cause), key=rank)
    return tuple(Diagnosis(i, tuple(j for j in grave if _root(j, cause) == i and j != i)) for i in roots_in_order)


def _root(i: int, cause: Mapping[int, int]) -> int:
    while i in cause:
        i = cause[i]
    return i


def _explains(checks: Mapping[str, Check], a: tuple[str, Finding], b: tuple[str, Finding]) -> bool:
    (code, first), (other, second) = a, b
    cause = checks.get(code)
    if cause is None or other not in cause.explains:
        return False
    shared: tuple[Role, ...] = ("setup", "loop")
    return cause.across_roles or first.role == second.role or first.role in shared or second.role in shared


def _rank(checks: Mapping[str, Check], code: str, severity: Severity) -> tuple[int, bool, int, str]:
    known = checks.get(code)
    place = next((n for n, prefix in enumerate(ORDER) if code.startswith(prefix)), len(ORDER))
    return severity.rank, known is not None and known.effect, place, code

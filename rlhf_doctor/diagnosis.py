"""Which finding explains which: the most likely root cause first, what follows from it folded under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rlhf_doctor.finding import Finding, Role, Severity

__all__ = ["EXPLAINS", "Diagnosis", "diagnose"]

# Root cause -> the findings that follow from it where both fire. A root in another role explains only what is listed
# in ACROSS_ROLES. The general order: causes in files and declarations, then in the models, then in the loop, then
# effects.
EXPLAINS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "CFG004": ("SYS001", "SYS007"),
        "TOK001": ("ROL005", "ROL004"),
        "TOK002": ("REW004", "REW005", "TOK001"),
        "REW004": ("TOK001", "REW005", "REW006", "REW009", "TOK005", "REW012", "REW013"),
        "REW005": ("REW009", "REW012", "REW013"),
        "REW006": ("REW009", "REW010", "REW012", "REW013"),
        "SYS002": (
            "REW002",
            "REW003",
            "REW006",
            "REW009",
            "VAL002",
            "VAL006",
            "VAL007",
            "POL002",
            "REF002",
            "SYS004",
            "SYS007",
            "REW008",
            "OPT001",
        ),
        "SYS011": ("REW003", "OPT001", "SYS007", "REF002"),
        "REW003": ("SYS007", "REW007", "REW009", "REW010", "REW012", "REW013"),
        "VAL007": ("SYS007", "VAL015"),
        "SYS005": ("TOK002", "TOK003", "TOK006", "REW009", "SYS007", "SYS004"),
        "SYS006": ("TOK008", "REW009", "REW012"),
        "TOK004": ("TOK006",),
        "TOK003": (
            "ROL005",
            "ROL006",
            "MET008",
        ),
        "SYS003": ("REF003", "OPT003", "REW008", "VAL007", "REF005", "REF006", "KLD003", "SYS008"),
        "SYS004": ("REF002", "POL007"),
        "SYS007": ("REF002", "POL007", "REW009", "REW010", "VAL007", "VAL015"),
        "REF002": ("POL007",),
        "POL004": (
            "VAL004",
            "REW005",
            "ROL003",
            "REF002",
            "POL006",
            "ROL011",
        ),
        "POL005": ("REF004", "ROL003", "SYS009", "REF002", "POL004", "POL006", "LOS003"),
        "POL001": ("POL003", "POL004", "POL006", "POL007", "REF001", "REF002", "SYS004"),
        "POL002": ("POL007", "REF002", "SYS004"),
        "POL003": ("POL004", "POL006", "POL007", "REF001", "REF002"),
        "REF001": ("SYS004", "REF002"),
        "REW001": ("REW004", "REW005", "SYS004", "REW006", "REW009", "REW012", "REW013"),
        "VAL001": ("VAL003", "VAL004", "SYS004", "VAL007", "VAL015"),
        "VAL002": ("VAL003", "VAL005", "VAL006", "VAL015", "VAL007"),
        "REW002": ("REW006", "REW009", "REW010", "REW004", "REW012", "REW013", "VAL007"),
        "VAL003": ("VAL004",),
        "VAL005": ("VAL006", "VAL015"),
        "ROL001": (
            "ROL003",
            "MET002",
            "MET011",
            "LOS002",
        ),
        "ROL002": (
            "ROL003",
            "MET002",
            "MET011",
            "ROL001",
        ),
        "OPT001": ("OPT002", "VAL008", "VAL009"),
        "PRE001": ("OPT002",),
        "PRE003": ("PRE004", "REW011", "PRE001", "PRE002"),
        "PRE004": ("REW011", "REF002", "REW006", "VAL006"),
        "SYS012": ("PRE004", "SYS007"),
        "PRE002": ("ROL003", "MET011"),
        "KLD001": ("REF005", "KLD002", "KLD003", "SYS008"),
        "CFG003": ("LOS007",),
        "CFG002": ("LOS007", "LOS002"),
        "CFG005": ("VAL007", "ROL008"),
        "ROL006": ("MET007", "MET008"),
        "REW012": ("MET006", "MET008"),
        "CFG001": ("MET005",),
        "REW011": ("REW002", "REW006", "REW007", "REW010"),
        "REW007": ("REW005", "REW009"),
        "VAL014": ("VAL004",),
        "REF004": ("REF002",),
        # What a step does with sound models: a mask, a row or an index that is wrong shows at every later stage.
        "ROL004": (
            "ROL003",
            "ROL001",
            "ADV008",
            "SYS008",
            "LOS001",
            "KLD005",
            "VAL013",
            "KLD003",
        ),
        "ROL005": (
            "LOS005",
            "LOS003",
            "ADV003",
            "KLD005",
            "ADV004",
            "ADV002",
            "ADV006",
            "ROL003",
            "SYS008",
            "KLD003",
        ),
        "ROL008": (
            "MET011",
            "ROL003",
            "ROL011",
            "ROL001",
        ),
        "ROL009": (
            "VAL013",
            "ADV008",
            "ADV002",
            "ADV001",
            "ROL003",
            "VAL009",
            "VAL011",
            "LOS004",
            "SYS008",
            "ROL005",
            "ADV004",
            "KLD005",
            "ADV003",
            "KLD003",
            "ADV006",
            "ADV007",
        ),
        "ROL010": (
            "ROL003",
            "ROL004",
            "ROL005",
            "ROL001",
            "REW014",
            "TOK007",
            "ROL011",
            "KLD005",
        ),
        "ROL011": ("ROL003", "ROL001"),
        "ROL003": ("LOS002", "MET012"),
        "KLD005": ("ADV003", "LOS005"),
        "KLD002": ("KLD003", "KLD004", "SYS008"),
        "KLD004": ("KLD003", "SYS008"),
        "KLD003": ("SYS008",),
        "KLD006": ("KLD003",),
        "REF005": ("KLD003", "KLD004", "LOS008", "SYS008"),
        "REF006": ("KLD003", "REF005", "SYS008"),
        "ADV002": (
            "ADV008",
            "VAL009",
            "ADV001",
            "ADV006",
            "VAL011",
            "REW014",
            "SYS008",
            "ADV004",
            "ADV009",
        ),
        "ADV001": ("ADV008", "VAL011", "ADV006", "SYS008"),
        "ADV003": (
            "LOS005",
            "ADV006",
            "ADV004",
            "ADV001",
        ),
        "ADV005": (
            "VAL012",
            "SYS008",
            "ADV001",
            "ADV004",
            "ADV006",
            "ADV007",
            "VAL009",
            "VAL010",
            "VAL011",
            "VAL013",
        ),
        "ADV006": (
            "ADV003",
            "ADV001",
            "ADV004",
            "VAL015",
        ),
        "ADV009": (
            "ADV008",
            "VAL009",
            "REW014",
            "SYS008",
            "ADV010",
            "ADV004",
        ),
        "ADV010": ("ADV004", "ADV009", "SYS008"),
        "REW014": ("ADV009", "SYS008"),
        "VAL008": ("VAL009", "LOS004", "OPT002", "SYS008"),
        "VAL009": (
            "ADV008",
            "VAL010",
            "VAL011",
            "ADV001",
            "ADV002",
            "ADV006",
            "ADV007",
            "ADV009",
            "LOS004",
            "SYS008",
            "MET012",
        ),
        "VAL010": ("ADV008", "LOS001", "VAL011", "ADV001", "LOS004", "SYS008", "MET012"),
        "VAL011": ("ADV001", "ADV006", "KLD003", "SYS008", "MET012"),
        "VAL012": ("VAL013", "LOS004", "SYS008"),
        "VAL013": (
            "ADV001",
            "ADV006",
            "VAL011",
            "LOS004",
            "ADV007",
            "SYS008",
            "ADV004",
            "KLD003",
        ),
        "LOS001": ("ADV008", "LOS006", "SYS008"),
        "LOS004": ("VAL009", "VAL010", "SYS008", "MET012"),
        "OPT003": ("REF002", "SYS008", "REF005"),
        "OPT004": ("LOS003", "OPT002", "OPT006", "VAL008"),
        "ADV007": (
            "SYS008",
            "ADV001",
            "ADV004",
            "ADV006",
        ),
        "ADV008": (
            "SYS008",
            "ADV004",
            "ADV010",
        ),
        "SYS009": ("ROL007",),
    }
)
ACROSS_ROLES = frozenset(
    {
        "CFG002", "CFG003", "CFG004",
        "POL001", "POL002", "POL003", "POL004", "POL005",
        "PRE003", "PRE004",
        "REF002", "REF004", "REW002",
        "SYS002", "SYS003", "SYS004", "SYS005", "SYS006", "SYS007", "SYS011", "SYS012",
        "TOK002", "TOK003",
        "ADV001", "ADV002", "ADV005", "ADV009", "KLD002", "KLD005", "LOS001", "REF005", "REF006", "REW014", "ROL004",
        "LOS004", "ROL005", "ROL009", "ROL010", "VAL008", "VAL009", "VAL010", "VAL011",
        "ADV003", "ADV006", "ADV007", "KLD003", "OPT003", "ROL001", "ROL002", "ROL008", "ROL011", "SYS009", "VAL013",
    }
)  # fmt: skip
# Families from the files outward; an effect is never the first line while a cause stands.
ORDER = (
    "CFG004", "SYS", "TOK", "CFG", "PRE", "KLD001", "POL", "REF", "REW",
    "VAL001", "VAL002", "VAL003", "VAL004", "VAL005", "VAL006", "VAL007", "VAL014", "VAL015",
    "OPT001", "ROL", "KLD", "ADV", "VAL", "LOS", "OPT", "MET",
)  # fmt: skip
EFFECTS = frozenset({"ROL003", "OPT002", "LOS005", "ADV008", "REW009", "SYS008"})


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
    cause: dict[int, int] = {}
    grave = [i for i, s in enumerate(severities) if s is not Severity.INFO]
    for i in grave:
        roots = [
            j for j in grave if j != i and _explains(found[j], found[i]) and severities[j].rank <= severities[i].rank
        ]
        if roots:
            cause[i] = min(roots, key=lambda j: _rank(found[j], severities[j]))
    for i in list(cause):  # a loop of mutual explanation keeps its gravest member as the root
        seen = {i}
        while cause.get(i) is not None and cause[i] not in seen:
            seen.add(i := cause[i])
        if i in cause:
            cycle = [j for j in seen if j in cause]
            cause.pop(min(cycle, key=lambda j: _rank(found[j], severities[j])))
    roots_in_order = sorted((i for i in grave if i not in cause), key=lambda i: _rank(found[i], severities[i]))
    return tuple(Diagnosis(i, tuple(j for j in grave if _root(j, cause) == i and j != i)) for i in roots_in_order)


def _root(i: int, cause: Mapping[int, int]) -> int:
    while i in cause:
        i = cause[i]
    return i


def _explains(a: tuple[str, Finding], b: tuple[str, Finding]) -> bool:
    (code, first), (other, second) = a, b
    if other not in EXPLAINS.get(code, ()):
        return False
    shared: tuple[Role, ...] = ("setup", "loop")
    return code in ACROSS_ROLES or first.role == second.role or first.role in shared or second.role in shared


def _rank(one: tuple[str, Finding], severity: Severity) -> tuple[int, bool, int, str]:
    code = one[0]
    place = next((n for n, prefix in enumerate(ORDER) if code.startswith(prefix)), len(ORDER))
    return severity.rank, code in EFFECTS, place, code

"""From the record to what a page shows: grouped, ordered, named and cleaned, still without any markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_doctor.check import HEADINGS
from rlhf_doctor.finding import MODEL_ROLES, ROLES, Severity
from rlhf_doctor.report.pictures import influence_map, influence_words, legend, wiring
from rlhf_doctor.report.text import blocks, clean, counted
from rlhf_doctor.report.trace_shown import shown as shown_trace
from rlhf_doctor.report.verdict import ROLE_WORDS

__all__ = ["grouped", "human", "view"]

STATUS = {
    "healthy": ("ok", "No fault found"),
    "error": ("error", "Not sound"),
    "warning": ("warning", "At a risk"),
    "unreadable": ("warning", "No verdict"),
    "tool-error": ("warning", "No verdict"),
}
CENSUS = (
    ("attention", "Attention", "every token looks at every token it may see"),
    ("convolution", "Convolution over time", "a token looks at its neighbours"),
    ("recurrent", "Recurrence", "a token is computed from the state after the one before"),
    ("scan", "Linear scan", "a linear state is carried from token to token"),
    ("pooling", "Pooling over time", "tokens are merged into one"),
)
COLUMNS = (
    ("quantity", "What"),
    ("expected", "Expected"),
    ("observed", "Found"),
    ("tolerance", "Tolerance"),
    ("where", "Where"),
)
ALWAYS = ("quantity", "expected", "observed")


def view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page's template needs, in the order in which it is shown."""
    made: dict[str, Any] = clean(record)
    shown = {one["id"]: _finding(one) for one in made["findings"]}
    for one in made["diagnosis"]:
        shown[one["id"]]["follows"] = [shown[child["id"]] for child in one["explains"]]
    roots = [shown[one["id"]] for one in made["diagnosis"]]
    cards = made["setup"]["roles"]
    sick = _sick(made["findings"])
    nodes, edges, reach = wiring(cards, sick)
    verdict = made["verdict"]
    gravest = roots[0]["severity"] if roots else ""
    tone, word = STATUS[gravest or verdict["status"]]
    return {
        "tool": made["tool"],
        "verdict": verdict,
        "tone": tone,
        "word": word,
        "summary": _summary(made),
        "roots": roots,
        "again": _again(made, roots),
        "infos": [one for one in shown.values() if one["severity"] == Severity.INFO],
        "total": len(shown),
        "filters": {
            "roles": [(role, ROLE_WORDS[role]) for role in ROLES if any(f["role"] == role for f in made["findings"])],
            "severities": [str(s) for s in Severity if any(f["severity"] == s for f in made["findings"])],
        },
        "cards": [_card(cards[role], made["findings"]) for role in MODEL_ROLES],
        "given": any(card["present"] for card in cards.values()),
        "mapped": any(card["influence"] for card in cards.values()),
        "legend": legend(),
        "census": _census(cards),
        "nodes": nodes,
        "edges": edges,
        "reach": reach,
        "trace": shown_trace(made["trace"]) if made.get("trace") else None,
        "skipped": grouped(made["skipped"], "reason"),
        "not_run": grouped(made["not_run"], "stage"),
        "skipped_count": len(made["skipped"]),
        "not_run_count": len(made["not_run"]),
        "hidden": made["hidden"],
        "passed": made["passed"],
        "errors": made["errors"],
        "crashed": made["crashed"],
        "setup": made["setup"],
        "declared": sorted(made["setup"]["declared"].items()),
        "environment": made["environment"],
        "versions": sorted(made["environment"]["versions"].items()),
        "columns": COLUMNS,
    }


def _again(made: Mapping[str, Any], roots: Sequence[Mapping[str, Any]]) -> str:
    """The command that examines the first cause alone, empty where the command line is not known."""
    command = made["environment"]["command"]
    return f"{command} --select {roots[0]['code']}" if roots and " check" in command else ""


def human(slug: str) -> str:
    """``value-not-scalar-per-state`` -> ``Value not scalar per state``."""
    words = slug.replace("-", " ")
    return words[:1].upper() + words[1:]


def grouped(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """(value of ``key``, its rows), the largest group first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return sorted(found.items(), key=lambda group: (-len(group[1]), group[0]))


def _finding(one: Mapping[str, Any]) -> dict[str, Any]:
    page = one["page"]
    used = [name for name, _ in COLUMNS if name in ALWAYS or any(e[name] for e in one["evidence"])]
    calm = one["severity"] == Severity.INFO  # nothing to mend: the whole page is background
    rest = HEADINGS if calm else ("What it examines", "What it looks like when broken", "Source")
    return {
        **{k: one[k] for k in ("id", "code", "role", "severity", "confidence", "title", "message", "evidence")},
        "name": human(one["slug"]),
        "role_word": ROLE_WORDS.get(one["role"], one["role"]),
        "columns": used,
        "reproduce": list(dict.fromkeys(e["reproduce"] for e in one["evidence"] if e["reproduce"])),
        "fix": blocks(page.get("How to fix", "")),
        "why": blocks(page.get("Why it matters", "")),
        "more": [(heading, blocks(page[heading])) for heading in rest if page.get(heading)],
        "follows": [],
    }


def _sick(findings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Role -> gravest severity, of the roles with a root cause that is an error or a warning."""
    grave = [f for f in findings if f["severity"] != Severity.INFO and f["cause"] is None]
    return {f["role"]: f["severity"] for f in sorted(grave, key=lambda f: Severity(f["severity"]).rank, reverse=True)}


def _card(card: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [f for f in findings if f["role"] == card["role"] and f["severity"] != Severity.INFO]
    worst = min((Severity(f["severity"]) for f in mine), key=lambda s: s.rank, default=None)
    found = card["influence"]
    shape, words = influence_words(card)
    return {
        **card,
        "word": ROLE_WORDS[card["role"]],
        "tone": str(worst) if worst else "",
        "findings": mine,
        "picture": influence_map(found["tokens"], found["score"], found["floor"]) if found else None,
        "shape": shape,
        "words": words,
        "facts": _facts(card),
    }


def _facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of a card that need no comparison; what is unknown is left out."""
    rows: list[tuple[str, str]] = []
    head, total = card["head"], card["parameters"]
    if head:
        rows.append(("Head", f"{head['name']}, {counted(head['width'], 'output')}"))
    if card["dtype"]:
        rows.append(("dtype", card["dtype"]))
    if total is not None:
        rows.append(("Parameters", size(total)))
    layers = f"{counted(card['layers'], 'layer')} of {card['hidden']:,}" if card["layers"] and card["hidden"] else ""
    said = [layers] if layers else []
    if card["vocabulary"]:
        said.append(f"vocabulary {card['vocabulary']:,}")
    if said:
        rows.append(("Size", ", ".join(said)))
    if card["adapter"]:
        rows.append(("Adapter", card["adapter"]))
    rows.append(("In PPO", card["in_ppo"]))
    return [*rows, ("Gradients", _gradients(card))] if total or card["origin"] == "checkpoint" else rows


def _gradients(card: Mapping[str, Any]) -> str:
    total, trainable = card["parameters"], card["trainable"]
    if card["state"] == "frozen":
        return "to no parameter: frozen"
    if card["state"] == "unknown" or not total:
        return "not known from files"
    return "to every parameter" if card["state"] == "trained" else f"to {size(trainable)} of {size(total)} parameters"


def size(number: int) -> str:
    """``26,848``, ``124.4 M``, ``7.0 B``."""
    for limit, unit in ((10**9, "B"), (10**6, "M")):
        if number >= limit:
            return f"{number / limit:,.1f} {unit}"
    return f"{number:,}"


def _census(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows of (name, what it means, a cell a measured role); None where nothing was measured."""
    measured = {role: cards[role]["census"] for role in MODEL_ROLES if cards[role]["census"]}
    rows = [(name, meaning, [_calls(one, key) for one in measured.values()]) for key, name, meaning in CENSUS]
    depth = [f"{one['depth_per_token']:.1f}" for one in measured.values()]
    rows.append(("Depth per token", "further operations, one after the other, for each further token", depth))
    return {"roles": [ROLE_WORDS[role] for role in measured], "rows": rows} if measured else None


def _calls(census: Mapping[str, Any], key: str) -> str:
    number = sum(census[key].values())
    if not number:
        return "–"
    widths = ", ".join(str(w) for w in census["kernel_widths"]) if key == "convolution" else ""
    return f"{counted(number, 'call')}, kernel {widths}" if widths else counted(number, "call")


def _summary(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(tone, words): how much of what was found, passed and left open."""
    counts = made["verdict"]["counts"]
    said = [(s, counted(counts[s], s)) for s in ("error", "warning") if counts[s]]
    if counts["info"]:
        said.append(("info", f"{counts['info']} worth knowing"))
    if made["verdict"]["ran"]:
        said.append(("ok", f"{len(made['passed'])} passed"))
    if made["skipped"]:
        said.append(("", f"{len(made['skipped'])} undecided"))
    return said

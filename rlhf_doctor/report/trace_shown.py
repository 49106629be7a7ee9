"""From the record's account of a traced step to what is drawn and said of it: words, rows, plain geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_doctor.report.text import counted
from rlhf_doctor.report.verdict import ROLE_WORDS

__all__ = ["Arrow", "Box", "numbers_line", "shown", "unmeasured", "wiring_rows"]

MARKS = {"there": "✓", "none": "✓", "missing": "✕", "unexpected": "✕", "undeclared": "–", "unknown": "?", "absent": "–"}
UPDATED = {
    "there": "✓ updated",
    "none": "✓ not updated",
    "missing": "✕ not updated",
    "unexpected": "✕ updated",
    "unknown": "? not seen",
    "absent": "none",
}
TONES = {"yes": "ok", "no": "error", "unknown": "warning", "no critic": ""}
CHANGES = {
    "rollout outputs": "the rollout's values and the reference's logits",
    "poison": "outputs at places that no response needs",
    "update values": "the critic's values in the update",
    "update logits": "the policy's logits in the update",
}
BOXES = {"reward": (0, 16), "value": (310, 16), "reference": (0, 262), "policy": (310, 262)}
# Edge -> path, what is written at it, and where: x, y of the first of two lines, their distance, their anchor.
ARROWS: Mapping[str, tuple[str, str, int, int, int, str]] = {
    "reward → value target": ("M130 42H302", "critic's target", 220, 32, 28, "middle"),
    "reward → policy": ("M124 68L316 256", "policy's gradient", 210, 146, 17, "middle"),
    "value → advantage": ("M375 68V254", "advantage", 366, 98, 17, "end"),
    "reference → reward": ("M65 262V76", "KL in the rewards", 74, 202, 17, "start"),
    "reference → loss": ("M130 288H302", "KL in the loss", 220, 278, 28, "middle"),
}
WEIGHTS = ("reference → reward", "reference → loss")


@dataclass(frozen=True)
class Box:
    """A model; ``state`` is "", "sick" or "absent"."""

    label: str
    note: str
    x: int
    y: int
    state: str


@dataclass(frozen=True)
class Arrow:
    """An influence; ``verdict`` as in the record; two lines of text at x and y."""

    path: str
    name: str
    said: str
    verdict: str
    x: int
    y: int
    gap: int
    anchor: str


def shown(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page's section needs."""
    absent = {one["role"] for one in trace["updated"] if one["verdict"] == "absent"}
    verdicts = {one["verdict"] for one in trace["wiring"]}
    sample = trace["sample"]
    return {
        "answer": trace["answer"],
        "tone": TONES[trace["answer"]["learns"]],
        "sentence": trace["sentence"],
        "how": _how(trace),
        "boxes": [_box(one) for one in trace["updated"]],
        "arrows": [_arrow(one) for one in trace["wiring"] if not absent & {one["from"], one["to"]}],
        "key": _key(verdicts),
        "wiring": wiring_rows(trace),
        "numbers": [_number(one) for one in trace["numbers"]],
        "sample": None if sample is None else _sample(sample),
    }


def _how(trace: Mapping[str, Any]) -> str:
    if not trace["changed"]:
        return f"Who influences whom was not measured: {trace['unchanged']}."
    return (
        "The step was run again from the same state, each time with one thing changed, and everything put back: "
        f"{', '.join(CHANGES.get(name, name) for name in trace['changed'])}."
    )


def _key(verdicts: set[str]) -> str:
    words = {
        "there": "Solid: there, as it should be.",
        "none": "Dotted: rightly not there.",
        "missing": "Dashed: should be there and is not.",
        "unexpected": "Thick: is there and should not be.",
        "undeclared": "Thin: nothing declares whether it should be there.",
        "unknown": "Sparse dots: not measured.",
    }
    return " ".join(said for verdict, said in words.items() if verdict in verdicts)


def _box(one: Mapping[str, Any]) -> Box:
    state = {"missing": "sick", "unexpected": "sick", "absent": "absent"}.get(one["verdict"], "")
    return Box(ROLE_WORDS[one["role"]], UPDATED[one["verdict"]], *BOXES[one["role"]], state)


def _arrow(one: Mapping[str, Any]) -> Arrow:
    path, name, x, y, gap, anchor = ARROWS[one["edge"]]
    return Arrow(path, name, _short(one), one["verdict"], x, y, gap, anchor)


def _short(one: Mapping[str, Any]) -> str:
    gain = "" if not one["gain"] else figure(one["gain"]) + ("" if one["edge"] in WEIGHTS else " a unit")
    return {
        "there": f"✓ {gain or 'there'}",
        "none": "✓ none",
        "missing": "✕ missing",
        "unexpected": f"✕ unexpected{gain and ': ' + gain}",
        "undeclared": (gain or "there") if one["measured"] else "none",
        "unknown": "? not measured",
    }[one["verdict"]]


def figure(value: float | None, minus: str = "−") -> str:
    """Three significant digits with a true minus; a dash where nothing is known."""
    return "–" if value is None else f"{value:.3g}".replace("-", minus)


def wiring_rows(trace: Mapping[str, Any]) -> list[dict[str, str]]:
    """Influences and updates as rows of words: mark, verdict, name, means, expected, measured."""
    rows = []
    for one in trace["wiring"]:
        expected = {True: "there", False: "not there", None: "not declared"}[one["expected"]]
        rows.append(
            {
                "mark": MARKS[one["verdict"]],
                "verdict": one["verdict"],
                "name": one["edge"],
                "means": one["means"],
                "expected": f"{expected}: {one['why']}",
                "measured": _found(one),
            }
        )
    for one in trace["updated"]:
        if one["verdict"] == "absent":
            continue
        measured = {True: f"yes, {counted(one['tensors'], 'tensor')}", False: "no", None: "not known"}[one["measured"]]
        rows.append(
            {
                "mark": MARKS[one["verdict"]],
                "verdict": one["verdict"],
                "name": f"{ROLE_WORDS[one['role']]} updated",
                "means": "",
                "expected": "yes" if one["expected"] else "no",
                "measured": measured + (f": {one['reason']}" if one["reason"] else ""),
            }
        )
    return rows


def _found(one: Mapping[str, Any]) -> str:
    if one["measured"] is None:
        return f"not known: {one['reason']}"
    if not one["measured"]:
        return "not there" + (f": {one['reason']}" if one["reason"] else "")
    unit = "weight {}" if one["edge"] in WEIGHTS else "{} for each unit"
    gain = "" if one["gain"] is None else f", {unit.format(figure(one['gain']))}"
    return f"there{gain}" + (f" ({one['reason']})" if one["reason"] else "")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _number(one: Mapping[str, Any]) -> dict[str, str]:
    verdict = {True: "ok", False: "differs", None: ""}[one["agrees"]]
    return {
        "name": one["name"],
        "declared": _said(one["declared"]) or "not declared",
        "measured": _said(one["measured"]) or f"not measured: {one['reason']}",
        "known": "yes" if one["measured"] is not None else "",
        "mark": {"ok": "✓ the same", "differs": "✕ differs", "": ""}[verdict],
        "verdict": verdict,
    }


def _said(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def numbers_line(trace: Mapping[str, Any]) -> str:
    """Measured numbers beside the declared ones, where these are others, in one line; empty where none was measured."""
    said = []
    for one in trace["numbers"]:
        if one["measured"] is None:
            continue
        beside = f" (declared {_said(one['declared'])})" if one["agrees"] is False else ""
        beside = " (not declared)" if one["declared"] is None else beside
        said.append(f"{one['name']} {_said(one['measured'])}{beside}")
    known = [one["agrees"] for one in trace["numbers"] if one["agrees"] is not None]
    same = "; all as declared" if known and all(known) else ""
    return ", ".join(said) + same if said else ""


def unmeasured(trace: Mapping[str, Any]) -> str:
    """Names of the numbers that were not measured, by reason; empty where there are none."""
    groups: dict[str, list[str]] = {}
    for one in trace["numbers"]:
        if one["measured"] is None:
            groups.setdefault(one["reason"], []).append(one["name"])
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _sample(one: Mapping[str, Any]) -> dict[str, Any]:
    tokens = [_token(token) for token in one["tokens"]]
    if one["left_out"]:
        at = one["left_out_after"]
        for token in tokens[at : at + 1]:
            token["after"] = f"{one['left_out']:,} left out"
    rows = [_row(row) for row in one["rows"] if not row["reason"]]
    groups: dict[str, list[str]] = {}
    for row in one["rows"]:
        if row["reason"]:
            groups.setdefault(row["reason"], []).append(row["name"])
    which = f"Response {one['number']} of {one['of']}"
    return {
        "title": which + (", the one whose score was changed" if one["changed"] else ""),
        "prompt": one["prompt"],
        "score": "not seen" if one["score"] is None else figure(one["score"]),
        "ended": one["ended"],
        "tokens": tokens,
        "rows": rows,
        "unknown": [f"{', '.join(names)}: {reason}" for reason, names in groups.items()],
    }


def _token(one: Mapping[str, Any]) -> dict[str, str]:
    place = {None: "–", 0: "its own"}.get(one["offset"]) or counted(abs(one["offset"]), "token")
    if one["offset"]:
        place += " before" if one["offset"] < 0 else " later"
    return {
        "text": _visible(one["text"]),
        "id": str(one["id"]),
        "counted": "yes" if one["counted"] else "no",
        "trained": "yes" if one["trained"] else "no",
        "action": place if one["trained"] else "–",
        "wrong": "yes" if one["offset"] and one["trained"] else "",
        "leak": "yes" if one["trained"] and not one["counted"] else "",
        "after": "",
    }


def _visible(text: str) -> str:
    """Blanks at the ends and line ends made visible."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text) or "(empty)"
    at = text.index(inner)
    return "␣" * at + inner + "␣" * (len(text) - at - len(inner))


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    declared: Sequence[float | None] = one["declared"] or [None] * len(one["measured"])
    apart = sum(one["differs"])
    if one["declared"] is None:
        note = ""
    else:
        note = f"differs from the declared settings at {counted(apart, 'token')}" if apart else "as declared"
    cells = [
        {"said": figure(a), "declared": figure(b) if differs else ""}
        for a, b, differs in zip(one["measured"], declared, one["differs"], strict=True)
    ]
    return {"name": one["name"], "note": note, "apart": "yes" if apart else "", "cells": cells}

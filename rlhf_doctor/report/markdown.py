"""The Markdown report, for pull requests and chats: verdict, causes, what was left open."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_doctor.report.text import Block, blocks, clean, one_line, spans
from rlhf_doctor.report.verdict import ROLE_WORDS

__all__ = ["render"]

MARKS = re.compile(r"([\\`*_\[\]<>|~#@!&$])")


def render(record: Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown."""
    from rlhf_doctor.report.view import grouped, human

    made: dict[str, Any] = clean(record)
    verdict = made["verdict"]
    shown = {one["id"]: one for one in made["findings"]}
    lines = [f"# {_text(verdict['sentence'])}"]
    lines += [_text(verdict[key]) for key in ("cost", "cost_basis", "incomplete") if verdict[key]]
    if made["errors"] or made["crashed"]:
        lines.append("## What could not be read or judged")
        broken = [f"- {one['role']}: {_text(one['message'])}" for one in made["errors"]]
        broken += [f"- {one['code']} crashed: a fault of this tool, not of the setup" for one in made["crashed"]]
        lines.append("\n".join(broken))
    if made["diagnosis"]:
        lines.append("## Diagnosis")
    for number, root in enumerate(made["diagnosis"], start=1):
        one = shown[root["id"]]
        lines.append(f"### {number}. {_text(human(one['slug']))} ({one['code']}, {_where(one)})")
        lines += _finding(one)
        if root["explains"]:
            names = ", ".join(f"{child['code']} ({child['role']})" for child in root["explains"])
            lines.append(f"Follows from it: {_text(names)}")
    if made.get("trace"):
        lines += _trace(made["trace"])
    if any(card["present"] for card in made["setup"]["roles"].values()):
        lines += ["## The four models", _models(made["setup"]["roles"])]
    infos = [one for one in made["findings"] if one["severity"] == "info"]
    if infos:
        lines.append("## Looks odd, is normal or worth knowing")
        lines.append("\n".join(f"- {one['code']} ({_text(one['role'])}): {_text(one['message'])}" for one in infos))
    groups = grouped(made["skipped"], "reason")
    if groups:
        lines.append("## What was not checked, and why")
        lines.append(
            "\n".join(f"- {_text(reason)}: {', '.join(row['code'] for row in rows)}" for reason, rows in groups)
        )
    environment = made["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment["versions"].items()) if version)
    lines += ["---", _text(f"{made['setup']['origin']}, stage {environment['stage']}, {versions}")]
    return "\n\n".join(line for line in lines if line) + "\n"


def _where(one: Mapping[str, Any]) -> str:
    return f"{ROLE_WORDS.get(one['role'], one['role'])}, {one['severity']}, {one['confidence']}"


def _finding(one: Mapping[str, Any]) -> list[str]:
    said = [_text(one["message"])]
    keys = ("quantity", "expected", "observed", "where")
    table = ["| what | expected | found | where |", "|---|---|---|---|"]
    table += ["| " + " | ".join(_text(row[key]) for key in keys) + " |" for row in one["evidence"]]
    said.append("\n".join(table))
    for heading in ("How to fix", "Why it matters", "Source"):
        found = blocks(one["page"].get(heading, ""))
        if found:
            said += [f"**{heading}**", *_blocks(found)]
    lines = dict.fromkeys(row["reproduce"] for row in one["evidence"] if row["reproduce"])
    if lines:
        said += ["See the same number again:", "\n".join(f"    {line}" for text in lines for line in text.splitlines())]
    return said


def _blocks(found: Sequence[Block]) -> list[str]:
    marks = {"numbered": "1. ", "bullets": "- "}
    return ["\n".join(marks.get(block.kind, "") + _text(item) for item in block.items) for block in found]


def _trace(trace: Mapping[str, Any]) -> list[str]:
    from rlhf_doctor.report.trace_shown import numbers_line, unmeasured, wiring_rows

    said = ["## What one step does"]
    said.append(f"**{_text(trace['answer']['question'])}** {_text(trace['answer']['sentence'])}")
    said.append(_text(trace["sentence"]))
    table = ["| influence | should be | measured |", "|---|---|---|"]
    for row in wiring_rows(trace):
        cells = (f"{row['mark']} {row['name']}", row["expected"], row["measured"])
        table.append("| " + " | ".join(map(_text, cells)) + " |")
    said.append("\n".join(table))
    measured, left = numbers_line(trace), unmeasured(trace)
    said += [f"Measured: {_text(measured)}"] if measured else []
    return said + ([f"Not measured: {_text(left)}"] if left else [])


def _models(cards: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| role | what it is | emits | should emit | shape | gradients |", "|---|---|---|---|---|---|"]
    for role, card in cards.items():
        kind = (card["kind"] or card["class_name"] or "not measured") if card["present"] else "not given"
        cells = (ROLE_WORDS[role], kind, card["emits"], card["emits_expected"], card["measured_shape"], card["state"])
        rows.append("| " + " | ".join(_text(str(cell or "–")) for cell in cells) + " |")
    return "\n".join(rows)


def _text(text: str) -> str:
    """One line in which nothing is markup but addresses and `code`."""
    said = []
    for span in spans(one_line(text)):
        if span.kind == "code" and "|" not in span.text:
            said.append(f"`{span.text}`")
        elif span.kind == "link":
            said.append(f"<{span.text.replace('|', '%7C')}>")
        else:
            said.append(MARKS.sub(r"\\\1", span.text))
    line = "".join(said)
    return re.sub(r"^(\s*)([-+=]|\d+[.)])(?=\s|$)", r"\1\\\2", line)

"""The terminal report: the verdict, the causes in order, what was left open. Every word reads without its colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_doctor.report.text import Block, blocks, clean, counted, one_line
from rlhf_doctor.report.verdict import ROLE_WORDS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["line", "render", "show"]

WIDTH = 88
COLOUR = {"error": "bold red", "warning": "bold yellow", "info": "bold blue", "healthy": "bold green"}
EVIDENCE = 3
REASONS = 6


def render(record: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """The report as plain text without colours, wrapped to ``width`` columns."""
    from rich.console import Console

    said = io.StringIO()
    show(record, Console(file=said, width=width, color_system=None, legacy_windows=False, _environ={}))
    return said.getvalue()


def line(record: Mapping[str, Any]) -> str:
    """The whole verdict in one line, for quiet callers."""
    verdict = record["verdict"]
    counts = verdict["counts"]
    codes = ", ".join(f"{d['code']} {d['role']}" for d in record["diagnosis"])
    numbers = f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}"
    return one_line(f"{verdict['status']}: {numbers}{f' ({codes})' if codes else ''}. {verdict['sentence']}")


def show(record: Mapping[str, Any], console: Console | None = None, *, path: str = "", quiet: bool = False) -> None:
    """Print the report.

    Args:
        record: the report record.
        console: where to print; None means the standard output.
        path: where the full report was written, named at the end.
        quiet: print ``line`` alone.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    if quiet:
        console.print(line(record), markup=False, highlight=False, soft_wrap=True)
        return
    made: dict[str, Any] = clean(record)
    page = _Page(console)
    _head(page, made)
    shown = {one["id"]: one for one in made["findings"]}
    told: dict[str, int] = {}
    for number, root in enumerate(made["diagnosis"], start=1):
        _root(page, number, shown[root["id"]], [shown[child["id"]] for child in root["explains"]], told)
    _trace(page, made.get("trace"))
    _models(page, made["setup"]["roles"])
    _infos(page, [one for one in made["findings"] if one["severity"] == "info"])
    _unchecked(page, made)
    if path:
        page.gap()
        page.put(f"Full report: {path}")


class _Page:
    """Lines with an indent, wrapped by hand; nothing in them is taken for markup."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def gap(self) -> None:
        self.console.print()

    def put(self, said: str | Text, *, at: int = 0, mark: str | Text = "", style: str = "") -> None:
        """A paragraph after its mark at column ``at``; what does not fit goes on below its own beginning."""
        from rich.text import Text

        first = Text.assemble(" " * at, mark)
        room = max(self.console.width - len(first), 16)
        text = Text(said, style=style) if isinstance(said, str) else said
        for one in text.wrap(self.console, room):
            one.rstrip()
            self.console.print(self._sayable(first + one), highlight=False, soft_wrap=True)
            first = Text(" " * len(first))

    def labelled(self, label: str, said: str, *, at: int, width: int = 11) -> None:
        """``label     said``, with what is said kept in its own column."""
        from rich.text import Text

        self.put(said, at=at, mark=Text(f"{label:<{width}}", style="dim"))

    def _sayable(self, text: Text) -> Text:
        """The text in the characters that the console's encoding has, as many columns as before."""
        text.plain = text.plain.encode(self.console.encoding, "replace").decode(self.console.encoding)
        return text


def _head(page: _Page, made: Mapping[str, Any]) -> None:
    from rich.text import Text

    verdict = made["verdict"]
    tone = made["diagnosis"][0]["severity"] if made["diagnosis"] else verdict["status"]
    page.put(Text(verdict["sentence"], style=COLOUR.get(tone, "bold yellow")))
    for said in (verdict["cost"], verdict["incomplete"]):
        if said:
            page.put(said)
    counts = [counted(verdict["counts"][s], s) for s in ("error", "warning") if verdict["counts"][s]]
    counts += [f"{verdict['counts']['info']} worth knowing"] if verdict["counts"]["info"] else []
    counts += [f"{len(made['passed'])} passed", f"{len(made['skipped'])} undecided"]
    page.put(", ".join(counts), style="dim")
    for error in made["errors"]:
        named = error["message"].lower().startswith(error["role"])
        page.gap()
        said = error["message"] if named else f"{error['role']}: {error['message']}"
        page.put(said, mark=Text("NOT READ  ", style="bold yellow"))
    for crash in made["crashed"]:
        page.gap()
        last = crash["traceback"].strip().splitlines()[-1:] or [""]
        page.put(f"{crash['code']}, a fault of this tool: {last[0]}", mark=Text("CRASHED   ", style="bold yellow"))


def _root(
    page: _Page, number: int, one: Mapping[str, Any], follows: Sequence[Mapping[str, Any]], told: dict[str, int]
) -> None:
    """One cause; ``told`` maps a code to the number under which its steps stand already."""
    page.gap()
    _title(page, f"{number}. ", one)
    page.put(one["message"], at=3)
    for evidence in one["evidence"][:EVIDENCE]:
        page.put(one_line(evidence["quantity"]), at=3, style="dim")
        _measured(page, evidence)
    if len(one["evidence"]) > EVIDENCE:
        page.put(f"and {len(one['evidence']) - EVIDENCE} more", at=5, style="dim")
    fix = blocks(one["page"].get("How to fix", ""))
    if told.setdefault(one["code"], number) != number:
        page.put(f"fix as under {told[one['code']]}.", at=3, style="dim")
    elif fix:
        page.put("fix", at=3, style="dim")
        _steps(page, fix)
    if follows:
        names = ", ".join(f"{child['code']} {child['role']}" for child in follows)
        page.put(names, at=3, mark="follows from it: ")


def _title(page: _Page, mark: str, one: Mapping[str, Any]) -> None:
    from rich.text import Text

    colour = COLOUR[one["severity"]]
    page.put(
        Text.assemble(
            (one["severity"].upper(), colour),
            " ",
            (one["code"], "bold"),
            f" {one['slug']}, {ROLE_WORDS.get(one['role'], one['role'])} ({one['confidence']})",
        ),
        mark=mark,
    )


def _measured(page: _Page, evidence: Mapping[str, str]) -> None:
    tolerance = f" (tolerance {evidence['tolerance']})" if evidence["tolerance"] else ""
    page.labelled("expected", evidence["expected"] + tolerance, at=5)
    page.labelled("found", evidence["observed"], at=5)
    for name in ("where", "reproduce"):
        if evidence[name]:
            page.labelled(name, evidence[name], at=5)


def _steps(page: _Page, found: Sequence[Block]) -> None:
    for block in found:
        for number, item in enumerate(block.items, start=1):
            mark = {"numbered": f"{number}. ", "bullets": "- "}.get(block.kind, "")
            page.put(item, at=5, mark=mark)


def _models(page: _Page, cards: Mapping[str, Mapping[str, Any]]) -> None:
    if not any(card["present"] for card in cards.values()):
        return
    page.gap()
    page.put("The four models", style="bold")
    for role in ("policy", "reference", "reward", "value"):
        card = cards[role]
        if not card["present"]:
            said = "not given"
        else:
            kind = card["kind"] or card["class_name"] or "not measured"
            shape = f", {card['emits']} {card['measured_shape']}" if card["emits"] else ""
            should = f", should be {card['emits_expected']}" if card["fits"] is False else ""
            said = f"{kind}{shape}{should}"
        page.labelled(role, said, at=2)


def _trace(page: _Page, trace: Mapping[str, Any] | None) -> None:
    """Whether the critic learns from the scores, the wiring, and measured numbers beside declared ones."""
    if trace is None:
        return
    from rlhf_doctor.report.trace_shown import numbers_line, unmeasured

    page.gap()
    page.put(trace["answer"]["question"], style="bold")
    page.put(trace["answer"]["sentence"], at=2)
    page.labelled("wiring", trace["sentence"], at=2)
    measured, left = numbers_line(trace), unmeasured(trace)
    if measured:
        page.labelled("measured", measured, at=2)
    if left:
        page.labelled("not seen", left, at=2)


def _infos(page: _Page, infos: Sequence[Mapping[str, Any]]) -> None:
    if not infos:
        return
    page.gap()
    page.put("Looks odd, is normal or worth knowing", style="bold")
    for one in infos:
        page.put(f"{one['role']}: {one['message']}", at=2, mark=f"{one['code']}  ")


def _unchecked(page: _Page, made: Mapping[str, Any]) -> None:
    from rlhf_doctor.report.view import grouped

    groups = grouped(made["skipped"], "reason")
    if groups:
        page.gap()
        page.put("Not checked, and why", style="bold")
    for reason, rows in groups[:REASONS]:
        page.labelled(f"{len(rows):>4}", one_line(reason), at=0, width=6)
    if len(groups) > REASONS:
        left = sum(len(rows) for _, rows in groups[REASONS:])
        page.labelled(f"{left:>4}", f"for {len(groups) - REASONS} other reasons, in the full report", at=0, width=6)
    if made["hidden"]:
        page.put(f"{counted(made['hidden'], 'suspicion')} without proof left out", at=2, style="dim")

"""The pages of the checks, and the table of all of them, for the terminal and for the README."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_doctor.check import Check, registry
from rlhf_doctor.nearest import did_you_mean

__all__ = ["check_named", "codes_named", "markdown_table", "page_text", "print_table", "rows"]


def check_named(name: str) -> Check:
    """The check of this code or slug, in any case.

    Raises:
        KeyError: there is none; the message suggests the nearest.
    """
    checks = registry()
    for one in checks.values():
        if name.lower() in (one.code.lower(), one.slug):
            return one
    raise KeyError(f"no check is called {name!r}{did_you_mean(name, _names(checks))}")


def codes_named(names: Iterable[str]) -> list[str]:
    """Codes and families as the examiner knows them, of codes, slugs and families in any case.

    Raises:
        KeyError: a name is none of these; the message suggests the nearest.
    """
    checks = registry()
    known = {c.slug: c.code for c in checks.values()} | {c.code.lower(): c.code for c in checks.values()}
    known |= {c.family: c.family for c in checks.values()} | {c.code[:3].lower(): c.code[:3] for c in checks.values()}
    chosen = []
    for name in names:
        if name.lower() not in known:
            raise KeyError(f"no check or family is called {name!r}{did_you_mean(name, known.values())}")
        chosen.append(known[name.lower()])
    return chosen


def _names(checks: Mapping[str, Check]) -> list[str]:
    return [*checks, *(c.slug for c in checks.values())]


def page_text(one: Check) -> str:
    """A check's page, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    after = f"; after {', '.join(one.after)}" if one.after else ""
    early = f", partly from --stage {one.early} on" if one.early else ""
    lines = [
        f"{one.code}  {one.slug}",
        f"{one.title} ({one.family}, {one.severity}, --stage {one.stage}{early}{after})",
    ]
    for heading, text in one.page.items():
        lines += ["", heading, *_wrapped(text, width)]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Paragraphs and numbered steps, indented under their heading."""
    from rlhf_doctor.report.text import blocks

    lines: list[str] = []
    for block in blocks(text):
        for number, item in enumerate(block.items, start=1):
            mark = {"numbered": f"{number}. ", "bullets": "- "}.get(block.kind, "")
            lines += textwrap.wrap(
                item,
                width,
                initial_indent=f"  {mark}",
                subsequent_indent="  " + " " * len(mark),
                break_long_words=False,  # an address stays whole
                break_on_hyphens=False,
            )
    return lines


def rows(families: Iterable[str] = ()) -> list[dict[str, Any]]:
    """code, slug, family, stage, severity, title of every check, or of those that ``families`` names."""
    wanted = set(codes_named(families))
    return [
        {
            "code": c.code,
            "slug": c.slug,
            "family": c.family,
            "stage": str(c.stage),
            "severity": str(c.severity),
            "title": c.title,
        }
        for c in registry().values()
        if not wanted or wanted & {c.code, c.family, c.code[:3]}
    ]


def markdown_table(table: Iterable[Mapping[str, Any]]) -> str:
    """The table of the README."""
    lines = ["| code | check | stage | severity | what holds when all is well |", "|---|---|---|---|---|"]
    for r in table:
        title = r["title"].replace("|", "\\|")
        lines.append(f"| {r['code']} | `{r['slug']}` | {r['stage']} | {r['severity']} | {title} |")
    return "\n".join(lines)


def print_table(table: Iterable[Mapping[str, Any]]) -> None:
    """The table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    shown = Table("code", "slug", "what holds when all is well", "stage", "severity", box=None, pad_edge=False)
    colours = {"error": "red", "warning": "yellow", "info": "cyan"}
    for r in table:
        severity = Text(r["severity"], style=colours[r["severity"]])
        shown.add_row(r["code"], Text(r["slug"]), Text(r["title"]), r["stage"], severity)
    console.print(shown)

"""The terminal report: narrow, without colour, in poor encodings, and in one line."""

from __future__ import annotations

import io

import pytest
import report_records as records
from rich.console import Console

from rlhf_doctor.report import terminal


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("case", sorted(records.EVERY))
def test_no_line_is_wider_than_the_terminal(case: str, width: int) -> None:
    lines = terminal.render(records.EVERY[case](), width=width).splitlines()
    assert max(map(len, lines)) <= width


def shown(case: str, **console: object) -> str:
    said = io.StringIO()
    terminal.show(records.EVERY[case](), Console(file=said, width=80, **console), path="reports/x.html")  # type: ignore[arg-type]
    return said.getvalue()


def test_colour_adds_nothing_to_the_words() -> None:
    from rich.text import Text

    coloured = shown("founding", force_terminal=True, color_system="standard", _environ={})
    assert "\x1b[" in coloured
    assert Text.from_ansi(coloured).plain.rstrip() == shown("founding", color_system=None).rstrip()


def test_the_cause_comes_first_and_the_page_last() -> None:
    lines = shown("founding", color_system=None).splitlines()
    assert lines[0].startswith("Do not start this RLHF run yet")
    assert next(line for line in lines if line.startswith("1. ")).startswith("1. ERROR REW001")
    assert lines[-1] == "Full report: reports/x.html"


def test_what_follows_is_named_under_its_cause_and_not_again() -> None:
    said = terminal.render(records.founding())
    assert "follows from it: REW006 reward" in said
    assert said.count("REW006") == 1


def test_undecided_checks_are_counted_by_reason() -> None:
    said = terminal.render(records.founding())
    assert "   2  needs a tokenizer of each model" in said
    many = [{"code": f"X{n:03}", "slug": "x", "title": "x", "reason": f"needs {n}"} for n in range(20)]
    assert "  14  for 14 other reasons" in terminal.render(records.record(skipped=many))


def test_quiet_is_one_line() -> None:
    for make in records.EVERY.values():
        said = io.StringIO()
        terminal.show(make(), Console(file=said, width=40), quiet=True)
        assert said.getvalue() == terminal.line(make()) + "\n"
        assert "\n" not in terminal.line(make())
    assert terminal.line(records.founding()).startswith("findings: 2 errors, 2 warnings (REW001 reward, VAL001 value")


class Ascii(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)


def test_a_terminal_without_the_letters_gets_others() -> None:
    with Ascii() as poor:
        terminal.show(records.founding(), Console(file=poor, width=80))
        said = poor.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "The reward's mean is ?3.2" in said


def test_brackets_are_no_markup() -> None:
    found = records.finding("VAL002", "x", "value", "The shape [bold]is[/bold] [3, 16]. [/nonsense]")
    made = records.record(findings=[found], diagnosis=[records.diagnosed(found)])
    assert "The shape [bold]is[/bold] [3, 16]. [/nonsense]" in terminal.render(made)


def test_the_steps_of_a_code_are_told_once() -> None:
    said = terminal.render(records.foreign())
    assert said.count("Start the reward model from the SFT checkpoint") == 1
    assert "fix as under 1." in said

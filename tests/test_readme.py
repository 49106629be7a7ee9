"""What README shows is what the code has: commands, options, files, exit codes, keys and the table of checks."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from typing import Any

import click
import pytest
from conftest import ROOT

from reference_impl import __main__ as pipeline
from rlhf_doctor.cli import cli
from rlhf_doctor.finding import Severity
from rlhf_doctor.pages import markdown_table, rows
from rlhf_doctor.report.record import exit_code
from rlhf_doctor.report.schema import SCHEMA
from rlhf_doctor.setups import DECLARED_NAMES, RLHFSetup

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
SPOKEN = re.findall(r"`([^`]+)`", PROSE)
OPENING = ["pip install . && rlhf-doctor check", 'pip install -e ".[test]" && pytest']
TABLE = re.compile(r"<!-- rlhf-doctor rules --format markdown -->\n(.*?)\n?<!-- end -->", re.DOTALL)


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every ``rlhf-doctor …`` that is shown, in blocks and in sentences, as words."""
    lines = [line for block in fenced("sh") for line in block.splitlines()] + SPOKEN
    parts = [part for line in lines for part in line.split("&&")]
    typed = [shlex.split(part, comments=True) for part in parts if part.strip().startswith("rlhf-doctor ")]
    return [words[1:] for words in typed]


def test_it_opens_with_the_two_commands() -> None:
    title, block = re.match(r"(.*?)\n\n```sh\n(.*?)```", README, re.DOTALL).groups()  # type: ignore[union-attr]
    assert title == "# rlhf-doctor"
    assert [line.split(" #")[0].rstrip() for line in block.splitlines()] == OPENING
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert "test" in extras


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_is_understood(words: list[str]) -> None:
    cli.commands[words[0]].make_context(words[0], words[1:])


REFERENCE = re.findall(r"^(?:python|torchrun).* -m reference_impl (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("words", REFERENCE)
def test_every_command_of_the_reference_is_understood(words: str) -> None:
    given, _ = pipeline.parse(shlex.split(words, comments=True))
    assert str(given.out) == "run"


def test_every_command_is_shown() -> None:
    assert len(REFERENCE) == 4
    assert {words[0] for words in commands()} == set(cli.commands)


def test_every_option_is_one() -> None:
    options = {o for c in cli.commands.values() for p in c.params if isinstance(p, click.Option) for o in p.opts}
    assert {word for word in SPOKEN if word.startswith("--")} <= options


def test_every_file_is_there() -> None:
    words = re.findall(r"(?:rlhf_doctor|reference_impl|tests|reports)/[\w./<>-]*", README)
    paths = [word.rstrip(".").partition("<")[0] for word in words]
    assert len(paths) > 4
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_exit_codes_are_those_of_the_code() -> None:
    shown = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE))
    assert cli.help is not None
    helped = dict(re.findall(r"[:;] (\d+) ([^;.]+)", " ".join(cli.help.split())))
    assert list(shown) == list(helped)
    nothing: dict[str, Any] = {"crashed": [], "errors": [], "findings": [], "skipped": []}
    reasons = [
        nothing,
        nothing | {"findings": [{"severity": str(Severity.ERROR)}]},
        nothing | {"errors": ["unreadable"]},
        nothing | {"crashed": ["VAL002"]},
    ]
    assert [str(exit_code(made)) for made in reasons] == [code for code in shown if code != "130"]


def test_the_setup_in_python_is_one() -> None:
    tree = ast.parse(fenced("python")[0])
    keys = [k.value for n in ast.walk(tree) if isinstance(n, ast.Dict) for k in n.keys if isinstance(k, ast.Constant)]
    assert set(keys) <= set(RLHFSetup.__dataclass_fields__) | set(DECLARED_NAMES)


def test_keys_of_the_json_report_are_documented() -> None:
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", README.split("## JSON")[1].split("\n## ")[0])]
    known = {re.split(r"[.*]", path)[0] for path in SCHEMA}
    shown = [span for span in spans if re.fullmatch(r"\w+(\[\])?", span)]
    assert shown
    assert [name for name in shown if name not in known and f"{name}[]" not in known] == []
    last = ""
    for span in spans:
        if span in shown:
            last = span
        elif re.fullmatch(r"\w+(, \w+)+", span):
            inner = {re.split(r"\.|\[\]", path.removeprefix(f"{last}."))[0] for path in SCHEMA if path.startswith(last)}
            assert set(span.split(", ")) <= inner, last


def test_the_table_is_the_registry() -> None:
    found = TABLE.search(README)
    assert found, "the markers around README's table are gone"
    assert found[1] == markdown_table(rows()), "put the output of `rlhf-doctor rules --format markdown` into README"

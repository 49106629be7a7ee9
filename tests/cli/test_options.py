"""What is typed: help, choices, mistyped names, where reports go."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rlhf_doctor import delivery
from rlhf_doctor.check import registry
from rlhf_doctor.cli import cli


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="rlhf-doctor")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["chek"], "did you mean 'check'"),
        (["mine.py:build"], "did you mean 'rlhf-doctor check mine.py:build'"),
        (["check", "--polcy", "x"], "--policy"),
        (["check", "--stage", "prob"], "did you mean 'probe'"),
        (["check", "--format", "html,jsn"], "did you mean 'json'"),
        (["check", "--fail-on", "warnings"], "did you mean 'warning'"),
        (["check", "--dtype", "float23"], "did you mean 'float32'"),
        (["check", "--select", "VAL0002"], "did you mean 'VAL002'"),
        (["check", "--ignore", "vallue"], "did you mean 'value'"),
        (["check", "--set", "gamma"], "as in gamma=0.99"),
        (["check", "--timeout", "0"], "--timeout"),
        (["explain", "val-not-scalar-per-state"], "did you mean 'value-not-scalar-per-state'"),
        (["rules", "rewad"], "did you mean 'reward'"),
        (["selftest", "--select", "REW01"], "did you mean 'REW01"),
        (["rules", "--format", "jsom"], "did you mean 'json'"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_and_exit_code_2(arguments: list[str], suggestion: str) -> None:
    result = typed(*arguments)
    assert result.exit_code == 2
    assert suggestion in result.output
    assert "Traceback" not in result.output


def test_a_setting_that_no_check_reads_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = typed("check", str(tmp_path), "--stage", "static", "--set", "gama=0.9", "--format", "json", "-o", "-")
    assert "note: no check reads the setting 'gama'; did you mean 'gamma'?" in result.stderr
    assert json.loads(result.stdout)["verdict"]["status"] == "unreadable"
    assert result.exit_code == 2


def test_stdout_takes_one_format() -> None:
    result = typed("check", "--format", "json,html", "-o", "-")
    assert result.exit_code == 2
    assert "one format" in result.output


def test_every_command_has_help() -> None:
    for name, command in cli.commands.items():
        result = typed(name, "--help")
        assert result.exit_code == 0
        assert command.get_short_help_str(200) in result.output.replace("\n  ", " ")
        undocumented = [p.name for p in command.params if p.param_type_name == "option" and not getattr(p, "help", "")]
        assert not undocumented, f"{name} has options without help"


@pytest.mark.parametrize("name", ["VAL002", "val002", "value-not-scalar-per-state"])
def test_explain_shows_the_whole_page(name: str) -> None:
    result = typed("explain", name)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 100
    words = " ".join(result.output.split())
    for heading, text in registry()["VAL002"].page.items():
        assert heading in result.output
        assert " ".join(text.split()) in words


def test_rules_as_json_lists_every_check() -> None:
    rows = json.loads(typed("rules", "--format", "json").output)
    assert [r["code"] for r in rows] == list(registry())
    assert set(rows[0]) == {"code", "slug", "family", "stage", "severity", "title"}


def test_rules_of_a_family_and_as_a_table() -> None:
    rows = json.loads(typed("rules", "value", "REW", "--format", "json").output)
    assert {r["family"] for r in rows} == {"value", "reward"}
    table = typed("rules", "value").output
    assert "VAL002  value-not-scalar-per-state" in table
    assert "REW001" not in table


class TestDelivery:
    """Which format goes where."""

    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def planned(formats: tuple[str, ...], output: str | None, name: str = "mine.py:build") -> dict[str, str | None]:
        return {d.format: d.path and d.path.as_posix() for d in delivery.plan(formats, output, name)}

    def test_by_default_the_terminal_and_a_page_named_after_setup_and_time(self) -> None:
        planned = self.planned((), None)
        assert planned["terminal"] is None
        assert re.fullmatch(r"reports/rlhf-doctor-mine-build-\d{8}-\d{6}\.html", planned["html"] or "")
        assert Path("reports").is_dir()

    @pytest.mark.parametrize(
        ("formats", "output", "expected"),
        [
            ((), "deep/out.json", {"terminal": None, "json": "deep/out.json"}),
            ((), "out.md", {"terminal": None, "markdown": "out.md"}),
            ((), "out.txt", {"terminal": "out.txt"}),
            ((), "-", {"terminal": None}),
            (("json",), "-", {"json": None}),
            (("json",), "out.data", {"json": "out.data"}),
            (("json", "html"), "out.html", {"json": "out.json", "html": "out.html"}),
            (("terminal", "json"), "out.json", {"terminal": None, "json": "out.json"}),
        ],
    )
    def test_files(self, formats: tuple[str, ...], output: str, expected: dict[str, str | None]) -> None:
        assert self.planned(formats, output) == expected

    def test_folders(self) -> None:
        planned = self.planned(("json", "markdown"), "some/folder", "--policy ../a b/π --value x")
        assert [Path(p or "").parent.as_posix() for p in planned.values()] == ["some/folder"] * 2
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", Path(p or "").name) for p in planned.values())

    def test_a_folder_that_cannot_be_made(self) -> None:
        Path("taken").write_text("")
        result = typed("check", "-o", "taken/out.json")
        assert result.exit_code == 2
        assert "--output" in result.output


def test_versions_of_any_install(doctor: Any) -> None:
    ran = doctor("version")
    assert ran.returncode == 0
    assert ran.stdout.startswith("rlhf-doctor")

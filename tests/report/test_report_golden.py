"""The renderings are what they were: a change of words or order shows up here, to be read before it is kept."""

from __future__ import annotations

import json

import pytest
import report_records as records

from rlhf_doctor.report import html, json_, markdown, terminal

RENDER = {"html": html.render, "json": json_.render, "markdown": markdown.render, "terminal": terminal.render}


@pytest.mark.parametrize("name", sorted(records.golden()))
def test_golden(name: str) -> None:
    kept = (records.GOLDEN / name).read_text(encoding="utf-8")
    assert records.golden()[name] == kept, f"run python {records.__file__} and read the difference"


@pytest.mark.parametrize("form", sorted(RENDER))
@pytest.mark.parametrize("case", sorted(records.EVERY))
def test_same_record_gives_same_bytes_whatever_the_order_of_its_keys(form: str, case: str) -> None:
    made = records.EVERY[case]()
    again = json.loads(json.dumps(made, sort_keys=True))
    first = RENDER[form](made)
    assert first == RENDER[form](made)
    # Roles and versions have an order of their own; census operations and declared names are sorted.
    assert first == RENDER[form](again)


@pytest.mark.parametrize("form", sorted(RENDER))
def test_rendering_leaves_the_record_alone(form: str) -> None:
    made = records.founding()
    before = json.dumps(made)
    RENDER[form](made)
    assert json.dumps(made) == before

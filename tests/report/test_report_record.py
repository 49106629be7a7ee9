"""The record: every key is documented, the verdict is right, and a real examination gives what the renderers read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import report_records as records

from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity
from rlhf_doctor.report import html, json_, markdown, terminal
from rlhf_doctor.report.record import _plain, exit_code, record, unreadable
from rlhf_doctor.report.schema import SCHEMA, SCHEMA_VERSION, paths
from rlhf_doctor.report.verdict import CONSEQUENCE, gpu_hours, verdict


@pytest.fixture(scope="module")
def founding() -> dict[str, Any]:
    """A real examination of a CNN reward and a GRU critic beside small Transformers."""
    from reference_impl import build_setup
    from rlhf_doctor.examine import examine
    from rlhf_doctor.selftest import specimens
    from rlhf_doctor.setups import RLHFSetup

    healthy = RLHFSetup.from_mapping(build_setup(trained=False))
    vocab = specimens.vocabulary(healthy)
    sick = healthy.but(reward=specimens.ConvolutionalScorer(vocab), value=specimens.GRUCritic(vocab))
    return record(examine(sick), command="rlhf-doctor check setup.py:build", started=records.STARTED)


@pytest.mark.parametrize("case", sorted(records.EVERY))
def test_every_key_of_a_record_is_documented(case: str) -> None:
    assert {path for path in paths(records.EVERY[case]()) if path not in SCHEMA} == set()


def test_every_documented_key_is_in_some_record() -> None:
    seen = {path for make in records.EVERY.values() for path in paths(make())}
    assert set(SCHEMA) - seen == set()


def test_a_real_record_has_the_documented_keys_and_no_other(founding: dict[str, Any]) -> None:
    assert founding["schema_version"] == SCHEMA_VERSION
    assert {path for path in paths(founding) if path not in SCHEMA} == set()
    made = records.founding()
    assert founding.keys() == made.keys()
    for role, card in founding["setup"]["roles"].items():
        assert card.keys() == made["setup"]["roles"][role].keys()
    assert {key for f in founding["findings"] for key in f} <= made["findings"][0].keys()
    assert founding["environment"].keys() == made["environment"].keys()


def test_a_real_record_is_strict_json_and_renders(founding: dict[str, Any]) -> None:
    assert json.loads(json_.render(founding)) == founding
    for renderer in (html, markdown, terminal):
        said = renderer.render(founding)
        assert "convolutional" in said
        assert "recurrent" in said


def test_the_founding_case_is_named_with_its_reason(founding: dict[str, Any]) -> None:
    codes = {d["code"] for d in founding["diagnosis"]}
    assert {"REW001", "VAL001"} <= codes
    assert founding["verdict"]["sentence"].startswith("Do not start this RLHF run yet")
    page = html.render(founding)
    for found in founding["findings"]:
        if found["code"] in ("REW001", "VAL001"):
            why = " ".join(found["page"]["Why it matters"].split())[:40]
            assert why in records.visible_text(page)


def test_ids_are_unique_and_causes_resolve(founding: dict[str, Any]) -> None:
    ids = [f["id"] for f in founding["findings"]]
    assert len(set(ids)) == len(ids)
    for one in founding["diagnosis"]:
        assert one["id"] in ids
        assert {child["id"] for child in one["explains"]} <= set(ids)
    assert {f["cause_id"] for f in founding["findings"]} <= {*ids, None}


def test_the_same_code_and_role_twice_gets_two_ids() -> None:
    from rlhf_doctor.report.record import _ids

    one = Finding("m", "value", Confidence.PROVEN, (Evidence("q", "e", "o"),))
    assert _ids([("VAL002", one), ("VAL002", one), ("VAL001", one)]) == [
        "VAL002-value",
        "VAL002-value-2",
        "VAL001-value",
    ]


def test_nothing_readable_still_gives_a_whole_record() -> None:
    made = unreadable("setup", "setup.py cannot be imported: no module named x", origin="setup.py", started="now")
    assert {path for path in paths(made) if path not in SCHEMA} == set()
    assert exit_code(made) == 2
    assert made["verdict"]["status"] == "unreadable"
    assert "no module named x" in made["verdict"]["sentence"]
    for renderer in (html, markdown, terminal):
        assert "no module named x" in " ".join(renderer.render(made).replace("\\_", "_").split())


def test_only_what_was_found_is_called_healthy() -> None:
    nothing = records.record(passed=[], findings=[])
    assert "No verdict" in nothing["verdict"]["sentence"]
    assert "2 checks" in records.record()["verdict"]["sentence"]


def test_the_first_diagnosis_leads_even_when_something_else_is_unreadable() -> None:
    made = records.founding()
    made["errors"] = [{"role": "value", "message": "value: cannot be called."}]
    said = verdict(made)
    assert said["sentence"].startswith("Do not start this RLHF run yet: the reward model is convolutional")
    assert said["incomplete"] == "The verdict is incomplete: 1 part of the setup could not be read or judged."


def test_every_family_has_its_consequence() -> None:
    from rlhf_doctor.check import registry

    assert {code[:3] for code in registry()} <= CONSEQUENCE.keys()


def sizes(number: int | None) -> dict[str, Any]:
    return {role: {"parameters": number} for role in ("policy", "reference", "reward", "value")}


def test_the_hours_at_stake_are_those_worked_out_by_hand() -> None:
    # Four models of 7e9. Forward: sampling + 4 scorings = 5 x 2 x 7e9. Updates: 2 x 6 x 7e9. Together 1.54e11 a token.
    # 1,000 steps x 512 responses x 200 tokens = 1.024e8 tokens: 1.577e19. At 0.4 x 989e12 a second: 39,862 s = 11.07 h.
    hours, basis = gpu_hours({"roles": sizes(7 * 10**9), "declared": {}})
    assert hours == "11"
    assert "1,000 steps of 512 responses of 200 tokens, 1 epoch each" in basis
    # Twice the responses, and 4 epochs: (7e10 + 4 x 8.4e10) x 2.048e8 = 8.315e19 -> 58.4 h.
    assert gpu_hours({"roles": sizes(7 * 10**9), "declared": {"batch_size": 1024, "ppo_epochs": 4}})[0] == "58"


@pytest.mark.parametrize("number", [None, 0, 26_848])
def test_no_hours_without_a_size_worth_naming(number: int | None) -> None:
    assert gpu_hours({"roles": sizes(number), "declared": {}}) == ("", "")


@pytest.mark.parametrize(
    "odd", [math.nan, math.inf, -3, 0, True, "many", None, [], 10**4500], ids=lambda odd: type(odd).__name__
)
def test_odd_declarations_do_not_reach_the_hours(odd: Any) -> None:
    hours, _ = gpu_hours({"roles": sizes(7 * 10**9), "declared": {"batch_size": odd}})
    assert hours == "11"


def test_plain_data_is_strict_json_in_a_stable_order() -> None:
    odd = {"a": math.nan, "b": {3, 1, 2}, "c": (Severity.ERROR, -math.inf), 4: frozenset({"y", "x"}), "d": 10**4500}
    plain = _plain(odd)
    assert plain.pop("d").startswith("0x")
    assert plain == {"a": "nan", "b": [1, 2, 3], "c": ["error", "-inf"], "4": ["x", "y"]}


@pytest.mark.parametrize(
    ("severity", "fail_on", "strict", "code"),
    [
        ("error", Severity.ERROR, False, 1),
        ("warning", Severity.ERROR, False, 0),
        ("warning", Severity.WARNING, False, 1),
        ("warning", Severity.ERROR, True, 1),
        ("info", Severity.WARNING, True, 0),
    ],
)
def test_exit_code(severity: str, fail_on: Severity, strict: bool, code: int) -> None:
    made = records.record(findings=[records.finding("VAL002", "x", "value", "m", severity=severity)])
    assert exit_code(made, fail_on, strict=strict) == code

"""The account of a traced step: from real steps of the reference to plain data, and what each renderer says of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import report_records as records

from rlhf_doctor.examine import Examination, Options
from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.report import html, json_, markdown, terminal, trace_sample
from rlhf_doctor.report.record import record
from rlhf_doctor.report.schema import SCHEMA, paths
from rlhf_doctor.report.trace_shown import numbers_line, shown, unmeasured, wiring_rows
from rlhf_doctor.report.trace_wiring import _answer, wiring_sentence
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.interventions import conduct
from rlhf_doctor.trace.recover import recover

Case = tuple[RLHFSetup, Traced]
WATCHED = "the step was watched and not run again"


@pytest.fixture(scope="module")
def plain() -> RLHFSetup:
    from reference_impl import build_setup

    return RLHFSetup.from_mapping(build_setup(trained=False))


def traced(setup: RLHFSetup) -> Case:
    found = conduct(setup, 1.0)
    return setup, Traced(found, recover(found, dict(setup.declared)), 1.0)


@pytest.fixture(scope="module")
def sound(plain: RLHFSetup) -> Case:
    from rlhf_doctor.selftest.loops import reference_step

    return traced(reference_step(plain))


@pytest.fixture(scope="module")
def sick(plain: RLHFSetup) -> Case:
    """The critic is trained on the KL alone, and another gamma and another place of the KL are declared."""
    from rlhf_doctor.selftest import value_faults
    from rlhf_doctor.selftest.loops import reference_step

    declared = {"gamma": 0.9, "kl_in": "loss", "reward_clip": 0.1}
    return traced(reference_step(plain, parts=value_faults.returns_of_the_penalty(), declared=declared))


def recorded(case: Case, **declared: Any) -> dict[str, Any]:
    setup = case[0].but(declared=declared) if declared else case[0]
    made = record(Examination(setup, Options(), {}, (), {"traced": case[1]}, 0.0), started=records.STARTED)
    assert made["crashed"] == []
    return made


def watched(case: Case) -> Case:
    """As if the step had only been watched."""
    found = dataclasses.replace(
        case[1].experiments, done={}, reasons={"*": WATCHED}, real=None, repeat=None, second=None, second_run=None
    )
    return case[0], Traced(found, recover(found, dict(case[0].declared)), 1.0)


def test_a_sound_step_is_told_as_such(sound: Case) -> None:
    made = recorded(sound)["trace"]
    assert made["answer"]["learns"] == "yes"
    assert made["answer"]["changed"] == made["answer"]["responded"] == len(sound[1].base.samples)
    assert made["answer"]["gain"] == pytest.approx(1, abs=1e-3)
    assert made["sentence"].startswith("The wiring is as declared: 4 influences")
    assert {one["edge"]: one["verdict"] for one in made["wiring"]} == {
        "reward → value target": "there",
        "reward → policy": "there",
        "value → advantage": "there",
        "reference → reward": "there",
        "reference → loss": "none",
    }
    assert {one["role"]: one["verdict"] for one in made["updated"]} == {
        "policy": "there",
        "reference": "none",
        "reward": "none",
        "value": "there",
    }
    assert [one["name"] for one in made["numbers"] if one["agrees"] is not True] == []
    assert "all as declared" in numbers_line(made)
    assert unmeasured(made) == ""


def test_a_sound_sample_is_what_the_declared_settings_make_of_it(sound: Case) -> None:
    made = recorded(sound)["trace"]["sample"]
    base = sound[1].base
    assert made["changed"]
    assert sound[1].experiments.done["one score"].touched[made["number"] - 1]
    rows = {one["name"]: one for one in made["rows"]}
    length = sum(token["counted"] for token in made["tokens"])
    assert length == base.real[made["number"] - 1].sum()
    for name in ("reward", "return", "advantage"):
        assert rows[name]["measured"][:length] == pytest.approx(rows[name]["declared"][:length], abs=2e-3)
        assert not any(rows[name]["differs"])
    assert {token["offset"] for token in made["tokens"] if token["trained"]} == {0}
    assert all(token["trained"] == token["counted"] for token in made["tokens"])
    words = sound[0].tokenizer.convert_ids_to_tokens([token["id"] for token in made["tokens"]])
    assert [token["text"] for token in made["tokens"]] == words


def test_a_critic_that_learns_the_penalty_alone_is_told_as_such(sick: Case) -> None:
    made = recorded(sick)["trace"]
    assert made["answer"]["learns"] == "no"
    assert made["answer"]["identical"]
    assert "identical to the last bit" in made["answer"]["sentence"]
    verdicts = {one["edge"]: one["verdict"] for one in made["wiring"]}
    assert verdicts["reward → value target"] == "missing"
    assert verdicts["reward → policy"] == "there"
    assert "Missing: reward → value target" in made["sentence"]
    assert any(any(row["differs"]) for row in made["sample"]["rows"])


def test_where_targets_hold_no_rewards_the_way_of_the_kl_is_not_told(plain: RLHFSetup) -> None:
    from rlhf_doctor.selftest import value_faults
    from rlhf_doctor.selftest.loops import reference_step

    parts = {"value_loss": value_faults.loss_towards_old_values}
    made = recorded(traced(reference_step(plain, parts=parts)))["trace"]
    verdicts = {one["edge"]: one["verdict"] for one in made["wiring"]}
    assert verdicts["reward → value target"] == "missing"
    assert verdicts["reference → reward"] == "there"
    assert verdicts["reference → loss"] == "unknown"
    assert "reference" not in made["sentence"]


def test_a_coefficient_of_zero_makes_the_reference_unexpected(sound: Case) -> None:
    made = recorded(sound, kl_coef=0.0)["trace"]
    assert {one["edge"] for one in made["wiring"] if one["verdict"] == "unexpected"} == {"reference → reward"}
    kl = next(one for one in made["numbers"] if one["name"] == "KL weight")
    assert (kl["declared"], kl["measured"], kl["agrees"]) == ("0", "0.05 in the reward", False)


def test_a_critic_in_an_algorithm_that_has_none_is_unexpected(sound: Case) -> None:
    made = recorded(sound, algorithm="rloo")["trace"]
    there = {one["edge"] for one in made["wiring"] if one["verdict"] == "unexpected"}
    assert there == {"reward → value target", "value → advantage"}


def test_what_is_not_declared_is_no_fault(sound: Case) -> None:
    setup = dataclasses.replace(sound[0], declared={})
    made = recorded((setup, sound[1]))["trace"]
    assert {one["verdict"] for one in made["wiring"]} == {"there", "undeclared"}
    assert {one["agrees"] for one in made["numbers"]} == {None}
    assert "(not declared)" in numbers_line(made)


def test_a_watched_step_renders_and_claims_nothing(sound: Case) -> None:
    made = recorded(watched(sound))
    assert made["trace"]["answer"]["learns"] == "unknown"
    assert WATCHED in made["trace"]["answer"]["sentence"]
    assert {one["verdict"] for one in made["trace"]["wiring"]} == {"unknown"}
    assert made["trace"]["sample"]["changed"] is False
    for renderer in (html, markdown, terminal):
        assert WATCHED in " ".join(renderer.render(made).split())


@pytest.mark.parametrize("which", ["sound", "sick"])
def test_records_are_documented_strict_and_the_same_again(which: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(which)
    made, again = recorded(case), recorded(case)
    again["environment"] = made["environment"]
    assert json_.render(made) == json_.render(again)
    assert {path for path in paths(made) if path not in SCHEMA} == set()
    assert json.loads(json_.render(made)) == made
    by_hand = records.traced()["trace"]
    for key in ("wiring", "updated", "numbers"):
        assert made["trace"][key][0].keys() == by_hand[key][0].keys()
    assert made["trace"]["sample"].keys() == by_hand["sample"].keys()
    for renderer in (html, markdown, terminal):
        said = " ".join(renderer.render(made).split())
        assert made["trace"]["answer"]["sentence"].split(". ")[0].replace("'", "&#39;") in said.replace("'", "&#39;")


def test_a_tool_that_fails_here_says_so(sound: Case) -> None:
    broken = Traced(sound[1].experiments, None, 1.0)  # type: ignore[arg-type]
    made = record(Examination(sound[0], Options(), {}, (), {"traced": broken}, 0.0))
    assert made["trace"] is None
    assert made["verdict"]["status"] == "tool-error"
    assert "Traceback" in made["crashed"][0]["traceback"]


def test_rewards_and_advantages_by_declaration_are_those_of_the_formulas(sound: Case) -> None:
    base = sound[1].base
    at = int(base.real.sum(1).argmax())
    length = int(base.real[at].sum())
    declared = {"gamma": 0.9, "lam": 0.8, "kl_coef": 0.0, "reward_clip": 0.25, "missing_eos_penalty": 2.0}
    rewards, returns, advantages = trace_sample.by_declaration(declared, base, at)
    assert rewards is not None
    assert returns is not None
    assert advantages is not None
    score = float(np.clip(base.scores[at], -0.25, 0.25)) - (0 if base.samples[at].ended else 2)
    assert rewards[:length].tolist() == pytest.approx([0.0] * (length - 1) + [score])
    values = [*base["old_value"][at, :length].tolist(), 0.0]
    errors = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
    for t in range(length):
        assert advantages[t] == pytest.approx(sum(0.72 ** (u - t) * errors[u] for u in range(t, length)))
    assert returns[:length] == pytest.approx(advantages[:length] + base["old_value"][at, :length])


@pytest.mark.parametrize(
    "declared",
    [
        {"kl_coef": 0.1},
        {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "other"},
        {"kl_coef": 0.1, "kl_in": "reward", "kl_adaptive": True},
        {"dense_rewards": True},
        {"whiten_rewards": True},
    ],
)
def test_nothing_is_made_of_settings_that_do_not_say(sound: Case, declared: dict[str, Any]) -> None:
    assert trace_sample.by_declaration(declared, sound[1].base, 0) == (None, None, None)


def test_a_long_response_is_shown_by_its_ends(sound: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_sample, "KEPT", 2)
    setup = dataclasses.replace(sound[0], tokenizer=None)
    made = trace_sample.sample(setup, sound[1])
    assert made is not None
    assert len(made["tokens"]) == 4
    assert made["left_out"] > 0
    assert all(len(row["measured"]) == 4 for row in made["rows"])
    assert all(token["text"] == f"#{token['id']}" for token in made["tokens"])


def test_the_critic_is_not_said_to_learn_where_it_is_not_trained(sound: Case) -> None:
    first = dataclasses.replace(
        sound[1].experiments.first, calls=[c for c in sound[1].experiments.first.calls if c.role != "value"]
    )
    found = dataclasses.replace(sound[1].experiments, first=first)
    learns, said, _ = _answer(sound[0], Traced(found, sound[1].recovered, 1.0))
    assert learns == "no"
    assert "never calls it" in said


# ---- what is shown ---------------------------------------------------------------------------------------------------

MAKE: dict[str, Callable[[], dict[str, Any]]] = {"traced": records.traced, "watched": records.watched}


def test_a_record_without_a_trace_shows_none() -> None:
    made = records.founding()
    without = {key: value for key, value in made.items() if key != "trace"}
    for renderer in (html, markdown, terminal):
        assert "Does the critic learn" not in renderer.render(made)
    assert "What one step does" not in html.render(without)


@pytest.mark.parametrize("case", sorted(MAKE))
def test_every_renderer_answers_the_question(case: str) -> None:
    made = MAKE[case]()
    page = records.visible_text(html.render(made))
    answer = made["trace"]["answer"]
    assert page.index(answer["question"]) < page.index(answer["sentence"]) < page.index("Who influences whom")
    for renderer in (markdown, terminal):
        said = " ".join(renderer.render(made).split())
        assert answer["question"] in said
        assert answer["sentence"] in said


def test_the_graph_draws_what_there_is_and_marks_each_verdict_twice() -> None:
    one = shown(records.traced()["trace"])
    assert len(one["boxes"]) == 4
    assert len(one["arrows"]) == 5
    for arrow in one["arrows"]:  # never by the look of the line alone
        assert arrow.said
    page = html.render(records.traced())
    for verdict in ("there", "missing", "unexpected", "undeclared", "unknown"):
        assert f'class="way {verdict}"' in page
        assert f"path.way.{verdict}" in page or verdict == "there"
    free = shown(records.watched()["trace"])
    assert [arrow.name for arrow in free["arrows"]] == ["policy's gradient", "KL in the rewards", "KL in the loss"]


def test_every_row_of_the_wiring_is_marked() -> None:
    for make in MAKE.values():
        for row in wiring_rows(make()["trace"]):
            assert row["mark"] in "✓✕?–"
            assert row["measured"]


def test_numbers_that_differ_stand_beside_the_declared_ones() -> None:
    said = numbers_line(records.traced()["trace"])
    assert "gamma 0.99 (declared 1)" in said
    assert "lambda 0.95," in said
    assert "all as declared" not in said
    assert "whitening (returns" in unmeasured(records.traced()["trace"])


def test_tokens_are_told_apart_from_markup_and_blanks_are_seen() -> None:
    page = html.render(records.traced())
    assert "␣&lt;b&gt;it&lt;/b&gt;" in page
    one = shown(records.traced()["trace"])["sample"]
    assert [token["text"] for token in one["tokens"]][:4] == ["The", "␣cat", "␣sat", "⏎"]
    assert one["tokens"][4]["after"] == "12 left out"
    assert one["tokens"][5]["action"] == "1 token before"
    assert one["tokens"][7]["leak"] == "yes"
    assert one["unknown"] == ["advantage: returns − values do not explain the policy's weights"]


@pytest.mark.parametrize("verdicts", list(itertools.product(["there", "missing", "unexpected", "unknown"], repeat=2)))
def test_the_sentence_names_what_is_amiss(verdicts: tuple[str, str]) -> None:
    rows = [{"edge": name, "verdict": verdict, "expected": True} for name, verdict in zip("ab", verdicts, strict=True)]
    said = wiring_sentence(rows, [])
    assert ("Missing" in said) == ("missing" in verdicts)
    assert ("Not expected" in said) == ("unexpected" in verdicts)
    assert ("as declared" in said) == (set(verdicts) in ({"there"}, {"there", "unknown"}))
    assert ("no other" in said) == (set(verdicts) == {"there"})
    assert said.endswith(".")

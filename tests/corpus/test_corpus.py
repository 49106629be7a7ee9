"""Every case is found as reports/detection.md says, and sound setups are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corpus import report
from corpus.case import Case, bugs, cases
from corpus.healthy import ZOO
from corpus.judge import Given, examined, failures, judge, seeded, sound, told
from rlhf_doctor.finding import Severity, Stage
from rlhf_doctor.selftest.run import Patients

REPORT = Path(__file__).parents[2] / "reports" / "detection.md"
MISSED = report.reasons()
pytestmark = pytest.mark.filterwarnings("ignore")  # broken models make libraries warn, each in its own way


@pytest.fixture(scope="module")
def given(shared_patients: Patients) -> Iterator[Given]:
    with sound(shared_patients) as made:
        yield made


def sampled() -> Iterator[Any]:
    """Every case; one in five, and fewer of those with a step, where the corpus is not asked for by name."""
    for n, case in enumerate(cases()):
        more = n % (9 if case.stage is Stage.TRACE else 5)
        yield pytest.param(case, id=case.name, marks=[pytest.mark.whole_corpus] if more else [])


@pytest.mark.parametrize("case", list(sampled()))
def test_a_fault_is_found(case: Case, given: Given) -> None:
    said = judge(case, given)
    given.shared.drop_copies()
    if case.name in MISSED:
        assert not (said.found and said.first), "it is found now: take it off the list of misses"
        pytest.xfail(MISSED[case.name])
    assert said.found, (case.codes, case.roles, said.all, said.failed)
    assert said.first, (case.codes, said.roots)
    assert (
        f"| {case.carrier} | {case.fault.replace('|', chr(92) + '|')} | {said.code} | {said.stage} |"
        in REPORT.read_text("utf-8")
    )


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[pytest.mark.whole_corpus] if seed or n % 3 else [])
        for n, name in enumerate(ZOO)
        for seed in report.SEEDS
    ],
)
def test_a_sound_setup_is_left_alone(name: str, seed: int, given: Given) -> None:
    seeded(seed)
    found, _, _ = examined(ZOO[name].setup(given, seed), seed)
    before, _, _ = examined(ZOO[name].setup(given, seed), seed, Stage.STATIC)
    given.shared.drop_copies()
    shown = [*told(found)[0], *told(before)[0]]
    assert [(code, role) for code, role, severity in shown if severity is not Severity.INFO] == []
    assert failures(found) == ()
    explained = ZOO[name].explained
    assert not explained or {code for code, _, _ in shown} & set(explained)


def test_every_bug_has_a_case_or_a_reason() -> None:
    with_case = {case.bug for case in cases()}
    assert {one.id for one in bugs().values() if not one.left_out} <= with_case
    assert {one.id for one in bugs().values() if one.left_out} & with_case == set()


def test_misses_are_cases_and_have_reasons() -> None:
    assert set(MISSED) <= {case.name for case in cases()}
    assert all(len(why) > 20 for why in MISSED.values())


def test_the_report_tells_every_case_and_setup() -> None:
    told_of = REPORT.read_text("utf-8")
    for case in cases():
        assert f"[{case.bug}]({bugs()[case.bug].url}) | {case.carrier} |" in told_of
    for name in ZOO:
        assert name in told_of


@pytest.mark.parametrize(
    ("good", "of", "interval"), [(0, 10, (0.0, 0.278)), (5, 10, (0.237, 0.763)), (10, 10, (0.722, 1.0))]
)
def test_intervals_are_those_of_the_tables(good: int, of: int, interval: tuple[float, float]) -> None:
    # Brown, Cai and DasGupta 2001, https://doi.org/10.1214/ss/1009213286
    assert report.wilson(good, of) == pytest.approx(interval, abs=1e-3)


def test_there_are_enough_sound_setups() -> None:
    assert len(ZOO) >= 40
    assert sum(bool(one.thread) for one in ZOO.values()) >= 10

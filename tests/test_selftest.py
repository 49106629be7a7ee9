"""Every shipped fault is found, and the healthy setup passes in silence."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_doctor.check import Check, Fault, registry
from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import Confidence, Evidence, Finding, Found, Passed, Severity, Stage
from rlhf_doctor.selftest import run as selftest
from rlhf_doctor.setups import RLHFSetup

EARLY = [one for one in registry().values() if one.early]
FAULTS = [(one, fault) for one in registry().values() for fault in one.faults]


@pytest.mark.filterwarnings("ignore")  # broken models make libraries warn, each in its own way
@pytest.mark.parametrize(("one", "fault"), FAULTS, ids=[f"{c.code}-{f.title}" for c, f in FAULTS])
def test_every_fault_is_found(shared_patients: Any, one: Check, fault: Fault) -> None:
    trial = selftest.try_fault(one, fault, shared_patients)
    shared_patients.drop_copies()
    assert trial.passed, trial.said


@pytest.mark.parametrize("index", [0, 1], ids=["in memory", "as files"])
def test_healthy_setup_is_silent(shared_patients: Any, index: int) -> None:
    trial = selftest.healthy_trials(shared_patients)[index].run()
    assert trial.passed, trial.said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", EARLY, ids=lambda one: one.code)
def test_a_check_that_may_decide_early_does_so(shared_patients: Any, one: Check) -> None:
    found = []
    for fault in one.faults:
        setup = fault.make(**{name: getattr(shared_patients, name) for name in fault.wants})
        examined = examine(setup, select=[one.code], options=Options(Stage(str(one.early)), show=False))
        found.append(isinstance(examined.outcomes[one.code], Found))
        shared_patients.drop_copies()
    assert any(found)


def test_nothing_is_said_early_of_a_healthy_setup(shared_patients: Any) -> None:
    for setup in (shared_patients.healthy, shared_patients.healthy_files.but(tokenizer=None)):
        examined = examine(setup, options=Options(Stage.STATIC, show=False))
        assert [code for code, one in examined.findings if one.severity is not Severity.INFO] == []
        assert examined.errors == ()
    shared_patients.drop_copies()


def test_a_fault_that_is_missed_fails_its_trial(shared_patients: Any) -> None:
    one = registry()["VAL002"]
    trial = selftest.try_fault(one, Fault("none at all", lambda healthy: healthy), shared_patients)
    assert trial.said == "not found"


def test_a_fault_that_cannot_be_made_fails_its_trial(shared_patients: Any) -> None:
    trial = selftest.try_fault(registry()["VAL002"], Fault("typo", lambda healthy: healthy.butt()), shared_patients)
    assert "AttributeError" in trial.said


def test_an_alarm_on_a_healthy_setup_fails_its_trial(shared_patients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("made up", "value", Confidence.MEASURED, (Evidence("nothing", "0", "1"),))
    given = Examination(RLHFSetup(), Options(), {"VAL002": Found("VAL002", (finding,))}, (), {}, 0.0)
    monkeypatch.setattr(selftest, "examine", lambda *a, **k: given)
    assert selftest.try_healthy("healthy", shared_patients.healthy).said == "false alarm VAL002: made up"


def test_an_unreadable_healthy_setup_fails_its_trial(shared_patients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Examination(RLHFSetup(), Options(), {"VAL002": Passed("VAL002")}, (("value", "value: odd"),), {}, 0.0)
    monkeypatch.setattr(selftest, "examine", lambda *a, **k: given)
    assert selftest.try_healthy("healthy", shared_patients.healthy).said == "value: odd"


def test_summary_counts_and_names_what_failed() -> None:
    trials = [
        selftest.Trial("VAL002", "two labels", "", 0.1),
        selftest.Trial("VAL002", "pooled", "not found", 0.1),
        selftest.Trial("", "healthy, in memory", "", 0.1),
    ]
    assert selftest.summary(trials, 3.2).splitlines() == [
        "VAL002  1/2 faults found",
        "healthy, in memory: yes",
        "FAILED VAL002 pooled: not found",
        "1 of 2 faults found, 1 trials failed, in 3 seconds",
    ]
    assert selftest.summary(trials, 3.2, quiet=True) == "FAILED VAL002 pooled: not found"
    assert selftest.summary(trials[:1], 3.2, quiet=True) == ""


def test_command_runs_the_selected_checks_alone(doctor: Any) -> None:
    ran = doctor("selftest", "--select", "VAL002")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    count = len(registry()["VAL002"].faults)
    assert f"VAL002  {count}/{count} faults found" in ran.stdout
    assert "KLD001" not in ran.stdout


@pytest.mark.slow
def test_several_processes_try_the_same() -> None:
    titles = [fault.title for fault in registry()["VAL002"].faults]
    trials = selftest.run(("VAL002",), workers=2)
    assert [trial.title for trial in trials] == ["healthy, in memory", "healthy, as files", *titles]
    assert [trial.said for trial in trials] == [""] * len(trials)

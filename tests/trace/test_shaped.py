"""Rewards of loops without a critic: the KL in them, the discount and the place of the score, read off the weights."""

from __future__ import annotations

from typing import Any

import pytest
from loops.examined import examined, grave, one_thread

from rlhf_doctor.examine import Options
from rlhf_doctor.instruments.tracing import traced
from rlhf_doctor.selftest.leave_one_out import Returns, setup
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.divergence import divergence
from rlhf_doctor.trace.shaped import of_scores

CODES = ("ADV001", "ADV002", "ADV010", "KLD002", "KLD003", "KLD004", "KLD005", "REF005", "LOS002", "LOS003", "ROL005")
pytestmark = pytest.mark.filterwarnings("ignore")

SOUND: dict[str, tuple[Returns, dict[str, Any]]] = {
    "from each token on": (Returns(), {}),
    "of the whole response": (Returns(whole=True), {}),
    "whitened over the batch": (Returns(whitened=True), {"algorithm": "reinforce++"}),
    "discounted as declared": (Returns(gamma=0.9), {"gamma": 0.9}),
    "discounted and whitened": (Returns(gamma=0.9, whitened=True), {"gamma": 0.9, "algorithm": "reinforce++"}),
    "k3 as declared": (Returns(estimator="k3"), {"kl_estimator": "k3"}),
}
WRONG: dict[str, tuple[Returns, dict[str, Any], str]] = {
    "ten times the coefficient": (Returns(), {"kl_coef": 0.005}, "KLD003"),
    "ten times, whitened": (Returns(whitened=True), {"kl_coef": 0.005}, "KLD003"),
    "another estimator, of the whole response": (Returns(whole=True, estimator="k2"), {}, "KLD004"),
    "pads of a whole response": (Returns(whole=True, masked=False), {}, "KLD005"),
    "another gamma, whitened": (Returns(gamma=0.9, whitened=True), {}, "ADV001"),
    "the last column, whitened": (Returns(last_column=True, whitened=True), {}, "ADV002"),
    "in the loss too, whitened": (Returns(whitened=True, in_the_loss=0.05), {}, "KLD003"),
}


def told(healthy: RLHFSetup, returns: Returns, declared: dict[str, Any]) -> set[str]:
    with one_thread():
        report = examined(setup(healthy, returns, **declared), CODES)
    return {code for code, _ in grave(report.findings)}


@pytest.mark.parametrize("name", SOUND)
def test_sound_returns_are_silent(healthy: RLHFSetup, name: str) -> None:
    assert told(healthy, *SOUND[name]) == set()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_returns_are_found(healthy: RLHFSetup, name: str) -> None:
    returns, declared, code = WRONG[name]
    assert code in told(healthy, returns, declared)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_coefficient_is_read(healthy: RLHFSetup, whole: bool, whitened: bool) -> None:
    if whole and whitened:
        pytest.skip("whole responses are not whitened in this loop")
    with one_thread():
        made = traced(setup(healthy, Returns(whole=whole, whitened=whitened)), Options())
        unit, reward = of_scores(made), divergence(made, {"kl_coef": 0.05}).reward
    assert unit is not None
    assert unit.gamma == 1
    assert reward is not None
    assert reward.best is not None
    assert reward.best.estimator == "k1"
    assert reward.best.coefficient == pytest.approx(0.05, rel=1e-3)

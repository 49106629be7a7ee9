"""Rewards that the batch's own deviation scales: the discount, the KL and the penalty in them are read all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops.examined import examined, one_thread

from rlhf_doctor.examine import Options
from rlhf_doctor.finding import Severity
from rlhf_doctor.instruments.tracing import traced
from rlhf_doctor.selftest import kl_faults
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace import gains

CODES = ("ADV001", "ADV002", "KLD002", "KLD003", "KLD004", "KLD005", "KLD006", "REW014", "VAL009", "VAL010", "VAL011")
pytestmark = pytest.mark.filterwarnings("ignore")


def whitened(healthy: RLHFSetup, settings: dict[str, Any] | None = None, **more: Any) -> RLHFSetup:
    return reference_step(healthy, settings={"whiten_rewards": True, **(settings or {})}, **more)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (1.0, 0.0)])
def test_the_discount_and_the_wiring_are_measured(healthy: RLHFSetup, gamma: float, lam: float) -> None:
    with one_thread():
        found = traced(whitened(healthy, {"gamma": gamma, "lam": lam}), Options(seed=0))
        made = found.recovered
        assert (made.gamma, made.lam) == pytest.approx((gamma, lam), abs=1e-3)
        assert made.gamma_lam_of_policy == pytest.approx(gamma * lam, abs=1e-3)
        for of in ("policy", "target"):
            read = gains.discount(found, of)
            assert read.sound
            assert (read.product, read.gamma) == pytest.approx((gamma * lam, gamma), abs=1e-3)
    edges = {name: edge.gain for name, edge in made.edges.items()}
    unit = edges["reward → value target"]
    assert unit > 1.5  # one over the deviation of the rewards
    assert edges["reward → policy"] == pytest.approx(unit, rel=1e-3)
    assert edges["reference → reward"] == pytest.approx(0.05 * unit, rel=1e-3)
    assert edges["value → advantage"] == pytest.approx(-1, abs=1e-2)
    assert edges["reference → loss"] == pytest.approx(0, abs=1e-3)


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "another gamma than declared": ("ADV001", {"settings": {"gamma": 0.97}, "declared": {"gamma": 1.0}}),
    "another lambda than declared": ("ADV001", {"settings": {"lam": 0.9}, "declared": {"lam": 0.95}}),
    "a KL that is rewarded": ("KLD002", {"parts": {"rewards": kl_faults.rewards_with(sign=-1.0)}}),
    "half the declared weight": ("KLD003", {"parts": {"rewards": kl_faults.rewards_with(factor=0.5)}}),
    "another estimator than declared": ("KLD004", {"parts": {"kl": kl_faults.estimator("k2")}}),
    "a penalty that is a bonus": ("REW014", {"parts": {"score": kl_faults.score_with(-1.0)}}),
    "a penalty for everyone": ("REW014", {"parts": {"score": kl_faults.score_with(always=True)}}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(healthy: RLHFSetup, name: str) -> None:
    code, more = FAULTS[name]
    with one_thread():
        found = examined(whitened(healthy, **more), CODES).findings
    assert [c for c, _ in found] == [code]


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.97}, {"whiten_advantages": False}, {"ppo_epochs": 2}], ids=str)
def test_sound_steps_are_silent(healthy: RLHFSetup, settings: dict[str, Any]) -> None:
    with one_thread():
        assert examined(whitened(healthy, settings), CODES).findings == ()


class OneLater:
    """The score in the slot after a shorter response, whose value counts: rewards are whitened with that slot."""

    def rewards(self, score: Any, kl: Any, mask: Any, kl_coef: float) -> Any:
        self.score = score
        return (-kl_coef * kl).masked_fill(~mask, 0)

    def gae(self, r: Any, v: Any, mask: Any, gamma: float, lam: float) -> Any:
        from reference_impl import ops

        wide = mask | torch.nn.functional.pad(mask[:, :-1], (1, 0))
        r = r.clone()
        r[torch.arange(len(r)), wide.sum(1) - 1] += self.score
        return ops.gae(ops.whiten(r, wide, shift_mean=False), v, wide, gamma, lam).masked_fill(~mask, 0)


def one_later(healthy: RLHFSetup, **declared: Any) -> RLHFSetup:
    parts, settings = OneLater(), {"gamma": 0.97, "whiten_rewards": False}
    return reference_step(
        healthy, parts={"rewards": parts.rewards, "gae": parts.gae}, settings=settings,
        declared={"whiten_rewards": True, **declared},
    )  # fmt: skip


def test_a_score_one_slot_after_the_end_is_no_obstacle(healthy: RLHFSetup) -> None:
    with one_thread():
        found = traced(one_later(healthy), Options(seed=0)).recovered
        assert (found.gamma, found.lam) == pytest.approx((0.97, 0.95), abs=2e-3)
        told = examined(one_later(healthy), CODES).findings
        assert {(code, finding.severity) for code, finding in told} <= {("ADV002", Severity.INFO)}
        wrong = examined(one_later(healthy, gamma=0.9), CODES).findings
        assert "ADV001" in [code for code, _ in wrong]
        assert {code for code, _ in wrong} <= {"ADV001", "ADV002"}

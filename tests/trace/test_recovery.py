"""What is read off the gradients is what the step really computed, in the reference and in loops of other hands."""

from __future__ import annotations

import importlib
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from reference_impl import ops, roles
from rlhf_doctor.examine import Options
from rlhf_doctor.instruments.tracing import Traced, traced
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

# Loops in other hands' styles: (module, gamma, lambda, KL weight on the rewards, ... in the loss, temperature)
STYLES = ("joined_v_head", "micro_batches", "backbone_direct", "lora_adapter_off", "right_padded_sums", "plain_modules")


@pytest.fixture(scope="module", params=[0, 1])
def recovered(request: pytest.FixtureRequest, healthy: RLHFSetup) -> tuple[Traced, list[tuple[str, Any]], RLHFSetup]:
    """A trace of the reference, and what its own functions were given (a queue is nothing that is put back)."""
    told: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def gae(r: Any, v: Any, mask: Any, gamma: float, lam: float) -> Any:
        advantages = ops.gae(r, v, mask, gamma, lam)
        told.put(("gae", [x.clone() for x in (r, v, mask, advantages)]))
        return advantages

    setup = reference_step(
        healthy, parts={"gae": gae}, settings={"gamma": 0.98, "lam": 0.9, "temperature": 0.8, "batch_size": 32}
    )
    torch.manual_seed(request.param)
    made = traced(setup, Options())
    return made, [told.get() for _ in range(told.qsize())], setup


def test_actions_and_mask_are_exact(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, told, _ = recovered
    base, mask = made.base, told[0][1][2].numpy()
    assert base.real.shape == mask.shape
    assert (base.real == mask).all()
    assert (base["offset"][base.real] == 0).all()
    assert (base["action"][base.real] == base.tokens[base.real]).all()
    assert np.isnan(base["offset"][~base.real]).all()


def test_temperature_is_read_off_the_gradient(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, _, _ = recovered
    assert np.abs(made.base["temperature"][made.base.real] - 0.8).max() < 1e-3


def test_returns_and_advantages_are_those_of_the_step(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, told, _ = recovered
    rewards, values, mask, advantages = (x.double().numpy() for x in told[0][1])
    inside = mask.astype(bool)
    for name, found, true in (
        ("returns", made.recovered.returns, advantages + values),
        ("raw advantages", made.recovered.raw_advantages, advantages),
    ):
        error = np.abs(found - true)[inside].max() / np.ptp(true[inside])
        assert error < 1e-4, (name, error)
    assert made.recovered.rewards is not None
    assert np.abs(made.recovered.rewards - rewards)[inside].max() < 1e-3 * np.ptp(rewards[inside])


def test_whitening_is_seen_and_explains_the_weights(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, told, _ = recovered
    assert made.recovered.whitened
    assert all(fit.misfit < 1e-4 for fit in made.recovered.fits.values())
    _, _, mask, advantages = told[0][1]
    white = ops.whiten(advantages, mask)
    weight, window = made.base["weight"], made.base["window"]
    for number in made.recovered.fits:
        rows = (window == number) & made.base.real
        expected = (white / rows.sum()).numpy()[rows]
        assert np.abs(weight[rows] - expected).max() < 1e-4 * np.ptp(expected)


def test_gamma_and_lambda_are_measured(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, _, _ = recovered
    found = made.recovered
    assert found.gamma_lam == pytest.approx(0.98 * 0.9, abs=1e-3)
    assert found.gamma_lam_of_policy == pytest.approx(0.98 * 0.9, abs=1e-3)
    assert found.gamma == pytest.approx(0.98, abs=1e-3)
    assert found.lam == pytest.approx(0.9, abs=1e-3)


def test_the_wiring_has_the_gains_of_the_algorithm(recovered: tuple[Traced, list[Any], RLHFSetup]) -> None:
    made, _, _ = recovered
    gains = {name: edge.gain for name, edge in made.recovered.edges.items()}
    assert gains == pytest.approx(
        {
            "reward → value target": 1.0,
            "reward → policy": 1.0,
            "value → advantage": -1.0,
            "reference → reward": 0.05,
            "reference → loss": 0.0,
        },
        abs=1e-3,
    )
    assert made.experiments.real is not None
    assert set(made.experiments.real.moved) == {"policy", "value"}


def test_a_wrong_action_is_not_taken_for_the_right_one(healthy: RLHFSetup) -> None:
    def shifted(model: Any, ids: Any, mask: Any, T: int, temperature: float) -> Any:
        hidden = roles.hidden_states(model, ids[:, :-1], mask[:, :-1])[:, -T:]
        return ops.token_logprobs(hidden, model.get_output_embeddings(), ids[:, -T - 1 : -1], temperature)

    made = traced(reference_step(healthy, parts={"logprobs": shifted}), Options())
    offsets = made.base["offset"][np.isfinite(made.base["offset"])]
    assert (offsets == -1).mean() > 0.5  # a token may be twice in a row


@pytest.mark.parametrize("style", STYLES)
def test_other_hands_loops_are_read_as_they_declare(style: str) -> None:
    """Without any knowledge of the loop: what it declares is what is measured."""
    setup = RLHFSetup.from_mapping(importlib.import_module(f"loops.{style}").build())
    declared = setup.declared
    made = traced(setup, Options())
    base, found = made.base, made.recovered
    seen = np.isfinite(base["offset"])
    assert seen.any()
    assert (base["offset"][seen] == 0).all()
    assert not (seen & ~base.real).any()
    assert np.nanmedian(base["temperature"]) == pytest.approx(declared["temperature"], rel=1e-3)
    assert found.gamma_lam == pytest.approx(declared["gamma"] * declared["lam"], abs=1e-3)
    assert found.gamma == pytest.approx(declared["gamma"], abs=1e-3)
    assert found.lam == pytest.approx(declared["lam"], abs=2e-3)
    assert all(fit.misfit < 1e-3 for fit in found.fits.values())
    assert found.edges["reward → value target"].gain == pytest.approx(1, abs=1e-3)
    assert found.edges["reward → policy"].gain == pytest.approx(1, abs=1e-3)
    assert found.edges["value → advantage"].gain == pytest.approx(-1, abs=1e-3)
    if declared["kl_in"] == "reward":
        assert found.edges["reference → reward"].gain == pytest.approx(declared["kl_coef"], abs=1e-3)
    else:
        assert found.edges["reference → reward"].identical
        assert found.edges["reference → loss"].there

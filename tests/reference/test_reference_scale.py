"""One process against two, under torchrun with gloo: the same tokens, gradients, weights and metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.ranks import far, run

from reference_impl import roles, scale

WORKER = Path(__file__).with_name("ranks.py")
ROOT = WORKER.parents[2]


# Tolerance, and what is run.
CASES = (
    (1e-10, {}),
    (1e-10, {"micro_batch_size": 3, "tied": True, "whiten_rewards": True, "ppo_epochs": 1}),
    (1e-5, {"weights": "float32", "iterations": 1, "ppo_epochs": 1}),
)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """What each case gives in process 0 of two."""
    file = tmp_path_factory.mktemp("two") / "results.pt"
    told = [str(WORKER), str(file), json.dumps([options for _, options in CASES])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *told],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_two_processes_do_what_one_does(in_two, i):
    tolerance, options = CASES[i]
    one, two = run(**options), in_two[i]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(one["drawn"], two["drawn"], strict=True))
    assert len(set(one["drawn"][0].mask.sum(1).tolist())) > 1  # the processes' rows ended at different steps
    assert torch.equal(one["generator"], two["generator"])
    assert far(two["gradients"], one["gradients"]) < tolerance
    assert far(two["weights"], one["weights"]) < tolerance
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert b == pytest.approx(a, rel=20 * tolerance, abs=20 * tolerance)
    assert two["scale"] == pytest.approx(one["scale"], rel=20 * tolerance)
    torch.testing.assert_close(two["scores"], one["scores"], rtol=0, atol=100 * tolerance)  # of deviation 1
    assert two["held"] == one["held"] / 2  # each holds half of the policy


def test_alone_nothing_is_divided(models):
    assert (scale.world(), scale.rank()) == (1, 0)
    assert scale.shard(models.policy) is models.policy
    assert type(models.policy).__name__ == "LlamaForCausalLM"
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(scale.gather_rows(x[scale.my_rows(3)]), x)
    assert scale.all_sum(x) is x
    assert scale.start("cpu") == torch.device("cpu")


def test_rows_divide_evenly_or_are_refused(monkeypatch):
    monkeypatch.setattr(scale, "world", lambda: 3)
    monkeypatch.setattr(scale, "rank", lambda: 1)
    assert torch.arange(6)[scale.my_rows(6)].tolist() == [1, 4]
    with pytest.raises(ValueError, match="7 rows do not divide evenly among 3"):
        scale.my_rows(7)


def test_bfloat16_is_for_products_and_nothing_else():
    exact = run("float32", iterations=1, num_minibatches=1)
    rough = run("float32", iterations=1, num_minibatches=1, dtype="bfloat16", disturb=lambda _: exact["drawn"][0])
    assert all(x.dtype == torch.float32 for kind in ("gradients", "weights") for x in rough[kind].values())
    assert 1e-4 < far(rough["gradients"], exact["gradients"]) < 0.2
    assert rough["metrics"][0]["first_ratio"] == pytest.approx(1.0, abs=1e-6)


def test_values_under_autocast_have_the_heads_precision(models):
    ids = torch.arange(4, 16).view(2, 6)
    with scale.autocast(ids.device, "bfloat16"):
        v = roles.scalars(models.value, ids, torch.ones_like(ids))
        logp = roles.response_logprobs(models.policy, ids, torch.ones_like(ids), 3, 1.0)
    assert v.dtype == logp.dtype == torch.float32
    exact = roles.scalars(models.value, ids, torch.ones_like(ids))
    assert 0 < (v - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_joins_by_its_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert scale.start() == torch.device("cuda", 0)

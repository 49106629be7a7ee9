"""Whole iterations under changes that must not matter: padding, order of the batch, micro-batches, the same seed."""

import pytest
import torch
import torch.nn.functional as F
from reference.ranks import far, run

from reference_impl import ops, ppo, rollout, task

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
# One minibatch an epoch, so that an order of the rows is nothing but an order of summing; and no second iteration,
# since drawing from other prompts is another iteration.
WHOLE = {"num_minibatches": 1, "iterations": 1}


@pytest.fixture(scope="module")
def plain():
    return {dtype: run(dtype, **WHOLE) for dtype in TOLERANCE}


def same(actual, expected, tolerance):
    assert far(actual["gradients"], expected["gradients"]) < tolerance
    for name, x in expected["metrics"][0].items():
        assert actual["metrics"][0][name] == pytest.approx(x, rel=20 * tolerance, abs=20 * tolerance), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (4, 2)])
def test_more_padding_changes_nothing(plain, dtype, left, right):
    def widen(r):
        ids, attention = (F.pad(x, (left, right), value=v) for x, v in ((r.ids, 7), (r.attention_mask, 0)))
        return rollout.Rollout(ids, attention, F.pad(r.mask, (0, right)), r.ended)

    same(run(dtype, disturb=widen, **WHOLE), plain[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_order_of_the_batch_changes_nothing(plain, dtype):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    mixed = run(dtype, disturb=lambda r: r.rows(order), micro_batch_size=5, **WHOLE)
    same(mixed, plain[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro", [1, 3, 16])
def test_the_micro_batch_size_changes_nothing(plain, dtype, micro):
    same(run(dtype, micro_batch_size=micro, **WHOLE), plain[dtype], TOLERANCE[dtype])


def test_the_heads_chunks_change_nothing(plain, monkeypatch):
    monkeypatch.setattr(ops.token_logprobs, "__defaults__", (1.0, 400))
    same(run(**WHOLE), plain["float64"], 1e-10)


def test_what_lies_in_padding_changes_not_a_bit(plain):
    def scribble(r):
        noise = torch.randint(4, 60, r.ids.shape, generator=torch.Generator().manual_seed(5))
        return rollout.Rollout(torch.where(r.attention_mask.bool(), r.ids, noise), r.attention_mask, r.mask, r.ended)

    same(run(disturb=scribble, **WHOLE), plain["float64"], 1e-12)


def test_the_same_seed_gives_the_same_bits():
    one, two = run("float32", micro_batch_size=3), run("float32", micro_batch_size=3)
    assert one["metrics"] == two["metrics"]
    assert all(torch.equal(x, two["weights"][name]) for name, x in one["weights"].items())


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_first_ratio_is_1_to_the_last_bit(models, micro):
    seen = []

    def policy_loss(logp, old, advantage, mask, *rest):
        seen.append(torch.equal(logp[mask], old[mask]))
        return ops.clipped_policy_loss(logp, old, advantage, mask, *rest)

    s = ppo.Settings(batch_size=16, num_minibatches=2, response_length=10, temperature=0.7, micro_batch_size=micro)
    ppo.ppo_step(
        models, task.prompts(), ppo.make_optimizers(models, s), s, ppo.FixedKL(0.1), ppo.Parts(policy_loss=policy_loss)
    )
    first = 8 // (micro or 8) + (8 % (micro or 8) > 0)
    assert all(seen[:first])
    assert not any(seen[first : 2 * first])

"""The equations against what TRL, verl and torchtune compute, as oracles/record.py recorded it.

Where a framework computes something else, the test says what, and asserts the relation between the two exactly.
"""

import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from reference_impl import ops, ppo, rollout

FOLDER = Path(__file__).parent / "oracles"
EOS, PAD = 2, 0
GAMMA, LAM, KL_COEF, CLIP, CLIP_VALUE, TEMPERATURE = 0.9, 0.8, 0.3, 0.2, 0.3, 0.7
CASES = ("ragged", "one token", "no end", "end in the last slot", "wild", "single precision")
INTEGERS = {"tokens": torch.long, "drawn": torch.long, "mask": torch.bool}


@functools.cache
def record(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def case(name):
    """The inputs of one case as tensors."""
    rows = dict(record("inputs")[name])
    dtype = getattr(torch, rows.pop("dtype"))
    return SimpleNamespace(**{key: torch.tensor(row, dtype=INTEGERS.get(key, dtype)) for key, row in rows.items()})


def outputs(framework, name):
    """By function, what the framework gave for the case."""
    return record(framework)["outputs"][name]


@pytest.fixture(params=CASES)
def x(request):
    return SimpleNamespace(name=request.param, **vars(case(request.param)))


@pytest.fixture
def trl(x):
    return outputs("trl", x.name)


@pytest.fixture
def verl(x):
    return outputs("verl", x.name)


@pytest.fixture
def torchtune(x):
    return outputs("torchtune", x.name)


def near(actual, recorded, x, tolerance=None):
    """Equal to 1e-12, or in single precision to 1e-5."""
    expected = torch.tensor(recorded, dtype=actual.dtype)
    limit = tolerance or (1e-12 if x.r.dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


def within(actual, recorded, x):
    """The same inside the mask, where alone the frameworks' tables mean something."""
    near(actual[x.mask], torch.tensor(recorded, dtype=actual.dtype)[x.mask].tolist(), x)


def longer(mask):
    """The mask with one slot more after the end, where the row has room: TRL's padding_mask_p1, turned over."""
    return mask | F.pad(mask[:, :-1], (1, 0))


def rounded(mask):
    """By how much the three correct a variance too far: they compute n / (n - 1) in single precision."""
    n = mask.sum()
    return (n / (n - 1)).double() / (n.double() / (n - 1))


def whitened(x, mask, *, shift_mean=True):
    """`ops.whiten` with that rounding of the variance."""
    v = ops.masked_var(x, mask)
    white = ops.whiten(x, mask) * ((v + 1e-8) / (v * rounded(mask).to(v) + 1e-8)).sqrt()
    assert (white / ops.whiten(x, mask)).sub(1).abs().nan_to_num(0).max() < 1e-7
    return white if shift_mean else white + (ops.whiten(x, mask, shift_mean=False) - ops.whiten(x, mask))


@pytest.mark.parametrize("framework", ["trl", "verl", "torchtune"])
def test_the_records_are_of_these_inputs(framework):
    found = record(framework)
    assert found["inputs"] == hashlib.sha256((FOLDER / "inputs.json").read_bytes()).hexdigest()
    assert list(found["outputs"]) == list(CASES) == list(record("inputs"))
    assert found["version"] == {"trl": "1.12.0", "verl": "0.9.1", "torchtune": "0.6.1"}[framework]


def test_masked_mean(x, trl, verl, torchtune):
    for framework in (trl, verl, torchtune):
        near(ops.masked_mean(x.r, x.mask), framework["masked_mean"], x)
    near(ops.masked_mean(x.r, x.mask), verl["agg_loss, token-mean"], x)
    near(ops.masked_mean(x.r, x.mask, 50), verl["agg_loss, a part of a larger batch"], x)


def test_masked_var_is_the_unbiased_one(x, trl, verl, torchtune):
    for framework in (trl, verl, torchtune):
        near(ops.masked_var(x.r, x.mask) * rounded(x.mask), framework["masked_var"], x)
    n = x.mask.sum()
    for framework in (trl, torchtune):
        near(ops.masked_var(x.r, x.mask) * (n - 1) / n, framework["masked_var, biased"], x)


def test_whiten(x, trl, verl, torchtune):
    white, kept = whitened(x.r, x.mask), whitened(x.r, x.mask, shift_mean=False)
    within(white, trl["masked_whiten"], x)
    within(white, verl["masked_whiten"], x)
    within(kept, trl["masked_whiten, mean kept"], x)
    within(kept, verl["masked_whiten, mean kept"], x)
    # torchtune's flag means the opposite: true adds the mean back.
    within(kept, torchtune["whiten"], x)
    within(white, torchtune["whiten, shift_mean false"], x)


def test_logprobs_at_the_temperature(x, trl, verl, torchtune):
    logp = ops.logprobs(x.logits, x.drawn, TEMPERATURE)
    near(logp, trl["selective_log_softmax"], x)
    near(logp, verl["logprobs_from_logits"], x)
    near(logp, torchtune["logits_to_logprobs"], x)


def test_entropy(x, trl, verl):
    near(ops.entropy(x.logits), trl["entropy_from_logits"], x)
    near(ops.entropy(x.logits), verl["entropy_from_logits"], x)


def test_kl_estimators(x, verl):
    near(ops.k1(x.old_logp, x.ref_logp), verl["kl_penalty, k1"], x)
    near(ops.k2(x.old_logp, x.ref_logp), verl["kl_penalty, k2"], x)
    # verl holds k3 to 10 at most, where it has no gradient; the estimator itself has no bound.
    k3 = ops.k3(x.old_logp, x.ref_logp)
    near(k3.clamp(max=10), verl["kl_penalty, k3"], x)
    assert x.name != "wild" or k3.max() > 10


def test_masks_end_with_the_first_end_of_sequence(x, trl, verl, torchtune):
    mask, ended = rollout.response_mask(x.drawn, EOS)
    assert mask.int().tolist() == verl["get_response_mask"]
    padding, truncated = torchtune["truncate_sequence_at_first_stop_token"]
    assert (~mask).tolist() == padding
    assert x.drawn.masked_fill(~mask, PAD).tolist() == truncated == trl["truncate_response"]
    # torchtune looks for padding instead of an end: it penalizes a response that ends in the very last slot.
    full = mask.all(1)
    assert (~ended | full).tolist() == torchtune["get_reward_penalty_mask"]
    assert x.name != "end in the last slot" or bool((ended & full).any())


def test_the_score_is_read_at_the_last_real_token(x, trl):
    whole = F.pad(x.mask, (2, 0), value=True)  # two tokens of the prompt
    near(ops.pool_last(x.per_token, whole), trl["get_reward"], x)


def test_rewards_with_the_score_at_the_last_token(x, torchtune):
    kl = ops.k1(x.old_logp, x.ref_logp)
    total, recorded_kl, _ = torchtune["get_rewards_ppo"]
    near(kl, recorded_kl, x)
    within(ops.shaped_rewards(x.score, kl, x.mask, KL_COEF), total, x)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("white", [False, True])
def test_trl_rewards_and_advantages(x, trl, estimator, white):
    # TRL's episode has a slot more after the end, where the row has room: the score is given there, with a value of its
    # own before it. Told so by the mask, the equations agree.
    mask = longer(x.mask)
    assert torch.equal(mask, x.mask) == (x.name in ("one token", "no end"))
    kl = getattr(ops, estimator)(x.old_logp, x.ref_logp).masked_fill(~x.mask, 0)
    r = ops.shaped_rewards(x.score, kl, mask, KL_COEF)
    if white:
        r = whitened(r, mask, shift_mean=False)
    advantage = ops.gae(r, x.old_v, mask, GAMMA, LAM)
    rewards, advantages, returns = trl[f"train, {estimator}" + ", whitened rewards" * white]
    tolerance = 1e-4 if x.name == "single precision" else 1e-11
    near(r, rewards, x, tolerance)
    near(advantage + x.old_v.masked_fill(~mask, 0), returns, x, tolerance)
    # The advantages are whitened without that slot.
    near(whitened(advantage, x.mask), advantages, x, tolerance)


def test_verl_advantages(x, verl):
    advantage = ops.gae(x.r, x.old_v, x.mask, GAMMA, LAM)
    advantages, returns = verl["compute_gae_advantage_return"]
    within(advantage + x.old_v, returns, x)
    within(whitened(advantage, x.mask), advantages, x)


def test_torchtune_advantages(x, torchtune):
    advantage = ops.gae(x.r, x.old_v, x.mask, GAMMA, LAM)
    advantages, returns = torchtune["estimate_advantages"]
    near(advantage + x.old_v.masked_fill(~x.mask, 0), returns, x)
    # torchtune leaves the mean in, see test_whiten; here it is subtracted.
    near(whitened(advantage, x.mask, shift_mean=False), advantages, x)


def test_trl_losses(x, trl):
    logits, v = (x.logits / TEMPERATURE).requires_grad_(), x.v.clone().requires_grad_()
    mask = longer(x.mask)  # TRL's critic learns the value of the slot after the end, too
    policy = ops.clipped_policy_loss(ops.logprobs(logits, x.drawn), x.old_logp, x.advantage, x.mask, CLIP)
    # TRL sets V to 0 outside the mask but leaves the mean to the mask, so only the kept values matter.
    value = ops.clipped_value_loss(v, x.old_v, x.returns, mask, CLIP_VALUE)
    loss = policy + 0.1 * value
    for actual, recorded in zip((policy, value, loss), trl["train, losses"], strict=True):
        near(actual, recorded, x)
    for actual, recorded in zip(torch.autograd.grad(loss, (logits, v)), trl["train, gradients"], strict=True):
        near(actual, recorded, x)


def test_trl_reports(x, trl):
    logp = ops.logprobs(x.logits, x.drawn, TEMPERATURE)
    fraction, approximate_kl = trl["train, clip fraction and approximate KL"]
    # TRL's count comes in single precision.
    near(ops.clip_fraction(logp, x.old_logp, x.advantage, x.mask, CLIP), fraction, x, 1e-6)
    # TRL's approximate KL is k2 over all slots, padding included.
    k2 = ops.masked_mean(ops.k2(logp, x.old_logp), x.mask, x.mask.numel())
    near(k2, approximate_kl, x)


def test_verl_policy_loss(x, verl):
    logp = x.logp.clone().requires_grad_()
    loss = ops.clipped_policy_loss(logp, x.old_logp, x.advantage, x.mask, CLIP)
    recorded, fraction, kl, gradient = verl["compute_policy_loss, plain"]
    near(loss, recorded, x)
    near(torch.autograd.grad(loss, logp)[0], gradient, x)
    near(ops.clip_fraction(x.logp, x.old_logp, x.advantage, x.mask, CLIP), fraction, x, 1e-6)
    near(ops.masked_mean(ops.k1(x.old_logp, x.logp), x.mask), kl, x)


def test_verl_dual_clip_is_a_bound_on_ours(x, verl):
    # As verl is set, the loss of a token with A < 0 is held to 3|A|, which is not [PPO]'s.
    loss, _, _, gradient = verl["compute_policy_loss, dual clip"]
    logp = x.logp.clone().requires_grad_()
    held = (x.advantage < 0) & ((x.logp - x.old_logp).exp() > 3)
    ours = ops.clipped_policy_loss(logp, x.old_logp, x.advantage, x.mask, CLIP)
    n, kept = x.mask.sum(), x.mask & ~held
    rest = (3 * x.advantage.abs())[x.mask & held].sum() / n
    near(ops.clipped_policy_loss(logp, x.old_logp, x.advantage, kept, CLIP, n) + rest, loss, x)
    near(torch.autograd.grad(ours, logp)[0].masked_fill(held, 0), gradient, x)
    assert x.name != "wild" or bool((held & x.mask).any())


def test_verl_value_loss(x, verl):
    v = x.v.clone().requires_grad_()
    loss = ops.clipped_value_loss(v, x.old_v, x.returns, x.mask, CLIP_VALUE)
    recorded, gradient = verl["compute_value_loss"]
    near(loss, recorded, x)
    near(torch.autograd.grad(loss, v)[0], gradient, x)


def test_torchtune_losses(x, torchtune):
    logp, v = x.logp.clone().requires_grad_(), x.v.clone().requires_grad_()
    policy = ops.clipped_policy_loss(logp, x.old_logp, x.advantage, x.mask, CLIP)
    value = ops.clipped_value_loss(v, x.old_v, x.returns, x.mask, CLIP_VALUE)
    loss = policy + 0.1 * value
    fraction = ops.clip_fraction(x.logp, x.old_logp, x.advantage, x.mask, CLIP)
    actual = (loss, policy, value, fraction, *torch.autograd.grad(loss, (logp, v)))
    for ours, recorded in zip(actual, torchtune["PPOLoss"], strict=True):
        near(ours, recorded, x)


def test_the_adaptive_coefficient(x, verl):
    control, coefficients = ppo.AdaptiveKL(0.1, target=6.0, horizon=1000), []
    for kl in (*x.score.tolist(), 6.3, 5.9, 40.0):
        control.update(kl, 64)
        coefficients.append(control.coef)
    assert coefficients == pytest.approx(verl["AdaptiveKLController"], rel=1e-12)

"""One iteration of PPO: what it moves, what it leaves, and what its parts are given."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from reference_impl import ops, ppo, rollout, setup, task

SMALL = ppo.Settings(batch_size=8, num_minibatches=2, ppo_epochs=2, response_length=8)


def iterate(models, s=SMALL, parts=None, seed=0, times=1, control=None):
    optimizers, control = ppo.make_optimizers(models, s), control or ppo.FixedKL(s.kl_coef)
    torch.manual_seed(seed)
    for _ in range(times):
        metrics = ppo.ppo_step(models, task.prompts(), optimizers, s, control, parts or ppo.Parts())
    return metrics


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def spy(function, seen):
    def recording(*arguments, **options):
        seen.append((arguments, options))
        return function(*arguments, **options)

    return recording


def test_policy_and_value_move_and_the_others_do_not(models):
    before = {role: weights(getattr(models, role)) for role in setup.ROLES}
    iterate(models)
    moved = {role for role in setup.ROLES if not torch.equal(before[role], weights(getattr(models, role)))}
    assert moved == {"policy", "value"}
    assert all(weight.grad is None for role in setup.ROLES for weight in getattr(models, role).parameters())


def test_the_ratio_is_1_before_the_first_update(models):
    metrics = iterate(models)
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["ratio"] != 1.0


def test_every_epoch_visits_every_response_once(models):
    drawn, policies, values = [], [], []

    def sample(*arguments, **options):
        drawn.append(rollout.sample(*arguments, **options))
        return drawn[-1]

    parts = ppo.Parts(
        sample=sample,
        policy_loss=spy(ops.clipped_policy_loss, policies),
        value_loss=spy(ops.clipped_value_loss, values),
    )
    iterate(models, replace(SMALL, clip_range=0.3, clip_range_value=0.4, ppo_epochs=3), parts)
    assert len(policies) == len(values) == 3 * 2
    for epoch in range(3):
        old = torch.cat([arguments[1] for arguments, _ in policies[2 * epoch : 2 * epoch + 2]])
        first = torch.cat([arguments[1] for arguments, _ in policies[:2]])
        assert sorted(old.sum(1).tolist()) == sorted(first.sum(1).tolist())
        assert len(set(old.sum(1).tolist())) == 8
    assert policies[0][0][4] == 0.3
    assert values[0][0][4] == 0.4
    v, old_v, _, mask, _, _ = values[0][0]  # the critic before its first update
    torch.testing.assert_close(v[mask], old_v[mask], rtol=1e-5, atol=1e-5)


def test_the_value_loss_has_its_weight(models):
    s = replace(SMALL, num_minibatches=1, ppo_epochs=1, vf_coef=0.01)
    once = iterate(copy.deepcopy(models), s)
    twice = iterate(copy.deepcopy(models), replace(s, vf_coef=0.02))
    assert twice["value_grad_norm"] == pytest.approx(2 * once["value_grad_norm"], rel=1e-4)
    assert twice["policy_grad_norm"] == pytest.approx(once["policy_grad_norm"], rel=1e-4)


def test_the_penalty_reaches_the_score(models):
    seen = []
    iterate(models, replace(SMALL, missing_eos_penalty=3.0), ppo.Parts(score=spy(rollout.score, seen)))
    assert seen[0][1] == {"missing_eos_penalty": 3.0}


def test_whitened_rewards_keep_their_mean(models):
    seen, raw = [], []

    def rewards(*arguments):
        raw.append(ops.shaped_rewards(*arguments))
        return raw[-1]

    iterate(models, replace(SMALL, whiten_rewards=True), ppo.Parts(rewards=rewards, gae=spy(ops.gae, seen)))
    (r, _, mask, _, _), _ = seen[0]
    assert r[mask].std().item() == pytest.approx(1.0, abs=1e-4)
    assert raw[0][mask].std() < 0.9
    assert r[mask].mean().item() == pytest.approx(raw[0][mask].mean().item(), abs=1e-5)


def test_without_a_learning_rate_nothing_moves(models):
    models = replace(models, reference=copy.deepcopy(models.policy))
    before = weights(models.policy), weights(models.value)
    metrics = iterate(models, replace(SMALL, learning_rate=0.0, critic_learning_rate=0.0))
    assert torch.equal(before[0], weights(models.policy))
    assert torch.equal(before[1], weights(models.value))
    assert metrics["kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["reward"] == pytest.approx(metrics["score"], abs=1e-6)


def test_the_same_seed_gives_the_same_bits(models):
    twin = copy.deepcopy(models)
    assert iterate(models, times=2) == iterate(twin, times=2)
    assert torch.equal(weights(models.policy), weights(twin.policy))


@pytest.mark.parametrize("micro", [1, 3])
def test_the_micro_batch_size_changes_nothing(models, micro):
    for role in setup.ROLES:
        getattr(models, role).double()
    twin = copy.deepcopy(models)
    whole, pieces = iterate(models), iterate(twin, replace(SMALL, micro_batch_size=micro))
    for name in whole:
        assert pieces[name] == pytest.approx(whole[name], rel=1e-8, abs=1e-10), name
    for role in ("policy", "value"):
        torch.testing.assert_close(weights(getattr(twin, role)), weights(getattr(models, role)), rtol=0, atol=1e-9)


def test_rewards_are_the_score_less_the_kl(models):
    seen = []
    metrics = iterate(models, parts=ppo.Parts(rewards=spy(ops.shaped_rewards, seen)))
    (((scores, kl, mask, kl_coef), _),) = seen
    assert kl_coef == SMALL.kl_coef
    assert kl.abs().max() > 0
    assert (kl[~mask] == 0).all()
    assert metrics["kl"] == pytest.approx(kl.sum(1).mean().item())
    assert metrics["reward"] == pytest.approx((scores - kl_coef * kl.sum(1)).mean().item(), abs=1e-6)


def test_with_lambda_1_the_critic_learns_the_score(models):
    # No KL penalty: what is still to come is the score, at every token; so every return is the row's score.
    seen, scored = [], []
    s = replace(SMALL, kl_coef=0.0, lam=1.0, num_minibatches=1, ppo_epochs=1)

    def score(*arguments, **options):
        scored.append(rollout.score(*arguments, **options))
        return scored[-1]

    iterate(models, s, ppo.Parts(value_loss=spy(ops.clipped_value_loss, seen), score=score))
    (_, _, returns, mask, _, _), _ = seen[0]
    for row, n in zip(returns, mask.sum(1), strict=True):
        assert (row[:n] - row[0]).abs().max() < 1e-5
    assert sorted(returns[:, 0].tolist()) == pytest.approx(sorted(scored[0].tolist()), abs=1e-5)


def test_values_are_read_at_the_token_before_the_action(models):
    drawn, seen = [], []

    def sample(*arguments, **options):
        drawn.append(rollout.sample(*arguments, **options))
        return drawn[-1]

    iterate(models, parts=ppo.Parts(sample=sample, gae=spy(ops.gae, seen)))
    twin = setup.build_models(0, trained=False)  # the critic as it was
    (_, values, mask, gamma, lam), _ = seen[0]
    assert (gamma, lam) == (SMALL.gamma, SMALL.lam)
    for i in range(4):
        kept = drawn[0].ids[i][drawn[0].attention_mask[i].bool()][None]
        n = int(mask[i].sum())
        expected = twin.value(input_ids=kept).logits[0, -n - 1 : -1, 0]
        torch.testing.assert_close(values[i, :n], expected, rtol=1e-5, atol=1e-5)


def test_advantages_are_whitened_over_the_batch_and_returns_are_not(models):
    seen, raw = [], []

    def gae(*arguments):
        advantage = ops.gae(*arguments)
        raw.append(advantage[arguments[2]])
        return advantage

    s = replace(SMALL, num_minibatches=1, ppo_epochs=1)
    values = []
    parts = ppo.Parts(
        gae=gae, policy_loss=spy(ops.clipped_policy_loss, seen), value_loss=spy(ops.clipped_value_loss, values)
    )
    iterate(models, s, parts)
    (_, _, advantage, mask, _, _), _ = seen[0]
    assert advantage[mask].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantage[mask].std().item() == pytest.approx(1.0, abs=1e-4)
    (_, old_v, returns, _, _, _), _ = values[0]
    kept = (returns - old_v)[mask].sort().values
    torch.testing.assert_close(kept, raw[0].sort().values, rtol=1e-4, atol=1e-5)


def test_the_temperature_of_sampling_is_that_of_the_ratio(models):
    seen = []
    metrics = iterate(models, replace(SMALL, temperature=0.5), ppo.Parts(sample=spy(rollout.sample, seen)))
    assert seen[0][1]["temperature"] == 0.5
    assert metrics["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["entropy"] < iterate(setup.build_models(0, trained=False), SMALL)["entropy"]


def test_a_loss_that_is_not_finite_stops_before_the_update(models):
    before = weights(models.policy)
    broken = ppo.Parts(score=lambda reward, drawn, **_: torch.full((len(drawn.ids),), math.nan))
    with pytest.raises(FloatingPointError, match="policy loss nan"):
        iterate(models, parts=broken)
    assert torch.equal(before, weights(models.policy))


def test_a_gradient_that_is_not_finite_stops_before_the_update(models):
    def rooted(v, *rest):  # the loss is 0, its gradient is not
        return (v.clamp(max=0) * 0).abs().sqrt().sum() + ops.clipped_value_loss(v, *rest) * 0

    before = weights(models.value)
    with pytest.raises(FloatingPointError, match=r"policy loss -?\d.*value grad norm (nan|inf)"):
        iterate(models, parts=ppo.Parts(value_loss=rooted))
    assert torch.equal(before, weights(models.value))


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_drawn(models):
    with pytest.raises(ValueError, match="context of 64"):
        iterate(models, replace(SMALL, response_length=60))


def test_the_adaptive_coefficient_by_hand():
    control = ppo.AdaptiveKL(0.1, target=6.0, horizon=1000)
    control.update(6.6, 100)  # 10% over: β (1 + 0.1 · 0.1)
    assert control.coef == pytest.approx(0.101)
    control.update(60.0, 100)  # clipped at 20%
    assert control.coef == pytest.approx(0.101 * 1.02)
    control.update(0.0, 500)
    assert control.coef == pytest.approx(0.101 * 1.02 * 0.9)
    other = ppo.AdaptiveKL(1.0, target=6.0, horizon=1000)
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef
    fixed = ppo.FixedKL(0.3)
    fixed.update(99.0, 10)
    assert fixed.coef == 0.3


def test_the_adaptive_coefficient_is_used_and_adapted(models):
    control = ppo.AdaptiveKL(0.2, target=1e-6, horizon=80)
    metrics = iterate(models, parts=ppo.Parts(kl=ops.k3), control=control)  # k3 is never negative
    assert metrics["kl_coef"] == 0.2
    assert control.coef == pytest.approx(0.2 * 1.02)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 10 does not divide into 4"):
        ppo.Settings(batch_size=10, num_minibatches=4)

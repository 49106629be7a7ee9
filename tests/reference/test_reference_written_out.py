"""One whole iteration against the same algorithm written out: row by row, token by token, with the model classes."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from reference_impl import ppo, rollout, setup, task

EOS = 2
S = ppo.Settings(
    batch_size=8,
    num_minibatches=1,
    ppo_epochs=2,
    response_length=24,
    temperature=0.7,
    learning_rate=3e-4,
    critic_learning_rate=2e-3,
    gamma=0.9,
    lam=0.8,
    kl_coef=0.3,
    clip_range=0.1,
    clip_range_value=0.05,
    vf_coef=0.5,
    missing_eos_penalty=1.5,
)


def logprobs(policy, row, n):
    """Of the last n tokens of the row, at the temperature, from a table of all tokens' probabilities."""
    table = (policy(input_ids=row[None]).logits[0] / S.temperature).softmax(-1)
    return torch.stack([table[p - 1, row[p]].log() for p in range(len(row) - n, len(row))])


def values(critic, row, n):
    """In the states in which these tokens were drawn: the critic has read all before each."""
    return critic(input_ids=row[None]).logits[0, -n - 1 : -1, 0]


def advantages(score, kl, v):
    """By recursion from the last token, after which nothing comes."""
    rewards = [-S.kl_coef * x for x in kl]
    rewards[-1] += score
    found, following, after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(v), strict=True):
        following = reward + S.gamma * after - value + S.gamma * S.lam * following
        found.insert(0, following)
        after = value
    return found


def written_out(models, rows, lengths, ended):
    """Moves policy and critic as S says; returns the metrics that describe the rollout, and each update's losses."""
    old_logp, ref_logp, old_v, scores = [], [], [], []
    with torch.no_grad():
        for row, n, has_ended in zip(rows, lengths, ended, strict=True):
            old_logp.append(logprobs(models.policy, row, n).tolist())
            ref_logp.append(logprobs(models.reference, row, n).tolist())
            old_v.append(values(models.value, row, n).tolist())
            scores.append(models.reward.score(models.reward.model(input_ids=row[None])[0][0, -1]).item())
            scores[-1] -= 0 if has_ended else S.missing_eos_penalty
    kl = [[a - b for a, b in zip(p, q, strict=True)] for p, q in zip(old_logp, ref_logp, strict=True)]
    raw = [advantages(*row) for row in zip(scores, kl, old_v, strict=True)]
    returns = [[a + v for a, v in zip(*row, strict=True)] for row in zip(raw, old_v, strict=True)]
    flat = [a for row in raw for a in row]
    n, mean = len(flat), sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / (n - 1) + 1e-8)
    white = [[(a - mean) / deviation for a in row] for row in raw]

    adam = [
        torch.optim.Adam(models.policy.parameters(), lr=S.learning_rate, eps=1e-5),
        torch.optim.Adam(models.value.parameters(), lr=S.critic_learning_rate, eps=1e-5),
    ]
    updates = []
    for _ in range(S.ppo_epochs):
        policy_losses, value_losses, ratios = [], [], []
        for i, row in enumerate(rows):
            for t, x in enumerate(logprobs(models.policy, row, lengths[i])):
                ratio, A = (x - old_logp[i][t]).exp(), white[i][t]
                clipped = min(max(ratio.item(), 1 - S.clip_range), 1 + S.clip_range)
                policy_losses.append(-ratio * A if ratio.item() * A <= clipped * A else torch.tensor(-clipped * A))
                ratios.append(ratio.item())
            for t, v in enumerate(values(models.value, row, lengths[i])):
                old, target = old_v[i][t], returns[i][t]
                near = min(max(v.item(), old - S.clip_range_value), old + S.clip_range_value)
                larger = (v.item() - target) ** 2 >= (near - target) ** 2
                value_losses.append((v - target) ** 2 / 2 if larger else torch.tensor((near - target) ** 2 / 2))
        losses = [torch.stack(x).mean() for x in (policy_losses, value_losses)]
        norms = []
        for model, optimizer, loss in zip(
            (models.policy, models.value), adam, (losses[0], S.vf_coef * losses[1]), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            weights = [weight for weight in model.parameters() if weight.grad is not None]
            norms.append(math.sqrt(sum(weight.grad.square().sum().item() for weight in weights)))
            for weight in weights:
                weight.grad *= min(1.0, 1 / (norms[-1] + 1e-6))
            optimizer.step()
        updates.append({
            "policy_loss": losses[0].item(),
            "value_loss": losses[1].item(),
            "approx_kl": sum(x - 1 - math.log(x) for x in ratios) / n,
            "ratio": sum(ratios) / n,
            "clip_fraction": sum(
                (A > 0 and x > 1 + S.clip_range) or (A < 0 and x < 1 - S.clip_range)
                for x, A in zip(ratios, (A for row in white for A in row), strict=True)
            ) / n,
            "policy_grad_norm": norms[0],
            "value_grad_norm": norms[1],
        })  # fmt: skip

    B, total = len(rows), [sum(row) for row in kl]
    errors = [a for row in raw for a in row]  # the return less the value
    targets = [x for row in returns for x in row]
    variances = [sum((x - sum(xs) / n) ** 2 for x in xs) for xs in (errors, targets)]
    centre = sum(scores) / B
    return {
        "score": centre,
        "score_std": math.sqrt(sum((x - centre) ** 2 for x in scores) / (B - 1)),
        "kl": sum(total) / B,
        "reward": sum(x - S.kl_coef * k for x, k in zip(scores, total, strict=True)) / B,
        "entropy": -sum(x for row in old_logp for x in row) / n,
        "eos_rate": sum(ended) / B,
        "response_length": n / B,
        "explained_variance": 1 - variances[0] / variances[1],
        "first_ratio": updates[0]["ratio"],
        **{name: sum(update[name] for update in updates) / len(updates) for name in updates[0]},
    }


@pytest.fixture
def double(models):
    """The models in double precision, with a critic of its own; the policy has long moved from the reference."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for model, scale in ((models.policy, 0.05), (models.value, 0.02)):
            for weight in model.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)
    for role in setup.ROLES:
        getattr(models, role).double()
    return models


@pytest.mark.parametrize("micro", [None, 3])
def test_one_iteration_is_the_algorithm_written_out(double, micro):
    twin, drawn = copy.deepcopy(double), []

    def sample(policy, *arguments, **options):
        assert policy is double.policy
        assert options["temperature"] == S.temperature
        drawn.append(rollout.sample(policy, *arguments, **options))
        return drawn[-1]

    optimizers = ppo.make_optimizers(double, S)
    torch.manual_seed(4)
    s, control = replace(S, micro_batch_size=micro), ppo.AdaptiveKL(S.kl_coef, target=0.5, horizon=80)
    metrics = ppo.ppo_step(double, task.prompts(), optimizers, s, control, ppo.Parts(sample=sample))

    (whole,) = drawn
    P = whole.ids.shape[1] - whole.mask.shape[1]
    rows, lengths, ended = [], [], []
    for ids, real in zip(whole.ids, whole.attention_mask.bool(), strict=True):
        prompt, response = ids[:P][real[:P]], ids[P:].tolist()
        ended.append(EOS in response)
        lengths.append(response.index(EOS) + 1 if ended[-1] else len(response))
        rows.append(torch.cat([prompt, ids[P : P + lengths[-1]]]))
    assert 0 < sum(ended) < len(ended)
    assert len({len(row) for row in rows}) > 3

    expected = written_out(twin, rows, lengths, ended)
    assert metrics.keys() == {*expected, "kl_coef"}
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number, rel=1e-6, abs=1e-7), name
    assert metrics["clip_fraction"] > 0
    for role in setup.ROLES:
        for actual, wanted in zip(getattr(double, role).parameters(), getattr(twin, role).parameters(), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)
    error = min(max(expected["kl"] / 0.5 - 1, -0.2), 0.2)
    assert control.coef == pytest.approx(S.kl_coef * (1 + error * 8 / 80), rel=1e-9)


def test_minibatches_are_drawn_anew_each_epoch(models):
    batch, pieces = [], []

    def kl(logp, ref_logp):
        batch.append(logp)
        return logp - ref_logp

    def policy_loss(logp, old_logp, *rest):
        pieces.append({(batch[0] == row).all(1).nonzero().item() for row in old_logp})
        return ppo.ops.clipped_policy_loss(logp, old_logp, *rest)

    s = replace(S, batch_size=32, num_minibatches=2, response_length=4)
    torch.manual_seed(0)
    ppo.ppo_step(
        models,
        task.prompts(),
        ppo.make_optimizers(models, s),
        s,
        ppo.FixedKL(0.0),
        ppo.Parts(kl=kl, policy_loss=policy_loss),
    )
    halves = [pieces[0], pieces[2]]
    assert [one | other for one, other in zip(pieces[::2], pieces[1::2], strict=True)] == [set(range(32))] * 2
    assert halves[0] != halves[1] != set(range(32)) - halves[0]
    for half in halves:
        assert 0 < len(half & set(range(16))) < 16

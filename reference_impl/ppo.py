"""Proximal policy optimization of a language model with four models, in the order it runs.

Sources: [PPO] https://arxiv.org/abs/1707.06347, [GAE] https://arxiv.org/abs/1506.02438, [InstructGPT]
https://arxiv.org/abs/2203.02155, [N+] https://arxiv.org/abs/2403.17031, [Ziegler] https://arxiv.org/abs/1909.08593.

Departures from the papers:
- policy and critic are two models with an optimizer each; [PPO] shares one network;
- no entropy bonus ([PPO] eq. 9 has one; [N+] does without);
- no pretraining gradients mixed in ([InstructGPT] eq. 2, its PPO-ptx);
- a response that reaches the length limit ends there: V = 0 after it, and the missing-EOS penalty is due;
- gradients are clipped to norm 1, for each model by itself; the learning rate is constant ([N+] decays it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles
from reference_impl.roles import Models
from reference_impl.rollout import Rollout, encode_prompts, sample, score

__all__ = ["AdaptiveKL", "FixedKL", "Parts", "Settings", "make_optimizers", "ppo_step"]


@dataclass(frozen=True)
class Settings:
    """What the algorithm is told. Clip ranges, gamma, lam, kl_coef and vf_coef are those of [N+]."""

    batch_size: int = 32  # responses an iteration
    num_minibatches: int = 4
    micro_batch_size: int | None = None  # responses a backward pass; None: a whole minibatch. Changes memory only
    ppo_epochs: int = 2
    response_length: int = 20
    temperature: float = 1.0
    learning_rate: float = 1e-4
    critic_learning_rate: float = 1e-4
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    clip_range: float = 0.2
    clip_range_value: float = 0.2
    vf_coef: float = 0.1
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size % self.num_minibatches:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.num_minibatches} minibatches")


@dataclass(frozen=True)
class Parts:
    """The functions that a variant replaces, each with the signature of the one that stands here."""

    sample: Callable[..., Rollout] = sample
    score: Callable[..., Tensor] = score
    logprobs: Callable[..., Tensor] = roles.response_logprobs
    values: Callable[..., Tensor] = roles.scalars
    kl: Callable[[Tensor, Tensor], Tensor] = ops.k1
    rewards: Callable[..., Tensor] = ops.shaped_rewards
    gae: Callable[..., Tensor] = ops.gae
    policy_loss: Callable[..., Tensor] = ops.clipped_policy_loss
    value_loss: Callable[..., Tensor] = ops.clipped_value_loss


class FixedKL:
    """The same KL coefficient for ever."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, samples: int) -> None:
        """Nothing: kl is the mean KL of a sequence in nats, `samples` how many were drawn."""


class AdaptiveKL(FixedKL):
    """β ← β (1 + clip(KL/target - 1, -0.2, 0.2) · samples / horizon). [Ziegler]"""

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, samples: int) -> None:
        """kl: the mean KL of a sequence in nats; samples: how many sequences were drawn since the last update."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What `update` changes."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        self.coef = state["coef"]


def make_optimizers(models: Models, s: Settings) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Adam for the policy and for the critic, with epsilon 1e-5 and without weight decay ([N+])."""
    policy = torch.optim.Adam(models.policy.parameters(), lr=s.learning_rate, eps=1e-5)
    return policy, torch.optim.Adam(models.value.parameters(), lr=s.critic_learning_rate, eps=1e-5)


def ppo_step(
    models: Models,
    prompts: Sequence[str],
    optimizers: Sequence[torch.optim.Optimizer],
    s: Settings,
    kl_control: FixedKL,
    parts: Parts = Parts(),
) -> dict[str, float]:
    """One whole iteration: rollout and every update, on these models in place. Returns the iteration's metrics.

    Draws prompts, tokens and minibatches from torch's global generator. Raises FloatingPointError before an update
    with a loss that is not finite.
    """
    policy, reference, reward, value, tokenizer = (
        models.policy, models.reference, models.reward, models.value, models.tokenizer,
    )  # fmt: skip

    # 1. Draw prompts and let the policy answer.
    drawn = [prompts[i] for i in torch.randint(len(prompts), (s.batch_size,)).tolist()]
    prompt, prompt_mask = (x.to(policy.device) for x in encode_prompts(tokenizer, drawn))  # (B, P) each
    rollout = parts.sample(
        policy, prompt, prompt_mask, T=s.response_length, temperature=s.temperature,
        eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
    )  # fmt: skip
    ids, attention, mask = rollout.ids, rollout.attention_mask, rollout.mask  # (B, P+T), (B, P+T), (B, T)
    T = mask.shape[1]

    with torch.no_grad():
        # 2. Score each response at its last token; there too if it never ended, less the penalty.
        scores = parts.score(reward, rollout, missing_eos_penalty=s.missing_eos_penalty)  # (B,)

        # 3. Log-probabilities under the policy that drew the tokens and under the reference, at the sampling
        #    temperature; and the critic's values, V(s_t) being read at the token before a_t.
        old_logp = parts.logprobs(policy, ids, attention, T, s.temperature)  # (B, T)
        ref_logp = parts.logprobs(reference, ids, attention, T, s.temperature)  # (B, T)
        old_v = parts.values(value, ids, attention)[:, -T - 1 : -1]  # (B, T)

        # 4. Rewards: a KL penalty at every token, the score at the last one.
        kl = parts.kl(old_logp, ref_logp).masked_fill(~mask, 0)  # (B, T)
        kl_coef = kl_control.coef
        r = parts.rewards(scores, kl, mask, kl_coef)  # (B, T)
        if s.whiten_rewards:
            r = ops.whiten(r, mask, shift_mean=False)

        # 5. Advantages and returns; only then are the advantages whitened, over the whole batch.
        advantage = parts.gae(r, old_v, mask, s.gamma, s.lam)  # (B, T)
        returns = advantage + old_v  # (B, T)
        if s.whiten_advantages:
            advantage = ops.whiten(advantage, mask)

    # 6. Several epochs over the same rollout, in minibatches drawn anew each epoch, one update of both models each.
    updates = list[dict[str, float]]()
    for _ in range(s.ppo_epochs):
        for minibatch in torch.randperm(s.batch_size).to(ids.device).chunk(s.num_minibatches):
            update = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio"), 0.0)
            count = mask[minibatch].sum()  # every loss is a mean over the minibatch's tokens, in however many pieces
            for optimizer in optimizers:
                optimizer.zero_grad()
            for rows in torch.split(minibatch, s.micro_batch_size or len(minibatch)):  # (b,)
                m, old = mask[rows], old_logp[rows]  # (b, T) each
                logp = parts.logprobs(policy, ids[rows], attention[rows], T, s.temperature)  # (b, T)
                v = parts.values(value, ids[rows], attention[rows])[:, -T - 1 : -1]  # (b, T)
                policy_loss = parts.policy_loss(logp, old, advantage[rows], m, s.clip_range, count)
                value_loss = parts.value_loss(v, old_v[rows], returns[rows], m, s.clip_range_value, count)
                loss: Any = policy_loss + s.vf_coef * value_loss
                if not bool(loss.isfinite()):
                    raise FloatingPointError(f"policy loss {policy_loss.item()}, value loss {value_loss.item()}")
                loss.backward()
                with torch.no_grad():
                    update["policy_loss"] += policy_loss.item()
                    update["value_loss"] += value_loss.item()
                    update["approx_kl"] += ops.masked_mean(ops.k3(old, logp), m, count).item()
                    update["clip_fraction"] += ops.clip_fraction(
                        logp, old, advantage[rows], m, s.clip_range, count
                    ).item()  # fmt: skip
                    update["ratio"] += ops.masked_mean((logp - old).exp(), m, count).item()
            for name, model in (("policy_grad_norm", policy), ("value_grad_norm", value)):
                update[name] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            for optimizer in optimizers:
                optimizer.step()
            updates.append(update)
    for optimizer in optimizers:
        optimizer.zero_grad()

    # 7. Adapt the KL coefficient, and report: means over the updates, and the rollout as it was before them.
    sequence_kl = kl.sum(1).mean().item()
    kl_control.update(sequence_kl, s.batch_size)
    return {
        "score": scores.mean().item(),
        "score_std": scores.std().item(),
        "kl": sequence_kl,
        "kl_coef": kl_coef,
        "reward": r.masked_fill(~mask, 0).sum(1).mean().item(),
        "entropy": -ops.masked_mean(old_logp, mask).item(),
        "eos_rate": rollout.ended.double().mean().item(),
        "response_length": mask.sum(1).double().mean().item(),
        "explained_variance": ops.explained_variance(old_v, returns, mask).item(),
        "first_ratio": updates[0]["ratio"],
        **{name: sum(update[name] for update in updates) / len(updates) for name in updates[0]},
    }

"""Proximal policy optimization of a language model with four models, in the order it runs.

Sources: [PPO] https://arxiv.org/abs/1707.06347, [GAE] https://arxiv.org/abs/1506.02438, [InstructGPT]
https://arxiv.org/abs/2203.02155, [N+] https://arxiv.org/abs/2403.17031, [Ziegler] https://arxiv.org/abs/1909.08593.

Departures from the papers:
- policy and critic are two models with an optimizer each; [PPO] shares one network;
- no entropy bonus ([PPO] eq. 9 has one; [N+] does without);
- no pretraining gradients mixed in ([InstructGPT] eq. 2, its PPO-ptx);
- a response that reaches the length limit ends there: V = 0 after it, and the missing-EOS penalty is due;
- log-probabilities of the rollout are computed after it, as in the updates, not kept from sampling, where a key-value
  cache rounds otherwise; so the ratio is exactly 1 before the first update;
- rows are moved to the left edge for everything but sampling, and minibatches cut into rows of like length;
- gradients are clipped to norm 1, for each model by itself; the learning rate is constant ([N+] decays it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles, scale
from reference_impl.roles import Models
from reference_impl.rollout import Rollout, encode_prompts, sample, score

# What is reported of every update; the first five are sums over processes.
NAMES = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio", "policy_grad_norm", "value_grad_norm")


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
    dtype: str = "float32"  # of matrix products; "bfloat16" leaves weights, optimizers and statistics in float32

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


@dataclass
class FixedKL:
    """The same KL coefficient for ever."""

    coef: float

    def update(self, kl: float, samples: int) -> None:
        """Nothing: kl is the mean KL of a sequence in nats, `samples` how many were drawn."""


@dataclass
class AdaptiveKL(FixedKL):
    """β ← β (1 + clip(KL/target - 1, -0.2, 0.2) · samples / horizon). [Ziegler]"""

    target: float
    horizon: int

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
    policy = torch.optim.Adam(models.policy.parameters(), lr=s.learning_rate, eps=1e-5, fused=True)
    return policy, torch.optim.Adam(models.value.parameters(), lr=s.critic_learning_rate, eps=1e-5, fused=True)


def micro_batches(minibatch: Tensor, lengths: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """This process's rows of the minibatch, in pieces of `size`, the longest first: rows of like length pad little."""
    mine = minibatch[lengths[minibatch].argsort(descending=True, stable=True)][scale.my_rows(len(minibatch))]
    return torch.split(mine, size or len(mine))


def everywhere(function: Callable[[Tensor], Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """function(rows) for these pieces of rows and those of the other processes → (B, …), all of the batch's rows."""
    rows = scale.gather_rows(torch.cat(list(pieces)))
    return scale.gather_rows(torch.cat([function(piece) for piece in pieces]))[rows.argsort()]


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
    with a loss or a gradient that is not finite, and ValueError for models that cannot read these prompts."""
    policy, reference, reward, value, tokenizer = (getattr(models, role) for role in (*roles.ROLES, "tokenizer"))
    precision = partial(scale.autocast, policy.device, s.dtype)

    # 1. Draw prompts and let the policy answer.
    drawn = [prompts[i] for i in torch.randint(len(prompts), (s.batch_size,)).tolist()]
    prompt, prompt_mask = (x.to(policy.device) for x in encode_prompts(tokenizer, drawn))  # (B, P) each
    roles.check_models(models, prompt, s.response_length)
    with precision():
        special = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        rollout = parts.sample(policy, prompt, prompt_mask, T=s.response_length, temperature=s.temperature, **special)
    ids, attention, mask = rollout.ids, rollout.attention_mask, rollout.mask  # (B, P+T), (B, P+T), (B, T)
    T = mask.shape[1]

    # 2. Several epochs over this rollout, in minibatches drawn anew each epoch, each in this process's micro-batches.
    #    What is read before the updates is read in the first epoch's, so that the ratio then starts at exactly 1.
    epochs = [
        [micro_batches(rows, attention.sum(1), s.micro_batch_size) for rows in order.chunk(s.num_minibatches)]
        for order in (torch.randperm(s.batch_size).to(ids.device) for _ in range(s.ppo_epochs))
    ]
    pieces = [rows for minibatch in epochs[0] for rows in minibatch]

    def logprobs(model: Any, rows: Tensor) -> Tensor:  # (b, T), at the temperature of sampling
        return parts.logprobs(model, ids[rows], attention[rows], T, s.temperature)

    def values(rows: Tensor) -> Tensor:  # (b, T), V(s_t) being read at the token before a_t
        return parts.values(value, ids[rows, :-1], attention[rows, :-1])[:, -T:]

    with torch.no_grad():
        with precision():
            # 3. Score each response at its last token; there too if it never ended, less the penalty.
            scores = everywhere(
                lambda rows: parts.score(reward, rollout.rows(rows), missing_eos_penalty=s.missing_eos_penalty), pieces
            )  # (B,)

            # 4. Log-probabilities under the policy that drew the tokens and under the reference, and the values.
            old_logp = everywhere(partial(logprobs, policy), pieces)  # (B, T)
            ref_logp = everywhere(partial(logprobs, reference), pieces)  # (B, T)
            old_v = everywhere(values, pieces)  # (B, T)

        # 5. Rewards: a KL penalty at every token, the score at the last one.
        kl = parts.kl(old_logp, ref_logp).masked_fill(~mask, 0)  # (B, T)
        kl_coef = kl_control.coef
        r = parts.rewards(scores, kl, mask, kl_coef)  # (B, T)
        if s.whiten_rewards:
            r = ops.whiten(r, mask, shift_mean=False)

        # 6. Advantages and returns; only then are the advantages whitened, over the whole batch.
        advantage = parts.gae(r, old_v, mask, s.gamma, s.lam)  # (B, T)
        returns = advantage + old_v  # (B, T)
        if s.whiten_advantages:
            advantage = ops.whiten(advantage, mask)

    # 7. Update both models once a minibatch. Losses are means over its tokens, in however many pieces and processes.
    updates = list[Tensor]()  # of NAMES each
    for optimizer in optimizers:
        optimizer.zero_grad()
    for minibatch in (minibatch for epoch in epochs for minibatch in epoch):
        count = scale.all_sum(mask[torch.cat(minibatch)].sum())
        sums = torch.zeros(5, dtype=torch.float64, device=ids.device)
        for rows in minibatch:  # (b,)
            m, old, A = mask[rows], old_logp[rows], advantage[rows]  # (b, T) each
            with precision():
                logp = logprobs(policy, rows)  # (b, T)
            policy_loss: Any = parts.policy_loss(logp, old, A, m, s.clip_range, count)
            scale.backward(policy_loss)
            with precision():
                v = values(rows)  # (b, T)
            value_loss: Any = parts.value_loss(v, old_v[rows], returns[rows], m, s.clip_range_value, count)
            scale.backward(s.vf_coef * value_loss)
            with torch.no_grad():
                approx_kl, ratio = (ops.masked_mean(x, m, count) for x in (ops.k3(old, logp), (logp - old).exp()))
                cut = ops.clip_fraction(logp, old, A, m, s.clip_range, count)
                sums += torch.stack([policy_loss.detach(), value_loss.detach(), approx_kl, cut, ratio])
        norms = [scale.clip_gradients(model, 1.0) for model in (policy, value)]
        update = torch.cat([scale.all_sum(sums), sums.new_tensor(norms)])
        if not bool(update[[0, 1, 5, 6]].isfinite().all()):
            told = ", ".join(f"{name.replace('_', ' ')} {x}" for name, x in zip(NAMES, update.tolist(), strict=True))
            raise FloatingPointError(f"stopped before an update that is not finite: {told}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        updates.append(update)

    # 8. Adapt the KL coefficient, and report: means over the updates, and the rollout as it was before them.
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
        "first_ratio": updates[0][NAMES.index("ratio")].item(),
        **dict(zip(NAMES, torch.stack(updates).mean(0).tolist(), strict=True)),
    }

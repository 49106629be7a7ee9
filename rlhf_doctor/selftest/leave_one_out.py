"""A small critic-free step whose rewards hold the KL (RLOO, REINFORCE++), of the reference's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reference_impl import ops, roles, rollout

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Returns", "setup"]

PROMPTS, SIZE, LENGTH, COEFFICIENT = 4, 4, 10, 0.05


@dataclass(frozen=True)
class Returns:
    """How advantages are made of scores (B,) and log-probabilities (B, T).

    Attributes:
        estimator: of the KL: k1, k2, k3.
        gamma: of the returns.
        whole: the KL is summed over the response; else every token has what comes from it on.
        whitened: over the tokens of the batch.
        masked: whether slots after the response hold no KL.
        last_column: the score is put in the batch's last column.
        in_the_loss: coefficient of a k3 term there.
    """

    estimator: str = "k1"
    gamma: float = 1.0
    whole: bool = False
    whitened: bool = False
    masked: bool = True
    last_column: bool = False
    in_the_loss: float = 0.0

    def __call__(self, scores: Tensor, old: Tensor, ref: Tensor, where: Tensor) -> Tensor:
        """Advantages, (B, T)."""
        grouped = scores.view(PROMPTS, SIZE)
        alone = (SIZE * grouped - grouped.sum(1, keepdim=True)).flatten() / (SIZE - 1)
        rewards: Tensor = -COEFFICIENT * getattr(ops, self.estimator)(old, ref)
        rewards = rewards.masked_fill(~where, 0) if self.masked else rewards
        if self.whole:
            return (alone + rewards.sum(1))[:, None].expand_as(rewards)
        last = torch.full_like(where[:, 0].long(), where.shape[1] - 1) if self.last_column else where.sum(1) - 1
        rewards[torch.arange(len(rewards)), last] += alone
        if self.last_column:
            rewards = rewards.masked_fill(~where, 0)
        running = torch.zeros_like(alone)
        for t in range(rewards.shape[1] - 1, -1, -1):
            rewards[:, t] += self.gamma * running
            running = rewards[:, t]
        return ops.whiten(rewards, where) if self.whitened else rewards


def setup(healthy: RLHFSetup, returns: Returns, **declared: Any) -> RLHFSetup:
    """The healthy policy, reference and reward in a step with these returns."""
    policy, reference, reward = (healthy.model(role) for role in ("policy", "reference", "reward"))
    tokenizer, prompts = healthy.tokenizer, list(healthy.prompts or ())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)

    def step() -> float:
        drawn = [prompts[i] for i in torch.randperm(len(prompts))[:PROMPTS].tolist() for _ in range(SIZE)]
        ids, mask = rollout.encode_prompts(tokenizer, drawn)
        special = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        texts = rollout.sample(policy, ids, mask, T=LENGTH, temperature=1.0, **special)
        where = texts.mask

        def logp(model: Any) -> Tensor:
            return roles.response_logprobs(model, texts.ids, texts.attention_mask, where.shape[1], 1.0)

        with torch.no_grad():
            old, ref = logp(policy), logp(reference)
            advantages = returns(rollout.score(reward, texts, missing_eos_penalty=1.0), old, ref, where)
        optimizer.zero_grad()
        new = logp(policy)
        loss = ops.clipped_policy_loss(new, old, advantages, where, 0.2)
        if returns.in_the_loss:
            loss = loss + returns.in_the_loss * ops.masked_mean(ops.k3(new, ref), where)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    said = {
        "algorithm": "rloo", "group_size": SIZE, "kl_coef": COEFFICIENT, "kl_in": "reward", "kl_estimator": "k1",
        "gamma": 1.0, "temperature": 1.0, "clip_range": 0.2, "ppo_epochs": 1, "num_minibatches": 1,
        "loss_aggregation": "token-mean", **declared,
    }  # fmt: skip
    return healthy.but(value=None, step=step, optimizers=[optimizer], state=[], declared=said)

"""A small critic-free step with groups of responses (GRPO), of the reference's parts, and wrong baselines for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from reference_impl import ops, roles, rollout

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.setups import RLHFSetup

__all__ = ["PROMPTS", "SIZE", "critic_free", "half", "mean_left_in", "mixed", "own_group", "setup", "whole_batch"]

PROMPTS, SIZE, LENGTH = 4, 4, 10
Relative = Callable[["Tensor"], "Tensor"]


def setup(healthy: RLHFSetup, relative: Relative) -> RLHFSetup:
    """The healthy policy, reference and reward in a GRPO step whose advantages are relative(scores), (B,) -> (B,)."""

    def advantages(scores: Tensor, old: Tensor, ref: Tensor, where: Tensor) -> Tensor:
        return relative(scores)[:, None].expand_as(old)

    return critic_free(
        healthy, advantages, in_the_loss=0.04, algorithm="grpo", kl_coef=0.04, kl_in="loss", kl_estimator="k3"
    )


def critic_free(
    healthy: RLHFSetup,
    advantages: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    in_the_loss: float,
    **declared: Any,
) -> RLHFSetup:
    """The healthy policy, reference and reward in a step without a critic.

    Args:
        healthy: the setup.
        advantages: of scores (B,), log-probabilities of policy and reference (B, T), and the mask -> (B, T).
        in_the_loss: coefficient of a k3 term there.
        declared: beside what every such step declares.
    """
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
            given = advantages(rollout.score(reward, texts, missing_eos_penalty=1.0), old, ref, where)
        optimizer.zero_grad()
        new = logp(policy)
        loss = ops.clipped_policy_loss(new, old, given, where, 0.2)
        if in_the_loss:
            loss = loss + in_the_loss * ops.masked_mean(ops.k3(new, ref), where)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    said = {
        "group_size": SIZE, "temperature": 1.0, "clip_range": 0.2, "ppo_epochs": 1, "num_minibatches": 1,
        "loss_aggregation": "token-mean", **declared,
    }  # fmt: skip
    return healthy.but(value=None, step=step, optimizers=[optimizer], state=[], declared=said)


def _normal(grouped: Tensor, dim: int) -> Tensor:
    return (grouped - grouped.mean(dim, keepdim=True)) / (grouped.std(dim, keepdim=True) + 1e-4)


def own_group(scores: Tensor) -> Tensor:
    """Each response against the others of its prompt."""
    return _normal(scores.view(PROMPTS, SIZE), 1).flatten()


def mixed(scores: Tensor) -> Tensor:
    """Rows of different prompts compared."""
    return _normal(scores.view(SIZE, PROMPTS), 0).flatten()


def whole_batch(scores: Tensor) -> Tensor:
    """Every response against all."""
    return _normal(scores, 0)


def mean_left_in(scores: Tensor) -> Tensor:
    """Scaled and not centred."""
    grouped = scores.view(PROMPTS, SIZE)
    return (grouped / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def half(scores: Tensor) -> Tensor:
    """Groups of half the size that is sampled."""
    return _normal(scores.view(-1, SIZE // 2), 1).flatten()

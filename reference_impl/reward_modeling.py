"""Reward modelling: a scalar head learns which of two responses is preferred, then its scale is fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles
from reference_impl.rollout import Rollout
from reference_impl.sft import encode_responses

__all__ = ["accuracy", "normalize", "score_pairs", "train"]

Pair = tuple[str, str, str]


def score_pairs(reward: Any, tokenizer: Any, pairs: Sequence[Pair], *, eos: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Scores (B,) of the chosen and of the rejected responses; `eos[i]`: whether the i-th pair's texts end with it."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    ids, attention, _ = encode_responses(tokenizer, texts, eos=[*eos, *eos])
    scores = ops.pool_last(roles.scalars(reward, ids, attention), attention.bool())
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


def train(
    reward: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    learning_rate: float,
    center_coef: float = 0.01,
) -> Iterator[float]:
    """One pass over the pairs with the Bradley-Terry loss and a linearly decaying rate; yields each batch's loss.

    Every other pair lacks the end of sequence, so that a response cut at the length limit is scored as well as a
    finished one.
    """
    optimizer = torch.optim.AdamW(reward.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(batches))
    for batch in batches:
        chosen, rejected = score_pairs(reward, tokenizer, batch, eos=[i % 2 == 0 for i in range(len(batch))])
        loss: Any = ops.bradley_terry_loss(chosen, rejected, center_coef)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), 1.0)
        optimizer.step()
        decay.step()
        yield loss.item()


@torch.no_grad()
def accuracy(reward: Any, tokenizer: Any, pairs: Sequence[Pair], *, eos: bool = True) -> float:
    """Share of the pairs whose chosen response scores higher."""
    chosen, rejected = score_pairs(reward, tokenizer, pairs, eos=[eos] * len(pairs))
    return (chosen > rejected).double().mean().item()


@torch.no_grad()
def normalize(reward: Any, rollout: Rollout) -> tuple[float, float]:
    """Gives the scores of the rollout, samples of the reference, mean 0 and deviation 1; returns what they were ([N+]).

    The head w has no bias to shift. The scores are w·h for the last hidden states h; so w moves along their mean h̄ by
    the shortest step that brings w·h̄, the mean score, to 0.
    """
    hidden = roles.hidden_states(reward, rollout.ids, rollout.attention_mask)
    last = torch.stack([ops.pool_last(h, rollout.attention_mask.bool()) for h in hidden.unbind(-1)], -1)  # (B, D)
    w = reward.score.weight  # (1, D)
    before = last @ w[0]
    center = last.mean(0)
    w -= before.mean() * center / center.square().sum()
    w /= (last @ w[0]).std()
    return before.mean().item(), before.std().item()

"""Reward modelling: a scalar head learns which of two responses is preferred, then its scale is fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_impl import ops, roles
from reference_impl.rollout import Rollout
from reference_impl.sft import encode_responses, fit

__all__ = ["accuracy", "normalize", "preference_loss", "score_texts", "train"]

Pair = tuple[str, str, str]


def score_texts(reward: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Scores of each (prompt, response) with the end of sequence (B,), and of the same without it (B,).

    The model is causal, so one pass gives both: the score is read at the last token, and at the one before.
    """
    ids, attention, _ = (x.to(reward.device) for x in encode_responses(tokenizer, texts))
    scores, real = roles.scalars(reward, ids, attention), attention.bool()
    return ops.pool_last(scores, real), ops.pool_last(scores, real & F.pad(real[:, 1:], (0, 1)))


def preference_loss(
    reward: Any, tokenizer: Any, pairs: Sequence[Pair], center_coef: float = 0.01, eos_coef: float = 0.2
) -> Tensor:
    """Bradley-Terry over (prompt, chosen, rejected), with and without the end of sequence, plus `eos_coef` times the
    squared difference between these: a response cut at the length limit must score what it would if finished."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    finished, cut = score_texts(reward, tokenizer, texts)  # (2B,) each, the chosen first
    (a, b), (c, d) = finished.chunk(2), cut.chunk(2)
    likelihood = (ops.bradley_terry_loss(a, b, center_coef) + ops.bradley_terry_loss(c, d, center_coef)) / 2
    return likelihood + eos_coef * (finished - cut).square().mean()


def train(reward: Any, tokenizer: Any, pairs: Sequence[Pair], **how: Any) -> Iterator[float]:
    """Fits the reward model to the pairs (prompt, chosen, rejected), `how` as in `fit`; yields each batch's loss."""
    return fit(reward, lambda batch: preference_loss(reward, tokenizer, batch), pairs, **how)


@torch.no_grad()
def accuracy(reward: Any, tokenizer: Any, pairs: Sequence[Pair], *, eos: bool = True) -> float:
    """Share of the pairs whose chosen response scores higher, with or without the end of sequence."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    chosen, rejected = score_texts(reward, tokenizer, texts)[0 if eos else 1].chunk(2)
    return (chosen > rejected).double().mean().item()


@torch.no_grad()
def normalize(reward: Any, rollout: Rollout) -> tuple[float, float]:
    """Gives the scores of the rollout, samples of the reference, mean 0 and deviation 1; returns what they were ([N+]).

    The head w has no bias to shift. The scores are w·h for the last hidden states h; so w moves along their mean h̄ by
    the shortest step that brings w·h̄, the mean score, to 0.
    """
    hidden = roles.hidden_states(reward, rollout.ids, rollout.attention_mask)
    last = torch.stack([ops.pool_last(h, rollout.attention_mask.bool()) for h in hidden.unbind(-1)], -1)  # (B, D)
    w, center = reward.score.weight, last.mean(0)  # (1, D), (D,)
    before = last @ w[0]  # (B,)
    w -= before.mean() * center / center.square().sum()
    w /= (last @ w[0]).std()
    return before.mean().item(), before.std().item()

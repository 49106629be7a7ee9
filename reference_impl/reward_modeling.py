"""Reward modelling: a scalar head learns which of two responses is preferred, then its scale is fixed."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_impl import ops, roles, scale
from reference_impl.rollout import Rollout
from reference_impl.sft import encode_responses


def score_texts(reward: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Scores of each (prompt, response) with the end of sequence (B,), and of the same without it (B,).
    The model is causal, so one pass gives both: the score is read at the last token, and at the one before."""
    ids, attention, _ = (x.to(reward.device) for x in encode_responses(tokenizer, texts))
    scores, real = roles.scalars(reward, ids, attention), attention.bool()
    return ops.pool_last(scores, real), ops.pool_last(scores, real & F.pad(real[:, 1:], (0, 1)))


def preference_loss(
    reward: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]], center_coef: float = 0.01, eos_coef: float = 0.2
) -> Tensor:
    """Bradley-Terry over (prompt, chosen, rejected), with and without the end of sequence, plus `eos_coef` times the
    squared difference between these: a response cut at the length limit must score what it would if finished."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    finished, cut = score_texts(reward, tokenizer, texts)  # (2B,) each, the chosen first
    (a, b), (c, d) = finished.chunk(2), cut.chunk(2)
    likelihood = (ops.bradley_terry_loss(a, b, center_coef) + ops.bradley_terry_loss(c, d, center_coef)) / 2
    return likelihood + eos_coef * (finished - cut).square().mean()


@torch.no_grad()
def accuracy(reward: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]], *, eos: bool = True) -> float:
    """Share of the pairs whose chosen response scores higher, with or without the end of sequence."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    chosen, rejected = score_texts(reward, tokenizer, texts)[0 if eos else 1].chunk(2)
    return (chosen > rejected).double().mean().item()


@torch.no_grad()
def normalize(reward: Any, rollout: Rollout) -> tuple[float, float]:
    """Gives the scores of the rollout, samples of the reference, mean 0 and deviation 1; returns what they were ([N+]).
    The head w has no bias to shift. The scores are w·h for the last hidden states h; so w moves along their mean h̄ by
    the shortest step that brings w·h̄, the mean score, to 0."""
    real, read = rollout.attention_mask.bool(), scale.forward(roles.hidden_states)
    hidden = read(reward, rollout.ids, rollout.attention_mask)  # (B, L, D)
    h, head = torch.stack([ops.pool_last(x, real) for x in hidden.unbind(-1)], -1), roles.scalar_head(reward)  # (B, D)
    w, center = scale.whole(head.weight)[0], h.mean(0)  # (D,) each
    before = h @ w  # (B,)
    w = w - before.mean() * center / center.square().sum()
    scale.assign(head.weight, w[None] / (h @ w).std())
    return before.mean().item(), before.std().item()

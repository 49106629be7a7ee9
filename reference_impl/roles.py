"""The four models as one record, and how each is read.

| role | body | head | trained by PPO |
|---|---|---|---|
| policy | decoder | vocabulary logits at every token | yes |
| reference | a copy of the policy before PPO | the same | never |
| reward | decoder | one scalar, read at the last real token | never |
| value | decoder, started from the reward model | one scalar at every token | yes |
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl import ops, scale

__all__ = [
    "Models",
    "critic_from_reward",
    "frozen_copy",
    "hidden_states",
    "positions",
    "response_logprobs",
    "scalar_head",
    "scalars",
]


@dataclass(frozen=True)
class Models:
    """Policy and reference are causal language models; reward and value end in a linear head of one output."""

    policy: Any
    reference: Any
    reward: Any
    value: Any
    tokenizer: Any


def freeze(model: Any) -> Any:
    """The model itself, in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def frozen_copy(model: Any) -> Any:
    """An independent copy in eval mode and without gradients: how the reference is made from the policy."""
    return freeze(copy.deepcopy(model))


def critic_from_reward(reward: Any, token_classifier: Any) -> Any:
    """`token_classifier` with the reward model's body and head; so V(s) starts as the score of the prefix s ([N+]).

    Its head may have a bias, which is set to 0. It stays trainable, in eval mode, since dropout is off in PPO.
    """
    token_classifier.base_model.load_state_dict(reward.base_model.state_dict())
    head = scalar_head(token_classifier)
    with torch.no_grad():
        head.weight.copy_(scalar_head(reward).weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return token_classifier.eval().requires_grad_(True)


def scalar_head(model: Any) -> Any:
    """The linear head of one output: `score`, which GPT-2's and NeoX's token classifiers call `classifier`."""
    return model.score if hasattr(model, "score") else model.classifier


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, L) that count real tokens from 0, so that padding on the left shifts nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The body's last hidden states: ids and mask (B, L) → (B, L, D)."""
    body = model.base_model
    out = body(input_ids=ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


@scale.forward
def scalars(model: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar head at every token: ids and mask (B, L) → (B, L)."""
    out: Tensor = scalar_head(model)(hidden_states(model, ids, attention_mask))
    return out.squeeze(-1).clone()


def cache_name(model: Any) -> str:
    """What the body calls its key-value cache: transformers renamed past_key_values to cache in 5.24."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


@scale.forward
def response_logprobs(model: Any, ids: Tensor, attention_mask: Tensor, T: int, temperature: float) -> Tensor:
    """log π of the last T of ids (B, P+T) → (B, T). The token at position p is predicted from position p-1."""
    hidden = hidden_states(model, ids, attention_mask)[:, -T - 1 : -1]
    return ops.token_logprobs(hidden, model.get_output_embeddings(), ids[:, -T:], temperature)

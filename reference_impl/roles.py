"""The four models as one record, and how each is read.

| role | body | head | trained by PPO |
|---|---|---|---|
| policy | decoder | vocabulary logits at every token | yes |
| reference | a copy of the policy before PPO | the same | never |
| reward | decoder | one scalar, read at the last real token | never |
| value | decoder, started from the reward model | one scalar at every token | yes |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl import ops, scale

ROLES = ("policy", "reference", "reward", "value")


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


def check_models(models: Models, prompt: Tensor, T: int) -> None:
    """Raises ValueError for what cannot read prompt ids (B, P) and T tokens more, and says why."""
    drawn, P = models.policy.get_input_embeddings().weight.shape[0], prompt.shape[1]
    for role in ROLES:
        model = getattr(models, role)
        tokens = model.get_input_embeddings().weight.shape[0]
        context = getattr(model.config, "max_position_embeddings", 0)
        if tokens <= int(prompt.max()) or tokens < drawn:
            raise ValueError(f"the {role} model reads {tokens} tokens, the policy {drawn}: not one vocabulary")
        if 0 < context < P + T:
            raise ValueError(f"prompts of {P} tokens and {T} more do not fit the {role} model's context of {context}")


def critic_from_reward(reward: Any, token_classifier: Any) -> Any:
    """`token_classifier` with the reward model's body and head; so V(s) starts as the score of the prefix s ([N+]).
    Its head may have a bias, which is set to 0. It stays trainable, in eval mode, since dropout is off in PPO."""
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


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor, T: int | None = None) -> Tensor:
    """The body's last hidden states at the last T tokens, or all: ids and mask (B, L) → (B, T, D).
    A row's real tokens are one run. They are moved to the left edge, and rows cut to the longest: what follows a token
    is hidden from it anyway, so attention needs no mask of its own, and padding costs what it must and no more. At
    masked positions the states are those of some other one."""
    column, start = torch.arange(ids.shape[1], device=ids.device), attention_mask.argmax(1, keepdim=True)
    L = int(attention_mask.sum(1).max())
    moved = ids.gather(1, (column[:L] + start).clamp(max=ids.shape[1] - 1))  # (B, L)
    hidden: Tensor = model.base_model(input_ids=moved, use_cache=False).last_hidden_state  # (B, L, D)
    back = (column[-(T or 0) :] - start).clamp(0, L - 1) + L * torch.arange(len(ids), device=ids.device)[:, None]
    return hidden.flatten(0, 1).index_select(0, back.flatten()).view(*back.shape, -1)


@scale.forward
def scalars(model: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar head at every token: ids and mask (B, L) → (B, L), in the head's own precision also under autocast."""
    hidden, head = hidden_states(model, ids, attention_mask), scalar_head(model)
    with torch.autocast(ids.device.type, enabled=False):
        out: Tensor = head(hidden.to(head.weight.dtype))
    return out.squeeze(-1).clone()


@scale.forward
def response_logprobs(model: Any, ids: Tensor, attention_mask: Tensor, T: int, temperature: float) -> Tensor:
    """log π of the last T of ids (B, P+T) → (B, T). The token at position p is predicted from position p-1."""
    hidden = hidden_states(model, ids[:, :-1], attention_mask[:, :-1], T)
    return ops.token_logprobs(hidden, model.get_output_embeddings(), ids[:, -T:], temperature)

"""Prompt → sample → mask → score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles

__all__ = ["Rollout", "encode_prompts", "response_mask", "sample", "score"]


@dataclass(frozen=True)
class Rollout:
    """B prompts padded on the left to P tokens, then responses padded on the right to T tokens."""

    ids: Tensor  # (B, P+T)
    attention_mask: Tensor  # (B, P+T), 1 at real tokens
    mask: Tensor  # (B, T) bool, true at response tokens up to and with the end of sequence
    ended: Tensor  # (B,) bool, whether there is an end of sequence

    @property
    def response(self) -> Tensor:
        """The response tokens (B, T)."""
        return self.ids[:, -self.mask.shape[1] :]


def encode_prompts(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, P), padded on the left, so that every response starts at the same column."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def response_mask(response: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Mask (B, T) true up to and with the first `eos`, and whether there is one (B,).

    It goes by the first end of sequence and not by the pad token, which may be the same id or be sampled in between.
    """
    is_eos = response == eos
    return is_eos.cumsum(1) - is_eos.long() == 0, is_eos.any(1)


@torch.no_grad()
def sample(
    policy: Any, prompt: Tensor, prompt_mask: Tensor, *, T: int, temperature: float, eos: int, pad: int
) -> Rollout:
    """Up to T tokens a_t ~ softmax(logits_t / temperature) for each prompt (B, P), from the whole vocabulary.

    Draws from torch's global generator; stops early once every row has ended.
    """
    head, cache, step_ids, attention = policy.get_output_embeddings(), None, prompt, prompt_mask
    position = roles.positions(prompt_mask)
    name = roles.cache_name(policy)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    tokens = list[Tensor]()
    while len(tokens) < T and not bool(ended.all()):
        out = policy.base_model(
            input_ids=step_ids, attention_mask=attention, position_ids=position, use_cache=True, **{name: cache}
        )
        cache = out[name]
        probabilities = (head(out.last_hidden_state[:, -1]).float() / temperature).softmax(-1)  # (B, V)
        token = torch.multinomial(probabilities, 1)[:, 0].masked_fill(ended, pad)  # (B,)
        tokens.append(token)
        attention = torch.cat([attention, (~ended).to(attention.dtype)[:, None]], 1)
        ended = ended | (token == eos)
        step_ids, position = token[:, None], position[:, -1:] + 1
    response = torch.stack(tokens, 1)  # (B, T)
    mask, ended = response_mask(response, eos)
    return Rollout(torch.cat([prompt, response], 1), attention, mask, ended)


@torch.no_grad()
def score(reward: Any, rollout: Rollout, *, missing_eos_penalty: float = 0.0) -> Tensor:
    """The reward model's scalar at the last real token, less the penalty where the response never ended → (B,).

    The penalty teaches the policy to finish within the response length ([N+], "EOS trick").
    """
    per_token = roles.scalars(reward, rollout.ids, rollout.attention_mask)
    return ops.pool_last(per_token, rollout.attention_mask.bool()) - missing_eos_penalty * (~rollout.ended)

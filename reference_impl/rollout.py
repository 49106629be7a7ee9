"""Prompt → sample → mask → score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from reference_impl import ops, roles, scale

__all__ = ["Rollout", "draw", "encode_prompts", "response_mask", "sample", "score"]


@dataclass(frozen=True)
class Rollout:
    """B prompts padded on the left to P tokens, then responses padded on the right to T tokens."""

    ids: Tensor  # (B, P+T)
    attention_mask: Tensor  # (B, P+T), 1 at real tokens
    mask: Tensor  # (B, T) bool, true at response tokens up to and with the end of sequence
    ended: Tensor  # (B,) bool, whether there is an end of sequence

    def rows(self, rows: Tensor) -> Rollout:
        """Some rows of it, by their indices."""
        return Rollout(self.ids[rows], self.attention_mask[rows], self.mask[rows], self.ended[rows])

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


class _Room(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values (B, heads, length, D), written in place; its base class copies all at every token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.used = length, 0
        self.keys: Tensor
        self.values: Tensor

    def get_seq_length(self) -> int:
        return self.used

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.used == 0:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values))
            self.is_initialized = True
        self.used += keys.shape[2]
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[:, :, self.used - new.shape[2] : self.used] = new
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Tokens a = min{a : Σ_{v≤a} π(v) > u}, with π = softmax(logits / temperature); (B, V) and u in [0, 1) (B,) → (B,).

    One number a token, which does not depend on who draws it: so a rollout is the same on any number of processes.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    below = z.softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


@scale.forward
@torch.no_grad()
def sample(
    policy: Any, prompt: Tensor, prompt_mask: Tensor, *, T: int, temperature: float, eos: int, pad: int,
    graphed: bool = False,
) -> Rollout:  # fmt: skip
    """Up to T tokens a_t ~ softmax(logits_t / temperature) for each prompt (B, P), from the whole vocabulary.

    The random numbers are torch's global generator's, as many whenever responses end. Processes share the rows.
    `graphed` gives every step the same shapes; one process with a CUDA device then runs them as a CUDA graph.
    """
    mine, (B, P), graphed = scale.my_rows(len(prompt)), prompt.shape, graphed and scale.world() == 1
    uniform = torch.rand(T, B, dtype=torch.float64)[:, mine].to(prompt.device)
    ids, attention = prompt[mine], F.pad(prompt_mask[mine], (0, T), value=1)  # (b, P), (b, P+T)
    position, head, name = roles.positions(prompt_mask[mine]), policy.get_output_embeddings(), roles.cache_name(policy)
    cache: Any = DynamicCache(config=policy.config)
    cache.layers = [_Room(P + T) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache = StaticCache(config=policy.config, max_cache_len=P + T) if graphed else cache
    response, ended = ids.new_full((len(ids), T), pad), ids.new_zeros(len(ids), dtype=torch.bool)
    last, at, t = ids[:, -1:].clone(), position[:, -1:].clone(), ids.new_zeros(1)  # (b, 1), (b, 1), (1,)

    def step(ids: Tensor, position: Tensor) -> None:  # changes its tensors in place, as a graph must
        seen = attention if graphed else attention[:, : cache.get_seq_length() + ids.shape[1]]
        out = policy.base_model(
            input_ids=ids, attention_mask=seen, position_ids=position, use_cache=True, **{name: cache}
        )
        token = draw(head(out.last_hidden_state[:, -1]), temperature, uniform.index_select(0, t)[0])
        last.copy_(token.masked_fill_(ended, pad)[:, None])
        response.index_copy_(1, t, last)
        ended.logical_or_(token == eos)
        at.add_(1)
        t.add_(1)

    with scale.gathered(policy):
        step(ids, position)
        run: Callable[[], None] = partial(step, last, at)
        for i in range(1, T):
            if bool(ended.all()):
                break
            if i == 2 and graphed and ids.is_cuda:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                run = graph.replay
            run()
    response = scale.gather_rows(response)
    mask, ended = response_mask(response, eos)
    longest = int(mask.sum(1).max())
    response, mask = response[:, :longest], mask[:, :longest]  # (B, T) from here on
    return Rollout(torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask.to(prompt_mask)], 1), mask, ended)


@torch.no_grad()
def score(reward: Any, rollout: Rollout, *, missing_eos_penalty: float = 0.0) -> Tensor:
    """The reward model's scalar at the last real token, less the penalty where the response never ended → (B,).

    The penalty teaches the policy to finish within the response length ([N+], "EOS trick").
    """
    per_token = roles.scalars(reward, rollout.ids, rollout.attention_mask)
    return ops.pool_last(per_token, rollout.attention_mask.bool()) - missing_eos_penalty * (~rollout.ended)

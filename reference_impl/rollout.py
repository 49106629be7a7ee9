"""Prompt → sample → mask → score."""

import inspect
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from reference_impl import ops, roles, scale


@dataclass(frozen=True)
class Rollout:
    """B prompts padded on the left to P tokens, then responses padded on the right to T tokens."""

    ids: Tensor  # (B, P+T)
    attention_mask: Tensor  # (B, P+T), 1 at real tokens
    mask: Tensor  # (B, T) bool, true at response tokens up to and with the end of sequence
    ended: Tensor  # (B,) bool, whether there is an end of sequence

    def rows(self, rows: Tensor) -> Self:
        """Some rows of it, by their indices."""
        return type(self)(self.ids[rows], self.attention_mask[rows], self.mask[rows], self.ended[rows])

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
    It goes by the first end of sequence and not by the pad token, which may be the same id or be sampled in between."""
    is_eos = response == eos
    return is_eos.cumsum(1) - is_eos.long() == 0, is_eos.any(1)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Tokens a = min{a : Σ_{v≤a} π(v) > u}, with π = softmax(logits / temperature); (B, V) and u in [0, 1) (B,) → (B,).
    One number a token, which does not depend on who draws it: so a rollout is the same on any number of processes."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    below = z.softmax(-1).double().cumsum(-1)
    token = torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


@scale.forward
@torch.no_grad()
def sample(
    policy: Any, prompt: Tensor, prompt_mask: Tensor, *, T: int, temperature: float, eos: int, pad: int,
    static: bool = False,
) -> Rollout:  # fmt: skip
    """Up to T tokens a_t ~ softmax(logits_t / temperature) for each prompt (B, P), from the whole vocabulary.
    The random numbers are torch's global generator's, as many whenever responses end. Processes share the rows.
    `static` gives all steps but the first the same shapes; one process with a CUDA device runs them as a CUDA graph."""
    mine, (B, P), static = scale.my_rows(len(prompt)), prompt.shape, static and scale.world() == 1
    uniform = torch.rand(T, B, dtype=torch.float64)[:, mine].to(prompt.device)
    ids, attention = prompt[mine], F.pad(prompt_mask[mine], (0, T), value=1)  # (b, P), (b, P+T)
    position, head, graph = roles.positions(prompt_mask[mine]), policy.get_output_embeddings(), None
    response, ended = ids.new_full((len(ids), T), pad), ids.new_zeros(len(ids), dtype=torch.bool)
    renamed = "cache" in inspect.signature(policy.base_model.forward).parameters  # past_key_values until 5.24
    kept = StaticCache(policy.config, max_cache_len=P + T) if static else DynamicCache(config=policy.config)
    cache = {"cache" if renamed else "past_key_values": kept, "use_cache": True}
    last, t = ids[:, -1:].clone(), ids.new_zeros(1)  # the token drawn last (b, 1), and how many before it (1,)

    def step(ids: Tensor, seen: int) -> None:  # (b, n) → the next token, all in place, as a CUDA graph must
        at = (position + t)[:, -ids.shape[1] :]
        out = policy.base_model(input_ids=ids, attention_mask=attention[:, :seen], position_ids=at, **cache)
        token = draw(head(out.last_hidden_state[:, -1]), temperature, uniform.index_select(0, t)[0])
        last.copy_(token.masked_fill(ended, pad)[:, None])
        response.index_copy_(1, t, last)
        ended.logical_or_(token == eos)
        t.add_(1)

    with scale.gathered(policy):
        step(ids, P + T if static else P)
        for i in range(1, T):
            if bool(ended.all()):
                break
            if static and i == 2 and ids.is_cuda:  # the step before has made whatever is made once
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(last, P + T)
            graph.replay() if graph else step(last, P + T if static else P + i)
    response = scale.gather_rows(response)
    mask, ended = response_mask(response, eos)
    longest = int(mask.sum(1).max())
    response, mask = response[:, :longest], mask[:, :longest]  # (B, T) from here on
    return Rollout(torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask.to(prompt_mask)], 1), mask, ended)


@torch.no_grad()
def score(reward: Any, rollout: Rollout, *, missing_eos_penalty: float = 0.0) -> Tensor:
    """The reward model's scalar at the last real token, less the penalty where the response never ended → (B,).
    The penalty teaches the policy to finish within the response length ([N+], "EOS trick")."""
    per_token = roles.scalars(reward, rollout.ids, rollout.attention_mask)
    return ops.pool_last(per_token, rollout.attention_mask.bool()) - missing_eos_penalty * (~rollout.ended)

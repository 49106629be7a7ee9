"""Supervised fine-tuning: the policy learns the demonstrations' responses, the end of sequence included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles

__all__ = ["encode_responses", "finetune", "sft_loss"]


def encode_responses(
    tokenizer: Any, texts: Sequence[tuple[str, str]], *, eos: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask (bool), each (B, L), of (prompt, response) padded on the right.

    `eos[i]` says whether the end of sequence follows the i-th response; it then belongs to the response.
    """
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    responses = tokenizer([response for _, response in texts], add_special_tokens=False)["input_ids"]
    rows = [p + r + [tokenizer.eos_token_id] * e for p, r, e in zip(prompts, responses, eos, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    column = torch.arange(length)
    attention = column < torch.tensor([[len(row)] for row in rows])
    return ids, attention.long(), attention & (column >= torch.tensor([[len(p)] for p in prompts]))


def sft_loss(policy: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Tensor:
    """Mean of -log π over the response tokens of (prompt, response), in nats a token."""
    ids, attention, mask = encode_responses(tokenizer, texts, eos=[True] * len(texts))
    logp = roles.response_logprobs(policy, ids, attention, ids.shape[1] - 1, temperature=1.0)
    return -ops.masked_mean(logp, mask[:, 1:])


def finetune(
    policy: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], *, batch_size: int, learning_rate: float
) -> Iterator[float]:
    """One pass over the demonstrations with a linearly decaying rate; yields each batch's loss."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(batches))
    for batch in batches:
        loss: Any = sft_loss(policy, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        decay.step()
        yield loss.item()

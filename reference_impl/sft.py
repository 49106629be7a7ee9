"""Supervised fine-tuning: the policy learns the demonstrations' responses, the end of sequence included."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles


def encode_responses(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask (bool), each (B, L), of (prompt, response) padded on the right.
    The end of sequence follows each response and belongs to it."""
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    responses = tokenizer([response for _, response in texts], add_special_tokens=False)["input_ids"]
    rows = [p + r + [tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    column = torch.arange(length)
    attention = column < torch.tensor([[len(row)] for row in rows])
    return ids, attention.long(), attention & (column >= torch.tensor([[len(p)] for p in prompts]))


def sft_loss(policy: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Tensor:
    """Mean of -log π over the response tokens of (prompt, response), in nats a token."""
    ids, attention, mask = (x.to(policy.device) for x in encode_responses(tokenizer, texts))
    logp = roles.response_logprobs(policy, ids, attention, ids.shape[1] - 1, temperature=1.0)
    return -ops.masked_mean(logp, mask[:, 1:])


def fit(
    loss_of: Callable[..., Tensor], model: Any, tokenizer: Any, examples: Sequence[Any], *, size: int, rate: float
) -> None:
    """One pass with Adam over the examples, down loss_of(model, tokenizer, batch) for batches of `size`.
    The learning rate rises to `rate` over a tenth of the pass, then falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95))
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    for i, batch in enumerate(batches):
        done = i / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((done + 1 / len(batches)) / 0.1, (1 - done) / 0.9, 1.0)
        loss: Any = loss_of(model, tokenizer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

"""Models that are healthy or sick in a known way, written by hand in another style than the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = [
    "BagOfTokens",
    "ConvolutionalScorer",
    "GRUCritic",
    "HandWrittenDecoder",
    "HandWrittenRecurrence",
    "hand_written_critic",
    "vocabulary",
]


def vocabulary(setup: Any) -> int:
    """Rows of the policy's embedding."""
    return int(setup.policy.get_input_embeddings().weight.shape[0])


class HandWrittenDecoder(nn.Module):
    """An attention decoder of plain linear layers: (ids, mask) -> (B, T, width), or (B, width) where it pools.

    Args:
        vocab: embedding rows.
        width: numbers per token at the head; 0 for none (hidden states).
        causal: whether positions see only their past.
        pool: "last" (last real token), "first", "final" (index -1, pads included), "mean", or None.
        squash: applied to the head's output.
        dropout: of the residual stream.
        uses_mask: whether pads are kept out of the attention.
        rotary: relative positions, so that left padding changes nothing; absolute learned ones otherwise.
    """

    def __init__(
        self,
        vocab: int,
        width: int = 1,
        *,
        hidden: int = 24,
        layers: int = 2,
        causal: bool = True,
        pool: str | None = None,
        squash: Any = None,
        dropout: float = 0.0,
        uses_mask: bool = True,
        positions: str = "mask",
        seed: int = 0,
    ) -> None:
        super().__init__()
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocab, hidden)
        self.places = nn.Embedding(512, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(hidden, hidden),
                    "k": nn.Linear(hidden, hidden),
                    "v": nn.Linear(hidden, hidden),
                    "o": nn.Linear(hidden, hidden),
                    "up": nn.Linear(hidden, 3 * hidden),
                    "down": nn.Linear(3 * hidden, hidden),
                    "n1": nn.LayerNorm(hidden),
                    "n2": nn.LayerNorm(hidden),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        self.causal = causal
        self.pool = pool
        self.squash = squash
        self.uses_mask = uses_mask
        self.positions = positions
        torch.random.set_rng_state(state)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and mask -> (B, T, width), or (B, width)."""
        length = ids.shape[1]
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        places = counted if self.positions == "mask" else torch.arange(length, device=ids.device)[None]
        h = self.drop(self.table(ids) + self.places(places))
        allowed = mask[:, None, :].bool() if self.uses_mask else torch.ones_like(mask)[:, None, :].bool()
        if self.causal:
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = block["n1"](h)
            scores = block["q"](x) @ block["k"](x).transpose(1, 2) / math.sqrt(h.shape[-1])
            weights = scores.masked_fill(~allowed, torch.finfo(h.dtype).min).softmax(-1)
            h = h + self.drop(block["o"](weights @ block["v"](x)))
            h = h + self.drop(block["down"](torch.nn.functional.gelu(block["up"](block["n2"](h)))))
        h = self._pooled(self.norm(h), mask)
        out: torch.Tensor = self.out(h)
        return out if self.squash is None else self.squash(out)

    def _pooled(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pool == "last":
            last = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
            return h[torch.arange(h.shape[0]), last]
        if self.pool == "first":
            return h[:, 0]
        if self.pool == "final":
            return h[:, -1]
        if self.pool == "mean":
            return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return h


class ConvolutionalScorer(nn.Module):
    """A CNN reward: embeddings, two convolutions over time, the maximum over time, one number: (ids, mask) -> (B,)."""

    def __init__(self, vocab: int, hidden: int = 24, kernel: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.first = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2)
        self.out = nn.Linear(hidden, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B,)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = (self.table(input_ids) * mask[..., None]).transpose(1, 2)
        x = torch.relu(self.first(x)) * mask[:, None, :]
        x = torch.relu(self.second(x)) * mask[:, None, :]
        pooled = x.masked_fill(mask[:, None, :] == 0, 0).amax(-1)
        out: torch.Tensor = self.out(pooled)[:, 0]
        return out


class GRUCritic(nn.Module):
    """An RNN critic: embeddings, a GRU, one number per state: (ids, mask) -> (B, T)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, T)."""
        states, _ = self.rnn(self.table(input_ids))
        out: torch.Tensor = self.out(states)[..., 0]
        return out


class HandWrittenRecurrence(nn.Module):
    """A recurrent cell written with linear layers and a loop: (ids,) -> (B, T)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.inward = nn.Linear(hidden, hidden)
        self.onward = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T)."""
        x = self.inward(self.table(tokens))
        state = torch.zeros_like(x[:, 0])
        values = []
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t] + self.onward(state))
            values.append(self.out(state)[:, 0])
        return torch.stack(values, dim=1)


class BagOfTokens(nn.Module):
    """An MLP on the mean of the embeddings: (ids, mask) -> (B,)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B,)."""
        mean = (self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out: torch.Tensor = self.out(mean)[:, 0]
        return out


def hand_written_critic(setup: Any, **options: Any) -> HandWrittenDecoder:
    """A ``HandWrittenDecoder`` over the setup's vocabulary; ``pool=True`` means the last real token."""
    if options.get("pool") is True:
        options["pool"] = "last"
    return HandWrittenDecoder(vocabulary(setup), **options)

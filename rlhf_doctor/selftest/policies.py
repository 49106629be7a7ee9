"""Policies that are healthy or sick in a known way: plain modules here, those of Hugging Face by their names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rlhf_doctor.selftest.specimens import HandWrittenDecoder, vocabulary
from rlhf_doctor.selftest.wrapped import Muted, Wrapped, adapted, bert, forget_positions, fresh, mamba, t5

__all__ = [
    "AlwaysDropping",
    "BatchNormalised",
    "CachedDecoder",
    "ConvolutionalPolicy",
    "HalfHead",
    "Muted",
    "RecurrentPolicy",
    "TwoHeads",
    "Wrapped",
    "adapted",
    "alone",
    "bert",
    "forget_positions",
    "fresh",
    "frozen",
    "hand_written",
    "mamba",
    "paired",
    "t5",
]


def alone(setup: Any, **changes: Any) -> Any:
    """The setup with other models; the loop and the optimizers, which hold the old ones, are left out.

    A policy that is changed is declared to be untrained, unless ``declared`` says otherwise.
    """
    if "policy" in changes:
        changes["declared"] = {"policy_init": "base", **changes.get("declared", {})}
    return setup.but(step=None, optimizers=(), state=(), **changes)


def paired(setup: Any, policy: nn.Module) -> Any:
    """The setup with another policy and a frozen copy of it as the reference."""
    return alone(setup, policy=policy, reference=frozen(policy))


def frozen(model: nn.Module) -> Any:
    """An independent copy in eval mode that requires no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def hand_written(setup: Any, **options: Any) -> Any:
    """A hand-written language model over the setup's vocabulary, in eval mode."""
    size = vocabulary(setup)
    return HandWrittenDecoder(size, size, **options).eval()


class ConvolutionalPolicy(nn.Module):
    """A causal CNN with a vocabulary head: (ids) -> (B, T, V)."""

    def __init__(self, vocab: int, hidden: int = 24, kernel: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.conv = nn.Conv1d(hidden, hidden, kernel)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        x = nn.functional.pad(self.table(ids).transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        out: torch.Tensor = self.out(torch.relu(self.conv(x)).transpose(1, 2))
        return out


class RecurrentPolicy(nn.Module):
    """A GRU with a vocabulary head: (ids) -> (logits (B, T, V), state)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) -> (B, T, V), (1, B, H)."""
        states, last = self.rnn(self.table(tokens))
        return self.out(states), last


class AlwaysDropping(nn.Module):
    """Dropout that does not listen to eval(), after another module."""

    def __init__(self, inner: nn.Module, p: float = 0.1) -> None:
        super().__init__()
        self.inner = inner
        self.p = p

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``inner`` gives, a share of it dropped."""
        return nn.functional.dropout(self.inner(*args, **kwargs), self.p, training=True)


class HalfHead(nn.Module):
    """A hand-written float32 trunk whose vocabulary product runs in bfloat16."""

    def __init__(self, body: HandWrittenDecoder, vocab: int, scale: float = 1.0) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.out.out_features, vocab, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V) bfloat16."""
        logits: torch.Tensor = self.body(ids, mask).bfloat16() @ self.head.weight.bfloat16().T
        return logits


class CachedDecoder(nn.Module):
    """A hand-written decoder of one layer with its own cache: (ids, mask, cache) -> (logits, cache).

    Args:
        vocab: rows of the embedding.
        forgets: how the cache is wrong: "" for not at all, "position" counts every call from 0, "oldest" drops the
            first cached token at each step.
    """

    def __init__(self, vocab: int, hidden: int = 24, forgets: str = "") -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocab, hidden), nn.Embedding(256, hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, vocab)
        self.forgets = forgets

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """ids (B, t), mask (B, t_past + t) -> (B, t, V), keys and values (B, t_past + t, H)."""
        new = ids.shape[1]
        counted = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        places = counted
        if self.forgets == "position" and cache is not None:
            places = torch.arange(new)[None]
        x = self.table(ids) + self.places(places)
        q, k, v = self.qkv(x).chunk(3, -1)
        if cache is not None:
            drop = 1 if self.forgets == "oldest" and cache[0].shape[1] > 1 else 0
            k, v = torch.cat([cache[0][:, drop:], k], 1), torch.cat([cache[1][:, drop:], v], 1)
        total = k.shape[1]
        allowed = torch.ones(new, total, dtype=torch.bool).tril(total - new) & mask[:, None, -total:].bool()
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9).softmax(-1)
        return self.out(x + weights @ v), (k, v)


class BatchNormalised(nn.Module):
    """A language model whose logits are centred over the rows of the batch: (ids, mask) -> (B, T, V)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        logits: torch.Tensor = self.inner(ids, mask)
        return logits - 0.5 * logits.mean(0)


class TwoHeads(nn.Module):
    """A hand-written policy and critic on one trunk: (ids, mask) -> (logits (B, T, V), values (B, T))."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.trunk = HandWrittenDecoder(vocab, hidden, hidden=hidden)
        self.lm_head = nn.Linear(hidden, vocab)
        self.v_head = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) -> (B, T, V), (B, T)."""
        states = self.trunk(ids, mask)
        return self.lm_head(states), self.v_head(states)[..., 0]

"""Rewards and critics that are sick in a known way: other architectures, and wrappers around healthy models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = [
    "CausalConvolutionCritic",
    "LSTMScorer",
    "Reader",
    "Rescored",
    "StateSpaceScorer",
    "TiedCritic",
    "last_real",
    "reward_of_length",
    "with_new_head",
]


class LSTMScorer(nn.Module):
    """An LSTM whose last state is scored: (input_ids, attention_mask) -> {"logits": (B, 1)}, as classifiers return."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.encoder = nn.LSTM(hidden, hidden, batch_first=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, T) -> {"logits": (B, 1)}."""
        states, _ = self.encoder(self.embed_tokens(input_ids))
        return {"logits": self.score(states[torch.arange(len(input_ids)), last_real(attention_mask)])}


class StateSpaceScorer(nn.Module):
    """A Mamba body with a scalar head, read at the last real token or at every token."""

    def __init__(self, vocab: int, hidden: int = 24, *, per_token: bool = False) -> None:
        super().__init__()
        import transformers

        self.backbone = transformers.MambaModel(
            transformers.MambaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                num_hidden_layers=2,
                state_size=8,
                time_step_rank=4,
                pad_token_id=0,
            )
        )
        self.head = nn.Linear(hidden, 1)
        self.per_token = per_token

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B,), or (B, T) where it is read at every token."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        scores: torch.Tensor = self.head(hidden)[..., 0]
        if self.per_token:
            return scores
        return scores[torch.arange(len(input_ids)), last_real(attention_mask)]


class CausalConvolutionCritic(nn.Module):
    """Dilated causal convolutions: (ids) -> {"values": (B, T)}."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, dilation=d) for d in (1, 2))
        self.out = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, T) -> {"values": (B, T)}."""
        x = self.table(ids).transpose(1, 2)
        for layer, pad in zip(self.layers, (2, 4), strict=True):
            x = torch.relu(layer(nn.functional.pad(x, (pad, 0))))
        return {"values": self.out(x.transpose(1, 2))[..., 0]}


class Reader(nn.Module):
    """A Hugging Face reward or critic whose per-token scores are read by a rule of its own.

    Args:
        model: a classifier with ``base_model`` and ``score``.
        rule: (scores (B, T), ids, mask) -> what is returned.
    """

    def __init__(self, model: Any, rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = model
        self.rule = rule

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """(B, T) ids and mask -> the rule's result."""
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        body = self.inner.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False
        )
        return self.rule(self.inner.score(body.last_hidden_state)[..., 0], input_ids, attention_mask)


class Rescored(nn.Module):
    """A reward model whose finished scores are changed: ``rule`` of (scores (B,), ids, mask)."""

    def __init__(self, model: Any, rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = model
        self.rule = rule

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and mask -> (B,)."""
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        scores = out.logits if hasattr(out, "logits") else out
        return self.rule(scores.reshape(len(input_ids)), input_ids, attention_mask)


def last_real(mask: torch.Tensor) -> torch.Tensor:
    """Index of the last real token of each row of a mask (B, T), whichever side is padded."""
    return mask.shape[1] - 1 - mask.flip(-1).argmax(-1)


def reward_of_length(model: Any, per_token: float) -> Rescored:
    """A reward whose score grows by this much with every token."""
    return Rescored(model, lambda scores, ids, mask: scores + per_token * mask.sum(-1))


def with_new_head(model: Any, seed: int = 1) -> Any:
    """A copy of a classifier whose head ``score`` has new random weights."""
    import copy

    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        changed.score.weight.copy_(torch.randn(changed.score.weight.shape, generator=generator) * 0.02)
    return changed


class TiedCritic(nn.Module):
    """A language model with tied embeddings whose first logit is returned as the value: (ids, mask) -> (B, T)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        from rlhf_doctor.selftest.specimens import HandWrittenDecoder

        self.body = HandWrittenDecoder(vocab, width=vocab, hidden=hidden)
        self.body.out = nn.Linear(hidden, vocab, bias=False)
        self.body.out.weight = self.body.table.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T)."""
        values: torch.Tensor = self.body(ids, mask)[..., 0]
        return values

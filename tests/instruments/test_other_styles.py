"""Models as other people write them: the architecture and the output are found all the same."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from rlhf_doctor import RLHFSetup, examine

V, H = zoo.VOCAB, 24


class TorchTransformer(nn.Module):
    """PyTorch's own encoder layers behind a causal mask; (ids, key_padding_mask) -> (B, T, width)."""

    def __init__(self, width: int, causal: bool = True, time_first: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, H)
        self.pos = nn.Embedding(256, H)
        layer = nn.TransformerEncoderLayer(H, 4, 48, dropout=0.0, batch_first=not time_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(H, width)
        self.causal, self.time_first = causal, time_first

    def forward(self, ids: torch.Tensor, key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        length = ids.shape[1]
        x = self.emb(ids) + self.pos.weight[:length]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        if self.time_first:
            x = x.transpose(0, 1)
        x = self.body(x, mask=causal, src_key_padding_mask=key_padding_mask)
        return self.head(x.transpose(0, 1) if self.time_first else x)  # type: ignore[no-any-return]


class MinGPT(nn.Module):
    """(idx, targets) -> (logits, loss), attention by einsum and its own exp; fused q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, H), nn.Embedding(256, H)
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, V, bias=False)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        batch, length = idx.shape
        x = self.wte(idx) + self.wpe(torch.arange(length))
        q, k, v = (a.view(batch, length, 4, H // 4) for a in self.qkv(x).chunk(3, -1))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(H // 4)).exp()
        weights = weights * torch.ones(length, length).tril()
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v)
        return self.out(x + mixed.reshape(batch, length, H)), None


@dataclasses.dataclass
class CriticOutput:
    hidden: torch.Tensor
    values: torch.Tensor


class DataclassCritic(nn.Module):
    """(token_ids, attn_mask) -> a dataclass with hidden states before the values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TorchTransformer(H)
        self.v = nn.Linear(H, 1)

    def forward(self, token_ids: torch.Tensor, attn_mask: torch.Tensor) -> CriticOutput:
        hidden = self.body(token_ids, attn_mask == 0)
        return CriticOutput(hidden, self.v(hidden).squeeze(-1))


class DictReward(nn.Module):
    """(input_ids, attention_mask) -> {"hidden", "score"}; read at the last real token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TorchTransformer(H)
        self.head = nn.Parameter(torch.randn(H))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body(input_ids, attention_mask == 0)
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return {"hidden": hidden, "score": hidden[torch.arange(len(last)), last] @ self.head}


class OneHotGPT(nn.Module):
    """No embedding look-up at all: one-hot vectors times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, H))
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.one_hot(x, V).float() @ self.table
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.out(h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))  # type: ignore[no-any-return]


class TextCNN(nn.Module):
    """Kim's CNN: two-dimensional kernels of 3, 4 and 5 tokens, the maximum over time: (x) -> (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, H)
        self.convs = nn.ModuleList(nn.Conv2d(1, 8, (k, H)) for k in (3, 4, 5))
        self.fc = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.emb(x)[:, None]
        return self.fc(torch.cat([c(e).squeeze(3).relu().amax(2) for c in self.convs], 1))  # type: ignore[no-any-return]


class PackedLSTM(nn.Module):
    """(ids, lengths) -> (B,), through a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.fc = nn.Embedding(V, H), nn.LSTM(H, H, batch_first=True), nn.Linear(H, 1)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.rnn(packed)
        return self.fc(last[-1]).squeeze(-1)  # type: ignore[no-any-return]


class BidirectionalGRU(nn.Module):
    """(ids) -> (B, T), with attention pooling of the past mixed in."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn = nn.Embedding(V, H), nn.GRU(H, H, batch_first=True, bidirectional=True)
        self.fc, self.key = nn.Linear(2 * H, 1), nn.Linear(2 * H, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.emb(ids))
        pooled = (self.key(states).softmax(1) * states).sum(1, keepdim=True)
        return self.fc(states + pooled).squeeze(-1)  # type: ignore[no-any-return]


class LinearAttention(nn.Module):
    """A causal linear attention: running sums instead of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.out = nn.Embedding(V, H), nn.Linear(H, 3 * H), nn.Linear(H, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.emb(ids)).chunk(3, -1)
        state = (k.exp()[..., None] * v[..., None, :]).cumsum(1)
        return self.out((q.exp()[..., None, :] @ state)[..., 0, :])  # type: ignore[no-any-return]


def compiled(model: Any) -> Any:
    with warnings.catch_warnings():  # importing the compiler warns of its own deprecations
        warnings.simplefilter("ignore")
        return torch.compile(model)


STYLES: dict[str, tuple[Any, str, str, str]] = {
    "PyTorch layers, causal": (lambda: TorchTransformer(V), "policy", "transformer decoder", "vocabulary"),
    "PyTorch layers, time first": (
        lambda: TorchTransformer(1, time_first=True),
        "value",
        "transformer decoder",
        "scalar per token",
    ),
    "PyTorch layers, no mask": (
        lambda: TorchTransformer(1, causal=False),
        "value",
        "transformer encoder",
        "scalar per token",
    ),
    "minGPT": (MinGPT, "policy", "transformer decoder", "vocabulary"),
    "dataclass critic": (DataclassCritic, "value", "transformer decoder", "scalar per token"),
    "dict reward": (DictReward, "reward", "transformer decoder", "scalar per sequence"),
    "one-hot embedding": (OneHotGPT, "policy", "transformer decoder", "vocabulary"),
    "TextCNN": (TextCNN, "reward", "convolutional", "scalar per sequence"),
    "packed LSTM": (PackedLSTM, "reward", "recurrent", "scalar per sequence"),
    "bidirectional GRU": (BidirectionalGRU, "value", "recurrent", "scalar per token"),
    "linear attention": (LinearAttention, "policy", "state space", "vocabulary"),
    "data-parallel Llama": (
        lambda: nn.DataParallel(zoo.decoder("llama")),
        "policy",
        "transformer decoder",
        "vocabulary",
    ),
    "compiled Llama": (
        lambda: compiled(zoo.decoder("llama")),
        "policy",
        "transformer decoder",
        "vocabulary",
    ),
}


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_style_is_understood(name: str, frozen: bool) -> None:
    build, role, kind, emits = STYLES[name]
    model = build().eval()
    if frozen:
        model.requires_grad_(False)
    examination = examine(RLHFSetup(**{role: model}, tokenizer=zoo.tokenizer("right")), select=["VAL002"])
    assert not examination.errors
    assert examination.shown[f"{role}_output"].kind == emits
    assert examination.shown[f"{role}_architecture"].kind == kind, examination.shown[f"{role}_census"]


def test_kernel_widths_over_time_are_reported() -> None:
    examination = examine(RLHFSetup(reward=TextCNN(), tokenizer=zoo.tokenizer()), select=["VAL002"])
    assert examination.shown["reward_census"].kernel_widths == (3, 4, 5)

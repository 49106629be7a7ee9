"""Every architecture is told apart by what it does; classes carry no telling names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import nn

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.selftest import specimens
from rlhf_doctor.setups import RLHFSetup


class Unfolded(nn.Module):
    """A causal convolution as windows that are multiplied out."""

    def __init__(self, size: int, width: int = 4) -> None:
        super().__init__()
        self.table, self.width = nn.Embedding(size, 16), width
        self.kernel = nn.Parameter(torch.randn(width, 16, 16) / 8)
        self.out = nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        windows = nn.functional.pad(self.table(ids), (0, 0, self.width - 1, 0)).unfold(1, self.width, 1)
        return self.out(torch.einsum("btdw,wde->bte", windows, self.kernel).tanh())


class LongFilter(nn.Module):
    """One filter as long as the text, multiplied in the frequency domain."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table, self.decay, self.out = nn.Embedding(size, 16), nn.Parameter(torch.rand(16)), nn.Linear(16, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, n = self.table(ids).transpose(1, 2), ids.shape[1]
        kernel = torch.exp(-self.decay[:, None] * torch.arange(n))
        mixed = torch.fft.irfft(torch.fft.rfft(x, 2 * n) * torch.fft.rfft(kernel, 2 * n), 2 * n)[..., :n]
        return self.out(mixed.transpose(1, 2).tanh())


HAND_WRITTEN = {
    "convolution of windows": (lambda: Unfolded(zoo.VOCAB), "convolutional"),
    "a filter as long as the text": (lambda: LongFilter(zoo.VOCAB), "convolutional"),
    "attention decoder of linear layers": (lambda: specimens.HandWrittenDecoder(zoo.VOCAB), "transformer decoder"),
    "the same without causal mask": (
        lambda: specimens.HandWrittenDecoder(zoo.VOCAB, causal=False),
        "transformer encoder",
    ),
    "CNN": (lambda: specimens.ConvolutionalScorer(zoo.VOCAB), "convolutional"),
    "GRU": (lambda: specimens.GRUCritic(zoo.VOCAB), "recurrent"),
    "hand-written recurrence": (lambda: specimens.HandWrittenRecurrence(zoo.VOCAB), "recurrent"),
    "MLP on mean-pooled embeddings": (lambda: specimens.BagOfTokens(zoo.VOCAB), "bag of tokens"),
    "attention decoder that pools": (
        lambda: specimens.HandWrittenDecoder(zoo.VOCAB, pool="last"),
        "transformer decoder",
    ),
}


@pytest.mark.parametrize("name", [*zoo.ZOO, *HAND_WRITTEN])
def test_architecture_is_measured(name: str) -> None:
    build, expected = (zoo.ZOO | HAND_WRITTEN)[name]
    examination = examine(_as_reward(build()), select=["VAL002"], options=Options())
    assert not examination.errors
    measured = examination.shown["reward_architecture"]
    assert measured.kind == expected, (measured, examination.shown["reward_census"])


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_decoder_map_is_the_full_lower_triangle(family: str) -> None:
    influence = examine(_as_reward(zoo.decoder(family)), select=["VAL002"]).shown["reward_influence"]
    assert influence.causal
    assert influence.coverage == 1.0
    assert influence.method == "gradient"


def test_convolution_map_is_a_band_as_wide_as_its_kernel() -> None:
    influence = examine(_as_reward(zoo.CausalConvolution()), select=["VAL002"]).shown["reward_influence"]
    assert influence.causal
    assert influence.reach == 2  # a kernel of 3 tokens


def test_encoder_map_is_the_full_square() -> None:
    influence = examine(_as_reward(zoo.bert()), select=["VAL002"]).shown["reward_influence"]
    assert influence.coverage == 1.0
    assert influence.sees_future > 100 * influence.floor


def _as_reward(model: Any) -> RLHFSetup:
    return RLHFSetup(reward=model, tokenizer=zoo.tokenizer())

"""Every architecture is told apart by what it does; classes carry no telling names."""

from __future__ import annotations

from typing import Any

import pytest
import zoo

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.selftest import specimens
from rlhf_doctor.setups import RLHFSetup

HAND_WRITTEN = {
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

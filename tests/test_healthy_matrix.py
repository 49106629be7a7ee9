"""Every healthy setup is silent: no error, no warning, nothing that could not be judged, no crash."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.report.record import record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("left", "right")
HEADS = ("score", "v_head", "value_head")
TUNING = ("full", "LoRA")
LAYOUTS = ("separate", "one module")
MATRIX = list(itertools.product(zoo.DECODERS, DTYPES, SIDES, HEADS, TUNING, LAYOUTS))
# A tenth of it, in which every pair of neighbouring choices occurs, runs by default.
SAMPLE = MATRIX[::11]


def grave(setup: RLHFSetup) -> list[str]:
    """What a person would be shown as wrong."""
    made = record(examine(setup))
    said = [
        f"{f['code']} {f['role']} {f['severity']}: {f['message']}" for f in made["findings"] if f["severity"] != "info"
    ]
    return said + [f"error: {e['message']}" for e in made["errors"]] + [c["traceback"] for c in made["crashed"]]


def setup_of(family: str, dtype: str, side: str, head: str, tuning: str, layout: str) -> RLHFSetup:
    return zoo.healthy_setup(
        family, dtype=DTYPES[dtype], side=side, head=head, lora=tuning == "LoRA", shared=layout == "one module"
    )


@pytest.mark.parametrize(("family", "dtype", "side", "head", "tuning", "layout"), SAMPLE)
def test_healthy_setup_is_silent(family: str, dtype: str, side: str, head: str, tuning: str, layout: str) -> None:
    assert grave(setup_of(family, dtype, side, head, tuning, layout)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "side", "head", "tuning", "layout"),
    [
        pytest.param(*m, marks=[] if i % 10 == 0 else pytest.mark.exhaustive)
        for i, m in enumerate(m for m in MATRIX if m not in SAMPLE)
    ],
)
def test_every_healthy_setup_is_silent(family: str, dtype: str, side: str, head: str, tuning: str, layout: str) -> None:
    assert grave(setup_of(family, dtype, side, head, tuning, layout)) == []


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_eager_attention_is_silent(family: str) -> None:
    assert grave(zoo.healthy_setup(family, attention="eager")) == []


def test_critic_free_with_a_reward_function_is_silent() -> None:
    def count_words(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return [float(len(set(c.split()))) for c in completions]

    setup = zoo.healthy_setup("qwen2").but(value=None, reward=count_words)
    assert grave(setup.but(declared={"algorithm": "grpo", "kl_coef": 0.0, "lam": None, "group_size": 8})) == []

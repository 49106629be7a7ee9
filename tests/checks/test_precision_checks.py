"""PRE001 to PRE004: what half precision loses, and what keeps it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from verdicts import said, skipped

from rlhf_doctor.instruments.precision import _vanishing
from rlhf_doctor.selftest import policies, specimens
from rlhf_doctor.setups import RLHFSetup


@pytest.mark.parametrize(
    ("dtype", "lr"), [(torch.bfloat16, 2e-4), (torch.bfloat16, 2e-5), (torch.float16, 2e-5), (torch.float16, 2e-6)]
)
def test_vanishing_is_what_an_addition_does(dtype: torch.dtype, lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(5000, generator=generator) * 0.1).to(dtype)
    away = (weights.float() + lr * weights.float().sign()).to(dtype)  # rounded once, as an optimizer's step is
    lost = float((away == weights).float().mean())
    assert 0.05 < lost < 1.0
    assert _vanishing(nn.Parameter(weights), lr) == pytest.approx(lost, abs=0.01)


def bfloat16(lr: float = 1e-6, kind: Any = torch.optim.AdamW, **options: Any) -> RLHFSetup:
    setup = zoo.healthy_setup("llama", dtype=torch.bfloat16)
    both = [*setup.policy.parameters(), *setup.value.parameters()]
    return setup.but(optimizers=[kind(both, lr=lr, **options)])


def test_bfloat16_under_adam_loses_small_steps() -> None:
    assert said(bfloat16(1e-6), "PRE001") == [("error", "policy"), ("error", "value")]


def test_steps_that_fit_are_silent() -> None:
    assert said(bfloat16(3e-3), "PRE001") == []


def test_without_optimizers_nothing_is_claimed() -> None:
    setup = zoo.healthy_setup("llama", dtype=torch.bfloat16).but(declared={"learning_rate": 1e-6, "dtype": "bfloat16"})
    assert said(setup, "PRE001") == []
    assert skipped(setup, "PRE001").startswith("needs")


def test_float32_weights_are_silent() -> None:
    setup = zoo.healthy_setup("llama")
    both = [*setup.policy.parameters(), *setup.value.parameters()]
    assert said(setup.but(optimizers=[torch.optim.Adam(both, lr=1e-7)]), "PRE001") == []


def test_an_adapter_in_float32_over_a_bfloat16_base_is_silent() -> None:
    base = zoo.decoder("llama").bfloat16()
    policy = policies.adapted(base)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    setup = zoo.healthy_setup("llama").but(policy=policy, reference="adapter-off", value=None)
    assert said(setup.but(optimizers=[torch.optim.AdamW(trainable, lr=1e-6)]), "PRE001") == []


class MasterAdam(torch.optim.AdamW):
    """Keeps float32 copies in its state under a name of its own."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["precise"] = p.detach().float().clone()


class KahanAdam(torch.optim.AdamW):
    """Carries the remainder, and says so in its name."""


@pytest.mark.parametrize("kind", [MasterAdam, KahanAdam])
def test_optimizers_that_keep_the_lost_bits_are_silent(kind: Any) -> None:
    assert said(bfloat16(1e-6, kind), "PRE001") == []


def test_master_copies_by_hand_are_not_accused() -> None:
    setup = zoo.healthy_setup("llama", dtype=torch.bfloat16)
    masters = [p.detach().float().clone().requires_grad_() for p in setup.policy.parameters()]
    assert said(setup.but(optimizers=[torch.optim.Adam(masters, lr=1e-6)]), "PRE001") == []


def test_adam_s_epsilon_vanishes_in_float16() -> None:
    setup = zoo.healthy_setup("llama", dtype=torch.float16)
    for eps, expected in ((1e-8, [("error", "policy")]), (1e-6, [])):
        optimizer = torch.optim.Adam(setup.policy.parameters(), lr=1e-2, eps=eps)
        assert said(setup.but(value=None, optimizers=[optimizer]), "PRE001") == expected


@pytest.mark.parametrize("family", zoo.DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_one_precision_are_silent(family: str, dtype: torch.dtype) -> None:
    setup = zoo.healthy_setup(family, dtype=dtype)
    assert said(setup, "PRE002") == []
    assert skipped(setup, "PRE002") == ""


def test_a_float32_model_whose_output_is_cast_down(healthy: RLHFSetup) -> None:
    class CastDown(policies.Wrapped):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(input_ids, attention_mask)["logits"].bfloat16()}

    assert said(policies.paired(healthy, CastDown(healthy.policy)), "PRE002") == [("warning", "policy")]
    assert said(policies.paired(healthy, policies.Wrapped(healthy.policy)), "PRE002") == []


def test_log_probabilities_in_float32_are_fine(healthy: RLHFSetup) -> None:
    size = specimens.vocabulary(healthy)
    policy = specimens.HandWrittenDecoder(size, size, squash=lambda logits: logits.log_softmax(-1)).eval()
    assert said(policies.paired(healthy, policy), "PRE002") == []


@pytest.mark.parametrize(("saved", "run", "expected"), [
    ("bfloat16", "fp16", [("error", "policy")]),
    ("bfloat16", "bfloat16", []),
    ("bfloat16", None, []),
    ("float16", "fp16", []),
    ("float32", "float16", []),
])  # fmt: skip
def test_the_dtype_of_a_checkpoint_against_the_declared_one(
    healthy_files: RLHFSetup, saved: str, run: str | None, expected: list[tuple[str, str]]
) -> None:
    folder = healthy_files.path("policy")
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": saved}))
    declared = dict(healthy_files.declared) | {"dtype": run}
    setup = RLHFSetup(policy=str(folder), tokenizer=str(folder), declared=declared)
    assert said(setup, "PRE003") == expected


def test_infinite_parameters_and_outputs_are_told_apart() -> None:
    setup = zoo.healthy_setup("llama")
    broken = copy.deepcopy(setup.value)
    with torch.no_grad():
        broken.score.weight[0, 0] = torch.inf
    assert said(setup.but(value=broken), "PRE004") == [("error", "value")]
    dividing = specimens.hand_written_critic(setup, squash=lambda v: v / 0)
    assert said(setup.but(value=dividing), "PRE004") == [("error", "value")]
    assert said(setup, "PRE004") == []

"""REF001 to REF004: what differs and is normal, and what is trained without looking so."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy
import pytest
import torch
import zoo
from verdicts import said, spoken

from rlhf_doctor.instruments.agreement import Gap, Predictions, agreement
from rlhf_doctor.selftest import policies
from rlhf_doctor.setups import RLHFSetup


@pytest.fixture
def llama() -> RLHFSetup:
    return zoo.healthy_setup("llama")


def predicted(rows: list[list[float]], dtype: str = "float32", spread: float = 1.0) -> Predictions:
    table = numpy.log(numpy.array(rows, dtype=numpy.float32))
    return Predictions(realised=(), table=table, spread=spread, dtype=dtype)


def kl(p: list[float], q: list[float]) -> Gap:
    setup = RLHFSetup(policy="p", reference="r")
    return agreement(setup, predicted([p]), predicted([q])).gaps["the reference"]


def test_divergence_by_hand() -> None:
    assert kl([0.5, 0.5], [0.5, 0.5]).mean == pytest.approx(0, abs=1e-7)
    assert kl([0.5, 0.5], [0.25, 0.75]).mean == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_token_that_both_rule_out_costs_nothing_and_one_that_only_the_reference_does_everything() -> None:
    assert kl([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]).mean == pytest.approx(0, abs=1e-7)
    assert kl([0.5, 0.5], [1.0, 0.0]).mean == math.inf


def test_a_wider_vocabulary_is_compared_over_what_is_shared() -> None:
    assert kl([0.5, 0.5], [0.25, 0.25, 0.5]).mean == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_a_copy_in_bfloat16_is_the_same_model(family: str) -> None:
    setup = zoo.healthy_setup(family)
    assert said(setup.but(reference=copy.deepcopy(setup.reference).bfloat16()), "REF002") == []


def test_a_small_change_of_a_bfloat16_reference_is_found() -> None:
    setup = zoo.healthy_setup("llama", dtype=torch.bfloat16)
    assert said(setup.but(reference=zoo.decoder("llama", seed=4).bfloat16()), "REF002") == [("error", "reference")]


def test_a_declared_second_stage_is_normal(llama: RLHFSetup) -> None:
    other = llama.but(reference=zoo.decoder("llama", seed=4).requires_grad_(False))
    assert said(other, "REF002") == [("error", "reference")]
    assert said(other.but(declared={"reference": "models/sft"}), "REF002") == [("info", "reference")]
    assert said(other.but(declared={"reference": "policy"}), "REF002") == [("error", "reference")]


def test_a_training_that_has_begun_is_normal(llama: RLHFSetup) -> None:
    policy = zoo.decoder("llama", seed=4)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    setup = llama.but(policy=policy, optimizers=[optimizer])
    assert said(setup, "REF002") == [("error", "reference")]
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert said(setup, "REF002") == [("info", "reference")]


def test_a_resumed_checkpoint_says_that_training_has_begun(healthy_files: RLHFSetup) -> None:
    from safetensors.torch import load_file, save_file

    folder = healthy_files.path("policy")
    assert folder is not None
    weights = {name: tensor * 1.1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    log: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert said(healthy_files, "REF002") == [("error", "reference")]
    log.append({"step": 2, "objective/kl": 0.3})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert said(healthy_files, "REF002") == [("info", "reference")]


def test_a_fresh_adapter_switched_off_is_the_policy(llama: RLHFSetup) -> None:
    setup = llama.but(policy=policies.adapted(llama.policy), reference="adapter-off")
    assert said(setup, "REF002") == [("info", "reference")]


def test_an_adapter_beside_its_base_is_the_same_fault(llama: RLHFSetup) -> None:
    policy = policies.adapted(llama.policy, trained=True)
    [(severity, role, _)] = spoken(llama.but(policy=policy), "REF002")
    assert (severity, role) == ("error", "reference")


def test_a_wrapper_that_switches_the_adapter_off_is_no_trained_reference(llama: RLHFSetup) -> None:
    class Off(torch.nn.Module):
        def __init__(self, policy: Any) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            with self.policy.disable_adapter(), torch.no_grad():
                return self.policy(input_ids=input_ids, attention_mask=attention_mask)

    policy = policies.adapted(llama.policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)
    setup = llama.but(policy=policy, reference=Off(policy), value=None, optimizers=[optimizer])
    for code in ("REF002", "REF003"):
        assert said(setup, code) == [], code


def test_gradients_alone_are_only_mentioned(llama: RLHFSetup) -> None:
    reference = copy.deepcopy(llama.policy)
    assert said(llama.but(reference=reference), "REF003") == [("info", "reference")]
    optimizer = torch.optim.AdamW([*llama.policy.parameters(), *llama.value.parameters()], lr=1e-5)
    assert said(llama.but(reference=reference, optimizers=[optimizer]), "REF003") == [("info", "reference")]


def test_one_tensor_of_the_reference_in_an_optimizer(llama: RLHFSetup) -> None:
    reference = policies.frozen(llama.policy)
    head = reference.get_output_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([*llama.policy.parameters(), head], lr=1e-5)
    [(severity, _, message)] = spoken(llama.but(reference=reference, optimizers=[optimizer]), "REF003")
    assert severity == "error"
    assert "1 parameters" in message


def test_a_head_left_trainable_outside_the_optimizers_is_a_warning(llama: RLHFSetup) -> None:
    reference = policies.frozen(llama.policy)
    reference.get_output_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([*llama.policy.parameters(), *llama.value.parameters()], lr=1e-5)
    assert said(llama.but(reference=reference), "REF003") == [("error", "reference")]
    assert said(llama.but(reference=reference, optimizers=[optimizer]), "REF003") == [("warning", "reference")]


def test_dropout_of_a_reference_beside_a_loop_is_only_mentioned(llama: RLHFSetup) -> None:
    policy = policies.hand_written(llama, dropout=0.1)
    setup = llama.but(policy=policy, reference=copy.deepcopy(policy).requires_grad_(False).train())
    assert said(setup, "REF004") == [("error", "reference")]
    assert said(setup.but(step=lambda: None), "REF004") == [("info", "reference")]


def test_examination_leaves_adapters_switched_on(llama: RLHFSetup) -> None:
    policy = policies.adapted(llama.policy, trained=True)
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        before = policy(input_ids=ids, attention_mask=mask).logits
        said(llama.but(policy=policy, reference="adapter-off"), "REF002")
        after = policy(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(before, after)

"""OPT001 and OPT005: what is frozen by design, what is held in another way, and rates by size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from verdicts import said, skipped, spoken

from rlhf_doctor.instruments.rates import Rate
from rlhf_doctor.selftest import policies, specimens
from rlhf_doctor.setups import RLHFSetup


@pytest.fixture
def llama() -> RLHFSetup:
    return zoo.healthy_setup("llama")


def adam(*models: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for m in models for p in m.parameters() if p.requires_grad], lr=lr)


def test_frozen_lower_layers_are_healthy(llama: RLHFSetup) -> None:
    policy = copy.deepcopy(llama.policy)
    policy.model.embed_tokens.requires_grad_(False)
    policy.model.layers[0].requires_grad_(False)
    assert said(llama.but(policy=policy), "OPT001") == []
    assert said(llama.but(policy=policy, optimizers=[adam(policy, llama.value)]), "OPT001") == []


def test_an_unused_head_of_the_critic_s_language_model_is_no_loss(llama: RLHFSetup) -> None:
    critic = zoo.WithScalarHead(zoo.decoder("llama", seed=1), "v_head").eval()
    used = [p for n, p in critic.named_parameters() if "lm_head" not in n]
    optimizers = [adam(llama.policy), torch.optim.Adam(used, lr=1e-4)]
    assert said(llama.but(value=critic, optimizers=optimizers), "OPT001") == []


def test_the_critic_s_head_outside_its_optimizer_is_an_error(llama: RLHFSetup) -> None:
    critic = specimens.hand_written_critic(llama)
    body = [p for n, p in critic.named_parameters() if not n.startswith("out.")]
    setup = llama.but(value=critic, optimizers=[adam(llama.policy), torch.optim.Adam(body, lr=1e-4)])
    [(severity, role, message)] = spoken(setup, "OPT001")
    assert (severity, role) == ("error", "value")
    assert "out.weight" in message


def test_some_parameters_outside_are_a_warning(llama: RLHFSetup) -> None:
    some = [p for n, p in llama.policy.named_parameters() if "layers.1" in n]
    setup = llama.but(optimizers=[torch.optim.Adam([*some, *llama.value.parameters()], lr=1e-4)])
    assert said(setup, "OPT001") == [("warning", "policy")]


def test_one_module_is_judged_once(llama: RLHFSetup) -> None:
    both = policies.TwoHeads(zoo.VOCAB).eval()
    shared = llama.but(policy=both, value=both, reference=policies.frozen(both))
    assert said(shared.but(optimizers=[adam(both)]), "OPT001") == []
    assert said(shared.but(optimizers=[adam(both.v_head, both.trunk)]), "OPT001") == [("warning", "policy")]
    frozen = copy.deepcopy(both).requires_grad_(False)
    assert said(llama.but(policy=frozen, value=frozen), "OPT001") == [("error", "policy")]


def test_a_critic_s_head_frozen_beside_its_adapter(llama: RLHFSetup) -> None:
    for saved, expected in ((None, [("error", "value")]), (["score"], [])):
        options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": saved}
        critic = policies.adapted(zoo.decoder("llama", "token", seed=1), **options)
        assert said(llama.but(value=critic), "OPT001") == expected


def test_master_copies_by_hand_are_no_stale_copies() -> None:
    setup = zoo.healthy_setup("llama", dtype=torch.bfloat16)
    masters = [p.detach().float().clone().requires_grad_() for m in (setup.policy, setup.value) for p in m.parameters()]
    assert said(setup.but(optimizers=[torch.optim.Adam(masters, lr=1e-4)]), "OPT001") == []


def test_a_hand_written_optimizer_in_the_state_is_believed(llama: RLHFSetup) -> None:
    class Momentum:
        def __init__(self, model: nn.Module) -> None:
            self.velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    setup = llama.but(optimizers=[adam(llama.value)])
    assert said(setup, "OPT001") == [("error", "policy")]
    assert said(setup.but(state=[Momentum(llama.policy)]), "OPT001") == []
    assert said(setup.but(state=[type("KL", (), {"coef": 0.1})()]), "OPT001") == [("error", "policy")]


def test_without_optimizers_only_gradients_are_judged(llama: RLHFSetup) -> None:
    assert said(llama, "OPT001") == []


def test_checkpoints_are_skipped(healthy_files: RLHFSetup) -> None:
    assert "in memory" in skipped(healthy_files, "OPT001")


def sized(parameters: int | None, lr: float, adapter: bool | None = False, role: Any = "policy") -> list[str]:
    from rlhf_doctor.check import registry

    rate = Rate(role, "declared", lr, True, parameters=parameters, adapter=adapter)
    return [f.message for f in registry()["OPT005"].run(setup=None, rates=(rate,))]


@pytest.mark.parametrize("lr", [5e-7, 1e-6, 3e-6, 9.65e-6, 1.41e-5, 3e-5])
def test_published_rates_of_full_training_are_silent(lr: float) -> None:
    assert sized(7_000_000_000, lr) == []
    assert sized(7_000_000_000, lr, role="value") == []


def test_the_default_of_supervised_training_is_too_high_for_full_training_alone() -> None:
    assert sized(1_000_000_000, 5e-5)
    assert sized(1_000_000_000, 5e-5, adapter=True) == []
    assert sized(1_000_000_000, 5e-5, role="value") == []
    assert sized(100_000, 5e-5) == []
    assert sized(None, 5e-5) == []


@pytest.mark.parametrize(("parameters", "lr"), [(100_000, 3e-3), (30_000_000, 3e-4), (None, 3e-4)])
def test_small_models_may_train_faster(parameters: int | None, lr: float) -> None:
    assert sized(parameters, lr) == []
    assert sized(parameters, 100 * lr)


def test_a_warm_up_that_starts_at_0_is_normal(llama: RLHFSetup) -> None:
    optimizer = adam(llama.policy, llama.value, lr=1e-4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    found = said(llama.but(optimizers=[optimizer]), "OPT005")
    assert {severity for severity, _ in found} == {"info"}


def test_a_rate_of_0_without_a_schedule_is_a_warning(llama: RLHFSetup) -> None:
    found = said(llama.but(optimizers=[adam(llama.policy, lr=0.0)]), "OPT005")
    assert ("warning", "policy") in found


def test_plain_gradient_descent_has_other_rates(llama: RLHFSetup) -> None:
    descent = torch.optim.SGD([*llama.policy.parameters(), *llama.value.parameters()], lr=0.1)
    assert said(llama.but(optimizers=[descent]), "OPT005") == []


def test_texts_and_tensors_are_numbers_too(llama: RLHFSetup) -> None:
    assert said(llama.but(declared={"learning_rate": "0.5"}), "OPT005") == [("warning", "policy")]
    optimizer = torch.optim.Adam(llama.policy.parameters(), lr=torch.tensor(0.5))
    assert ("warning", "policy") in said(llama.but(optimizers=[optimizer]), "OPT005")
    assert "learning_rate" in skipped(llama.but(declared={"learning_rate": "linear"}), "OPT005")

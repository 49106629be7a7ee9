"""Dropout of the policy that a step switches on: told apart from other reasons for passes that disagree."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from reference_impl import roles
from rlhf_doctor.check import registry
from rlhf_doctor.diagnosis import diagnose
from rlhf_doctor.examine import Options, examine
from rlhf_doctor.selftest import rollout_faults
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.twice import dropout_rates, without_dropout

ASKED = ("POL005", "ROL003", "ROL011", "ROL001")


def with_dropout(healthy: RLHFSetup) -> Any:
    policy = copy.deepcopy(healthy.policy)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return policy.eval()


def dropping(healthy: RLHFSetup, *, in_update: bool) -> RLHFSetup:
    """The policy's log-probabilities are taken in train mode in the update's passes alone, or in those before it."""
    policy = with_dropout(healthy)

    def logprobs(model: Any, *given: Any, **named: Any) -> Any:
        model.train(model is policy and torch.is_grad_enabled() is in_update)
        try:
            return roles.response_logprobs(model, *given, **named)
        finally:
            model.eval()

    return reference_step(healthy, policy=policy, parts={"logprobs": logprobs})


@pytest.mark.parametrize("in_update", [True, False], ids=["in_update", "in_rollout"])
def test_it_is_the_root_of_passes_that_disagree(in_update: bool, healthy: RLHFSetup) -> None:
    setup = dropping(healthy, in_update=in_update)
    before = dropout_rates(setup.policy)
    found = examine(setup, select=ASKED, options=Options(show=False)).findings
    roots = diagnose(found, [f.severity or registry()[code].severity for code, f in found])
    assert [found[root.index][0] for root in roots] == ["POL005"]
    assert found[roots[0].index][1].role == "policy"
    assert "ROL003" in {found[i][0] for i in roots[0].explains}
    assert dropout_rates(setup.policy) == before == [0.1] * len(before)


def test_dropout_that_does_nothing_is_not_blamed_for_another_mask(healthy: RLHFSetup) -> None:
    policy = copy.deepcopy(healthy.policy)
    policy.idle = torch.nn.Dropout(0.1)
    made = reference_step(healthy, policy=policy.train(), parts={"logprobs": rollout_faults.attending_to_pads_before})
    found = {code for code, f in examine(made, select=ASKED, options=Options(show=False)).findings if not f.severity}
    assert "ROL003" in found
    assert "POL005" not in found


def test_rates_come_back_whatever_happens(healthy: RLHFSetup) -> None:
    policy = with_dropout(healthy)
    before = dropout_rates(policy)
    with without_dropout(policy):
        assert dropout_rates(policy) == []
    with pytest.raises(KeyError), without_dropout(policy):
        raise KeyError
    assert dropout_rates(policy) == before

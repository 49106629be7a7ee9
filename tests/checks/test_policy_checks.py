"""POL001 to POL007 beyond the faults they ship: what is normal, other styles, and which of them speaks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from verdicts import said, skipped, spoken

from rlhf_doctor.selftest import policies, specimens
from rlhf_doctor.setups import RLHFSetup


@pytest.fixture
def llama() -> RLHFSetup:
    return zoo.healthy_setup("llama")


def with_policy(setup: RLHFSetup, policy: nn.Module, **more: Any) -> RLHFSetup:
    return setup.but(policy=policy, reference=policies.frozen(policy), **more)


@pytest.mark.parametrize("make", [zoo.LSTMLanguageModel, zoo.mamba, zoo.mamba2, zoo.hybrid])
def test_other_architectures_are_named(llama: RLHFSetup, make: Any) -> None:
    assert said(with_policy(llama, make().eval()), "POL001") == [("error", "policy")]


def test_encoder_decoder_is_named_as_such(llama: RLHFSetup) -> None:
    [(severity, _, message)] = spoken(with_policy(llama, policies.t5(llama)), "POL001")
    assert severity == "warning"
    assert "encoder-decoder" in message
    assert skipped(with_policy(llama, policies.t5(llama)), "POL003") == "an encoder-decoder reads its whole prompt"


def test_a_decoder_without_mask_is_no_encoder(llama: RLHFSetup) -> None:
    setup = with_policy(llama, policies.hand_written(llama, causal=False))
    assert said(setup, "POL001") == []
    assert said(setup, "POL003") == [("error", "policy")]


def test_a_padded_vocabulary_head_is_normal(llama: RLHFSetup) -> None:
    wide = specimens.HandWrittenDecoder(zoo.VOCAB, zoo.VOCAB + 31).eval()
    assert said(with_policy(llama, wide), "POL002") == []


def test_a_head_narrower_than_the_tokenizer_is_found(llama: RLHFSetup) -> None:
    narrow = specimens.HandWrittenDecoder(zoo.VOCAB, zoo.VOCAB - 5).eval()
    assert said(with_policy(llama, narrow), "POL002") == [("error", "policy")]


def test_logits_masked_to_minus_infinity_are_normal(llama: RLHFSetup) -> None:
    class Masked(policies.Wrapped):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = super().forward(input_ids, attention_mask)["logits"].clone()
            logits[..., 3] = -torch.inf
            return {"logits": logits}

    setup = with_policy(llama, Masked(llama.policy))
    for code in ("POL002", "POL004", "REF002", "PRE004", "PRE002"):
        assert said(setup, code) == [], code


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", ["equal", "unequal"])
def test_a_model_without_a_mask_fails_only_where_it_is_padded_on_the_left(side: str, lengths: str) -> None:
    class Maskless(nn.Module):
        def __init__(self, lm: Any) -> None:
            super().__init__()
            self.lm = lm

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    setup = zoo.healthy_setup("llama", side=side)
    prompts = ["t5 t6", "t7 t8"] if lengths == "equal" else ["t5 t6", "t7 t8 t9 t10"]
    broken = with_policy(setup, Maskless(setup.policy), prompts=prompts)
    expected = [("error", "policy")] if (side, lengths) == ("left", "unequal") else []
    assert said(broken, "POL004") == expected


def test_only_the_reference_depends_on_padding(llama: RLHFSetup) -> None:
    reference = policies.Wrapped(policies.frozen(llama.policy), "maskless")
    assert said(llama.but(reference=reference), "POL004") == [("error", "reference")]


def test_train_mode_without_dropout_is_silent(llama: RLHFSetup) -> None:
    assert said(llama.but(policy=copy.deepcopy(llama.policy).train()), "POL005") == []


def gpt2_in_train_mode() -> Any:
    policy = copy.deepcopy(zoo.decoder("gpt2"))
    for child in policy.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.1
    return policy.train()


def test_dropout_of_a_policy_as_handed_over() -> None:
    [(severity, _, message)] = spoken(zoo.healthy_setup("gpt2").but(policy=gpt2_in_train_mode()), "POL005")
    assert severity == "error"
    assert "transformer.drop" in message


def test_dropout_beside_a_loop_is_only_mentioned() -> None:
    setup = zoo.healthy_setup("gpt2").but(policy=gpt2_in_train_mode(), step=lambda: None)
    assert said(setup, "POL005") == [("info", "policy")]


def test_randomness_that_ignores_eval_is_an_error_beside_a_loop_too(llama: RLHFSetup) -> None:
    policy = policies.hand_written(llama)
    policy.norm = policies.AlwaysDropping(policy.norm)
    for mode in (True, False):
        setup = with_policy(llama, copy.deepcopy(policy).train(mode), step=lambda: None)
        assert said(setup, "POL005") == [("error", "policy")]


def test_dropout_behind_a_fresh_adapter_is_only_mentioned(llama: RLHFSetup) -> None:
    policy = policies.adapted(llama.policy, lora_dropout=0.1).train()
    assert said(llama.but(policy=policy, reference="adapter-off"), "POL005") == [("info", "policy")]


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_caches_of_every_family_agree(family: str) -> None:
    setup = zoo.healthy_setup(family)
    assert said(setup, "POL006") == []
    assert skipped(setup, "POL006") == ""


def test_a_hand_written_cache_is_read_and_agrees(llama: RLHFSetup) -> None:
    setup = with_policy(llama, policies.CachedDecoder(zoo.VOCAB).eval())
    assert said(setup, "POL006") == []
    assert skipped(setup, "POL006") == ""


def test_a_model_without_a_cache_is_skipped(llama: RLHFSetup) -> None:
    assert "key-value cache" in skipped(with_policy(llama, policies.hand_written(llama)), "POL006")


def test_untrained_policies_without_a_claim_or_preferences_are_not_accused(healthy: RLHFSetup) -> None:
    fresh = policies.paired(healthy, policies.fresh(healthy.policy))
    assert "policy_init" in skipped(fresh, "POL007")
    assert said(fresh.but(declared={"policy_init": "sft"}), "POL007") == [("warning", "policy")]
    alone = fresh.but(declared={"policy_init": "sft"}, preferences=None)
    assert said(alone, "POL007") == [("info", "policy")]
    assert said(healthy, "POL007") == []

"""ROL002, ROL006 and KLD001: settings that bend the sampler, settings that do not, and what is normal."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import transformers
import zoo
from verdicts import said, skipped, spoken

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.finding import Found, Stage
from rlhf_doctor.selftest import policies
from rlhf_doctor.setups import RLHFSetup

NEUTRAL: list[dict[str, Any]] = [
    {},
    {"top_p": 1.0, "top_k": 0},
    {"top_p": 1.0, "top_k": -1, "temperature": 1.0},
    {"temperature": 0.7},
    {"do_sample": True, "max_new_tokens": 20},
]
BENT: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_k": 50},
    {"min_p": 0.05},
    {"repetition_penalty": 1.1},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 16},
    {"suppress_tokens": [2]},
    {"bad_words_ids": [[5]]},
    {"num_beams": 4},
]


@pytest.mark.parametrize("settings", NEUTRAL)
def test_neutral_settings_are_silent(settings: dict[str, Any]) -> None:
    assert said(RLHFSetup(policy=zoo.decoder("qwen2"), declared=settings), "ROL002") == []


@pytest.mark.parametrize("settings", BENT)
def test_declared_settings_that_bend_the_sampler(settings: dict[str, Any]) -> None:
    assert said(RLHFSetup(policy=zoo.decoder("qwen2"), declared=settings), "ROL002") == [("error", "loop")]


@pytest.mark.parametrize("settings", [s for s in BENT if s != {"top_k": 50}])
def test_shipped_settings_that_bend_the_sampler(settings: dict[str, Any]) -> None:
    policy = zoo.decoder("qwen2")
    policy.generation_config = transformers.GenerationConfig(**settings)
    assert said(RLHFSetup(policy=policy), "ROL002") == [("error", "policy")]
    assert said(RLHFSetup(policy=policy, step=lambda: None), "ROL002") == [("warning", "policy")]


def test_generate_s_own_top_k_is_nobody_s_choice() -> None:
    policy = zoo.decoder("qwen2")
    policy.generation_config = transformers.GenerationConfig(top_k=50)
    assert said(RLHFSetup(policy=policy), "ROL002") == []


def test_a_declared_value_replaces_the_shipped_one() -> None:
    policy = zoo.decoder("qwen2")
    policy.generation_config = transformers.GenerationConfig(top_p=0.8, top_k=20, temperature=0.7)
    assert said(RLHFSetup(policy=policy), "ROL002") == [("error", "policy")]
    declared = {"top_p": 1.0, "top_k": 0, "temperature": 1.0}
    assert said(RLHFSetup(policy=policy, declared=declared), "ROL002") == []


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_files_are_read_without_torch(healthy_files: RLHFSetup, file: str) -> None:
    folder = healthy_files.path("policy")
    assert folder is not None
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"repetition_penalty": 1.2}))
    outcome = examine(healthy_files, select=["ROL002"], options=Options(stage=Stage.STATIC)).outcomes["ROL002"]
    assert isinstance(outcome, Found)
    assert "repetition_penalty 1.2" in outcome.findings[0].message


def test_greedy_decoding_is_found_without_models() -> None:
    for declared, severity in (
        ({"temperature": 0}, "error"),
        ({"top_k": 1}, "warning"),
        ({"do_sample": False}, "warning"),
    ):
        assert said(RLHFSetup(declared=declared), "ROL006") == [(severity, "loop")]
    assert said(RLHFSetup(declared={"temperature": 0.01}), "ROL006") == []


def test_an_untrained_policy_is_not_blamed_for_never_stopping(healthy: RLHFSetup) -> None:
    fresh = policies.fresh(healthy.policy)
    with_quiet_end = policies.Muted(fresh, healthy.tokenizer.eos_token_id)
    assert said(policies.paired(healthy, with_quiet_end), "ROL006") == []
    assert said(healthy, "ROL006") == []


def test_a_limit_below_the_preferred_responses_is_named(healthy: RLHFSetup) -> None:
    [(_, _, message)] = spoken(healthy.but(declared={"response_length": 3}), "ROL006")
    assert "cut at 3 tokens" in message
    [(_, role, message)] = spoken(healthy.but(prompts=None, declared={"response_length": 3}), "ROL006")
    assert role == "loop"
    assert "longer than the declared response_length of 3" in message


@pytest.mark.parametrize(
    ("declared", "reference", "expected"),
    [
        ({"kl_coef": 0.05}, True, []),
        ({"kl_coef": 0.05, "kl_in": "loss"}, True, []),
        ({"kl_coef": -0.001}, True, ["error"]),
        ({"kl_coef": "-0.001", "algorithm": "grpo"}, True, ["error"]),
        ({"kl_coef": 0.0, "algorithm": "ppo"}, True, ["warning"]),
        ({"kl_coef": 0, "algorithm": "ppo"}, False, ["info"]),
        ({"kl_coef": 0.0, "algorithm": "grpo"}, True, ["info"]),
        ({"kl_coef": 0.0}, True, ["info"]),
        ({"kl_coef": 0.05, "kl_in": None}, True, ["warning"]),
        ({"kl_coef": 0.05, "kl_in": "none"}, True, ["warning"]),
        ({"kl_coef": 0.0, "kl_in": None, "algorithm": "grpo"}, True, ["info"]),
    ],
)
def test_kl_coefficient(declared: dict[str, Any], reference: bool, expected: list[str]) -> None:
    lm = zoo.decoder("llama")
    setup = RLHFSetup(policy=lm, reference=copy.deepcopy(lm) if reference else None, declared=declared)
    assert [severity for severity, _ in said(setup, "KLD001")] == expected


def test_an_undeclared_coefficient_is_skipped() -> None:
    assert "kl_coef" in skipped(RLHFSetup(policy=zoo.decoder("llama")), "KLD001")

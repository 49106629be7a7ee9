"""CFG001 to CFG007: found, silent on what looks alike and is sound."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import zoo
from foreign import plain
from judged import grave, said, severity_of
from peft import LoraConfig, get_peft_model

from rlhf_doctor import RLHFSetup
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.versions import before


def declared(**options: Any) -> RLHFSetup:
    return RLHFSetup(policy=zoo.decoder("llama"), declared=options)


@pytest.mark.parametrize(
    ("options", "severity"),
    [
        ({"gamma": 1.0, "lam": 0.95, "clip_range": 0.2, "vf_coef": 0.1}, ""),
        ({"clip_range": (0.2, 0.28), "temperature": 0.7, "kl_coef": 0.001}, ""),
        ({"ppo_epochs": 4, "num_minibatches": 4}, ""),
        ({"gamma": None, "reward_clip": None, "learning_rate": 3e-6}, ""),
        ({"gamma": 1.5}, "error"),
        ({"lam": -0.1}, "error"),
        ({"gamma": float("nan")}, "error"),
        ({"clip_range": 0}, "error"),
        ({"clip_range": (0.2, 1.5)}, "error"),
        ({"top_p": 0}, "error"),
        ({"ppo_epochs": 0}, "error"),
        ({"ppo_epochs": 1.5}, "error"),
        ({"batch_size": True}, "error"),
        ({"learning_rate": "3e-6"}, "error"),
        ({"algorithm": "grpo", "group_size": 1}, "error"),
        ({"gamma": 0.5}, "warning"),
        ({"kl_coef": 20.0}, "warning"),
        ({"temperature": 5}, "warning"),
        ({"ppo_epochs": 16, "num_minibatches": 4}, "warning"),
        ({"whiten_rewards": True}, "info"),
    ],
)
def test_ranges(options: dict[str, Any], severity: str) -> None:
    assert severity_of("CFG001", declared(**options)) == severity


def test_what_other_checks_say_is_not_said_twice() -> None:
    for options in ({"temperature": 0.0}, {"kl_coef": -0.1}, {"learning_rate": 0.5}, {"top_k": 1}):
        assert said(declared(**options), ["CFG001"]) == []


@pytest.mark.parametrize(
    ("options", "severity"),
    [
        ({"batch_size": 32, "num_minibatches": 4}, ""),
        ({"batch_size": 30, "num_minibatches": 4}, "error"),
        ({"kl_adaptive": True, "kl_target": 6.0, "kl_horizon": 10000}, ""),
        ({"kl_adaptive": True, "kl_target": None}, "error"),
        ({"kl_adaptive": True}, "warning"),
        ({"algorithm": "grpo", "group_size": 8, "lam": 1.0, "vf_coef": 0.0}, ""),
        ({"algorithm": "grpo", "lam": 0.95, "vf_coef": 0.1, "clip_range_value": 0.2}, "info"),
        ({"algorithm": "rloo", "vf_coef": 0.33}, "warning"),
        ({"algorithm": "ppo", "lam": 0.9}, ""),
    ],
)
def test_contradictions(options: dict[str, Any], severity: str) -> None:
    assert severity_of("CFG002", declared(**options)) == severity


def adapted(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def test_an_adapter_that_is_off_must_be_there(tmp_path: Path) -> None:
    off = RLHFSetup(policy=zoo.decoder("llama"), reference="adapter-off", declared={"kl_coef": 0.05})
    assert grave(off, ["CFG002"]) == [("CFG002", "loop")]
    folder = checkpoints.save(zoo.decoder("llama"), tmp_path / "policy")
    assert grave(off.but(policy=str(folder)), ["CFG002"], Stage.STATIC) == [("CFG002", "loop")]
    for policy in (adapted(zoo.decoder("llama")), zoo.WithScalarHead(adapted(zoo.decoder("gpt2"))), plain.Actor()):
        assert grave(off.but(policy=policy), ["CFG002"]) == []


def test_unknown_names_are_mentioned_with_the_nearest() -> None:
    found = said(declared(gama=1.0, clip_rnge=0.2, wandb_project="x", gamma=1.0), ["CFG003"])
    assert [severity for _, _, severity, _ in found] == ["info"] * 3
    assert "'gamma'" in found[0][3]
    assert "'clip_range'" in found[1][3]
    assert "Did you mean" not in found[2][3]


class Trainer:
    """Options that a method takes by other names."""

    def ignoring(self, loss: Any, *, cliprange: float = 0.2, **rest: Any) -> Any:
        return loss.clamp(-cliprange, cliprange)

    def passing_on(self, loss: Any, *, cliprange: float = 0.2, **rest: Any) -> Any:
        return self.ignoring(loss, cliprange=cliprange, **rest)

    def reading(self, loss: Any, *, cliprange: float = 0.2, **rest: Any) -> Any:
        return [loss.clamp(-x, x) for x in (rest.get("clip_range_high"),)]


@pytest.mark.parametrize(
    ("function", "severity"), [("ignoring", "warning"), ("passing_on", "info"), ("reading", "info")]
)
def test_an_option_that_other_keywords_swallow(function: str, severity: str) -> None:
    setup = declared(clip_range_high=0.3).but(functions={"policy_loss": getattr(Trainer(), function)})
    assert [grade for _, _, grade, _ in said(setup, ["CFG003"])] == [severity]


def test_an_option_that_one_function_swallows_and_another_knows() -> None:
    def value_loss(v: Any, clip_range_high: float) -> Any:
        return v * clip_range_high

    setup = declared(clip_range_high=0.3)
    both = setup.but(functions={"policy_loss": Trainer().ignoring, "value_loss": value_loss, "gae": max})
    assert [grade for _, _, grade, _ in said(both, ["CFG003"])] == ["info"]


def test_paths(tmp_path: Path) -> None:
    folder = checkpoints.save(zoo.decoder("llama"), tmp_path / "policy")
    assert grave(RLHFSetup(policy=str(folder), tokenizer=zoo.tokenizer()), ["CFG004"]) == []
    wrong = said(RLHFSetup(policy=tmp_path / "polcy"), ["CFG004"], Stage.STATIC)
    assert [(code, role) for code, role, _, _ in wrong] == [("CFG004", "policy")]
    assert str(folder) in wrong[0][3]
    assert grave(RLHFSetup(policy=plain.Actor(), tokenizer=str(tmp_path / "no")), ["CFG004"]) == [
        ("CFG004", "tokenizer")
    ]
    for name in ("policy", "adapter-off", "meta-llama/Llama-3"):
        assert grave(RLHFSetup(policy=plain.Actor(), declared={"reference": name}), ["CFG004"]) == []
    gone = RLHFSetup(policy=plain.Actor(), declared={"reference": str(tmp_path / "gone")})
    assert grave(gone, ["CFG004"]) == [("CFG004", "reference")]


def run_of(folder: Path, log: list[dict[str, Any]], **state: Any) -> Path:
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 200, "log_history": log, **state}))
    return folder


RL = [{"step": 200, "objective/kl": 3.0, "objective/scores": 0.4}]
SFT = [{"step": 200, "loss": 2.1, "learning_rate": 1e-5}, {"step": 200, "eval_loss": 2.0}]


def test_resumed_runs(tmp_path: Path) -> None:
    made = {
        role: checkpoints.save(zoo.decoder("llama", kind), tmp_path / role)
        for role, kind in (("policy", "causal"), ("reference", "causal"), ("reward", "sequence"), ("value", "token"))
    }
    setup = RLHFSetup(**{role: str(path) for role, path in made.items()}, declared={"algorithm": "ppo"})
    run_of(made["policy"], SFT)
    assert grave(setup.but(reference=setup.policy), ["CFG005"], Stage.STATIC) == []
    run_of(made["policy"], RL)
    assert grave(setup, ["CFG005"], Stage.STATIC) == []
    assert grave(setup.but(reference=setup.policy), ["CFG005"], Stage.STATIC) == [("CFG005", "reference")]
    assert grave(setup.but(value=setup.reward), ["CFG005"], Stage.STATIC) == [("CFG005", "value")]
    grouped = setup.but(value=setup.reward, declared={"algorithm": "grpo"})
    assert grave(grouped, ["CFG005"], Stage.STATIC) == []
    run_of(made["policy"], [*RL, *SFT], best_metric=2.0)
    assert severity_of("CFG005", setup) == "info"


def test_a_broken_state_file_is_no_crash(tmp_path: Path) -> None:
    folder = checkpoints.save(zoo.decoder("llama"), tmp_path / "policy")
    for text in ("{", "[]", '{"log_history": [1, null]}', '{"log_history": {"a": 1}}', '{"global_step": "x"}'):
        (folder / "trainer_state.json").write_text(text)
        assert grave(RLHFSetup(policy=str(folder)), ["CFG005"], Stage.STATIC) == []


@pytest.mark.parametrize(
    ("asked", "loaded", "expected"),
    [
        ("float32", torch.float32, []),
        ("bf16", torch.bfloat16, []),
        ("torch.bfloat16", torch.bfloat16, []),
        ("bfloat16", torch.float32, []),
        ("auto", torch.bfloat16, []),
        (None, torch.bfloat16, []),
        ("fp32", torch.bfloat16, [("CFG006", "policy")]),
        ("bfloat16", torch.float16, [("CFG006", "policy")]),
    ],
)
def test_dtypes(asked: Any, loaded: torch.dtype, expected: list[Any]) -> None:
    setup = RLHFSetup(policy=zoo.decoder("gpt2").to(loaded), declared={"dtype": asked})
    assert grave(setup, ["CFG006"]) == expected
    hand_written = RLHFSetup.from_mapping(plain.healthy(policy=plain.Actor().to(loaded), declared={"dtype": asked}))
    assert [c for c in grave(hand_written, ["CFG006"]) if c[1] == "policy"] == expected


def test_how_much_of_an_adapted_model_trains() -> None:
    policy = adapted(zoo.decoder("llama"))
    assert grave(RLHFSetup(policy=policy), ["CFG006"]) == []
    thawed = copy.deepcopy(policy).requires_grad_(True)
    assert grave(RLHFSetup(policy=thawed), ["CFG006"]) == [("CFG006", "policy")]


def test_a_declared_trunk() -> None:
    apart = RLHFSetup.from_mapping(plain.healthy(declared={"shared_trunk": True}))
    assert grave(apart, ["CFG006"]) == [("CFG006", "value")]
    made = plain.healthy(declared={"shared_trunk": True})
    made["value"].body = made["policy"].body
    assert grave(RLHFSetup.from_mapping(made), ["CFG006"]) == []


@pytest.mark.parametrize(
    ("version", "side", "kind", "expected"),
    [
        ("4.44.2", "left", "sequence", [("CFG007", "reward")]),
        ("4.48.3", "left", "sequence", [("CFG007", "reward")]),
        ("4.49.0", "left", "sequence", []),
        ("5.23.0", "left", "sequence", []),
        ("4.44.2", "right", "sequence", []),
        ("4.44.2", "left", "token", []),
        ("unknown", "left", "sequence", []),
    ],
)
def test_versions(version: str, side: str, kind: str, expected: list[Any]) -> None:
    setup = RLHFSetup(
        reward=zoo.decoder("llama", kind),
        tokenizer=zoo.tokenizer(side),
        declared={"versions": {"transformers": version}},
    )
    assert grave(setup, ["CFG007"], Stage.STATIC) == expected


def test_versions_are_compared_by_number() -> None:
    assert before("4.9.0", "4.49")
    assert not before("4.49.0", "4.49")
    assert not before("4.100", "4.49")
    assert before("2.6.0+cu124", "2.7")
    assert not before("nightly", "2.7")

"""SYS001 to SYS012: found in several styles, silent on what looks alike and is sound."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import zoo
from foreign import plain
from judged import grave, said, severity_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_doctor import RLHFSetup
from rlhf_doctor.finding import Stage

Case = tuple[Callable[[], RLHFSetup], str, str]


def written(**changes: Any) -> RLHFSetup:
    """Hand-written modules of plain linear layers."""
    return RLHFSetup.from_mapping(plain.healthy(**changes))


def adapted(model: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **options)).eval()


class AdapterOff(nn.Module):
    """The policy with its adapter off, without gradients: a reference that shares every tensor."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        with torch.no_grad(), self.policy.disable_adapter():
            return self.policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


class Hydra(nn.Module):
    """A frozen copy of the upper part of a policy on the policy's own lower part."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.lower = policy.body
        self.upper = copy.deepcopy(policy.to_logits).requires_grad_(False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.upper(self.lower(tokens, mask))  # type: ignore[no-any-return]


def test_role_missing_in_every_style(healthy: RLHFSetup, healthy_files: RLHFSetup) -> None:
    assert ("SYS001", "value") in grave(written(value=None))
    assert ("SYS001", "reference") in grave(healthy.but(reference=None))
    assert ("SYS001", "reward") in grave(healthy_files.but(reward=None), stage=Stage.STATIC)
    critic_only = RLHFSetup(
        policy=plain.Actor(), reward=plain.Scorer(), declared={"clip_range_value": 0.2, "kl_coef": 0.0}
    )
    assert grave(critic_only) == [("SYS001", "value")]


@pytest.mark.parametrize(
    "declared",
    [
        {"algorithm": "ppo", "kl_coef": 0.0},
        {"algorithm": "grpo"},
        {"algorithm": "RLOO", "kl_coef": 0.0},
        {},
        {"algorithm": "dpo"},
    ],
)
def test_a_reference_that_nothing_needs_may_be_missing(declared: dict[str, Any]) -> None:
    made = plain.healthy(reference=None, declared=declared)
    assert grave(RLHFSetup.from_mapping(made)) == []


def test_a_value_head_in_the_policy_is_a_value_model() -> None:
    both = zoo.WithScalarHead(zoo.decoder("llama"))
    setup = zoo.healthy_setup("llama").but(policy=both, value=None, reference=copy.deepcopy(both).requires_grad_(False))
    assert grave(setup) == []
    assert severity_of("SYS001", zoo.healthy_setup("llama").but(declared={"algorithm": "grpo"})) == "info"


def test_a_language_model_as_reward_or_critic() -> None:
    setup = zoo.healthy_setup("gpt2")
    assert grave(setup.but(reward=zoo.decoder("gpt2")), ["SYS002"]) == [("SYS002", "reward")]
    assert grave(setup.but(value=zoo.decoder("gpt2")), ["SYS002"]) == [("SYS002", "value")]
    assert grave(written(reward=plain.Actor()), ["SYS002"]) == [("SYS002", "reward")]


def test_a_hand_written_critic_with_vocabulary_logits_is_left_to_val002() -> None:
    assert grave(written(value=plain.Critic(outputs=plain.VOCAB)), ["SYS002"]) == []


def test_a_classifier_as_policy() -> None:
    setup = zoo.healthy_setup("neox")
    assert grave(setup.but(policy=zoo.decoder("neox", "sequence")), ["SYS002"]) == [("SYS002", "policy")]
    assert grave(written(policy=plain.Critic()), ["SYS002"]) == [("SYS002", "policy")]


def test_reward_and_value_exchanged() -> None:
    setup = zoo.healthy_setup("llama")
    assert ("SYS002", "setup") in grave(setup.but(reward=setup.value, value=setup.reward), ["SYS002"])
    made = plain.healthy()
    swapped = RLHFSetup.from_mapping(made | {"reward": made["value"], "value": made["reward"]})
    assert ("SYS002", "setup") in grave(swapped, ["SYS002"])


def test_a_pooling_critic_beside_a_reward_per_token_is_not_exchanged() -> None:
    reward = plain.Critic().requires_grad_(False)
    assert grave(written(reward=reward, value=plain.Scorer()), ["SYS002"]) == []


LAYOUTS = {
    "TRL": checkpoints.trl_value_head,
    "LLaMA-Factory": checkpoints.llamafactory_value_head,
    "DeepSpeed-Chat": checkpoints.deepspeed_chat,
    "OpenRLHF": checkpoints.openrlhf,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_whose_config_names_the_language_model_are_sound(layout: str, tmp_path: Path) -> None:
    made = LAYOUTS[layout](tmp_path / "head")
    policy = checkpoints.save(zoo.decoder("llama"), tmp_path / "policy")
    setup = RLHFSetup(
        policy=str(policy), reference=str(policy), reward=str(made), value=str(made), tokenizer=zoo.tokenizer()
    )
    for stage in (Stage.STATIC, Stage.PROBE):
        assert grave(setup, ["system"], stage) == []


def shared_embedding() -> RLHFSetup:
    made = plain.healthy()
    made["reference"].body.tok = made["policy"].body.tok
    return RLHFSetup.from_mapping(made)


def policy_wrapped_as_reference() -> RLHFSetup:
    class Same(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens, mask)  # type: ignore[no-any-return]

    made = plain.healthy()
    return RLHFSetup.from_mapping(made | {"reference": Same(made["policy"])})


def storage_shared_without_the_parameter() -> RLHFSetup:
    setup = zoo.healthy_setup("llama")
    reference = copy.deepcopy(setup.policy).requires_grad_(False)
    reference.model.embed_tokens.weight.data = setup.policy.model.embed_tokens.weight.data
    return setup.but(reference=reference)


def reward_on_the_policys_trunk() -> RLHFSetup:
    setup = zoo.healthy_setup("gpt2")
    reward = zoo.decoder("gpt2", "sequence")
    reward.transformer = setup.policy.transformer
    return setup.but(reward=reward)


def adapted_policy_as_its_own_reference() -> RLHFSetup:
    policy = adapted(zoo.decoder("llama"))
    return zoo.healthy_setup("llama").but(policy=policy, reference=policy)


@pytest.mark.parametrize(
    ("build", "role"),
    [
        (shared_embedding, "reference"),
        (policy_wrapped_as_reference, "reference"),
        (storage_shared_without_the_parameter, "reference"),
        (reward_on_the_policys_trunk, "reward"),
        (adapted_policy_as_its_own_reference, "reference"),
    ],
)
def test_trained_weights_in_two_roles(build: Callable[[], RLHFSetup], role: str) -> None:
    assert grave(build(), ["SYS003"]) == [("SYS003", role)]


def adapter_off() -> RLHFSetup:
    policy = adapted(zoo.decoder("llama"), init_lora_weights=False)
    return zoo.healthy_setup("llama").but(policy=policy, reference=AdapterOff(policy))


def hydra() -> RLHFSetup:
    made = plain.healthy()
    made["policy"].body.requires_grad_(False)
    return RLHFSetup.from_mapping(made | {"reference": Hydra(made["policy"])})


def hydra_by_optimizer() -> RLHFSetup:
    made = plain.healthy()
    trained = [*made["policy"].to_logits.parameters(), *made["value"].parameters()]
    return RLHFSetup.from_mapping(
        made | {"reference": Hydra(made["policy"]), "optimizers": [torch.optim.Adam(trained, lr=1e-5)]}
    )


def one_frozen_base_under_two_adapters() -> RLHFSetup:
    base = zoo.decoder("llama", "token").requires_grad_(False)
    value = nn.Module()
    value.base = base
    setup = zoo.healthy_setup("llama")
    reward = zoo.decoder("llama", "sequence")
    reward.model = base.model
    reward.requires_grad_(False)
    return setup.but(value=base, reward=reward)


def critic_on_the_policys_trunk() -> RLHFSetup:
    made = plain.healthy()
    made["value"].body = made["policy"].body
    return RLHFSetup.from_mapping(made)


@pytest.mark.parametrize(
    "build", [adapter_off, hydra, hydra_by_optimizer, one_frozen_base_under_two_adapters, critic_on_the_policys_trunk]
)
def test_sound_ways_to_share(build: Callable[[], RLHFSetup]) -> None:
    assert grave(build(), ["SYS003"]) == []


def test_sharing_leaves_the_models_as_they_were() -> None:
    setup = shared_embedding()
    before = [p.detach().clone() for role in ("policy", "reference") for p in setup.model(role).parameters()]  # type: ignore[arg-type]
    said(setup, ["SYS003"])
    after = [p for role in ("policy", "reference") for p in setup.model(role).parameters()]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert setup.reference.body.tok is setup.policy.body.tok


def test_backbones() -> None:
    setup = zoo.healthy_setup("llama")
    assert ("SYS004", "reference") in grave(setup.but(reference=zoo.decoder("qwen2")), ["SYS004"])
    wide = copy.deepcopy(setup.policy.config)
    wide.intermediate_size = 96
    assert grave(setup.but(reference=type(setup.policy)(wide)), ["SYS004"]) == [("SYS004", "reference")]
    assert severity_of("SYS004", setup.but(reward=zoo.decoder("gpt2", "sequence"))) == "info"
    assert grave(setup.but(value=zoo.decoder("neox", "sequence")), ["SYS004"]) == [("SYS004", "value")]
    assert grave(written(reward=plain.Scorer(), value=plain.Critic()), ["SYS004"]) == []


def test_vocabularies() -> None:
    setup = zoo.healthy_setup("qwen2")
    small = zoo.decoder("gpt2", "sequence")
    small.resize_token_embeddings(zoo.VOCAB - 20)
    assert grave(setup.but(reward=small), ["SYS005"]) == [("SYS005", "reward")]
    padded = zoo.decoder("qwen2", "token")
    padded.resize_token_embeddings(zoo.VOCAB + 31)
    assert grave(setup.but(value=padded), ["SYS005"]) == []


def test_a_reward_with_its_own_tokenizer_is_sound_and_a_critic_of_it_is_not() -> None:
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<pad>": 3}, unk_token="<unk>")
    )
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    reward, value = zoo.decoder("gpt2", "sequence"), zoo.decoder("gpt2", "token")
    for model in (reward, value):
        model.resize_token_embeddings(len(own))
    setup = zoo.healthy_setup("llama").but(reward=reward, reward_tokenizer=own)
    assert grave(setup, ["SYS005"]) == []
    assert severity_of("SYS005", setup) == "info"
    assert ("SYS005", "value") in grave(setup.but(value=value), ["SYS005"])


LENGTHS = {"prompt_length": 100, "response_length": 100}


def test_context() -> None:
    assert [c for c, _ in grave(zoo.healthy_setup("gpt2").but(declared=LENGTHS), ["SYS006"])] == ["SYS006"]
    assert grave(zoo.healthy_setup("gpt2").but(declared={"prompt_length": 60, "response_length": 60}), ["SYS006"]) == []
    assert grave(written(declared={"prompt_length": 150, "response_length": 150}), ["SYS006"]) == [("SYS006", "setup")]
    assert grave(written(declared={"prompt_length": 90, "response_length": 90}), ["SYS006"]) == []


def test_scaled_rotary_positions_reach_further() -> None:
    model = zoo.decoder("llama")
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    setup = RLHFSetup(policy=model, declared=LENGTHS)
    assert grave(setup, ["SYS006"], Stage.STATIC) == []


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2"])
def test_whole_checkpoints_lack_nothing_and_maimed_ones_do(family: str, tmp_path: Path) -> None:
    folders = {
        kind: checkpoints.save(zoo.decoder(family, kind), tmp_path / kind) for kind in ("causal", "sequence", "token")
    }
    setup = RLHFSetup(
        policy=str(folders["causal"]),
        reward=str(folders["sequence"]),
        value=str(folders["token"]),
        tokenizer=zoo.tokenizer(),
    )
    assert grave(setup, ["SYS007"]) == []
    rewrite(
        folders["causal"],
        lambda t: {n: v for n, v in t.items() if not n.endswith("layernorm.weight") and "ln_1" not in n},
    )
    assert grave(setup, ["SYS007"], Stage.STATIC) == [("SYS007", "policy")]
    rewrite(folders["sequence"], lambda t: {f"module.{n}": v for n, v in t.items()})
    assert ("SYS007", "reward") in grave(setup, ["SYS007"], Stage.STATIC)


def test_a_heads_bias_that_its_class_drops(tmp_path: Path) -> None:
    folder = checkpoints.save(zoo.decoder("llama", "sequence"), tmp_path / "reward")
    rewrite(folder, lambda t: t | {"score.bias": torch.ones(1)})
    assert severity_of("SYS007", RLHFSetup(reward=str(folder), tokenizer=zoo.tokenizer())) == "warning"


def test_pickles_and_code(tmp_path: Path) -> None:
    folder = checkpoints.as_pickle(checkpoints.save(zoo.decoder("llama"), tmp_path / "plain"))
    assert severity_of("SYS010", RLHFSetup(policy=str(folder))) == "info"
    checkpoints.edit(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert grave(RLHFSetup(policy=str(folder)), ["SYS010"], Stage.STATIC) == []
    checkpoints.edit(folder, model_type="own")
    assert grave(RLHFSetup(policy=str(folder)), ["SYS010"], Stage.STATIC) == [("SYS010", "policy")]


class Opens:
    def __reduce__(self) -> Any:
        return open, ("/dev/null",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_imports_is_named_without_being_loaded(legacy: bool, tmp_path: Path) -> None:
    folder = checkpoints.save(zoo.decoder("llama", "sequence"), tmp_path / "reward")
    state = load_file(folder / "model.safetensors")
    torch.save({**state, "extra": Opens()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()
    found = [m for code, _, _, m in said(RLHFSetup(reward=str(folder)), ["SYS010"], Stage.STATIC) if code == "SYS010"]
    assert "io.open" in found[0] or "builtin" in found[0]


def saved_adapter(tmp_path: Path, kind: str, **options: Any) -> Path:
    base = checkpoints.save(zoo.decoder("llama", kind), tmp_path / f"base-{kind}")
    model = zoo.decoder("llama", kind)
    model.name_or_path = str(base)
    return checkpoints.save(adapted(model, **options), tmp_path / "adapter")


def test_adapters(tmp_path: Path) -> None:
    lost = saved_adapter(tmp_path, "causal", task_type="CAUSAL_LM")
    assert grave(RLHFSetup(reward=str(lost)), ["SYS011"], Stage.STATIC) == [("SYS011", "reward")]
    assert grave(RLHFSetup(policy=str(lost)), ["SYS011"], Stage.STATIC) == []


def test_a_reward_adapter_with_its_head_is_sound(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, "sequence", task_type="SEQ_CLS")
    assert grave(RLHFSetup(reward=str(folder)), ["SYS011"], Stage.STATIC) == []
    assert grave(RLHFSetup(policy=str(folder)), ["SYS011"], Stage.STATIC) == [("SYS011", "policy")]


def test_an_adapter_in_memory_on_a_base_of_another_name() -> None:
    policy = adapted(zoo.decoder("llama"), task_type="CAUSAL_LM")
    policy.peft_config["default"].base_model_name_or_path = "org/one"
    policy.config._name_or_path = "elsewhere/One"
    assert grave(RLHFSetup(policy=policy), ["SYS011"]) == []
    policy.config._name_or_path = "org/two"
    told = policy.config.to_dict().get("_name_or_path")
    assert grave(RLHFSetup(policy=policy), ["SYS011"]) == ([("SYS011", "policy")] if told else [])


def test_materials() -> None:
    assert grave(written(value=plain.Critic().to("meta")), ["SYS012"]) == [("SYS012", "value")]
    blank = zoo.decoder("gpt2", "sequence")
    for p in blank.parameters():
        nn.init.constant_(p, 0.1)
    assert grave(zoo.healthy_setup("gpt2").but(reward=blank), ["SYS012"]) == [("SYS012", "reward")]
    zero_head = zoo.decoder("llama", "token")
    nn.init.zeros_(zero_head.score.weight)
    policy = adapted(zoo.decoder("llama"))
    assert grave(zoo.healthy_setup("llama").but(policy=policy, value=zero_head), ["SYS012"]) == []


def test_no_system_check_needs_torch_at_the_static_stage(healthy_files: RLHFSetup) -> None:
    import subprocess
    import sys

    folders = {role: str(healthy_files.path(role)) for role in ("policy", "reference", "reward", "value")}
    code = (
        "import json, sys; from rlhf_doctor import RLHFSetup, examine; from rlhf_doctor.examine import Options\n"
        "from rlhf_doctor.finding import Stage\n"
        f"s = RLHFSetup(**json.loads({json.dumps(folders)!r}), declared={{'algorithm': 'ppo'}})\n"
        "examine(s, select=('system', 'tokens', 'config'), options=Options(stage=Stage.STATIC))\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0

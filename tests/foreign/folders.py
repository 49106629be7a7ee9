"""Setups of Hugging Face checkpoint folders as other people's scripts leave them: one function a case."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo

CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str | None, str | None]] = {}
DECLARED = {"algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "prompt_length": 16, "response_length": 32}


def case(code: str | None = None, role: str | None = None) -> Callable[[Any], Any]:
    def register(build: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
        CASES[build.__name__] = (build, code, role)
        return build

    return register


def saved(model: Any, folder: Path, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or zoo.tokenizer()).save_pretrained(folder)
    return str(folder)


def healthy(folder: Path, family: str = "qwen2", **changes: Any) -> dict[str, Any]:
    lm = zoo.decoder(family)
    made: dict[str, Any] = {
        "policy": saved(lm, folder / "sft"),
        "reference": str(folder / "sft"),
        "reward": saved(zoo.decoder(family, "sequence", seed=1), folder / "rm"),
        "value": str(folder / "rm"),
        "tokenizer": str(folder / "sft"),
        "declared": dict(DECLARED),
    }
    return made | changes


def edit(path: str, name: str, **changes: Any) -> None:
    file = Path(path) / name
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "<drop>"}))


def rewrite(path: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    file = str(Path(path) / "model.safetensors")
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


@case()
def qwen_in_folders(folder: Path) -> dict[str, Any]:
    return healthy(folder)


@case()
def neox_in_folders(folder: Path) -> dict[str, Any]:
    return healthy(folder, "neox")


@case()
def gpt2_whose_pad_is_its_eos(folder: Path) -> dict[str, Any]:
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    lm, rm = zoo.decoder("gpt2"), zoo.decoder("gpt2", "sequence", seed=1)
    for model in (lm, rm):
        model.config.pad_token_id = 2
    lm.generation_config.pad_token_id = 2
    paths = saved(lm, folder / "sft", tokenizer), saved(rm, folder / "rm", tokenizer)
    return {
        "policy": paths[0], "reference": paths[0], "reward": paths[1], "value": paths[1], "tokenizer": paths[0],
        "declared": dict(DECLARED),
    }  # fmt: skip


@case()
def embedding_padded_to_a_multiple(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    big = zoo.decoder("qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        big.resize_token_embeddings(128)
    saved(big, folder / "sft")
    return made


@case()
def two_stop_ids_in_the_generation_config(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    edit(made["policy"], "generation_config.json", eos_token_id=[2, 5])
    edit(made["policy"], "config.json", eos_token_id=[2, 5])
    return made


@case()
def sharded_bfloat16(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    shutil.rmtree(folder / "sft")
    zoo.decoder("qwen2").bfloat16().save_pretrained(folder / "sft", max_shard_size="20KB")
    zoo.tokenizer().save_pretrained(folder / "sft")
    return made


@case()
def lora_policy_over_its_base(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    made = healthy(folder)
    with warnings.catch_warnings():  # of what the library itself is about to rename
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(made["policy"]),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
    return made | {"policy": saved(adapted, folder / "lora"), "reference": "adapter-off"}


@case("SYS002", "reward")
def language_model_as_reward(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    return made | {"reward": made["policy"]}


@case("SYS002", "value")
def language_model_as_critic(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    return made | {"value": saved(zoo.decoder("qwen2", seed=5), folder / "critic")}


@case("SYS002", "policy")
def classifier_as_policy(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    return made | {"policy": made["reward"], "reference": made["reward"]}


@case("REW003", "reward")
def reward_head_not_saved(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["value"] = saved(zoo.decoder("qwen2", "token", seed=2), folder / "critic")
    rewrite(made["reward"], lambda t: {k: v for k, v in t.items() if not k.startswith("score")})
    return made


@case("REW003", "reward")
def reward_head_saved_under_another_name(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["value"] = saved(zoo.decoder("qwen2", "token", seed=2), folder / "critic")
    rewrite(made["reward"], lambda t: {("my_head" + k[5:] if k.startswith("score") else k): v for k, v in t.items()})
    return made


@case("REW002", "reward")
def reward_with_the_default_two_labels(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["value"] = saved(zoo.decoder("qwen2", "token", seed=2), folder / "critic")
    config = zoo.decoder("qwen2").config
    config.num_labels = 2
    two = transformers.Qwen2ForSequenceClassification(config)
    return made | {"reward": saved(two, folder / "two")}


@case("SYS007", "policy")
def policy_saved_with_a_wrappers_prefix(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["reference"] = saved(zoo.decoder("qwen2"), folder / "ref")
    rewrite(made["policy"], lambda t: {"pretrained_model." + k: v for k, v in t.items()})
    return made


@case("SYS007", "policy")
def policy_lacks_a_layer(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["reference"] = saved(zoo.decoder("qwen2"), folder / "ref")
    rewrite(made["policy"], lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k})
    return made


@case("SYS004", None)
def reference_is_another_size(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    config = zoo.decoder("qwen2").config
    config.num_hidden_layers = 3
    config.layer_types = None
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**config.to_dict(), "layer_types": None}))
    return made | {"reference": saved(other, folder / "other")}


@case("SYS005", None)
def critic_of_another_vocabulary(folder: Path) -> dict[str, Any]:
    import tokenizers

    made = healthy(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, zoo.VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    return made | {"value": saved(zoo.decoder("qwen2", "token", seed=2), folder / "critic", other)}


@case("SYS006", None)
def context_shorter_than_prompt_and_response(folder: Path) -> dict[str, Any]:
    made = healthy(folder, "gpt2")
    return made | {"declared": DECLARED | {"prompt_length": 100, "response_length": 100}}


@case("SYS010", "policy")
def policy_needs_remote_code(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    edit(
        made["policy"],
        "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    return made | {"reference": saved(zoo.decoder("qwen2"), folder / "ref")}


@case("SYS011", "policy")
def adapter_on_another_base(folder: Path) -> dict[str, Any]:
    made = lora_policy_over_its_base(folder)
    wide = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**zoo.decoder("qwen2").config.to_dict(), "hidden_size": 64, "layer_types": None})
    )
    base = saved(wide, folder / "wide")
    edit(made["policy"], "adapter_config.json", base_model_name_or_path=base)
    return made | {"reference": base}


@case("TOK002", None)
def no_pad_token_anywhere(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    for path in (made["policy"], made["reward"]):
        edit(path, "config.json", pad_token_id=None)
        edit(path, "tokenizer_config.json", pad_token="<drop>")
    edit(made["policy"], "generation_config.json", pad_token_id="<drop>")
    return made


@case("TOK002", "reward")
def pad_id_outside_the_rewards_embedding(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    edit(made["reward"], "config.json", pad_token_id=4000)
    return made


@case("TOK003", None)
def eos_of_the_tokenizer_is_another(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    edit(made["policy"], "config.json", eos_token_id=7)
    edit(made["policy"], "generation_config.json", eos_token_id=7)
    return made


@case("ROL002", None)
def shipped_generation_config_filters_tokens(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    edit(made["policy"], "generation_config.json", do_sample=True, top_p=0.8, top_k=20, repetition_penalty=1.05)
    return made


@case("PRE003", None)
def bfloat16_checkpoint_run_in_float16(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    zoo.decoder("qwen2").bfloat16().save_pretrained(folder / "sft")
    return made | {"declared": DECLARED | {"dtype": "float16"}}


@case("CFG004", "value")
def critic_path_is_not_there(folder: Path) -> dict[str, Any]:
    return healthy(folder) | {"value": str(folder / "criitc")}


@case("REF002", "reference")
def reference_is_another_run(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    return made | {"reference": saved(zoo.decoder("qwen2", seed=8), folder / "older")}


@case("VAL007", "value")
def critic_head_not_in_its_checkpoint(folder: Path) -> dict[str, Any]:
    made = healthy(folder)
    made["value"] = saved(zoo.decoder("qwen2", "token", seed=2), folder / "critic")
    rewrite(made["value"], lambda t: {k: v for k, v in t.items() if not k.startswith("score")})
    return made | {"declared": DECLARED | {"value_init": "reward"}}

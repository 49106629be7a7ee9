"""Checkpoint folders in the layouts that frameworks write, made from tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from zoo import decoder, tokenizer

from rlhf_doctor.instruments.loading import quiet

HEAD = torch.linspace(-1, 1, 32)[None]  # (1, H)


def save(model: Any, path: Path, **options: Any) -> Path:
    with quiet():
        model.save_pretrained(path, **options)
    return path


def edit(path: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


def as_pickle(path: Path) -> Path:
    """The same folder with pytorch_model.bin in place of model.safetensors."""
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def trl_value_head(path: Path, family: str = "llama") -> Path:
    """TRL's AutoModelForCausalLMWithValueHead: the LM's own names, and v_head.summary beside them."""
    save(decoder(family), path)
    tensors = load_file(path / "model.safetensors")
    tensors |= {"v_head.summary.weight": HEAD.clone(), "v_head.summary.bias": torch.tensor([0.5])}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def llamafactory_value_head(path: Path) -> Path:
    """LLaMA-Factory: the LM, and value_head.safetensors beside it."""
    save(decoder("llama"), path)
    tensors = {"v_head.summary.weight": HEAD.clone(), "v_head.summary.bias": torch.tensor([0.5])}
    save_file(tensors, path / "value_head.safetensors", {"format": "pt"})
    return path


def deepspeed_chat(path: Path) -> Path:
    """DeepSpeed-Chat: rwtransformer.* and v_head.weight in one pickle, config.json of the base LM."""
    lm = save(decoder("llama"), path)
    state = {f"rwtransformer.{k}": v for k, v in decoder("llama").model.state_dict().items()}
    torch.save({**state, "v_head.weight": HEAD.clone()}, lm / "pytorch_model.bin")
    (lm / "model.safetensors").unlink()
    return edit(path, id2label=None, label2id=None)


def openrlhf(path: Path, head: str = "score", **config: Any) -> Path:
    """OpenRLHF: the backbone under its prefix, a head of the configured name, config.json of the base LM."""
    save(decoder("llama"), path)
    state = {f"model.{k}": v for k, v in decoder("llama").model.state_dict().items()}
    save_file({**state, f"{head}.weight": HEAD.clone()}, path / "model.safetensors", {"format": "pt"})
    return edit(path, id2label=None, label2id=None, value_head_prefix=head, **config)


def lora(path: Path, base: Path, task: str = "CAUSAL_LM", auto: str = "AutoModelForCausalLM", **labels: Any) -> Path:
    """A PEFT adapter folder whose base is a folder."""
    import peft

    with quiet():
        model = getattr(transformers, auto).from_pretrained(base, **labels)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(path)
    return path


def with_tokenizer(path: Path) -> Path:
    tokenizer("left").save_pretrained(path)
    return path

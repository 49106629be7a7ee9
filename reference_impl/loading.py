"""Models and prompts from disk: any Hugging Face causal language model and reward model that share a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from reference_impl import roles
from reference_impl.roles import Models

__all__ = ["Unusable", "load_models", "load_prompts"]

hf: Any = transformers  # its constructors are not annotated


class Unusable(ValueError):
    """Something given cannot be used; the message is one sentence that names it."""


def _load(auto: Any, folder: Path, kind: str) -> Any:
    """The folder's model in float32, without dropout; the folder must have every one of its weights."""
    if not (folder / "config.json").is_file():
        raise Unusable(f"there is no checkpoint in {folder}: it has no config.json")
    try:
        model, found = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise Unusable(f"{folder} cannot be read as a {kind}: {str(error).strip().splitlines()[0]}") from error
    if found["missing_keys"]:
        raise Unusable(f"{folder} is no {kind}: it has no weights for {min(found['missing_keys'])}")
    return model.eval().requires_grad_(True)


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise Unusable(f"there is no tokenizer in {folder} that can be read") from error
    if tokenizer.eos_token_id is None:
        raise Unusable(f"the tokenizer in {folder} has no end of sequence, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks go by the first end of sequence, not by padding
    return tokenizer


@torch.no_grad()
def _assert_plain(model: Any, folder: Path, read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """This package goes from body to head by itself; a model that does more in between (a softcap, a scale) differs."""
    ids = torch.arange(4)[None]
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten()
    if not torch.allclose(read(ids, torch.ones_like(ids)).flatten()[-len(whole) :], whole, rtol=1e-3, atol=1e-3):
        raise Unusable(f"{folder} ({type(model).__name__}) does more than its head does to the last hidden states")


def load_models(policy: Path, reward: Path, value: Path | None = None, tokenizer: Path | None = None) -> Models:
    """Policy, reward model and critic from their folders, the tokenizer from the policy's if there is no other.

    The reference is a frozen copy of the policy; without `value` the critic is one of the reward model. Raises
    Unusable for what is not there, is not such a model, or does not read the policy's vocabulary.
    """
    answers = _load(hf.AutoModelForCausalLM, policy, "causal language model")
    scores = roles.freeze(_load(hf.AutoModelForSequenceClassification, reward, "reward model"))
    if scores.num_labels != 1:
        raise Unusable(f"the reward model in {reward} gives {scores.num_labels} numbers a response, not one")
    if value:
        critic = _load(hf.AutoModelForTokenClassification, value, "critic of one value a token")
    else:
        fresh = hf.AutoModelForTokenClassification.from_config(scores.config, dtype=torch.float32)
        critic = roles.critic_from_reward(scores, fresh)
    words = _load_tokenizer(tokenizer or policy)
    for role, folder, model in (("policy", policy, answers), ("reward", reward, scores), ("value", value, critic)):
        tokens = model.get_input_embeddings().weight.shape[0]
        if folder and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            same = (vocabulary := _load_tokenizer(folder).get_vocab()) == words.get_vocab()
            tokens = len(vocabulary) if not same else tokens
        else:
            same = tokens >= len(words)
        if not same or tokens < len(words):
            raise Unusable(
                f"the {role} model in {folder} has another vocabulary ({tokens} tokens) than the policy's tokenizer "
                f"({len(words)}); all four models must read the same"
            )
    _assert_plain(answers, policy, lambda ids, mask: answers.lm_head(roles.hidden_states(answers, ids, mask)))
    _assert_plain(scores, reward, lambda ids, mask: roles.scalars(scores, ids, mask))
    return Models(answers, roles.frozen_copy(answers), scores, critic, words)


def load_prompts(file: Path, models: Models, response_length: int) -> list[str]:
    """The file's prompts: one a line, or in a .jsonl file one object with "prompt" a line.

    Raises Unusable where there is none, or one that with its response is longer than a model's context.
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
    except OSError as error:
        raise Unusable(f"the prompts {file} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f'{file} must have one JSON object with "prompt" a line') from error
    if not prompts:
        raise Unusable(f"there is no prompt in {file}")
    tokens, number = max((len(ids), i) for i, ids in enumerate(models.tokenizer(prompts)["input_ids"], 1))
    for role in ("policy", "reward", "value"):
        context = getattr(getattr(models, role).config, "max_position_embeddings", None)
        if context is not None and tokens + response_length > context:
            raise Unusable(
                f"prompt {number} of {file} has {tokens} tokens, with a response of {response_length} more than the "
                f"{role} model's context of {context}"
            )
    return prompts

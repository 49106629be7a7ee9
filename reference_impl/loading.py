"""Models and prompts from disk: any Hugging Face causal language model and reward model that share a tokenizer."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from reference_impl import roles
from reference_impl.roles import Models
from reference_impl.rollout import encode_prompts


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
    Unusable for what is not there, is not such a model, or was trained with another tokenizer."""
    answers = _load(hf.AutoModelForCausalLM, policy, "causal language model")
    scores = roles.freeze(_load(hf.AutoModelForSequenceClassification, reward, "reward model"))
    if scores.num_labels != 1:
        raise Unusable(f"the reward model in {reward} gives {scores.num_labels} numbers a response, not one")
    _assert_plain(answers, policy, lambda *x: answers.get_output_embeddings()(roles.hidden_states(answers, *x)))
    _assert_plain(scores, reward, lambda *x: roles.scalars(scores, *x))
    if value:
        critic = _load(hf.AutoModelForTokenClassification, value, "critic of one value a token")
    else:
        critic = hf.AutoModelForTokenClassification.from_config(scores.config, dtype=torch.float32)
        critic = roles.critic_from_reward(scores, critic)
    words = _load_tokenizer(tokenizer or policy)
    for folder in (x for x in (policy, reward, value) if x and (x / "tokenizer_config.json").exists()):
        if _load_tokenizer(folder).get_vocab() != words.get_vocab():
            raise Unusable(f"{folder} has another vocabulary than {tokenizer or policy}; all models must share one")
    return Models(answers, roles.freeze(deepcopy(answers)), scores, critic, words)


def load_prompts(file: Path, models: Models, response_length: int) -> list[str]:
    """The file's prompts: one a line, or in a .jsonl file one object with "prompt" a line.
    Raises Unusable where there is none, or one that with its response is longer than a model's context."""
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
        if not prompts:
            raise ValueError("there is no prompt to answer")
        roles.check_models(models, encode_prompts(models.tokenizer, prompts)[0], response_length)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise Unusable(f'{file} must have one JSON object with "prompt" a line') from error
    except (OSError, ValueError) as error:
        raise Unusable(f"{error} (prompts: {file})") from error
    return prompts

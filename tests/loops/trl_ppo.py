"""TRL's own PPOTrainer on tiny Llamas; one step is one whole ``train()`` of a single batch.

As a script, ``python trl_ppo.py [FAULT]``, it trains three batches and prints what TRL logs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

FAULTS: dict[str, tuple[str, str]] = {
    "kl_coef_differs": ("KLD003", "loop"),
    "kl_estimator_k3": ("KLD004", "loop"),
    "kl_coef_negative": ("KLD002", "loop"),
    "gamma_left_at_the_default": ("ADV001", "loop"),
    "lam_differs": ("ADV001", "loop"),
    "missing_eos_penalty_is_negative": ("REW014", "loop"),
    "missing_eos_penalty_left_at_none": ("REW014", "loop"),
    "vf_coef_zero": ("LOS004", "loop"),
    "cliprange_in_percent": ("LOS002", "loop"),
    "reference_is_the_policy": ("REF005", "reference"),
    "reference_without_mask": ("REF006", "reference"),
    "rewards_replaced_with_zero": ("VAL009", "value"),
    "scores_of_the_reversed_batch": ("ROL009", "loop"),
    "scores_clipped_at_0_01": ("ADV009", "loop"),
    "advantages_not_whitened": ("ADV004", "loop"),
    "whitening_counts_the_pads": ("ADV004", "loop"),
    "logprobs_of_the_token_before": ("ROL004", "loop"),
    "samples_at_temperature_one": ("ROL001", "loop"),
    "values_of_the_state_before": ("VAL013", "value"),
    "critic_frozen": ("VAL008", "value"),
    "optimizer_step_lost": ("OPT002", "policy"),
    "gradients_not_zeroed": ("OPT004", "loop"),
    "stop_token_left_at_none": ("ROL005", "loop"),
    "accumulation_swallows_the_minibatches": ("LOS007", "loop"),
    "seeded_in_every_step": ("ROL007", "loop"),
}
ALSO = {"rewards_replaced_with_zero": ("ADV008",), "optimizer_step_lost": ("VAL008",)}
EDGE: set[str] = {"cliprange_in_percent"}  # an ordinary batch does not show these
NOT_FINITE: set[str] = set()

SPOKEN = (
    "hello good morning please help me with this code bug test fails passes why how what is the answer line file open "
    "close read write run stop start it works now never again thanks sure yes no maybe try another way first then last "
    "one two three of in on"
)
WORDS = SPOKEN.split()
PROMPTS = [
    "please help me with this code",
    "why is the test",
    "how it works",
    "good morning",
    "what fails now",
    "read the file then write one line",
    "try another way",
    "this bug never stop",
    "open the last file",
    "run it again please",
    "the answer is",
    "start",
]
PAD, EOS, UNK = 0, 1, 2
GAMMA, LAM, KL, TEMPERATURE, CLIP, VALUE_CLIP, VF, NO_EOS, LR = 0.97, 0.95, 0.05, 0.7, 0.2, 0.2, 0.1, 1.0, 3e-4
BATCH, MINIBATCHES, EPOCHS, RESPONSE = 8, 2, 2, 8


def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@contextlib.contextmanager
def generators_as_they_were() -> Iterator[None]:
    was = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(was[0])
        np.random.set_state(was[1])
        torch.set_rng_state(was[2])


def tiny(kind: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=3 + len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.15,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
            num_labels=1,
        )
    )


def patches(fault: str | None, policy: Any, reference: Any, reward: Any, value: Any) -> list[Any]:
    """What somebody has edited in TRL."""
    get_reward, forward = ppo_trainer.get_reward, ppo_trainer.forward
    whiten, pick = ppo_trainer.masked_whiten, ppo_trainer.selective_log_softmax

    def judge(model: Any, ids: torch.Tensor, pad: int, start: int) -> Any:
        every, last, lengths = get_reward(model, ids, pad, start)
        if model is reward and fault == "rewards_replaced_with_zero":
            last = torch.zeros_like(last)
        elif model is reward and fault == "scores_of_the_reversed_batch":
            last = last.flip(0)
        elif model is reward and fault == "scores_clipped_at_0_01":
            last = last.clamp(-0.01, 0.01)
        elif model is value and fault == "values_of_the_state_before":
            every = every.roll(1, 1)
        return every, last, lengths

    def pass_over(model: Any, ids: torch.Tensor, pad: int) -> Any:
        if model is reference and fault == "reference_is_the_policy":
            model = policy
        elif model is reference and fault == "reference_without_mask":
            return model(input_ids=ids, return_dict=True, output_hidden_states=True)
        return forward(model, ids, pad)

    def generation(**options: Any) -> Any:
        return ppo_trainer_generation_config(**{**options, "temperature": 1.0})

    ppo_trainer_generation_config = ppo_trainer.GenerationConfig
    edited: dict[str, tuple[str, Any]] = {
        "advantages_not_whitened": ("masked_whiten", lambda x, mask, shift_mean=True: x),
        "whitening_counts_the_pads": (
            "masked_whiten",
            lambda x, mask, shift_mean=True: whiten(x, torch.ones_like(mask), shift_mean),
        ),
        "logprobs_of_the_token_before": ("selective_log_softmax", lambda x, ids: pick(x, ids.roll(1, 1))),
        "samples_at_temperature_one": ("GenerationConfig", generation),
    }
    for name in (
        "rewards_replaced_with_zero",
        "scores_of_the_reversed_batch",
        "scores_clipped_at_0_01",
        "values_of_the_state_before",
    ):
        edited[name] = ("get_reward", judge)
    for name in ("reference_is_the_policy", "reference_without_mask"):
        edited[name] = ("forward", pass_over)
    return [mock.patch.object(ppo_trainer, *edited[fault])] if fault in edited else []


def trainer_of(fault: str | None, batches: int) -> PPOTrainer:
    tok = words()
    policy = tiny(LlamaForCausalLM, 51)
    with torch.no_grad():  # a direction that all states share: about half of the responses end in time
        policy.model.embed_tokens.weight[:, :4] += 0.3
        state = policy.model(torch.randint(3, 3 + len(WORDS), (8, 8))).last_hidden_state.mean((0, 1))
        policy.lm_head.weight[EOS] = 2.0 * state / state.square().sum()
        policy.lm_head.weight[[PAD, UNK]] -= 8.0 * state / state.square().sum()
    reference = copy.deepcopy(policy).requires_grad_(False)
    reward = tiny(LlamaForSequenceClassification, 52).requires_grad_(False)
    value = copy.deepcopy(reward).requires_grad_(fault != "critic_frozen")
    swallowed = fault == "accumulation_swallows_the_minibatches"
    options: dict[str, Any] = {
        "output_dir": os.path.join(tempfile.gettempdir(), "trl-ppo"),
        "per_device_train_batch_size": BATCH // MINIBATCHES if swallowed else BATCH,
        "gradient_accumulation_steps": MINIBATCHES if swallowed else 1,
        "num_mini_batches": MINIBATCHES,
        "num_ppo_epochs": EPOCHS,
        "total_episodes": BATCH * batches,
        "response_length": RESPONSE,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "temperature": TEMPERATURE,
        "gamma": GAMMA,
        "lam": LAM,
        "kl_coef": KL,
        "cliprange": CLIP,
        "cliprange_value": VALUE_CLIP,
        "vf_coef": VF,
        "missing_eos_penalty": NO_EOS,
        "stop_token": "eos",
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    changed: dict[str, dict[str, Any]] = {
        "kl_coef_differs": {"kl_coef": 0.5},
        "kl_estimator_k3": {"kl_estimator": "k3"},
        "kl_coef_negative": {"kl_coef": -KL},
        "gamma_left_at_the_default": {"gamma": 1.0},
        "lam_differs": {"lam": 0.5},
        "missing_eos_penalty_is_negative": {"missing_eos_penalty": -NO_EOS},
        "missing_eos_penalty_left_at_none": {"missing_eos_penalty": None},
        "vf_coef_zero": {"vf_coef": 0.0},
        "cliprange_in_percent": {"cliprange": 20.0},
        "stop_token_left_at_none": {"stop_token": None},
    }
    rows = Dataset.from_dict({"input_ids": [tok(p)["input_ids"] for p in PROMPTS]})
    return PPOTrainer(
        args=PPOConfig(**(options | changed.get(fault or "", {}))),
        processing_class=tok,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
    )


def build(fault: str | None = None, batches: int = 1) -> dict[str, Any]:
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}")
    with generators_as_they_were():
        trainer = trainer_of(fault, batches)
    if batches == 1:
        trainer.remove_callback(PrinterCallback)
    policy, reference, reward = trainer.policy_model, trainer.ref_model, trainer.reward_model
    value = trainer.value_model
    if fault == "optimizer_step_lost":
        trainer.optimizer.step = lambda *_, **__: None
    elif fault == "gradients_not_zeroed":
        trainer.optimizer.zero_grad = lambda *_, **__: None

    def step() -> None:
        if fault == "seeded_in_every_step":
            torch.manual_seed(3)
            np.random.seed(3)
        with contextlib.ExitStack() as stack:
            for patch in patches(fault, policy, reference, reward, value):
                stack.enter_context(patch)
            trainer.train()

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": value,
        "tokenizer": trainer.processing_class,
        "prompts": list(PROMPTS),
        "step": step,
        "optimizers": [trainer.optimizer],
        "state": [trainer.lr_scheduler],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": False,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": VALUE_CLIP,
            "vf_coef": VF,
            "ent_coef": 0.0,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "missing_eos_penalty": NO_EOS,
            "learning_rate": LR,
            "critic_learning_rate": LR,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": BATCH,
            "prompt_length": 7,
            "response_length": RESPONSE,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "reward",
            "loss_aggregation": "token-mean",
        },
    }


def main() -> None:
    torch.manual_seed(0)
    build(sys.argv[1] if len(sys.argv) > 1 else None, batches=3)["step"]()


if __name__ == "__main__":
    main()

"""A setup of the reference itself, built in seconds: what a healthy four-model RLHF looks like from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reference_impl import ppo, reward_modeling, roles, scale, sft, task
from reference_impl.roles import Models
from reference_impl.rollout import Rollout, encode_prompts, sample

__all__ = ["assemble", "build_models", "build_setup", "build_tokenizer", "save_checkpoints"]

POSITIONS = 64  # more than the longest prompt (10 tokens) and response (20)
hf: Any = transformers  # its constructors are not annotated
ROLES = ("policy", "reference", "reward", "value")
ALGORITHM = {"algorithm": "ppo", "kl_estimator": "k1", "kl_in": "reward", "top_k": 0, "top_p": 1.0, "ent_coef": 0.0}
MODELS = {"reference": "policy", "value_init": "reward", "policy_init": "sft", "shared_trunk": False}
DECLARED = ALGORITHM | MODELS | {"loss_aggregation": "token-mean", "dense_rewards": False}  # what is no setting
TASK = ppo.Settings(batch_size=64, learning_rate=3e-4, critic_learning_rate=1e-3, kl_coef=0.05)  # what suits the task
DISK = ppo.Settings(learning_rate=3e-6, critic_learning_rate=3e-6, response_length=64)  # learning rates of [N+]


def build_tokenizer() -> Any:
    """One token a word and a mark: decoding and encoding again gives the same tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *task.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", words["<s>"])])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: Any, **head: Any) -> Any:
    return hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size): copying the noun is then learnt ten times sooner
        **head,
    )


def build_models(
    seed: int,
    *,
    trained: bool,
    demonstrations: int = 2048,
    pairs: int = 2048,
    noise: float = 0.0,
    reward_learning_rate: float = 4e-3,
    report: Callable[[str], None] = lambda _: None,
) -> Models:
    """The four models, after SFT and reward modelling, or with random weights if not `trained`.

    Training sees that many `demonstrations`, and `pairs` with labels of that `noise`. `report` is told how it goes.
    Leaves the global generators alone.
    """

    def follow(phase: str, losses: Iterator[float]) -> None:
        for i, loss in enumerate(losses, 1):
            if i % 32 == 0:
                report(f"{phase:<6} batch {i:4d}  loss {loss:.3f}")

    rng, tokenizer = Random(seed), build_tokenizer()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        policy: Any = hf.LlamaForCausalLM(_config(tokenizer)).eval()
        policy.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        policy.generation_config.max_new_tokens = task.RESPONSE_LENGTH
        if trained:
            texts = task.demonstrations(demonstrations, rng)
            follow("sft", sft.finetune(policy, tokenizer, texts, batch_size=32, learning_rate=1e-2))
        reference = roles.frozen_copy(policy)

        reward: Any = hf.LlamaForSequenceClassification(_config(tokenizer, num_labels=1)).eval()
        if trained:
            reward.base_model.load_state_dict(policy.base_model.state_dict())
            labelled = task.preference_pairs(pairs, rng, noise=noise)
            rate = reward_learning_rate  # a high one for few and clean pairs
            follow("reward", reward_modeling.train(reward, tokenizer, labelled, batch_size=16, learning_rate=rate))
            prompt = encode_prompts(tokenizer, task.prompts() * 4)
            eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
            rollout = sample(reference, *prompt, T=task.RESPONSE_LENGTH, temperature=1.0, eos=eos, pad=pad)
            reward_modeling.normalize(reward, rollout)
        roles.freeze(reward)
        critic: Any = hf.LlamaForTokenClassification(_config(tokenizer, num_labels=1, classifier_dropout=0.0))
        return Models(policy, reference, reward, roles.critic_from_reward(reward, critic), tokenizer)


def assemble(
    models: Models,
    prompts: Sequence[str],
    preferences: Sequence[tuple[str, str, str]],
    settings: ppo.Settings | None = None,
    parts: ppo.Parts | None = None,
    kl_control: ppo.FixedKL | None = None,
) -> dict[str, Any]:
    """A dict of everything there is to examine, with `step` running one iteration on these very models.

    Other models, `parts` or `settings` make another setup, a faulty one too.
    """
    s, parts = settings or ppo.Settings(), parts or ppo.Parts()
    control = kl_control or ppo.FixedKL(s.kl_coef)
    optimizers = list(ppo.make_optimizers(models, s))
    adaptive, prompts = control if isinstance(control, ppo.AdaptiveKL) else None, list(prompts)

    def step() -> dict[str, float]:
        return ppo.ppo_step(models, prompts, optimizers, s, control, parts)

    return {
        **{role: getattr(models, role) for role in ROLES},
        "tokenizer": models.tokenizer,
        "prompts": prompts,
        "preferences": list(preferences),
        "step": step,
        "optimizers": optimizers,
        "state": [adaptive] if adaptive else [],
        "declared": {
            **{name: x for name, x in asdict(s).items() if x is not None},
            **DECLARED,
            "prompt_length": max(map(len, models.tokenizer(prompts)["input_ids"])),
            "kl_adaptive": adaptive is not None,
            **({"kl_target": adaptive.target, "kl_horizon": adaptive.horizon} if adaptive else {}),
        },
    }


def build_setup(seed: int = 0, *, trained: bool = True) -> dict[str, Any]:
    """A healthy setup, as a dict of what `assemble` gives, in seconds.

    The policy is fine-tuned on the task's demonstrations, the reward model trained on its preference pairs and scaled
    on samples of the reference; with `trained` false both have random weights. The same seed gives the same weights,
    and the caller's random generators are left as they were.
    """
    held_out = task.preference_pairs(128, Random(f"held out {seed}"))
    return assemble(build_models(seed, trained=trained), task.prompts(), held_out)


def judge_reward(models: Models, seed: int, noise: float) -> dict[str, float]:
    """Accuracy on unseen pairs: on labels as noisy as those learnt from, their ceiling, and on clean labels."""
    noisy = task.preference_pairs(1024, Random(f"held out {seed}"), noise=noise)
    turned = [task.gold_score(p, chosen) < task.gold_score(p, rejected) for p, chosen, rejected in noisy]
    clean = [(p, b, a) if wrong else (p, a, b) for wrong, (p, a, b) in zip(turned, noisy, strict=True)]
    on_noisy, on_clean = (reward_modeling.accuracy(models.reward, models.tokenizer, pairs) for pairs in (noisy, clean))
    return {"accuracy": on_noisy, "ceiling": 1 - sum(turned) / len(turned), "clean_accuracy": on_clean}


def gold_scores(tokenizer: Any, drawn: Rollout) -> list[float]:
    """The task's gold score of every response."""
    prompt = drawn.ids[:, : -drawn.mask.shape[1]]
    prompts, responses = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompt, drawn.response))
    return [task.gold_score(*text) for text in zip(prompts, responses, strict=True)]


def mean_gold(policy: Any, tokenizer: Any) -> float:
    """The gold score of some 512 responses to the task's prompts, always from the same random numbers."""
    prompts = (task.prompts() * 8)[: 512 // scale.world() * scale.world()]
    prompt = (x.to(policy.device) for x in encode_prompts(tokenizer, prompts))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = sample(policy, *prompt, T=task.RESPONSE_LENGTH, temperature=1.0, eos=eos, pad=pad)
    return sum(gold := gold_scores(tokenizer, drawn)) / len(gold)


def save_checkpoints(setup: Mapping[str, Any], folder: str | Path, roles: Sequence[str] = ROLES) -> dict[str, Path]:
    """Writes the models, each with the tokenizer, to folder/policy, /reference, /reward and /value as safetensors.

    Returns the folders by role. Raises OSError when the disk is full.
    """
    folders = {role: Path(folder) / role for role in roles}
    bar, logging = transformers.utils.logging.is_progress_bar_enabled(), hf.utils.logging
    logging.disable_progress_bar()
    try:
        for role, path in folders.items():
            weights = get_model_state_dict(
                setup[role], options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if scale.rank() == 0:
                setup[role].save_pretrained(path, state_dict=weights)
                setup["tokenizer"].save_pretrained(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return folders

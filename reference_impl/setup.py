"""A setup of the reference itself, built in seconds: what a healthy four-model RLHF looks like from outside."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers as hf
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reference_impl import ppo, reward_modeling, roles, scale, sft, task
from reference_impl.roles import ROLES, Models
from reference_impl.rollout import Rollout, encode_prompts, sample

POSITIONS = 64  # more than the longest prompt (10 tokens) and response (20)
ALGORITHM = {"algorithm": "ppo", "kl_estimator": "k1", "kl_in": "reward", "top_k": 0, "top_p": 1.0, "ent_coef": 0.0}
MODELS = {"reference": "policy", "value_init": "reward", "policy_init": "sft", "shared_trunk": False}
DECLARED = ALGORITHM | MODELS | {"loss_aggregation": "token-mean", "dense_rewards": False}  # what is no setting
TASK = ppo.Settings(batch_size=64, learning_rate=3e-4, critic_learning_rate=1e-3, kl_coef=0.05)  # what suits the task
DISK = ppo.Settings(learning_rate=3e-6, critic_learning_rate=3e-6, response_length=64)  # learning rates of [N+]


def build_tokenizer() -> Any:
    """One token a word and a mark: decoding and encoding again gives the same tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*special.values(), *task.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    marks = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(marks)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", words["<s>"])])
    how = {"padding_side": "left", "model_max_length": POSITIONS, "clean_up_tokenization_spaces": False}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **how)


def _config(tokenizer: Any, **head: Any) -> Any:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    # A deviation of about 1 / sqrt(hidden_size): copying the noun is then learnt ten times sooner than with 0.02.
    more = {"max_position_embeddings": POSITIONS, "dtype": torch.float32, "initializer_range": 0.1}
    return hf.LlamaConfig(vocab_size=len(tokenizer), **size, **ids, **more, **head)


def build_models(
    seed: int, *, trained: bool, demonstrations: int = 2048, pairs: int = 2048, noise: float = 0.0, rate: float = 4e-3
) -> Models:
    """The four models, after SFT and reward modelling, or with random weights if not `trained`.
    Training sees that many `demonstrations`, and `pairs` with labels of that `noise`, at the learning `rate`, a high
    one for few and clean pairs. Leaves the global generators alone."""
    rng, tokenizer = Random(seed), build_tokenizer()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        policy: Any = hf.LlamaForCausalLM(_config(tokenizer)).eval()
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        policy.generation_config.update(**drawn, max_new_tokens=task.RESPONSE_LENGTH)
        if trained:
            texts = task.demonstrations(demonstrations, rng)
            sft.fit(sft.sft_loss, policy, tokenizer, texts, size=32, rate=1e-2)
        reference = roles.freeze(deepcopy(policy))
        reward: Any = hf.LlamaForSequenceClassification(_config(tokenizer, num_labels=1)).eval()
        if trained:
            reward.base_model.load_state_dict(policy.base_model.state_dict())
            labelled = task.preference_pairs(pairs, rng, noise=noise)
            sft.fit(reward_modeling.preference_loss, reward, tokenizer, labelled, size=16, rate=rate)
            reward_modeling.normalize(reward, answer(reference, tokenizer, task.prompts() * 4))
        roles.freeze(reward)
        critic: Any = hf.LlamaForTokenClassification(_config(tokenizer, num_labels=1, classifier_dropout=0.0))
        return Models(policy, reference, reward, roles.critic_from_reward(reward, critic), tokenizer)


def answer(policy: Any, tokenizer: Any, prompts: list[str]) -> Rollout:
    """A response of the policy to each of the prompts, at temperature 1."""
    prompt = (x.to(policy.device) for x in encode_prompts(tokenizer, prompts))
    special = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    return sample(policy, *prompt, T=task.RESPONSE_LENGTH, temperature=1.0, **special)


def assemble(
    models: Models, prompts: Sequence[str], preferences: Sequence[tuple[str, str, str]],
    settings: ppo.Settings | None = None, parts: ppo.Parts | None = None, kl_control: ppo.FixedKL | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A dict of everything there is to examine, with `step` running one iteration on these very models.
    Other models, `parts` or `settings` make another setup, a faulty one too."""
    s, parts, prompts = settings or ppo.Settings(), parts or ppo.Parts(), list(prompts)
    control, optimizers = kl_control or ppo.FixedKL(s.kl_coef), list(ppo.make_optimizers(models, s))
    adaptive = {f"kl_{name}": getattr(control, name) for name in ("target", "horizon") if hasattr(control, name)}
    return {
        **vars(models),
        "prompts": prompts,
        "preferences": list(preferences),
        "step": lambda: ppo.ppo_step(models, prompts, optimizers, s, control, parts),
        "optimizers": optimizers,
        "state": [control] if adaptive else [],
        "declared": {
            **{name: x for name, x in asdict(s).items() if x is not None},
            **DECLARED,
            "prompt_length": max(map(len, models.tokenizer(prompts)["input_ids"])),
            "kl_adaptive": bool(adaptive),
            **adaptive,
        },
    }


def build_setup(seed: int = 0, *, trained: bool = True) -> dict[str, Any]:
    """A healthy setup, as a dict of what `assemble` gives, in seconds.
    The policy is fine-tuned on the task's demonstrations, the reward model trained on its preference pairs and scaled
    on samples of the reference; with `trained` false both have random weights. The same seed gives the same weights,
    and the caller's random generators are left as they were."""
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gold = gold_scores(tokenizer, answer(policy, tokenizer, prompts))
    return sum(gold) / len(gold)


def save_checkpoints(setup: Mapping[str, Any], folder: str | Path, roles: Sequence[str] = ROLES) -> dict[str, Path]:
    """Writes the models, each with the tokenizer, to folder/policy, /reference, /reward and /value as safetensors.
    Returns the folders by role. Raises OSError when the disk is full."""
    folders, whole = {role: Path(folder) / role for role in roles}, StateDictOptions(True, cpu_offload=True)
    logging, bar = hf.utils.logging, hf.utils.logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        for role, path in folders.items():
            weights = get_model_state_dict(setup[role], options=whole)
            if scale.rank() == 0:
                setup[role].save_pretrained(path, state_dict=weights)
                setup["tokenizer"].save_pretrained(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    return folders

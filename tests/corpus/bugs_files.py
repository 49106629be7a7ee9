"""Bugs of checkpoints: heads, adapters, vocabularies, names of weights, and what a resumed run leaves out."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from foreign import folders
from loops.examined import built
from torch import nn

from corpus.case import case, shipped
from rlhf_doctor.selftest.scorers import TiedCritic
from rlhf_doctor.setups import RLHFSetup

ADAPTED = {
    "qwen2": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "neox": ["query_key_value"],
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Tensors = dict[str, torch.Tensor]


def folder_of(setup: RLHFSetup, role: str) -> str:
    """The checkpoint folder of a role, as text."""
    return str(getattr(setup, role))


def without_head(tensors: Tensors) -> Tensors:
    """All but the weights of the scalar head, which some classes call classifier."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("score", "classifier"))}


def own_critic(made: dict[str, Any], folder: Path, family: str = "qwen2") -> dict[str, Any]:
    """The setup with a critic in a folder of its own, so that a change of the reward model is one of it alone."""
    return made | {"value": folders.saved(zoo.decoder(family, "token", seed=2), folder / "critic")}


def classifier_on(path: str) -> Any:
    """A checkpoint as a sequence classifier of one label; its head is new where the checkpoint has none."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()


def adapter(
    base: Any, path: Path, family: str = "qwen2", *, fresh: bool = False, words: Any = None, **options: Any
) -> str:
    """Put a LoRA adapter on a model, one that has learnt something unless ``fresh``, and save it; gives its folder."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(6)
        adapted = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ADAPTED[family]} | options))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and not fresh:
                nn.init.normal_(parameter, std=0.02)
        return folders.saved(adapted, path, words)


def on_top(base: Any, path: str, **options: Any) -> Any:
    """A saved adapter on a model, for inference unless the options say otherwise."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, path, **options).eval()


def resumed(path: str) -> None:
    """Leave the trainer's state of an interrupted PPO run beside a policy."""
    logged = {
        "step": 120,
        "objective/kl": 3.1,
        "objective/scores": 0.8,
        "loss/policy_avg": -0.02,
        "loss/value_avg": 0.3,
    }
    folders.edit(path, "trainer_state.json", global_step=120, epoch=0.6, max_steps=200, log_history=[logged])


def adapter_in_ppo(folder: Path, family: str) -> dict[str, Any]:
    """A policy that is an adapter saved in the middle of PPO."""
    made = own_critic(folders.healthy(folder, family), folder, family)
    base = transformers.AutoModelForCausalLM.from_pretrained(made["policy"])
    path = adapter(base, folder / "lora", family, task_type="CAUSAL_LM")
    resumed(path)
    return made | {"policy": path}


# ---- the reward model's head ----
shipped("TRL-032", "REW003", "the checkpoint lacks its head", roles="reward")


@case("TRL-032", "folders", roles="reward")
def head_was_not_saved(tmp_path: Path) -> Mapping[str, Any]:
    """The saved reward model holds no score weights."""
    return folders.reward_head_not_saved(tmp_path)


@case("TRL-033", "the reference's files", roles="reward")
def saved_as_a_language_model(healthy_files: RLHFSetup) -> RLHFSetup:
    """The reward model was loaded and saved again as a causal LM, which has no score."""
    path = folder_of(healthy_files, "reward")
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)
    return healthy_files


@case("TRL-033", "folders", roles="reward")
def merged_into_a_language_model(tmp_path: Path) -> Mapping[str, Any]:
    """The reward adapter was merged into the base as a causal LM, without its head."""
    made = own_critic(folders.healthy(tmp_path), tmp_path)
    path = adapter(classifier_on(made["policy"]), tmp_path / "lora")
    merged = on_top(transformers.AutoModelForCausalLM.from_pretrained(made["policy"]), path).merge_and_unload()
    return made | {"reward": folders.saved(merged, tmp_path / "merged")}


shipped("ORL-012", "REW003", "the head is stored under a name that the class does not read", roles="reward")


@case("ORL-012", "folders", roles="reward")
def head_of_another_name(tmp_path: Path) -> Mapping[str, Any]:
    """The head of the reward checkpoint has a name that its class does not know."""
    return folders.reward_head_saved_under_another_name(tmp_path)


@case("TRL-036", "the reference's files", roles="reward")
def bias_that_the_class_lacks(healthy_files: RLHFSetup) -> RLHFSetup:
    """The reward's head was trained with a bias, which the class that loads it does not have."""
    path = folder_of(healthy_files, "reward")
    folders.rewrite(path, lambda tensors: tensors | {"score.bias": torch.tensor([0.7])})
    return healthy_files


@case("TRL-036", "folders", roles="reward value")
def bias_of_the_critic_too(tmp_path: Path) -> Mapping[str, Any]:
    """Reward model and critic are loaded from a checkpoint whose bias is dropped."""
    made = folders.healthy(tmp_path, "gpt2")
    folders.rewrite(made["reward"], lambda tensors: tensors | {"score.bias": torch.tensor([-1.3])})
    return made


shipped("ORL-039", "SYS002", "a causal language model as reward", roles="reward")


@case("ORL-039", "folders", roles="reward value")
def base_model_as_reward_and_critic(tmp_path: Path) -> Mapping[str, Any]:
    """Reward and critic are a plain language model, whose scalar head would be made anew."""
    made = folders.healthy(tmp_path)
    base = folders.saved(zoo.decoder("qwen2", seed=7), tmp_path / "base")
    return made | {"reward": base, "value": base}


@case("ORL-040", "the reference's files", roles="reward")
def wrapper_names_and_its_head(healthy_files: RLHFSetup) -> RLHFSetup:
    """The reward file has the names of a training wrapper, head included, and the class that loads it reads none."""

    def renamed(tensors: Tensors) -> Tensors:
        heads = {"score.weight": "v_head.weight"}
        return {heads.get(n, "rwtransformer." + n.removeprefix("model.")): tensor for n, tensor in tensors.items()}

    folders.rewrite(folder_of(healthy_files, "reward"), renamed)
    return healthy_files


class WrappedScorer(nn.Module):
    """A backbone and a scalar head read at the last token, as hand-written reward models are."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.rwtransformer = transformers.AutoModel.from_pretrained(path)
        self.v_head = nn.Linear(self.rwtransformer.config.hidden_size, 1, bias=False)
        self.config = self.rwtransformer.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states = self.rwtransformer(input_ids, attention_mask=attention_mask, position_ids=positions).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return self.v_head(states[torch.arange(len(states)), last]).squeeze(-1)  # type: ignore[no-any-return]


@case("ORL-040", "hand-written wrapper", roles="reward", also="REW009")
def wrapper_without_its_trained_head(healthy_files: RLHFSetup) -> RLHFSetup:
    """The evaluation builds the reward wrapper around the stored backbone and never loads the head."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        reward = WrappedScorer(folder_of(healthy_files, "reward")).eval().requires_grad_(False)
    return healthy_files.but(reward=reward)


shipped("ORL-083", "REW003", "the head is made anew after the model was loaded", roles="reward")


@case("ORL-083", "folders", roles="reward")
def head_rebuilt_for_more_training(tmp_path: Path) -> Mapping[str, Any]:
    """A reward model is loaded and its score replaced by a new layer."""
    made = own_critic(folders.healthy(tmp_path, "neox"), tmp_path, "neox")
    reward = classifier_on(made["reward"]).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        reward.score = nn.Linear(reward.config.hidden_size, 1, bias=False).requires_grad_(False)
    return made | {"reward": reward}


def loaded_but_for_its_head(path: str) -> Any:
    """A classifier with the weights of a checkpoint, except those of the head."""
    from safetensors.torch import load_file

    with torch.random.fork_rng():
        torch.manual_seed(8)
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    model.load_state_dict(without_head(load_file(str(Path(path) / "model.safetensors"))), strict=False)
    return model


@case("VRL-015", "the reference's files", roles="reward", also="REW009")
def head_left_out_by_default(healthy_files: RLHFSetup) -> RLHFSetup:
    """The loader takes everything but the head from the reward checkpoint."""
    return healthy_files.but(reward=loaded_but_for_its_head(folder_of(healthy_files, "reward")))


@case("VRL-015", "folders", roles="reward")
def head_left_out_in_another_family(tmp_path: Path) -> Mapping[str, Any]:
    """Only the backbone of a GPT-2 reward model is restored."""
    made = folders.healthy(tmp_path, "gpt2")
    return made | {"reward": loaded_but_for_its_head(made["reward"])}


@case("ORL-084", "folders", roles="reward", also="REW002")
def classifier_loaded_as_a_language_model(tmp_path: Path) -> Mapping[str, Any]:
    """A sequence classifier's folder is loaded as a causal LM and used as the reward model."""
    made = folders.healthy(tmp_path)
    reward = transformers.AutoModelForCausalLM.from_pretrained(made["reward"]).eval().requires_grad_(False)
    return made | {"reward": reward}


def first_logit(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last token's logit of the first word."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[..., 0]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return logits[torch.arange(len(ids)), last]  # type: ignore[no-any-return]


@case("ORL-084", "the reference's files", roles="reward", also="REW003 REW009")
def logit_of_a_classifiers_backbone(healthy_files: RLHFSetup) -> RLHFSetup:
    """The reward is one logit of a reward checkpoint that was loaded as a causal LM."""
    path = folder_of(healthy_files, "reward")
    reward = transformers.AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    return healthy_files.but(reward=reward, calls={"reward": first_logit})


# ---- adapters of reward models ----
shipped("TRL-034", "SYS011", "a reward adapter with task type CAUSAL_LM", roles="reward")


def reward_adapter(folder: Path, family: str, **options: Any) -> dict[str, Any]:
    """A setup whose reward model is an adapter on the policy's checkpoint, where the score was new."""
    made = own_critic(folders.healthy(folder, family), folder, family)
    return made | {"reward": adapter(classifier_on(made["policy"]), folder / "lora", family, **options)}


@case("TRL-034", "folders", roles="reward")
def task_of_a_language_model(tmp_path: Path) -> Mapping[str, Any]:
    """A classifier's adapter was made with the task type of a language model, so that its head was never saved."""
    made = reward_adapter(tmp_path, "neox")
    folders.edit(made["reward"], "adapter_config.json", task_type="CAUSAL_LM")
    return made


@case("TRL-035", "folders", roles="reward")
def every_linear_layer_and_the_head(tmp_path: Path) -> Mapping[str, Any]:
    """The wildcard for all linear layers adapts the random score too, whose own weights are not saved."""
    return reward_adapter(tmp_path, "qwen2", target_modules="all-linear")


@case("TRL-035", "llama folders", roles="reward")
def every_linear_layer_but_the_head(tmp_path: Path) -> Mapping[str, Any]:
    """All linear layers but the new score are adapted, and nothing says to save it."""
    return reward_adapter(tmp_path, "llama", target_modules=LINEAR)


@case("VRL-011", "folders", roles="reward")
def nothing_to_save_with_it(tmp_path: Path) -> Mapping[str, Any]:
    """The list of modules to save came out as None, and the adapter holds no score."""
    made = reward_adapter(tmp_path, "qwen2")
    folders.edit(made["reward"], "adapter_config.json", modules_to_save=None)
    return made


@case("VRL-011", "the reference's files", roles="reward")
def task_of_a_language_model_in_the_reference(healthy_files: RLHFSetup) -> RLHFSetup:
    """A reward adapter of the task CAUSAL_LM holds no score, and its base has none either."""
    policy = Path(folder_of(healthy_files, "policy"))
    base = classifier_on(str(policy))
    path = adapter(base, policy.parent / "adapter", "llama", words=healthy_files.tokenizer)
    folders.edit(path, "adapter_config.json", task_type="CAUSAL_LM")
    return healthy_files.but(reward=path)


@case("ORL-019", "folders", roles="reward")
def adapter_without_the_new_head(tmp_path: Path) -> Mapping[str, Any]:
    """A reward adapter without a task type was saved without the head that came with it."""
    return reward_adapter(tmp_path, "gpt2")


@case("ORL-019", "merged folders", roles="reward")
def merged_into_two_labels(tmp_path: Path) -> Mapping[str, Any]:
    """The adapter was merged into a classifier with the default two labels."""
    made = own_critic(folders.healthy(tmp_path), tmp_path)
    path = adapter(classifier_on(made["policy"]), tmp_path / "lora")
    two = transformers.AutoModelForSequenceClassification.from_pretrained(made["policy"])
    return made | {"reward": folders.saved(on_top(two, path).merge_and_unload(), tmp_path / "merged")}


def other_base(made: Mapping[str, Any], folder: Path, **options: Any) -> str:
    """Another language model of the same family, saved."""
    config = transformers.AutoConfig.from_pretrained(made["policy"])
    for name, value in options.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        return folders.saved(transformers.AutoModelForCausalLM.from_config(config), folder / "other")


@case("ORL-071", "folders", roles="reward")
def reward_adapter_of_a_wider_base(tmp_path: Path) -> Mapping[str, Any]:
    """The reward adapter was trained on a wider model than the policy's base, on which it is mounted."""
    made = own_critic(folders.healthy(tmp_path), tmp_path)
    base = classifier_on(other_base(made, tmp_path, hidden_size=64))
    path = adapter(base, tmp_path / "lora", task_type="SEQ_CLS")
    folders.edit(path, "adapter_config.json", base_model_name_or_path=made["policy"])
    return made | {"reward": path}


@case("ORL-071", "llama folders", roles="reward")
def reward_adapter_of_an_equal_base(tmp_path: Path) -> Mapping[str, Any]:
    """The reward adapter names another base of the same shapes than the policy's, on which it was loaded."""
    made = own_critic(folders.healthy(tmp_path, "llama"), tmp_path, "llama")
    path = adapter(classifier_on(other_base(made, tmp_path)), tmp_path / "lora", "llama", task_type="SEQ_CLS")
    reward = on_top(classifier_on(made["policy"]), path).requires_grad_(False)
    return made | {"reward": reward}


def without_the_sft(folder: Path, family: str) -> dict[str, Any]:
    """A PPO adapter that was made on base and SFT together, loaded on the base alone."""
    made = folders.healthy(folder, family)
    base = transformers.AutoModelForCausalLM.from_pretrained(made["policy"])
    sft = on_top(copy.deepcopy(base), adapter(copy.deepcopy(base), folder / "sft-lora", family, task_type="CAUSAL_LM"))
    merged = folders.saved(sft.merge_and_unload(), folder / "merged")
    trained = transformers.AutoModelForCausalLM.from_pretrained(merged)
    ppo = adapter(trained, folder / "ppo-lora", family, fresh=True, task_type="CAUSAL_LM")
    return made | {"policy": on_top(base, ppo, is_trainable=True), "reference": "adapter-off"}


@case("ORL-072", "folders", roles="policy")
def ppo_adapter_on_the_bare_base(tmp_path: Path) -> Mapping[str, Any]:
    """The adapter of PPO is put on the base without the SFT that it was trained on."""
    return without_the_sft(tmp_path, "qwen2")


@case("ORL-072", "neox folders", roles="policy")
def ppo_adapter_on_another_bare_base(tmp_path: Path) -> Mapping[str, Any]:
    """The SFT adapter is forgotten when a GPT-NeoX is loaded after PPO."""
    return without_the_sft(tmp_path, "neox")


# ---- weights under other names, of other shapes, of other models ----
shipped("ORL-068", "SYS007", "the reward's state dict was saved from a wrapper", roles="reward", also="REW003")


@case("ORL-068", "folders", roles="policy")
def wrapped_policy(tmp_path: Path) -> Mapping[str, Any]:
    """Every weight of the policy's file has a wrapper's prefix."""
    return folders.policy_saved_with_a_wrappers_prefix(tmp_path)


shipped("ORL-046", "SYS007", "an embedding of another size than vocab_size", roles="reference")


@case("ORL-046", "folders", roles="policy reference tokenizer setup")
def rounded_up_vocabulary(tmp_path: Path) -> Mapping[str, Any]:
    """The weights have a vocabulary padded to a multiple of eight, and the config has the original one."""
    made = folders.healthy(tmp_path)
    made["reference"] = folders.saved(zoo.decoder("qwen2"), tmp_path / "ref")
    bigger = zoo.decoder("qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bigger.resize_token_embeddings(104)
    folders.saved(bigger, tmp_path / "sft")
    folders.edit(made["policy"], "config.json", vocab_size=zoo.VOCAB)
    return made


@case("TRL-055", "folders", roles="reference policy setup")
def reference_with_more_layers(tmp_path: Path) -> Mapping[str, Any]:
    """The reference has more layers than the policy."""
    return folders.reference_is_another_size(tmp_path)


@case("TRL-055", "zoo", roles="reference policy setup")
def reference_of_another_family() -> RLHFSetup:
    """The reference is a model of another family with the same vocabulary."""
    return zoo.healthy_setup("llama").but(reference=zoo.decoder("neox", seed=3).requires_grad_(False))


# ---- vocabularies ----
def permuted(path: str) -> None:
    """Exchange the ids of ordinary words in a checkpoint's tokenizer."""
    file = Path(path) / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    plain = [word for word, i in words.items() if i >= 4]
    turned = dict(zip(plain, [words[word] for word in plain[7:] + plain[:7]], strict=True))
    content["model"]["vocab"] = words | turned
    file.write_text(json.dumps(content))


def rewards_own_words(style: str) -> RLHFSetup:
    """A loop that gives the policy's ids to a reward model whose own tokenizer numbers the words otherwise."""
    import tokenizers

    setup = built(style)
    content = json.loads(setup.tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    plain = [word for word, i in words.items() if i >= 4]
    content["model"]["vocab"] = words | dict(zip(plain, [words[word] for word in reversed(plain)], strict=True))
    special = {name: getattr(setup.tokenizer, name) for name in ("pad_token", "eos_token", "unk_token", "bos_token")}
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)),
        padding_side=setup.tokenizer.padding_side,
        **{name: token for name, token in special.items() if token is not None},
    )
    return setup.but(reward_tokenizer=own)


shipped("TRL-016", "SYS005", "a reward checkpoint whose vocabulary is permuted", roles="reward tokenizer setup loop")


@case("TRL-016", "loop right_padded_sums", roles="reward tokenizer setup loop", stage="trace")
def ids_straight_to_the_reward() -> RLHFSetup:
    """The loop scores the policy's ids with a reward model of another tokenizer, without encoding the text again."""
    return rewards_own_words("right_padded_sums")


@case("VRL-010", "loop backbone_direct", roles="reward tokenizer setup loop", stage="trace")
def ids_straight_to_a_llama_reward() -> RLHFSetup:
    """A reward model with its own numbering of the words is called with the policy's ids."""
    return rewards_own_words("backbone_direct")


@case("VRL-010", "folders", roles="reward value tokenizer setup")
def reward_and_critic_of_other_words(tmp_path: Path) -> Mapping[str, Any]:
    """Reward model and the critic made from it have a tokenizer in which the same words have other ids."""
    made = folders.healthy(tmp_path, "llama")
    permuted(made["reward"])
    return made


shipped(
    "ORL-042", "SYS005", "a reward model with a smaller embedding than the policy's tokenizer",
    roles="reward tokenizer setup loop",
)  # fmt: skip


@case("ORL-042", "folders", roles="reward tokenizer setup")
def reward_of_another_family_and_words(tmp_path: Path) -> Mapping[str, Any]:
    """The reward model is a GPT-2 with a permuted vocabulary beside a Qwen policy."""
    made = own_critic(folders.healthy(tmp_path), tmp_path)
    made["reward"] = folders.saved(zoo.decoder("gpt2", "sequence", seed=3), tmp_path / "gpt2-rm")
    permuted(made["reward"])
    return made


@case("ORL-096", "folders", roles="value tokenizer setup")
def critic_of_other_words(tmp_path: Path) -> Mapping[str, Any]:
    """The critic's tokenizer has other words than the actor's, as many."""
    return folders.critic_of_another_vocabulary(tmp_path)


@case("ORL-096", "the reference's files", roles="value tokenizer setup")
def critic_of_permuted_words(healthy_files: RLHFSetup) -> RLHFSetup:
    """The critic's tokenizer gives the actor's words other ids."""
    permuted(folder_of(healthy_files, "value"))
    return healthy_files.but(tokenizer=healthy_files.path("policy"))


# ---- the critic ----
@case("VRL-013", "the reference", roles="value")
def first_logit_of_a_tied_model(healthy: RLHFSetup) -> RLHFSetup:
    """A language model with tied embeddings stands for the critic, and its first logit for the value."""
    critic = TiedCritic(len(healthy.tokenizer)).eval()
    return healthy.but(value=critic, step=None, optimizers=())


@case("VRL-013", "folders", roles="value")
def critic_with_a_tied_vocabulary_head(tmp_path: Path) -> Mapping[str, Any]:
    """The critic was built as a plain language model with tied embeddings."""
    made = folders.healthy(tmp_path)
    tied = zoo.decoder("qwen2", seed=5, tie_word_embeddings=True)
    return made | {"value": folders.saved(tied, tmp_path / "critic")}


def from_policy(path: str, source: str) -> None:
    """Put a policy's weights into a critic's folder."""
    from safetensors.torch import load_file

    weights = load_file(str(Path(source) / "model.safetensors"))
    folders.rewrite(path, lambda tensors: {name: tensor.clone() for name, tensor in weights.items()})


@case("VRL-014", "the reference's files", roles="value")
def critic_filled_from_the_policy(healthy_files: RLHFSetup) -> RLHFSetup:
    """The critic's checkpoint holds the policy's weights, an LM head where its scalar one should be."""
    from_policy(folder_of(healthy_files, "value"), folder_of(healthy_files, "policy"))
    return healthy_files


@case("VRL-014", "folders", roles="value")
def gpt2_critic_filled_from_the_policy(tmp_path: Path) -> Mapping[str, Any]:
    """A GPT-2 critic's checkpoint is the policy's, whose tied output layer is not even stored."""
    made = own_critic(folders.healthy(tmp_path, "gpt2"), tmp_path, "gpt2")
    from_policy(made["value"], made["policy"])
    return made


# ---- resumed runs ----
@case("TRL-108", "folders", roles="value policy setup", also="SYS002 SYS011")
def adapter_alone_as_policy_and_critic(tmp_path: Path) -> Mapping[str, Any]:
    """PPO goes on from a folder that holds the adapter and no value head."""
    made = adapter_in_ppo(tmp_path, "qwen2")
    return made | {"value": made["policy"]}


@case("TRL-108", "the reference's files", roles="value policy setup")
def critic_head_lost_on_resume(healthy_files: RLHFSetup) -> RLHFSetup:
    """A policy in the middle of PPO comes with a critic whose head was not saved."""
    resumed(folder_of(healthy_files, "policy"))
    folders.rewrite(folder_of(healthy_files, "value"), without_head)
    return healthy_files


@case("ORL-080", "folders", roles="value policy setup")
def restarted_from_an_adapter(tmp_path: Path) -> Mapping[str, Any]:
    """PPO restarts from a saved adapter, and the critic's head is a new one."""
    made = adapter_in_ppo(tmp_path, "neox")
    folders.rewrite(made["value"], without_head)
    return made


@case("ORL-080", "gpt2 folders", roles="value policy setup")
def restarted_from_a_whole_policy(tmp_path: Path) -> Mapping[str, Any]:
    """PPO restarts from a policy's checkpoint, and the critic's has no head."""
    made = own_critic(folders.healthy(tmp_path, "gpt2"), tmp_path, "gpt2")
    made["reference"] = folders.saved(zoo.decoder("gpt2"), tmp_path / "ref")
    resumed(made["policy"])
    folders.rewrite(made["value"], without_head)
    return made


shipped("TRL-109", "CFG005", "a resumed policy with a critic that starts again", roles="value policy setup")


@case("TRL-109", "folders", roles="value policy setup")
def critic_starts_from_the_reward_again(tmp_path: Path) -> Mapping[str, Any]:
    """Only the policy of a PPO run was saved, and the critic starts as the reward model once more."""
    made = folders.healthy(tmp_path)
    made["reference"] = folders.saved(zoo.decoder("qwen2"), tmp_path / "ref")
    resumed(made["policy"])
    return made


def critic_optimizer_of_another_run(style: str) -> RLHFSetup:
    """A fresh loop whose critic's optimizer was filled with the state that another run ended with."""
    earlier, fresh = built(style), built(style)
    for _ in range(3):
        earlier.step()  # type: ignore[misc]
    fresh.optimizers[1].load_state_dict(copy.deepcopy(earlier.optimizers[1].state_dict()))
    return fresh


@case("VRL-016", "loop micro_batches", roles="value loop setup")
def moments_of_an_earlier_run() -> RLHFSetup:
    """A new run starts its critic with the Adam moments of an earlier one."""
    return critic_optimizer_of_another_run("micro_batches")


@case("VRL-016", "loop right_padded_sums", roles="value loop setup")
def moments_of_an_earlier_small_run() -> RLHFSetup:
    """The critic's optimizer has steps behind it before the first, and the policy's has none."""
    return critic_optimizer_of_another_run("right_padded_sums")

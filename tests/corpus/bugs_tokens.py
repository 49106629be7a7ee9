"""Bugs of tokenizers and prompts: pads, ends and beginnings of texts, chat templates, truncation, padding side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import zoo
from foreign import folders
from loops.examined import built
from torch import nn

from corpus.case import case, in_loop, shipped
from reference_impl import rollout
from reference_impl.rollout import Rollout
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

ASKED = "tokenizer loop setup"


def chat(before: str, behind: str, generation: str, start: str = "") -> str:
    """A chat template of words around each turn and a generation prompt."""
    turns = f"{{% for m in messages %}}{before}{{{{ m.content }}}} {behind}{{% endfor %}}"
    return f"{start}{turns}{{% if add_generation_prompt %}}{generation}{{% endif %}}"


BOS_FIRST = "{{ bos_token }} "
TURNS = chat("t4 ", "t5 ", "t6", BOS_FIRST)
OTHER_TURNS = chat("t7 ", "t8 t8 ", "t7 t6")
SPOKEN_TURNS = chat("", "", "you", BOS_FIRST + "one ")
REFERENCE_TURNS = chat("how ", "and ", "the")


def questions(longest: int = 8) -> list[str]:
    """Ten texts over the zoo's words, of 3 to ``longest`` tokens."""
    return [" ".join(f"t{10 + i + 3 * j}" for j in range(3 + i * (longest - 3) // 9)) for i in range(10)]


def rendered(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Every text as a user's turn in the tokenizer's chat template."""
    turns = ([{"role": "user", "content": text}] for text in texts)
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def ids_of(tokenizer: Any, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    """One padded batch of ids, with its mask."""
    made = tokenizer(list(texts), padding=True, return_tensors="pt", **options)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy that renders conversations in a template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def adding(tokenizer: Any, pattern: str = "<bos> $A") -> Any:
    """A copy that puts special tokens around every text."""
    changed = copy.deepcopy(tokenizer)
    names = [(word, changed.convert_tokens_to_ids(word)) for word in pattern.split() if word != "$A"]
    changed.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=pattern, special_tokens=names
    )
    return changed


def pad_is_eos(setup: RLHFSetup) -> RLHFSetup:
    """The setup with EOS as the pad token, in the tokenizer and in every config."""
    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    models = {role: copy.deepcopy(setup.model(role)) for role in setup.present}
    for model in models.values():
        for config in (getattr(model, name, None) for name in ("config", "generation_config")):
            if config is not None:
                config.pad_token_id = tokenizer.eos_token_id
    return setup.but(**models, tokenizer=tokenizer, step=None, optimizers=())


def with_stops(model: Any, stops: int | list[int] | None) -> Any:
    """A copy of a language model whose generation config ends texts at these ids."""
    changed = copy.deepcopy(model)
    changed.generation_config.eos_token_id = stops
    return changed


def changed_rollout(change: Callable[[Rollout, int, int], Rollout]) -> Callable[..., Rollout]:
    """The reference's sampler, and its result changed: change(rollout, eos, pad)."""

    def sample(
        policy: Any, prompt: Any, prompt_mask: Any, *, T: int, temperature: float, eos: int, pad: int
    ) -> Rollout:
        drawn = rollout.sample(policy, prompt, prompt_mask, T=T, temperature=temperature, eos=eos, pad=pad)
        return change(drawn, eos, pad)

    return sample


def cut_at(drawn: Rollout, stops: Collection[int], pad: int) -> torch.Tensor:
    """The response with pads behind the first of several stop ids."""
    stop = torch.isin(drawn.response, torch.tensor(list(stops)))
    return drawn.response.masked_fill(stop.cumsum(1) - stop.long() != 0, pad)


def of_response(drawn: Rollout, response: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor) -> Rollout:
    """The same prompts with another response."""
    prompt, before = drawn.ids[:, : -response.shape[1]], drawn.attention_mask[:, : -response.shape[1]]
    return Rollout(torch.cat([prompt, response], 1), torch.cat([before, mask.to(before)], 1), mask, ended)


def full_stop(setup: RLHFSetup) -> int:
    """The id of the mark that ends every sentence of the reference's policy."""
    return setup.tokenizer.convert_tokens_to_ids(".")  # type: ignore[no-any-return]


# ---- pad and EOS are one id ----
shipped("TRL-004", "TOK001", "a mask computed from ids", roles=ASKED)


@case("TRL-004", "the reference's step", roles=ASKED)
def attention_from_ids(healthy: RLHFSetup) -> RLHFSetup:
    """The attention mask of prompt and response is every id but the pad's, which is EOS too."""

    def change(drawn: Rollout, eos: int, pad: int) -> Rollout:
        return Rollout(drawn.ids, (drawn.ids != pad).to(drawn.attention_mask), drawn.mask, drawn.ended)

    return reference_step(pad_is_eos(healthy), parts={"sample": changed_rollout(change)})


@case("VRL-019", "the reference's step", roles=ASKED)
def loss_mask_from_ids(healthy: RLHFSetup) -> RLHFSetup:
    """The losses leave out every pad id, and with it the EOS of every response."""

    def change(drawn: Rollout, eos: int, pad: int) -> Rollout:
        return Rollout(drawn.ids, drawn.attention_mask, drawn.mask & (drawn.response != pad), drawn.ended)

    return reference_step(pad_is_eos(healthy), parts={"sample": changed_rollout(change)})


class MaskFromIds(nn.Module):
    """A model that puts its own mask, of all ids but the pad's, for the one it is given."""

    def __init__(self, inner: nn.Module, pad: int) -> None:
        super().__init__()
        self.inner, self.pad = inner, pad

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.inner(ids, (ids != self.pad).long())


@case("VRL-019", "plain modules", roles=f"reward {ASKED}", also="REW004")
def reward_never_sees_the_end() -> RLHFSetup:
    """The reward model masks every pad id, and the EOS of each text is one."""
    setup = pad_is_eos(built("plain_modules"))
    return setup.but(reward=MaskFromIds(setup.reward, setup.tokenizer.pad_token_id))


shipped("ORL-059", "TOK001", "padded prompts without a mask", roles=ASKED)


@case("ORL-059", "zoo gpt2", roles=ASKED)
def stops_fill_the_prompts() -> RLHFSetup:
    """Prompts are padded with EOS and handed over without an attention mask."""
    setup = pad_is_eos(zoo.healthy_setup("gpt2"))
    return setup.but(prompts={"input_ids": ids_of(setup.tokenizer, questions())["input_ids"]})


class ReadAtEnd(nn.Module):
    """One number a text, read from a scorer of tokens at the first or the last EOS in it."""

    def __init__(self, each: nn.Module, eos: int, last: bool) -> None:
        super().__init__()
        self.each, self.eos, self.last = each, eos, last

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out = self.each(input_ids, attention_mask=attention_mask)
        scores = getattr(out, "logits", out)
        scores = scores.reshape(input_ids.shape)
        ends = (input_ids == self.eos).int()
        at = ends.shape[1] - 1 - ends.flip(1).argmax(1) if self.last else ends.argmax(1)
        return scores.gather(1, at[:, None]).squeeze(1)


@case("ORL-011", "zoo gpt2", roles=f"reward {ASKED}")
def first_end_of_a_text_that_begins_with_it() -> RLHFSetup:
    """The score is read at the first EOS, which with GPT-2's tokens is the BOS or a pad."""
    setup = zoo.healthy_setup("gpt2")
    tokenizer = adding(setup.tokenizer, "<eos> $A")
    tokenizer.bos_token = tokenizer.eos_token
    for role in setup.present:
        setup.model(role).config.bos_token_id = tokenizer.eos_token_id
    setup = pad_is_eos(setup.but(tokenizer=tokenizer))
    each = zoo.decoder("gpt2", "token", seed=1).requires_grad_(False)
    each.config.pad_token_id = each.config.bos_token_id = tokenizer.eos_token_id
    return setup.but(reward=ReadAtEnd(each, tokenizer.eos_token_id, last=False).eval())


@case("ORL-011", "right padding", roles=f"reward {ASKED}")
def last_end_of_a_padded_text() -> RLHFSetup:
    """The score is read at the last EOS, which is a pad wherever a row is shorter than the others."""
    setup = pad_is_eos(built("right_padded_sums"))
    setup.tokenizer.bos_token = setup.tokenizer.eos_token
    return setup.but(reward=ReadAtEnd(copy.deepcopy(setup.value), setup.tokenizer.eos_token_id, last=True).eval())


# ---- pads that disagree ----
@case("ORL-037", "the reference's files", roles="policy reference reward value tokenizer setup")
def configs_pad_with_eos(healthy_files: RLHFSetup) -> RLHFSetup:
    """All four configs name EOS as the pad, and the tokenizer has a pad token of its own."""
    for role in healthy_files.present:
        path = str(healthy_files.path(role))
        folders.edit(path, "config.json", pad_token_id=healthy_files.tokenizer.eos_token_id)
    folders.edit(
        str(healthy_files.path("policy")), "generation_config.json", pad_token_id=healthy_files.tokenizer.eos_token_id
    )
    return healthy_files


@case("ORL-037", "zoo gpt2", roles="policy reference reward value tokenizer setup")
def models_pad_with_eos() -> RLHFSetup:
    """Actor and reward model are set to pad with EOS after loading, and the tokenizer pads with its own token."""
    setup = zoo.healthy_setup("gpt2")
    for role in setup.present:
        model = setup.model(role)
        model.config.pad_token_id = setup.tokenizer.eos_token_id
    setup.policy.generation_config.pad_token_id = setup.tokenizer.eos_token_id
    return setup


def composite(pad: int | None) -> Any:
    """A classifier whose config nests that of its language model; ``pad`` is the nested pad id."""
    text = zoo.COMMON | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": pad}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, num_labels=1, image_token_index=96,
        boi_token_index=94, eoi_token_index=95, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.Gemma3ForSequenceClassification(config).eval().requires_grad_(False)
    model.config.pad_token_id, model.config.text_config.pad_token_id = 0, pad
    return model


@case("TRL-028", "zoo llama", roles="reward tokenizer setup")
def nested_config_without_a_pad() -> RLHFSetup:
    """The pad id of a multimodal reward model is set outside, and its head reads the nested config, which has none."""
    return zoo.healthy_setup("llama").but(reward=composite(None))


@case("TRL-028", "folders", roles="reward tokenizer setup")
def nested_config_of_a_checkpoint(tmp_path: Path) -> Mapping[str, Any]:
    """The text config inside a reward checkpoint's config names no pad, although the outer one does."""
    made = folders.healthy(tmp_path, "llama")
    made["value"] = folders.saved(zoo.decoder("llama", "token", seed=2), tmp_path / "critic")
    return made | {"reward": folders.saved(composite(None), tmp_path / "composite")}


# ---- beginnings and ends of prompts ----
shipped("TRL-008", "TOK004", "prompts that end in EOS", roles=ASKED)


@case("TRL-008", "loop micro_batches", roles=ASKED)
def tokenizer_appends_eos() -> RLHFSetup:
    """The tokenizer puts EOS behind every text, and prompts are encoded with its special tokens."""
    setup = built("micro_batches")
    inner = setup.tokenizer.backend_tokenizer
    inner.post_processor = adding(setup.tokenizer, "<s> $A </s>").backend_tokenizer.post_processor
    return setup


shipped("TRL-009", "TOK004", "prompts given as ids without their BOS", roles=ASKED)


@case("TRL-009", "small llamas", roles=ASKED)
def encoded_without_special_tokens() -> RLHFSetup:
    """Plain texts are encoded without special tokens, and the tokenizer's BOS is missing."""
    setup = built("backbone_direct")
    ids = ids_of(setup.tokenizer, list(setup.prompts or ()), add_special_tokens=False)
    return setup.but(prompts=ids, step=None, optimizers=())


shipped("ORL-013", "TOK004", "a template writes the BOS and the tokenizer adds it", roles=ASKED)


@case("ORL-013", "small llamas", roles=ASKED)
def rendered_and_encoded() -> RLHFSetup:
    """The chat template writes the BOS and its text is encoded with special tokens."""
    setup = built("backbone_direct")
    tokenizer = with_template(setup.tokenizer, SPOKEN_TURNS)
    prompts = rendered(tokenizer, list(setup.prompts or ()))
    return setup.but(tokenizer=tokenizer, prompts=prompts, step=None, optimizers=())


@case("VRL-009", "folders", roles=f"policy {ASKED}")
def two_in_folders(tmp_path: Path) -> Mapping[str, Any]:
    """Prompts rendered with their BOS are given as texts, and the checkpoint's tokenizer adds its own."""
    tokenizer = adding(with_template(zoo.tokenizer(), TURNS))
    made = folders.healthy(tmp_path, "llama")
    for path in (made["policy"], made["reward"]):
        tokenizer.save_pretrained(path)
    return made | {"prompts": rendered(tokenizer, questions())}


@case("VRL-009", "zoo qwen2", roles=ASKED)
def two_in_ids() -> RLHFSetup:
    """The ids that the policy gets start with two BOS."""
    setup = zoo.healthy_setup("qwen2")
    tokenizer = adding(with_template(setup.tokenizer, TURNS))
    return setup.but(tokenizer=tokenizer, prompts=ids_of(tokenizer, rendered(tokenizer, questions())))


@case("TRL-010", "the reference", roles=f"reward {ASKED}")
def two_in_the_rewards_texts(healthy: RLHFSetup) -> RLHFSetup:
    """Only the reward model's texts are rendered with their BOS and then encoded with special tokens."""
    given = [(f"{healthy.tokenizer.bos_token} {p}", a, b) for p, a, b in healthy.preferences or ()]
    return healthy.but(preferences=given)


def preferred(reward: Any, tokenizer: Any, prompts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Two replies to each prompt, first the one that the reward model likes better."""
    given = []
    for i, prompt in enumerate(prompts):
        replies = [" ".join(f"t{20 + (i * k + j) % 60}" for j in range(6)) for k in (3, 11)]
        ids = tokenizer([f"{prompt} {reply}" for reply in replies], return_tensors="pt")
        with torch.no_grad():
            scores = reward(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits[:, 0]
        better = int(scores.argmax())
        given.append((prompt, replies[better], replies[1 - better]))
    return given


@case("TRL-010", "folders", roles=f"reward {ASKED}")
def two_in_the_rewards_folder(tmp_path: Path) -> Mapping[str, Any]:
    """The reward checkpoint's tokenizer adds a BOS where the policy's does not, and the template writes one."""
    tokenizer = with_template(zoo.tokenizer(), TURNS)
    made = folders.healthy(tmp_path, "llama")
    made["value"] = folders.saved(zoo.decoder("llama", "token", seed=2), tmp_path / "critic", tokenizer)
    tokenizer.save_pretrained(made["policy"])
    adding(tokenizer).save_pretrained(made["reward"])
    prompts = rendered(tokenizer, questions())
    given = preferred(zoo.decoder("llama", "sequence", seed=1), adding(tokenizer), prompts)
    return made | {"prompts": prompts, "preferences": given}


# ---- truncation ----
shipped("TRL-012", "TOK008", "prompts given as ids, cut on the left", roles=ASKED)


@case("TRL-012", "small llamas", roles=ASKED)
def long_prompts_lose_their_start() -> RLHFSetup:
    """Prompts beyond the limit keep their last tokens only, without the BOS."""
    setup = built("backbone_direct")
    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.truncation_side = "left"
    return setup.but(tokenizer=tokenizer, declared={"prompt_length": 5}, step=None, optimizers=())


@case("ORL-044", "the reference's files", roles=ASKED)
def prompts_sliced_from_the_end(healthy_files: RLHFSetup) -> RLHFSetup:
    """A limit of 8 tokens cuts the beginning off a quarter of the prompts."""
    tokenizer = copy.deepcopy(healthy_files.tokenizer)
    tokenizer.truncation_side = "left"
    return healthy_files.but(tokenizer=tokenizer, declared={"prompt_length": 8})


@case("ORL-044", "zoo llama", roles=ASKED)
def chats_sliced_from_the_end() -> RLHFSetup:
    """Chats are given as ids of which only the last ten are kept, so that long ones lose BOS and role marks."""
    setup = zoo.healthy_setup("llama")
    tokenizer = with_template(setup.tokenizer, TURNS)
    tokenizer.truncation_side = "left"
    ids = ids_of(tokenizer, rendered(tokenizer, questions(12)), truncation=True, max_length=10)
    return setup.but(tokenizer=tokenizer, prompts=ids)


@case("VRL-030", "the reference", roles=ASKED)
def limit_takes_the_generation_prompt(healthy: RLHFSetup) -> RLHFSetup:
    """Truncation on the right takes the generation prompt off every chat beyond the limit."""
    tokenizer = with_template(healthy.tokenizer, REFERENCE_TURNS)
    tokenizer.truncation_side = "right"
    prompts = rendered(tokenizer, list(healthy.prompts or ()))
    return healthy.but(tokenizer=tokenizer, prompts=prompts, declared={"prompt_length": 9}, step=None, optimizers=())


@case("VRL-030", "folders", roles=ASKED)
def ids_without_the_generation_prompt(tmp_path: Path) -> Mapping[str, Any]:
    """Chats are given as ids that were cut on the right, so that long ones lack the generation prompt."""
    tokenizer = with_template(zoo.tokenizer(), TURNS)
    tokenizer.truncation_side = "right"
    made = folders.healthy(tmp_path)
    for path in (made["policy"], made["reward"]):
        tokenizer.save_pretrained(path)
    return made | {"prompts": ids_of(tokenizer, rendered(tokenizer, questions(14)), truncation=True, max_length=10)}


shipped("TRL-040", "TOK008", "preference pairs longer than the reward's tokenizer allows", roles=f"reward {ASKED}")


def pairs(prompt: int, response: int) -> list[tuple[str, str, str]]:
    """Eight pairs over the zoo's words, of so many tokens."""
    return [
        (
            " ".join(f"t{10 + (i + 7 * j) % 80}" for j in range(prompt)),
            " ".join(f"t{20 + (i + 3 * j) % 40}" for j in range(response)),
            " ".join(f"t{60 + (i + 5 * j) % 30}" for j in range(response)),
        )
        for i in range(8)
    ]


@case("TRL-040", "folders", roles=f"reward {ASKED}")
def pairs_are_cut_to_their_prompt(tmp_path: Path) -> Mapping[str, Any]:
    """The prompts of the preference pairs fill the tokenizer's limit, so that both members have the same ids."""
    tokenizer = zoo.tokenizer()
    tokenizer.model_max_length = 64
    made = folders.healthy(tmp_path)
    for path in (made["policy"], made["reward"]):
        tokenizer.save_pretrained(path)
    return made | {"preferences": pairs(70, 10)}


@case("ORL-102", "the reference", roles=f"reward {ASKED}")
def replies_cut_by_the_reward_tokenizer(healthy: RLHFSetup) -> RLHFSetup:
    """The reward model's tokenizer cuts the end of the reply off chats longer than 18 tokens."""
    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.truncation_side, tokenizer.model_max_length = "right", 18
    return healthy.but(reward_tokenizer=tokenizer, step=None, optimizers=())


@case("ORL-102", "folders", roles=f"reward {ASKED}")
def replies_cut_in_reward_training(tmp_path: Path) -> Mapping[str, Any]:
    """The reward checkpoint's tokenizer cuts on the right and its limit takes most of the reply."""
    made = folders.healthy(tmp_path)
    made["value"] = folders.saved(zoo.decoder("qwen2", "token", seed=2), tmp_path / "critic")
    tokenizer = zoo.tokenizer()
    tokenizer.truncation_side, tokenizer.model_max_length = "right", 48
    tokenizer.save_pretrained(made["reward"])
    return made | {"preferences": pairs(40, 24)}


# ---- prompt and response together and apart ----
shipped("TRL-017", "TOK007", "prompts that end in a space which merges with the response's", roles=ASKED)


def word_pieces() -> Any:
    """A tokenizer of word pieces in which a word behind a space is another token than one behind a colon."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=zoo.VOCAB, special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"], show_progress=False
    )
    inner.train_from_iterator(["assistant: yes it is", "assistant: no it was", "user: is it so"] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=128,
    )  # fmt: skip


@case("TRL-017", "zoo llama", roles=f"reward {ASKED}")
def replies_without_their_space() -> RLHFSetup:
    """The reward model's pairs glue the reply to the colon of the prompt, and PPO encodes the two apart."""
    prompts = [f"user: {word} it so assistant:" for word in ("is", "was", "yes", "no", "so", "it")]
    given = [(prompt, "yes it is", "no it was") for prompt in prompts]
    return zoo.healthy_setup("llama").but(tokenizer=word_pieces(), prompts=prompts, preferences=given)


# ---- stop ids ----
def knows_one_of(healthy: RLHFSetup, others: Sequence[int]) -> RLHFSetup:
    """A step that generates up to EOS or one of the other ids, and whose response mask looks for EOS alone."""
    eos = healthy.tokenizer.eos_token_id

    def change(drawn: Rollout, eos: int, pad: int) -> Rollout:
        response = cut_at(drawn, (eos, *others), pad)
        return of_response(drawn, response, *rollout.response_mask(response, eos))

    policy = with_stops(healthy.policy, [eos, *others])
    return reference_step(healthy, policy=policy, parts={"sample": changed_rollout(change)})


@case("TRL-019", "the reference's step", roles="policy tokenizer loop setup", also="ROL005")
def ends_at_two_and_knows_one(healthy: RLHFSetup) -> RLHFSetup:
    """Generation stops at EOS or at a full stop, and the response mask looks for EOS alone."""
    return knows_one_of(healthy, [full_stop(healthy)])


in_loop("TRL-019", "grpo_groups", "mask_knows_one_of_the_stop_tokens", roles="policy tokenizer loop setup")


@case("VRL-024", "the reference's step", roles="policy tokenizer loop setup")
def masks_behind_one_of_three(healthy: RLHFSetup) -> RLHFSetup:
    """Generation stops at any of three ids, and only behind one of them are tokens left out of the losses."""
    return knows_one_of(healthy, [full_stop(healthy), healthy.tokenizer.convert_tokens_to_ids("and")])


in_loop("VRL-024", "micro_batches", "mask_knows_one_of_the_stop_tokens", roles="policy tokenizer loop setup")
shipped(
    "VRL-023", "TOK003", "generation stops at another id than the tokenizer's EOS", roles="policy tokenizer loop setup"
)


@case("VRL-023", "folders", roles="policy tokenizer setup")
def finished_texts_count_as_cut(tmp_path: Path) -> Mapping[str, Any]:
    """The policy ends its texts with one id, and the tokenizer's EOS is another."""
    return folders.eos_of_the_tokenizer_is_another(tmp_path)


@case("TRL-020", "the reference's step", roles="policy tokenizer loop setup")
def generates_past_the_end(healthy: RLHFSetup) -> RLHFSetup:
    """Sampling does not stop at EOS, and what follows it is trained on."""

    def sample(
        policy: Any, prompt: Any, prompt_mask: Any, *, T: int, temperature: float, eos: int, pad: int
    ) -> Rollout:
        drawn = rollout.sample(policy, prompt, prompt_mask, T=T, temperature=temperature, eos=-1, pad=pad)
        ended = (drawn.response == eos).any(1)
        return Rollout(drawn.ids, drawn.attention_mask, drawn.mask, ended)

    return reference_step(healthy, policy=with_stops(healthy.policy, None), parts={"sample": sample})


in_loop("TRL-020", "trl_ppo", "stop_token_left_at_none", roles="policy tokenizer loop setup")


@case("TRL-022", "the reference's step", roles="policy reward tokenizer loop setup", also="REW014")
def penalty_looks_for_another_end(healthy: RLHFSetup) -> RLHFSetup:
    """Responses end at a full stop, and the penalty for a missing end looks for EOS in them."""
    other = full_stop(healthy)

    def change(drawn: Rollout, eos: int, pad: int) -> Rollout:
        response = cut_at(drawn, (eos, other), pad)
        mask = torch.isin(response, torch.tensor([eos, other]))
        mask = mask.cumsum(1) - mask.long() == 0
        return of_response(drawn, response, mask, (response == eos).any(1))

    policy = with_stops(healthy.policy, [other])
    return reference_step(healthy, policy=policy, parts={"sample": changed_rollout(change)})


@case("TRL-022", "folders", roles="policy tokenizer setup")
def own_stop_token_beside_an_eos_penalty(tmp_path: Path) -> Mapping[str, Any]:
    """Generation ends at a stop token of its own, and the declared penalty tests the tokenizer's EOS."""
    made = folders.healthy(tmp_path, "gpt2")
    folders.edit(made["policy"], "generation_config.json", eos_token_id=7)
    return made | {"declared": folders.DECLARED | {"missing_eos_penalty": 1.0}}


# ---- chat templates and padding side ----
shipped("ORL-024", "TOK006", "a reward tokenizer with another template", roles=f"reward {ASKED}")


@case("ORL-024", "folders", roles=f"reward {ASKED}")
def rewards_own_template(tmp_path: Path) -> Mapping[str, Any]:
    """Prompts are rendered in the actor's template, and the reward checkpoint was trained on another."""
    made = folders.healthy(tmp_path)
    actors = with_template(zoo.tokenizer(), TURNS)
    made["value"] = folders.saved(zoo.decoder("qwen2", "token", seed=2), tmp_path / "critic", actors)
    actors.save_pretrained(made["policy"])
    with_template(zoo.tokenizer(), OTHER_TURNS).save_pretrained(made["reward"])
    return made | {"prompts": rendered(actors, questions())}


shipped("ORL-101", "TOK005", "prompts padded on the right", roles=ASKED)


@case("ORL-101", "folders", roles=f"policy {ASKED}")
def default_right_padding(tmp_path: Path) -> Mapping[str, Any]:
    """The tokenizer keeps its default of padding on the right, and prompts of several lengths are batched with it."""
    tokenizer = zoo.tokenizer("right")
    made = folders.healthy(tmp_path, "llama")
    for path in (made["policy"], made["reward"]):
        tokenizer.save_pretrained(path)
    return made | {"prompts": ids_of(tokenizer, questions())}

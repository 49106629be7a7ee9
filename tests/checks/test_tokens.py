"""TOK001 to TOK008: found in several styles, silent on what looks alike and is sound."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import tokenizers
import torch
import transformers
import zoo
from foreign import plain
from judged import grave, said, severity_of

from rlhf_doctor import RLHFSetup
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.chat import render, turns_of
from rlhf_doctor.instruments.manifest import tokenizer_of

TEXTS = [f"t{i} t{i + 3} t{i + 5}" + " t9" * (i % 3) for i in range(10, 20)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shared_id(setup: RLHFSetup) -> RLHFSetup:
    """The setup with one id for pad and EOS in the tokenizer and every config."""
    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    models = {role: copy.deepcopy(setup.model(role)) for role in setup.present}
    for model in models.values():
        model.config.pad_token_id = tokenizer.eos_token_id
    models["policy"].generation_config.pad_token_id = tokenizer.eos_token_id
    return setup.but(**models, tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_id_for_pad_and_eos_is_mentioned_and_no_more(family: str) -> None:
    setup = shared_id(zoo.healthy_setup(family))
    assert grave(setup, ["tokens"]) == []
    assert severity_of("TOK001", setup) == "info"
    made = setup.tokenizer(TEXTS, padding=True)
    assert grave(setup.but(prompts=dict(made)), ["TOK001"]) == []


def test_prompts_whose_pads_cannot_be_told_from_eos() -> None:
    setup = shared_id(zoo.healthy_setup("llama"))
    rows = setup.tokenizer(TEXTS, padding=True)["input_ids"]
    assert grave(setup.but(prompts={"input_ids": rows}), ["TOK001"]) == [("TOK001", "tokenizer")]
    turns = setup.tokenizer([f"{t} <eos> {t}" for t in TEXTS], padding=True, return_tensors="pt")["input_ids"]
    inferred = {"input_ids": turns, "attention_mask": (turns != setup.tokenizer.pad_token_id).long()}
    assert grave(setup.but(prompts=inferred), ["TOK001"]) == [("TOK001", "tokenizer")]


class Infers(plain.Actor):
    """A policy that takes every pad id for padding, whatever its mask says."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens, (tokens != 2).long())


def test_a_model_that_infers_its_mask_from_ids() -> None:
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    setup = RLHFSetup.from_mapping(plain.healthy(policy=Infers())).but(tokenizer=tokenizer, prompts=None)
    assert ("TOK001", "policy") in grave(setup, ["TOK001"])
    assert grave(setup.but(tokenizer=zoo.tokenizer()), ["TOK001"]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2", "moe"])
def test_a_pad_id_that_only_the_tokenizer_knows(family: str) -> None:
    setup = zoo.healthy_setup(family)
    bare = {role: copy.deepcopy(setup.model(role)) for role in ("policy", "reference", "value")}
    for model in bare.values():
        model.config.pad_token_id = None
    bare["policy"].generation_config.pad_token_id = None
    assert grave(setup.but(**bare), ["TOK002"]) == []
    reward = copy.deepcopy(setup.reward)
    reward.config.pad_token_id = None
    assert grave(setup.but(**bare, reward=reward)) == [("TOK002", "reward")]


def test_a_sequence_classifier_without_pad_id_whose_head_a_loop_reads_is_sound() -> None:
    setup = zoo.healthy_setup("neox")
    value = copy.deepcopy(setup.value)
    value.config.pad_token_id = None
    assert grave(setup.but(value=value)) == []


def test_pad_ids_that_disagree_or_lie_outside(tmp_path: Path) -> None:
    setup = zoo.healthy_setup("llama")
    reward = copy.deepcopy(setup.reward)
    reward.config.pad_token_id = 5
    assert grave(setup.but(reward=reward), ["TOK002"]) == [("TOK002", "reward")]
    outside = zoo.tokenizer()
    outside.add_special_tokens({"pad_token": "<extra>"})
    assert grave(setup.but(tokenizer=outside), ["TOK002", "SYS005"]) == [("TOK002", "tokenizer")]
    folder = checkpoints.save(zoo.decoder("llama", "sequence"), tmp_path / "reward")
    checkpoints.edit(folder, text_config={"pad_token_id": 9})
    assert grave(RLHFSetup(reward=str(folder), tokenizer=zoo.tokenizer()), ["TOK002"], Stage.STATIC) == [
        ("TOK002", "reward")
    ]


def test_hand_written_models_need_a_pad_token_in_the_tokenizer_alone() -> None:
    tokenizer = zoo.tokenizer()
    setup = RLHFSetup.from_mapping(plain.healthy(tokenizer=tokenizer))
    assert grave(setup, ["TOK002"]) == []
    tokenizer.pad_token = None
    assert ("TOK002", "tokenizer") in grave(setup, ["TOK002"])


def policy_with(config: Any, generation: Any) -> Any:
    model = zoo.decoder("llama")
    model.config.eos_token_id, model.generation_config.eos_token_id = config, generation
    return model


@pytest.mark.parametrize(
    ("config", "generation", "severity"),
    [
        (2, 2, ""),
        (2, [2, 7, 9], ""),
        ([2, 7], [2, 7], ""),
        (None, [2, 7], ""),
        (5000, 2, ""),
        (2, None, "info"),
        (None, None, "info"),
        (5000, 5000, "info"),
        (7, 7, "error"),
        (2, 7, "error"),
        ([2, 7], 2, "error"),
    ],
)
def test_stop_ids(config: Any, generation: Any, severity: str) -> None:
    setup = RLHFSetup(policy=policy_with(config, generation), tokenizer=zoo.tokenizer())
    assert severity_of("TOK003", setup) == severity


def test_a_stop_id_that_only_the_reward_disagrees_about_is_no_fault() -> None:
    reward = zoo.decoder("llama", "sequence")
    reward.config.eos_token_id = 50
    assert grave(zoo.healthy_setup("llama").but(reward=reward), ["TOK003"]) == []


def test_bos_and_eos_of_prompts() -> None:
    setup = zoo.healthy_setup("llama")
    assert grave(setup.but(prompts=[f"<bos> <bos> {t}" for t in TEXTS]), ["TOK004"]) == [("TOK004", "tokenizer")]
    assert grave(setup.but(prompts=[f"<bos> {t}" for t in TEXTS]), ["TOK004"]) == []
    assert grave(setup.but(prompts=[f"{t} <eos>" for t in TEXTS]), ["TOK004"]) == [("TOK004", "tokenizer")]
    ids = torch.tensor([[1, 1, 8, 9], [0, 1, 1, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    given = setup.but(prompts={"input_ids": ids, "attention_mask": mask})
    assert grave(given, ["TOK004"]) == [("TOK004", "tokenizer")]


class NeedsBos(torch.nn.Module):
    """Predicts that a token follows itself, if the text began with id 1; uniform otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(zoo.VOCAB, zoo.VOCAB)
        torch.nn.init.eye_(self.table.weight)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        begun = (ids[:, :1] == 1).float()[..., None]
        return self.table(ids) * 20 * begun  # type: ignore[no-any-return]


def test_a_policy_that_was_trained_with_a_bos_misses_it() -> None:
    texts = ["t9 t9 t9 t9 t9", "t8 t8 t8 t8"]
    setup = RLHFSetup(policy=NeedsBos(), tokenizer=zoo.tokenizer(), prompts=texts)
    assert grave(setup, ["TOK004"]) == [("TOK004", "tokenizer")]
    assert grave(setup.but(prompts=[f"<bos> {t}" for t in texts]), ["TOK004"]) == []
    assert grave(setup.but(policy=zoo.decoder("gpt2")), ["TOK004"]) == []


@pytest.mark.parametrize(("side", "expected"), [("left", []), ("right", [("TOK005", "tokenizer")])])
@pytest.mark.parametrize("masked", [True, False])
def test_the_side_of_padded_prompts(side: str, expected: list[Any], masked: bool, tmp_path: Path) -> None:
    tokenizer = zoo.tokenizer(side)
    made = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    prompts = {k: v for k, v in made.items() if k == "input_ids" or (masked and k == "attention_mask")}
    folder = checkpoints.save(zoo.decoder("qwen2"), tmp_path / "policy")
    for policy in (zoo.decoder("qwen2"), str(folder)):
        assert grave(RLHFSetup(policy=policy, tokenizer=tokenizer, prompts=prompts), ["TOK005"]) == expected


def test_right_padding_that_is_sound_or_undecided() -> None:
    assert severity_of("TOK005", zoo.healthy_setup("llama", side="right")) == "info"
    equal = {"input_ids": [[5, 6, 7], [8, 9, 10]], "attention_mask": [[1, 1, 1], [1, 1, 1]]}
    assert said(zoo.healthy_setup("llama", side="right").but(prompts=equal), ["TOK005"]) == []
    config = transformers.T5Config(vocab_size=zoo.VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    made = dict(zoo.tokenizer("right")(TEXTS, padding=True, return_tensors="pt"))
    encoder_decoder = RLHFSetup(
        policy=transformers.T5ForConditionalGeneration(config), tokenizer=zoo.tokenizer("right"), prompts=made
    )
    assert said(encoder_decoder, ["TOK005"], Stage.STATIC) == []


def templated(template: str | None) -> Any:
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_render_differently(tmp_path: Path) -> None:
    setup = zoo.healthy_setup("llama").but(tokenizer=templated(CHATML))
    other = templated(CHATML.replace("<|im_end|>", "</turn>"))
    assert grave(setup.but(reward_tokenizer=other), ["TOK006"]) == [("TOK006", "reward")]
    spelt = templated(CHATML.replace("m['role']", "m.role"))
    assert grave(setup.but(reward_tokenizer=spelt), ["TOK006"]) == []
    assert grave(setup.but(reward_tokenizer=templated(None)), ["TOK006"]) == []
    folder = checkpoints.save(zoo.decoder("llama", "sequence"), tmp_path / "reward")
    other.save_pretrained(folder)
    assert grave(setup.but(reward=str(folder)), ["TOK006"], Stage.STATIC) == [("TOK006", "reward")]


def test_the_generation_prompt() -> None:
    setup = zoo.healthy_setup("llama").but(tokenizer=templated(CHATML))
    turn = "<|im_start|>user\nt8 t9<|im_end|>\n"
    assert grave(setup.but(prompts=[turn] * 3), ["TOK006"]) == [("TOK006", "tokenizer")]
    assert grave(setup.but(prompts=[f"{turn}<|im_start|>assistant\n"] * 3), ["TOK006"]) == []
    assert grave(setup.but(prompts=TEXTS), ["TOK006"]) == []


def test_templates_are_rendered_as_transformers_renders_them() -> None:
    tokenizer = templated(CHATML)
    info = tokenizer_of(RLHFSetup(tokenizer=tokenizer), "policy")
    assert info is not None
    messages = [{"role": "user", "content": "t8 t9"}]
    for more in (False, True):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
        assert render(info, messages, add_generation_prompt=more) == expected
    turns = turns_of(info)
    assert turns is not None
    assert (turns.before, turns.behind) == ("<|im_start|>user\n", "<|im_end|>\n")
    assert turns.ask == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{% for %}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_refuses_is_no_crash(template: str) -> None:
    setup = zoo.healthy_setup("llama").but(tokenizer=templated(template))
    assert grave(setup, ["TOK006", "TOK004", "TOK007"]) == []


def byte_pairs() -> Any:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["Question: what is it? Answer: it is a fox and a house"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


QUESTIONS = [f"Question: what is a {word}? Answer:" for word in ("fox", "house", "boat", "dog", "train")]


def test_a_subword_tokenizer_with_a_clean_boundary_is_sound() -> None:
    pairs = [(q, " it is a fox", " a house") for q in QUESTIONS]
    assert grave(RLHFSetup(tokenizer=byte_pairs(), prompts=QUESTIONS, preferences=pairs), ["TOK007"]) == []


def test_prompts_that_end_in_a_space_merge_with_the_response() -> None:
    pairs = [(f"{q} ", "it is a fox", "a house") for q in QUESTIONS]
    setup = RLHFSetup(policy=zoo.decoder("llama"), tokenizer=byte_pairs(), prompts=QUESTIONS, preferences=pairs)
    assert grave(setup, ["TOK007"]) == [("TOK007", "tokenizer")]


def test_words_that_would_run_together_are_joined_by_ids() -> None:
    pairs = [("t8 t9", "t10 t11", "t12") for _ in range(4)]
    assert grave(zoo.healthy_setup("llama").but(preferences=pairs), ["TOK007"]) == []


def test_a_tokenizer_that_does_not_come_back() -> None:
    tokenizer = byte_pairs()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel(), tokenizers.decoders.Replace("?", "")]
    )
    setup = RLHFSetup(policy=zoo.decoder("llama"), tokenizer=tokenizer, prompts=QUESTIONS)
    assert grave(setup, ["TOK007"]) == [("TOK007", "tokenizer")]


def test_prompts_longer_than_their_limit() -> None:
    setup = zoo.healthy_setup("llama")
    assert severity_of("TOK008", setup.but(declared={"prompt_length": 3})) == "error"
    assert severity_of("TOK008", setup.but(declared={"prompt_length": 5})) == ""
    long = [*(["t8 t9"] * 30), "t8 " * 9]
    assert severity_of("TOK008", setup.but(prompts=long, declared={"prompt_length": 5})) == "warning"


def test_preference_pairs_that_are_cut() -> None:
    setup = zoo.healthy_setup("llama")
    prompt = "t8 " * 126
    pairs = [(prompt, "t9 t10", "t11 t12"), (prompt * 2, "t9", "t11")]
    assert grave(setup.but(preferences=pairs), ["TOK008"]) == [("TOK008", "reward")]
    left = zoo.tokenizer()
    left.truncation_side = "left"
    assert grave(setup.but(tokenizer=left, preferences=pairs), ["TOK008"]) == []


def test_ids_whose_start_was_cut_off() -> None:
    rows = [[1, 8, 9], [1, 8, 9, 10], [1, 7, 9], [8, 9, 10, 11, 12], [9, 10, 11, 12, 13]]
    width = 5
    prompts = {
        "input_ids": [[0] * (width - len(r)) + r for r in rows],
        "attention_mask": [[0] * (width - len(r)) + [1] * len(r) for r in rows],
    }
    setup = zoo.healthy_setup("llama").but(prompts=prompts)
    assert grave(setup, ["TOK008"]) == [("TOK008", "tokenizer")]
    whole = {"input_ids": [[1, *r[1:]] if 0 not in r else r for r in prompts["input_ids"]]}
    assert grave(setup.but(prompts=prompts | whole), ["TOK008"]) == []


def test_tokenizers_in_folders_are_read_alike(tmp_path: Path) -> None:
    folder = checkpoints.save(zoo.decoder("llama"), tmp_path / "policy")
    zoo.tokenizer("left").save_pretrained(folder)
    assert grave(RLHFSetup(policy=str(folder), prompts=TEXTS), ["tokens"]) == []
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "t9"}))
    assert grave(RLHFSetup(policy=str(folder)), ["TOK003"], Stage.STATIC) == [("TOK003", "tokenizer")]

"""A tokenizer's files tell what the tokenizer itself tells once it is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from zoo import tokenizer

from rlhf_doctor.facts import Broken
from rlhf_doctor.instruments.headers import read_tokenizer
from rlhf_doctor.instruments.manifest import tokenizer_of
from rlhf_doctor.setups import RLHFSetup

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "good": 4, "bad": 5, "é": 6, "\U0001f642": 7}


def build(model: str = "WordLevel", *, post: str = "", **named: Any) -> Any:
    if model == "Unigram":
        backend = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=3))
    elif model == "BPE":
        backend = Tokenizer(models.BPE(WORDS, [], unk_token="<unk>"))
    else:
        backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post:
        backend.post_processor = processors.TemplateProcessing(post, special_tokens=[("<s>", 1), ("</s>", 2)])
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **named}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)


CASES = {
    "words": lambda: build(),
    "zoo": lambda: tokenizer("left"),
    "adds both": lambda: build(post="<s> $A </s>"),
    "adds a BOS": lambda: build(post="<s> $A"),
    "adds an EOS": lambda: build(post="$A </s>"),
    "unigram": lambda: build("Unigram", padding_side="left", truncation_side="left"),
    "bpe with a limit": lambda: build("BPE", model_max_length=77),
    "pad is eos": lambda: build(pad_token="</s>"),
    "no pad": lambda: build(pad_token=None),
    "a token added": lambda: build(pad_token="<new>"),
    "template": lambda: build(chat_template="{{ messages }}"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_say_what_the_tokenizer_says(case: str, tmp_path: Path) -> None:
    original = CASES[case]()
    original.save_pretrained(tmp_path)
    info = read_tokenizer(tmp_path)
    live = tokenizer_of(RLHFSetup(tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path)), "policy")
    assert info is not None
    assert live is not None
    assert dataclasses.replace(info, where="", raw={}) == dataclasses.replace(live, where="", raw={})
    ids = original("good bad")["input_ids"]
    assert info.adds_bos == (ids[0] == 1)
    assert info.adds_eos == (ids[-1] == 2)
    assert info.size == max(original.get_vocab().values()) + 1


def test_older_layouts_are_read_too(tmp_path: Path) -> None:
    """Special tokens as objects, ids in added_tokens_decoder, named templates, a vocabulary of its own."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": {"content": "</s>", "lstrip": False},
        "added_tokens_decoder": {"9": {"content": "</s>"}},
        "chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
        "model_max_length": 1e30,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "a"}}))
    info = read_tokenizer(tmp_path)
    assert info is not None
    assert (info.size, info.eos_id, info.pad_id, info.chat_template) == (10, 9, 0, "D")
    assert (info.model_max_length, info.adds_bos, info.adds_eos, info.padding_side) == (None, True, False, "left")


def test_a_sentencepiece_model_alone_gives_its_pieces(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁hello" * 30]
    message = b""
    for piece in pieces:
        text = piece.encode()
        inner = b"\x0a" + _varint(len(text)) + text + b"\x15\x00\x00\x80\x3f"  # the text, a score of 1.0
        message += b"\x0a" + _varint(len(inner)) + inner
    (tmp_path / "tokenizer.model").write_bytes(message + b"\x12\x02\x08\x01")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    info = read_tokenizer(tmp_path)
    assert info is not None
    assert (info.size, info.eos_id) == (4, 2)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(Broken, match=r"tokenizer\.model"):
        read_tokenizer(tmp_path)


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def test_a_folder_without_a_tokenizer_gives_none_and_no_folder_is_broken(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    with pytest.raises(Broken, match="does not exist") as failure:
        read_tokenizer(tmp_path / "x")
    assert failure.value.role == "tokenizer"

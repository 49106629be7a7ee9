"""Texts become the same ids without transformers as with it, or nothing is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign import folders

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.instruments.prompts import encode
from rlhf_doctor.instruments.texts import FileTokenizer, live_tokenizer
from rlhf_doctor.setups import RLHFSetup

TEXTS = ("", "a red dog", "the the  the\n", "<s> twice </s>", "naïve ☃")


def test_a_file_alone_gives_the_ids_that_transformers_gives(healthy_files: RLHFSetup) -> None:
    setup = healthy_files.but(tokenizer=None)
    light, whole = live_tokenizer(setup, from_files=True), live_tokenizer(setup)
    assert isinstance(light, FileTokenizer)
    for text in (*TEXTS, *setup.prompts):
        for special in (True, False):
            assert encode(light, text, add_special_tokens=special) == encode(whole, text, add_special_tokens=special)


def test_a_file_that_cuts_and_pads_does_neither(healthy_files: RLHFSetup) -> None:
    path = Path(healthy_files.policy) / "tokenizer.json"
    cut: dict[str, Any] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folders.edit(str(healthy_files.policy), "tokenizer.json", truncation=cut)
    assert len(encode(FileTokenizer(path), "a red dog and a cat")) > 2


def test_a_class_that_does_more_than_its_file_waits_for_transformers(healthy_files: RLHFSetup) -> None:
    folders.edit(str(healthy_files.policy), "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(Unavailable, match="--stage probe"):
        live_tokenizer(healthy_files.but(tokenizer=None), from_files=True)


def test_a_file_that_is_cut_off_is_named(healthy_files: RLHFSetup) -> None:
    path = Path(healthy_files.policy) / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:200], encoding="utf-8")
    with pytest.raises(Unavailable, match="cannot be loaded"):
        live_tokenizer(healthy_files.but(tokenizer=None), from_files=True)

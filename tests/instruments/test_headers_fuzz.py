"""Whatever bytes a checkpoint's files hold: sentences that name them, in little time and memory, and no exception."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import Errored, Stage
from rlhf_doctor.instruments.headers import read_checkpoint
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.setups import RLHFSetup

SMALL = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "chat_template.json", "adapter_config.json", "adapter_model.safetensors",
         "model.safetensors", "model.safetensors.index.json", "value_head.safetensors", "tokenizer.model",
         "vocab.json", "vocab.txt", "pytorch_model.bin", "model-00001-of-00002.safetensors")  # fmt: skip
KEYS = ("architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "id2label", "text_config",
        "auto_map", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype", "torch_dtype", "rope_scaling",
        "quantization_config", "tie_word_embeddings", "base_model_name_or_path", "task_type", "modules_to_save", "r",
        "model", "vocab", "added_tokens", "post_processor", "padding", "truncation", "chat_template", "pad_token",
        "eos_token", "bos_token", "added_tokens_decoder", "model_max_length", "weight_map", "temperature", "top_p",
        "do_sample", "name", "template", "content", "id", "single", "processors", "type", "direction")  # fmt: skip
NUMBERS = st.integers() | st.integers(0, 100) | st.sampled_from([-1, 1 << 31, 1 << 63, 10**30]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["LlamaForCausalLM", "<s>", ".", "/"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=25,
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=12)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "BOOL", "?"]) | VALUES,
        "shape": st.lists(st.integers(0, 8), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | VALUES,
    },
)
NAMES = st.sampled_from(["score.weight", "lm_head.weight", "model.embed_tokens.weight", "__metadata__", "v_head", ""])


def judged(files: dict[str, bytes]) -> Manifest | None:
    """The manifest of a folder with these files; every sentence about it is checked."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            manifest = read_checkpoint("policy", Path(folder))
        except Broken as broken:
            check_sentence(broken.sentence, folder)
            return None
        for said in manifest.problems:
            check_sentence(said, folder)
        assert not manifest.unloadable or manifest.unloadable == manifest.problems[0]
        return manifest


def check_sentence(said: str, folder: str) -> None:
    assert folder in said
    assert "\n" not in said
    assert len(said) < 1500


def packed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def valid() -> bytes:
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
        "score.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [32, 36]},
        "__metadata__": {"format": "pt"},
    }
    return packed(json.dumps(header).encode(), bytes(36))


@SMALL
@given(st.dictionaries(st.sampled_from(FILES), st.binary(max_size=64), max_size=5))
def test_random_bytes(files: dict[str, bytes]) -> None:
    judged(files)


@SMALL
@given(
    st.lists(
        st.tuples(st.sampled_from(["set", "drop", "add"]), st.integers(0, 400), st.integers(0, 255)),
        min_size=1,
        max_size=6,
    )
)
def test_mutated_headers(changes: list[tuple[str, int, int]]) -> None:
    raw = bytearray(valid())
    for what, at, byte in changes:
        at %= len(raw) + 1
        if what == "set" and at < len(raw):
            raw[at] = byte
        elif what == "drop":
            del raw[at : at + 1 + byte % 5]
        else:
            raw[at:at] = bytes([byte])
    judged({"config.json": b"{}", "model.safetensors": bytes(raw)})


def test_the_header_that_is_mutated_is_healthy() -> None:
    manifest = judged({"config.json": b"{}", "model.safetensors": valid()})
    assert manifest is not None
    assert manifest.problems == ()
    assert manifest.tensors["score.weight"].shape == (1, 2)


@SMALL
@given(st.dictionaries(NAMES, ENTRIES | VALUES, max_size=5), st.integers(0, 80))
def test_lying_headers(header: dict[str, Any], size: int) -> None:
    manifest = judged({"config.json": b"{}", "model.safetensors": packed(json.dumps(header).encode(), bytes(size))})
    assert manifest is not None
    spans = [
        e["data_offsets"]
        for n, e in header.items()
        if n != "__metadata__" and isinstance(e, dict) and "data_offsets" in e
    ]
    if not manifest.problems:  # then every byte of the data belongs to exactly one tensor
        covered = sorted(i for begin, end in spans for i in range(begin, end))
        assert covered == list(range(size))


@SMALL
@given(st.dictionaries(st.sampled_from([f for f in FILES if f.endswith(".json")]), OBJECTS | VALUES, max_size=6))
def test_configs_of_any_content(files: dict[str, Any]) -> None:
    judged({"model.safetensors": valid(), **{name: json.dumps(value).encode() for name, value in files.items()}})


@settings(max_examples=40, deadline=None)
@given(OBJECTS, OBJECTS, OBJECTS)
def test_no_check_crashes_on_what_was_read(config: Any, tokenizer: Any, generation: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("config", config), ("tokenizer_config", tokenizer), ("generation_config", generation)):
            (Path(folder) / f"{name}.json").write_text(json.dumps(value))
        (Path(folder) / "model.safetensors").write_bytes(valid())
        setup = RLHFSetup(policy=folder, reference=folder, reward=folder, value=folder, tokenizer=folder)
        found = examine(setup, options=Options(stage=Stage.STATIC))
    assert [o for o in found.outcomes.values() if isinstance(o, Errored)] == []


BOMBS: dict[str, Callable[[Path], Any]] = {
    "lists in lists": lambda path: (path / "config.json").write_bytes(b"[" * (4 << 20)),
    "objects in objects": lambda path: (path / "tokenizer.json").write_bytes(b'{"a":' * (1 << 20)),
    "a sparse config of a terabyte": lambda path: _sparse(path / "config.json", b"", 1 << 40),
    "a sparse index": lambda path: _sparse(path / "model.safetensors.index.json", b"{", 1 << 34),
    "a header of a terabyte": lambda path: _sparse(
        path / "model.safetensors", (1 << 40).to_bytes(8, "little"), 1 << 41
    ),
    "weights of a terabyte": lambda path: _sparse(path / "model.safetensors", valid(), 1 << 40),
}


def _sparse(path: Path, start: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_little_time_and_memory(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    BOMBS[bomb](tmp_path)
    tracemalloc.start()
    started = time.perf_counter()
    problems = read_checkpoint("policy", tmp_path).problems
    taken, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problems
    assert taken < 2  # milliseconds in fact; the bound only says that nothing grows with what a file claims
    assert peak < 40 << 20

"""Manifests of checkpoint folders: what they hold, and one sentence about everything that is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints as made
import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import DECODERS, decoder, tokenizer

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.files import CONFIG_LIMIT
from rlhf_doctor.instruments.headers import read_checkpoint
from rlhf_doctor.instruments.readings import Manifest, TensorInfo
from rlhf_doctor.setups import RLHFSetup


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.with_tokenizer(made.save(decoder("llama"), tmp_path_factory.mktemp("healthy") / "c"))


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(healthy, tmp_path / "c"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return made.save(decoder("llama"), tmp_path / "s", max_shard_size="20KB")


def read(path: Path, role: Any = "policy") -> Manifest:
    return read_checkpoint(role, path)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["causal", "sequence"])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_manifest_names_every_tensor_of_the_file(family: str, kind: str, size: str, tmp_path: Path) -> None:
    path = made.save(decoder(family, kind), tmp_path / "c", max_shard_size=size)
    manifest = read(path)
    held = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert {n: info.shape for n, info in manifest.tensors.items()} == {n: tuple(t.shape) for n, t in held.items()}
    assert {info.dtype for info in manifest.tensors.values()} == {"F32"}
    assert all((path / info.file).exists() for info in manifest.tensors.values())
    assert (manifest.problems, manifest.unloadable, manifest.vocab_size) == ((), "", 97)
    assert manifest.class_name == type(decoder(family, kind)).__name__
    assert manifest.is_causal_lm == (kind == "causal")
    assert [head.kind for head in manifest.heads if head.kind != "vocabulary"] == ["scalar"] * (kind != "causal")


def test_data_types_are_those_of_the_format(tmp_path: Path) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool,
             "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    save_file({n: torch.zeros(2, 3, dtype=d) for n, d in kinds.items()}, tmp_path / "model.safetensors")
    manifest = read(tmp_path)
    assert manifest.tensors == {n: TensorInfo((2, 3), n, "model.safetensors") for n in kinds}
    assert manifest.problems == ()


@pytest.mark.parametrize("write", [made.trl_value_head, made.llamafactory_value_head, made.openrlhf])
def test_scalar_heads_of_frameworks_are_found(write: Callable[[Path], Path], tmp_path: Path) -> None:
    manifest = read(write(tmp_path / "c"), "value")
    assert manifest.head("scalar") is not None
    assert not manifest.is_causal_lm
    assert manifest.problems == ()


def test_a_pickle_is_named_and_its_tensors_are_unknown(tmp_path: Path) -> None:
    manifest = read(made.deepspeed_chat(tmp_path / "c"), "reward")
    assert (manifest.pickles, manifest.tensors, manifest.problems) == (("pytorch_model.bin",), {}, ())


def test_a_pickle_beside_safetensors_is_not_needed(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    torch.save({}, folder / "optimizer.pt")
    assert read(folder).pickles == ()


def test_an_adapter_has_its_own_tensors_and_its_bases(tmp_path: Path) -> None:
    base = made.with_tokenizer(made.save(decoder("llama"), tmp_path / "base"))
    manifest = read(made.lora(tmp_path / "a", base))
    assert manifest.adapter is not None
    assert manifest.adapter["base_model_name_or_path"] == str(base)
    assert manifest.adapter_tensors.keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert manifest.tensors == read(base).tensors
    assert manifest.is_causal_lm
    assert manifest.tokenizer == read(base).tokenizer
    shutil.rmtree(base)
    alone = read(tmp_path / "a")
    assert (alone.tensors, alone.problems) == ({}, ())
    assert alone.adapter_tensors == manifest.adapter_tensors


def test_an_adapted_classifier_is_no_language_model(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    path = made.lora(tmp_path / "a", base, "SEQ_CLS", "AutoModelForSequenceClassification", num_labels=1)
    manifest = read(path, "reward")
    assert [head.kind for head in manifest.heads] == ["scalar"]
    assert not manifest.is_causal_lm


def test_an_adapter_that_is_its_own_base_is_a_sentence(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    path = made.lora(tmp_path / "a", base)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(path)}))
    assert "leads back to itself" in read(path).unloadable


# What is done to a healthy folder -> the file that the sentence must name, and a word of it.
def header(text: bytes | None = None, length: int | None = None) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        raw = b"{}" if text is None else text
        size = (len(raw) if length is None else length).to_bytes(8, "little")
        (folder / "model.safetensors").write_bytes(size + raw)

    return write


def entry(data: bytes = b"\0" * 8, **fields: Any) -> Callable[[Path], Any]:
    raw = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def config(raw: bytes, name: str = "config.json") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(raw)


def a_folder_instead(name: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return write


def cut(count: int) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:count])

    return write


BAD: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "empty weights": (cut(0), "model.safetensors", "truncated"),
    "cut in the header": (cut(100), "model.safetensors", "truncated"),
    "cut in the data": (cut(-1), "model.safetensors", "truncated"),
    "header beyond the file": (header(length=1 << 20), "model.safetensors", "truncated"),
    "header over 100 MB": (header(length=1 << 40), "model.safetensors", "damaged"),
    "git lfs pointer": (config(b"version https://git-lfs", "model.safetensors"), "model.safetensors", "LFS"),
    "header no JSON": (header(b"{'a'"), "model.safetensors", "JSON"),
    "header no UTF-8": (header(b'{"\xff":1}'), "model.safetensors", "UTF-8"),
    "header a list": (header(b"[]"), "model.safetensors", "list"),
    "header a recursion bomb": (header(b"[" * 100_000), "model.safetensors", "nested"),
    "tensor no object": (header(b'{"a": 3}'), "model.safetensors", "'a'"),
    "offsets beyond the file": (entry(data_offsets=[0, 1 << 50], shape=[1 << 48]), "model.safetensors", "truncated"),
    "offsets not the shape": (entry(shape=[3]), "model.safetensors", "lies"),
    "offsets backwards": (entry(data_offsets=[8, 0]), "model.safetensors", "lies"),
    "offsets with a hole": (entry(b"\0" * 16, data_offsets=[8, 16]), "model.safetensors", "no tensor"),
    "offsets negative": (entry(data_offsets=[-8, 0]), "model.safetensors", "'a'"),
    "offsets no numbers": (entry(data_offsets=["0", "8"]), "model.safetensors", "'a'"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "model.safetensors", "'a'"),
    "unknown dtype": (entry(dtype="F31"), "model.safetensors", "F31"),
    "shape overflows": (entry(shape=[1 << 62, 1 << 62]), "model.safetensors", "lies"),
    "data without a tensor": (entry(b"\0" * 9), "model.safetensors", "after its last"),
    "weights a folder": (a_folder_instead("model.safetensors"), "model.safetensors", "folder"),
    "config a folder": (a_folder_instead("config.json"), "config.json", "folder"),
    "config cut": (config(b'{"model_type": "lla'), "config.json", "JSON"),
    "config empty": (config(b""), "config.json", "JSON"),
    "config no UTF-8": (config('{"model_type": "é"}'.encode("latin-1")), "config.json", "UTF-8"),
    "config a list": (config(b"[1, 2]"), "config.json", "a list"),
    "config null": (config(b"null"), "config.json", "null"),
    "config a bomb": (config(b'{"a":' * 50_000), "config.json", "nested"),
    "config a number of many digits": (config(b'{"a": ' + b"9" * 9999 + b"}"), "config.json", "JSON"),
    "config half a character": (config(b'{"model_type": "\\ud800"}'), "config.json", "surrogate"),
    "config of wrong kinds": (config(b'{"architectures": "Llama", "vocab_size": ""}'), "config.json", "'vocab_size'"),
    "tokenizer cut": (config(b'{"model": {', "tokenizer.json"), "tokenizer.json", "JSON"),
    "tokenizer of wrong ids": (config(b'{"model": {"vocab": {"a": "b"}}}', "tokenizer.json"), "tokenizer.json", "ids"),
    "tokenizer config a list": (config(b"[]", "tokenizer_config.json"), "tokenizer_config.json", "a list"),
    "generation config cut": (config(b"{", "generation_config.json"), "generation_config.json", "JSON"),
    "special tokens cut": (config(b"{", "special_tokens_map.json"), "special_tokens_map.json", "JSON"),
    "chat template no UTF-8": (config(b"\xff", "chat_template.jinja"), "chat_template.jinja", "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_every_bad_file_is_one_sentence_that_names_it(case: str, folder: Path) -> None:
    spoil, file, word = BAD[case]
    spoil(folder)
    manifest = read(folder)
    assert len(manifest.problems) == 1
    assert str(folder / file) in manifest.problems[0]
    assert word in manifest.problems[0]
    assert "\n" not in manifest.problems[0]
    minor = file not in ("config.json", "model.safetensors")
    assert manifest.unloadable == ("" if minor else manifest.problems[0])


def test_what_can_be_read_is_still_read(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    manifest = read(folder)
    assert manifest.head("vocabulary") is not None
    assert manifest.tokenizer is not None
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert len(read(folder).problems) == 2
    assert read(folder).tensors == manifest.tensors


def test_a_huge_config_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "config.json", 100 << 20)
    [said] = read(folder).problems
    assert "104,857,600 bytes" in said
    assert f"{CONFIG_LIMIT:,}" in said


def test_a_byte_order_mark_is_no_fault(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert read(folder).problems == ()


def test_an_index_that_names_absent_shards_says_which(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    manifest = read(sharded)
    assert manifest.missing_shards == (first.name,)
    assert manifest.problems == (
        f"{sharded}/model.safetensors.index.json names a shard that is not there: {first.name}",
    )
    second.unlink()
    [said] = read(sharded).problems
    assert "2 shards that are not there" in said


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["model.gone.weight"] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    [said] = read(sharded).problems
    assert file in said
    assert "model.gone.weight" in said


@pytest.mark.parametrize("places", [None, [], {}, {"a": 1}, {"a": ""}, {"a": "../x.safetensors"}, {"a": "/etc/passwd"}])
def test_an_index_that_lies_is_one_sentence(places: Any, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    [said] = read(sharded).problems
    assert str(sharded / "model.safetensors.index.json") in said


def test_shards_without_an_index_are_read_and_reported(sharded: Path) -> None:
    whole = read(sharded).tensors
    (sharded / "model.safetensors.index.json").unlink()
    manifest = read(sharded)
    assert manifest.tensors == whole
    assert "model.safetensors.index.json does not exist" in manifest.unloadable


def test_a_config_alone_has_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in read(folder).unloadable


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "holds no checkpoint"),
        ("polcy", "did you mean {}/policy?"),
        ("policy/config.json", "give the checkpoint's folder, {}/policy"),
        ("run", "did you mean {}/run/checkpoint-7?"),
        ("loop", "a link to"),
        ("dangling", "a link to"),
        ("a\0b", "does not exist"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_folder_that_cannot_be_judged_is_broken(given: str, words: str, healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "policy")
    shutil.copytree(healthy, tmp_path / "run" / "checkpoint-7")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(Broken) as failure:
        read(tmp_path / given)
    assert words.format(tmp_path) in failure.value.sentence
    assert failure.value.role == "policy"


def test_a_file_without_permission_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "config.json":  # a superuser may read anything, so the refusal is played
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    [said] = read(folder).problems
    assert said == f"{folder}/config.json cannot be read: Permission denied"


def test_a_pipe_in_place_of_a_file_does_not_hang(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert sum("not a regular file" in said for said in read(folder).problems) == 2


def test_code_that_a_checkpoint_brings_along_is_noted(folder: Path) -> None:
    assert not read(folder).needs_remote_code
    made.edit(folder, auto_map={"AutoModel": "modeling.Odd"})
    assert read(folder).needs_remote_code


def test_problems_reach_the_errors_and_the_other_roles_are_examined(folder: Path, healthy: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    setup = RLHFSetup(policy=healthy, reference=folder, tokenizer=tokenizer("left"))
    found = examine(setup, options=Options(stage=Stage.STATIC))
    assert found.errors == (("reference", read(folder).problems[0]),)
    assert {"policy_manifest", "reference_manifest"} <= found.shown.keys()


def test_nothing_heavy_is_imported(healthy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rlhf_doctor.instruments.headers import read_checkpoint\n"
        f"read_checkpoint('policy', Path({str(healthy)!r}))\n"
        "print({'torch', 'transformers', 'peft', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""A checkpoint folder from its small files and the headers of its weights. No torch, and no tensor is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import Role
from rlhf_doctor.instruments.files import INDEX_LIMIT, BadFile, folder_problem, read_json, read_object
from rlhf_doctor.instruments.readings import Manifest, TensorInfo
from rlhf_doctor.instruments.safetensors_header import read_header
from rlhf_doctor.instruments.tokenizer_files import read_tokenizer, tokenizer_of_folder

__all__ = ["base_folder", "read_checkpoint", "read_tokenizer"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, VALUE_HEAD = "adapter_model.safetensors", "value_head.safetensors"
# What a training run leaves beside the weights, in the same pickle format.
NO_WEIGHTS = (
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
    "random_states",
    "optim_",
    "extra_state",
)
WHOLE = ("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "n_positions", "n_ctx", "num_labels", "bos_token_id",
         "pad_token_id")  # fmt: skip
CONFIG_KINDS: Mapping[str, tuple[type, ...]] = {
    "model_type": (str,),
    "architectures": (list,),
    "torch_dtype": (str,),
    "dtype": (str,),
    "eos_token_id": (int, list),
    **dict.fromkeys(WHOLE, (int,)),
    **dict.fromkeys(("id2label", "label2id", "auto_map", "quantization_config"), (dict,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict, bool)),
    **dict.fromkeys(("tie_word_embeddings", "is_encoder_decoder"), (bool,)),
    "rope_theta": (int, float),
}
GENERATION_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"), (int, list)),
    **dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty", "min_p", "typical_p"), (int, float)),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_beams"), (int,)),
    "do_sample": (bool,),
}
ADAPTER_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("base_model_name_or_path", "peft_type", "task_type"), (str,)),
    **dict.fromkeys(("modules_to_save", "target_modules"), (list, str)),
    "r": (int,),
    "lora_alpha": (int, float),
}


@dataclass
class Weights:
    """What the weight files of a folder hold, and what is wrong with them."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    adapter_tensors: dict[str, TensorInfo] = field(default_factory=dict)
    missing_shards: list[str] = field(default_factory=list)
    pickles: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether there is any file of weights, be it unreadable."""
        return bool(self.tensors or self.adapter_tensors or self.pickles or self.problems)


def read_checkpoint(role: Role, path: Path) -> Manifest:
    """The manifest of a checkpoint folder: a whole model, or a PEFT adapter with its base where that is on this disk.

    Files that cannot be read are sentences in ``problems``; the first that keeps the model from being loaded is also
    ``unloadable``.

    Raises:
        Broken: there is nothing in ``path`` that could be judged.
    """
    return _read(role, Path(path), ())


def _read(role: Role, path: Path, above: tuple[Path, ...]) -> Manifest:
    from rlhf_doctor.instruments.manifest import describe

    said = folder_problem(path)
    if said:
        raise Broken(role, said)
    essential: list[str] = []
    minor: list[str] = []
    config = read_object(path / "config.json", CONFIG_KINDS, essential)
    adapter = read_object(path / "adapter_config.json", ADAPTER_KINDS, essential)
    adapted = os.path.lexists(path / "adapter_config.json")
    weights = _weights(path, adapted)
    lack = _lack(path, weights, adapted)
    if lack and not essential and not os.path.lexists(path / "config.json") and not adapted and not weights.found:
        raise Broken(role, lack)
    essential += [lack] if lack else []
    essential += weights.problems
    generation = read_object(path / "generation_config.json", GENERATION_KINDS, minor)
    tokenizer = tokenizer_of_folder(path, minor)
    base = _base(role, path, adapter, (*above, path), essential) if adapted else None
    if base is not None:
        config = config or dict(base.raw_config)
        weights.tensors = {**base.tensors, **weights.tensors}
        generation = generation or dict(base.generation_config)
    names = [str(name) for name in config.get("architectures") or ()]
    made = describe(
        role,
        raw_config=config,
        tensors=weights.tensors,
        origin="checkpoint",
        path=str(path),
        class_name=names[0] if names else str(config.get("model_type") or ""),
        generation_config=generation,
        tokenizer=tokenizer or (base.tokenizer if base else None),
        adapter=adapter if adapted else None,
        adapter_tensors=weights.adapter_tensors,
        missing_shards=(*weights.missing_shards, *(base.missing_shards if base else ())),
        pickles=(*weights.pickles, *(base.pickles if base else ())),
        needs_remote_code=_remote(config, tokenizer) or bool(base and base.needs_remote_code),
        problems=tuple(dict.fromkeys([*essential, *minor, *(base.problems if base else ())])),
        unloadable=essential[0] if essential else base.unloadable if base else "",
    )
    return _with_adapted_head(made) if adapted else made


def _lack(path: Path, weights: Weights, adapted: bool) -> str:
    """What a checkpoint must have and this folder has not, in one sentence."""
    if adapted:
        return "" if weights.found else f"{path} has adapter_config.json and neither {ADAPTER} nor adapter_model.bin"
    if not os.path.lexists(path / "config.json"):
        if weights.found:
            return f"{path} has weights and no config.json, so nothing says how to build the model"
        return f"{path} holds no checkpoint: neither config.json nor weights are there{_elsewhere(path)}"
    if not weights.found:
        return f"{path} has no weights: there is neither {WEIGHTS} nor {INDEX} nor pytorch_model.bin"
    return ""


def _remote(config: Mapping[str, Any], tokenizer: Any) -> bool:
    return bool(config.get("auto_map") or (tokenizer is not None and tokenizer.raw.get("auto_map")))


def base_folder(adapter: Mapping[str, Any]) -> Path | None:
    """The folder of the model that an adapter sits on, None where it is not on this disk."""
    name = adapter.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    try:
        return Path(name) if Path(name).is_dir() else None
    except (OSError, ValueError):
        return None


def _base(
    role: Role, path: Path, adapter: Mapping[str, Any], above: tuple[Path, ...], problems: list[str]
) -> Manifest | None:
    folder = base_folder(adapter)
    if folder is None:
        return None
    if any(os.path.samefile(folder, each) for each in above):
        problems.append(f"{path / 'adapter_config.json'} names {folder} as its base, which leads back to itself")
        return None
    try:
        return _read(role, folder, above)
    except Broken as broken:
        problems.append(f"the base of the adapter in {path} cannot be read: {broken.sentence}")
        return None


def _with_adapted_head(made: Manifest) -> Manifest:
    """The heads that the adapted model has: a classifier's or critic's own in place of the base's vocabulary head."""
    from rlhf_doctor.instruments.manifest import heads_of

    own = heads_of({name: info for name, info in made.adapter_tensors.items() if "lora_" not in name})
    if made.adapts_classifier or any(head.kind != "vocabulary" for head in own):
        heads = own or tuple(head for head in made.heads if head.kind != "vocabulary")
        return dataclasses.replace(made, heads=heads)
    return made


def _weights(path: Path, adapted: bool) -> Weights:
    found = Weights()
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        found.problems.append(f"{path} cannot be read: {error.strerror}")
        return found
    present = frozenset(names)
    if WEIGHTS in present:
        found.tensors |= _shard(path / WEIGHTS, found)
    elif INDEX in present:
        _indexed(path, present, found)
    else:
        shards = [n for n in names if n.startswith("model-") and "-of-" in n and n.endswith(".safetensors")]
        if shards:
            found.problems.append(
                f"{path / INDEX} does not exist, and without it none of the {len(shards)} shards is loaded"
            )
        for name in shards:
            found.tensors |= _shard(path / name, found)
    if ADAPTER in present and adapted:
        found.adapter_tensors |= _shard(path / ADAPTER, found)
    if VALUE_HEAD in present:
        (found.adapter_tensors if adapted else found.tensors).update(_shard(path / VALUE_HEAD, found))
    found.pickles += [name for name in names if _is_needed_pickle(name, present, bool(found.tensors))]
    return found


def _is_needed_pickle(name: str, present: frozenset[str], have_tensors: bool) -> bool:
    """Whether a file is a pickle with weights that no safetensors file beside it has."""
    if not name.endswith((".bin", ".pt", ".pth")) or name.startswith(NO_WEIGHTS):
        return False
    if name == "adapter_model.bin":
        return ADAPTER not in present
    if name == "value_head.bin":
        return VALUE_HEAD not in present
    return not have_tensors and not {WEIGHTS, INDEX, ADAPTER} & present


def _shard(path: Path, found: Weights) -> dict[str, TensorInfo]:
    try:
        tensors, said = read_header(path)
    except BadFile as bad:
        found.problems.append(str(bad))
        return {}
    if said:
        found.problems.append(said)
    return tensors


def _indexed(path: Path, present: frozenset[str], found: Weights) -> None:
    """The shards that an index names, and what is wrong between it and them."""
    index = path / INDEX
    try:
        given = read_json(index, INDEX_LIMIT)
    except BadFile as bad:
        found.problems.append(str(bad))
        return
    places = given.get("weight_map") if isinstance(given, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) and file for file in places.values())
    ):
        found.problems.append(f"{index} has no weight_map from tensors to the files that hold them")
        return
    promised: dict[str, set[str]] = {}
    for tensor, file in places.items():
        promised.setdefault(file, set()).add(tensor)
    outside = sorted(f for f in promised if PurePosixPath(f).is_absolute() or ".." in PurePosixPath(f).parts)
    if outside:
        found.problems.append(f"{index} names a file outside its folder: {outside[0]!r:.120}")
    lacking: list[str] = []
    for file in sorted(set(promised) - set(outside)):
        if file not in present and not _exists(path / file):
            found.missing_shards.append(file)
            continue
        tensors = _shard(path / file, found)
        found.tensors |= tensors
        lost = sorted(promised[file] - tensors.keys()) if tensors else []
        if lost:
            lacking.append(f"{file} lacks {len(lost)} of them, {lost[0]!r:.120} for one")
    if found.missing_shards:
        names = ", ".join(found.missing_shards[:3]) + (" and others" if len(found.missing_shards) > 3 else "")
        many = len(found.missing_shards) > 1
        what = f"{len(found.missing_shards)} shards that are" if many else "a shard that is"
        found.problems.append(f"{index} names {what} not there: {names}")
    if lacking:
        found.problems.append(f"{index} promises tensors that its shards do not hold: {'; '.join(lacking[:3])}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _elsewhere(path: Path) -> str:
    """A folder below that does hold a checkpoint, as a hint."""
    found: list[Path] = []
    for top, folders, files in islice(os.walk(path), 200):  # a hint is worth no search through a whole disk
        depth = len(Path(top).parts) - len(path.parts)
        folders[:] = sorted(folders)[:64] if depth < 3 else []
        if depth and ("config.json" in files or "adapter_config.json" in files):
            found.append(Path(top))
    return f"; did you mean {found[-1]}?" if found else ""

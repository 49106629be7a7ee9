"""What each role is, from its files or from the names and shapes of a module. No torch is imported here."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.files import NESTED
from rlhf_doctor.instruments.readings import Head, Manifest, TensorInfo, TokenizerInfo
from rlhf_doctor.instruments.tokenizer_files import added_around, fingerprint

__all__ = ["describe", "heads_of", "manifest", "tokenizer_of"]

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight",
              "tok_embeddings.weight", "embedding.weight", "shared.weight")  # fmt: skip
VOCABULARY_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "lm_head")
SCALAR_HEADS = ("score", "v_head", "value_head", "classifier", "summary", "reward_head", "critic_head", "v_proj_head",
                "regression_head", "scalar_head")  # fmt: skip


@role_fact(Stage.STATIC)
def manifest(role: Role, setup: Any) -> Manifest:
    """The manifest of a role.

    Raises:
        Unavailable: the setup has no such model.
        Broken: its folder cannot be read at all.
    """
    given = setup.model(role)
    if given is None:
        raise Unavailable(f"needs a {role} model")
    path = setup.path(role)
    if path is not None:
        from rlhf_doctor.instruments.headers import read_checkpoint

        made = read_checkpoint(role, path)
        if made.tokenizer:
            return made
        tokenizer, problems = _tokenizer_or_problem(setup, role)
        return replace(made, tokenizer=tokenizer, problems=(*made.problems, *problems))
    tokenizer, problems = _tokenizer_or_problem(setup, role)
    if isinstance(given, str):
        made = _empty(role, "adapter-off", "the policy with its adapter off", tokenizer)
    elif not hasattr(given, "state_dict"):
        made = _empty(role, "callable", getattr(given, "__name__", type(given).__name__), tokenizer)
    else:
        made = _of_module(role, given, tokenizer)
    return replace(made, problems=problems) if problems else made


def _tokenizer_or_problem(setup: Any, role: Role) -> tuple[TokenizerInfo | None, tuple[str, ...]]:
    """A tokenizer that cannot be read is no reason to know nothing of the model."""
    try:
        return tokenizer_of(setup, role), ()
    except Broken as broken:
        return None, (broken.sentence,)


def describe(
    role: Role,
    *,
    raw_config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    embedding_rows: int | None = None,
    **rest: Any,
) -> Manifest:
    """A manifest with everything that follows from config and tensors filled in.

    ``embedding_rows`` is for a live module, whose look-up tables are known by more than their names.
    """
    nested: dict[str, Any] = next((raw_config[k] for k in NESTED if isinstance(raw_config.get(k), dict)), {})
    config = {**raw_config, **nested}
    heads = heads_of(tensors)
    rows = [
        info.shape[0]
        for name, info in tensors.items()
        if len(info.shape) == 2
        and name.endswith(EMBEDDINGS)
        and "position" not in name
        and "token_type" not in name
        and not any(part.isdigit() for part in name.split("."))  # a layer's, such as an expert that is shared
    ]
    weights = Counter[str]()
    for info in tensors.values():
        if info.dtype.startswith(("F", "BF")):
            weights[info.dtype] += math.prod(info.shape)
    return Manifest(
        role=role,
        raw_config=raw_config,
        config=config,
        tensors=tensors,
        heads=heads,
        model_type=config.get("model_type"),
        hidden_size=_first_int(config, "hidden_size", "n_embd", "d_model", "dim"),
        num_layers=_first_int(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        vocab_size=_first_int(config, "vocab_size"),
        embedding_rows=max(rows, default=None) if embedding_rows is None else embedding_rows,
        max_positions=_first_int(config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
        weight_dtypes=dict(weights),
        **rest,
    )


def heads_of(tensors: Mapping[str, TensorInfo]) -> tuple[Head, ...]:
    """The output heads among tensors: by name, and a scalar head by its single row where its name is not known."""
    heads = []
    for name, info in tensors.items():
        if len(info.shape) != 2:
            continue
        if info.shape[0] > 8:
            if name.endswith(VOCABULARY_HEADS):
                heads.append(Head("vocabulary", name, info.shape[0]))
            continue
        if not name.endswith("weight"):
            continue
        if any(part in SCALAR_HEADS or part.endswith("_head") for part in name.lower().split(".")[:-1]):
            if info.shape[0] == 1:
                heads.append(Head("scalar", name, 1))
            elif not any(h.name.startswith(name.rsplit(".", 2)[0]) for h in heads):
                heads.append(Head("labels", name, info.shape[0]))
        elif info.shape[0] == 1 and info.shape[1] > 1 and "layers." not in name:
            heads.append(Head("scalar", name, 1))
    return tuple(heads)


def _first_int(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[n] for n in names if isinstance(config.get(n), int) and not isinstance(config[n], bool)), None)


def _empty(role: Role, origin: Any, name: str, tokenizer: TokenizerInfo | None) -> Manifest:
    return describe(
        role,
        raw_config={},
        tensors={},
        origin=origin,
        path=None,
        class_name=name,
        generation_config={},
        tokenizer=tokenizer,
    )


def _of_module(role: Role, module: Any, tokenizer: TokenizerInfo | None) -> Manifest:
    tensors = {
        name: TensorInfo(tuple(tensor.shape), DTYPES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype)))
        for name, tensor in module.state_dict().items()
        if hasattr(tensor, "dtype") and not type(tensor).__name__.startswith("Uninitialized")
    }
    peft = getattr(module, "peft_config", None)
    adapter = next((_as_dict(c) for c in peft.values()), None) if isinstance(peft, dict) else None
    return describe(
        role,
        raw_config=_as_dict(getattr(module, "config", None)),
        embedding_rows=_embedding_rows(module),
        tensors={name.replace(".base_layer.", "."): info for name, info in tensors.items() if "lora_" not in name},
        origin="module",
        path=None,
        class_name=_class_name(module),
        generation_config=_as_dict(getattr(module, "generation_config", None)),
        tokenizer=tokenizer,
        adapter=adapter,
        adapter_tensors={name: info for name, info in tensors.items() if "lora_" in name},
    )


def _embedding_rows(module: Any) -> int | None:
    """Rows of the token embedding of a module of any style: not a table of positions or types; of several the one as
    long as some projection is wide (the vocabulary head), else the first."""
    tables = [
        (name.lower(), child.num_embeddings)
        for name, child in module.named_modules()
        if isinstance(getattr(child, "num_embeddings", None), int)
    ]
    tokens = [n for name, n in tables if not any(part in name for part in ("pos", "place", "wpe", "type", "segment"))]
    widths = {getattr(child, "out_features", None) for child in module.modules()}
    rows = tokens or [n for _, n in tables]
    return next((n for n in rows if n in widths), rows[0] if rows else None)


def _class_name(module: Any) -> str:
    base = getattr(module, "get_base_model", None)
    return type(base() if callable(base) else module).__name__


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return {}
    return dict(config.to_dict())


def tokenizer_of(setup: Any, role: Role) -> TokenizerInfo | None:
    """The tokenizer that a role is fed by: its own where the setup has one for it, else the policy's.

    Raises:
        Broken: it is given as a folder that cannot be read.
    """
    given = setup.tokenizer
    if role == "reward" and setup.reward_tokenizer is not None:
        given = setup.reward_tokenizer
    if given is None:
        return None
    if isinstance(given, (str, Path)):
        from rlhf_doctor.instruments.headers import read_tokenizer

        return read_tokenizer(Path(given))
    return _of_tokenizer(given)


def _of_tokenizer(tokenizer: Any) -> TokenizerInfo:
    vocabulary = tokenizer.get_vocab() if callable(getattr(tokenizer, "get_vocab", None)) else {}
    adds_bos, adds_eos = _added_by(tokenizer)

    def text(name: str) -> str | None:
        value = getattr(tokenizer, name, None)
        return None if value is None else str(value)

    limit = getattr(tokenizer, "model_max_length", None)
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerInfo(
        where=type(tokenizer).__name__,
        size=max(vocabulary.values(), default=-1) + 1,
        pad=text("pad_token"),
        pad_id=getattr(tokenizer, "pad_token_id", None),
        bos=text("bos_token"),
        bos_id=getattr(tokenizer, "bos_token_id", None),
        eos=text("eos_token"),
        eos_id=getattr(tokenizer, "eos_token_id", None),
        unk=text("unk_token"),
        padding_side=getattr(tokenizer, "padding_side", None),
        truncation_side=getattr(tokenizer, "truncation_side", None),
        model_max_length=limit if isinstance(limit, int) and limit < 10**9 else None,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=template if isinstance(template, str) else None,
        fingerprint=fingerprint(vocabulary),
    )


def _added_by(tokenizer: Any) -> tuple[bool | None, bool | None]:
    """Whether a tokenizer puts a BOS before a text and an EOS behind it.

    Its post-processor decides; ``add_bos_token`` is only what it was once asked for, and False of many that add one.
    """
    processor = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
    if processor is None or not hasattr(processor, "__getstate__"):
        return getattr(tokenizer, "add_bos_token", None), getattr(tokenizer, "add_eos_token", None)
    state = processor.__getstate__()
    bos, eos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None)
    return added_around(json.loads(state) if isinstance(state, (str, bytes)) else None, bos, eos)

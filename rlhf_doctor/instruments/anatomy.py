"""Which tensors a checkpoint of a known family must hold, and which of them it does not. No torch is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rlhf_doctor.instruments.readings import Manifest

__all__ = ["WRAPPERS", "Gap", "gaps", "wrapper_of"]

# What wrappers put before every name when their state_dict is saved as it is.
WRAPPERS = (
    "pretrained_model.",
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "base_model.model.",
)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
LLAMA = (
    *NORMS,
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
)
BOTH = ("weight", "bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
VOCABULARY_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Family:
    """``layers`` are a layer's tensors, ``stack`` the name before its number, ``rows`` hidden-size checks:
    tensor -> (axis that is the hidden size)."""

    stack: str
    layers: tuple[str, ...]
    outer: tuple[str, ...]
    tied: bool = False
    hidden: Mapping[str, int] = field(default_factory=dict)


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in BOTH)


FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral"),
        Family("layers", LLAMA, ("norm.weight",), hidden={"self_attn.q_proj.weight": 1, "mlp.gate_proj.weight": 1}),
    ),
    "qwen2": Family(
        "layers",
        (*LLAMA, *(f"self_attn.{p}_proj.bias" for p in "qkv")),
        ("norm.weight",),
        hidden={"self_attn.q_proj.weight": 1, "mlp.gate_proj.weight": 1},
    ),
    "qwen3": Family(
        "layers",
        (*LLAMA, "self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        ("norm.weight",),
        hidden={"self_attn.q_proj.weight": 1, "mlp.gate_proj.weight": 1},
    ),
    "gemma": Family("layers", LLAMA, ("norm.weight",), True, {"self_attn.q_proj.weight": 1}),
    "gpt2": Family(
        "h",
        _pairs("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        ("wpe.weight", *_pairs("ln_f")),
        True,
        {"attn.c_attn.weight": 0, "mlp.c_fc.weight": 0},
    ),
    "gpt_neox": Family(
        "layers",
        (
            *_pairs("input_layernorm", "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            "attention.query_key_value.weight",
            "attention.dense.weight",
        ),
        _pairs("final_layer_norm"),
        hidden={"attention.query_key_value.weight": 1, "mlp.dense_h_to_4h.weight": 1},
    ),
}


NUMBERED = re.compile(r"\.\d+\.")
IN_LAYER = re.compile(r"(?:^|\.)(layers|h|blocks|block)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Gap:
    """``kind``: "absent", "shape" or "renamed"; ``names`` of tensors; ``expected`` and ``observed`` in words."""

    kind: str
    names: tuple[str, ...]
    expected: str
    observed: str


def wrapper_of(m: Manifest) -> str:
    """The wrapper's prefix that every layer's tensor carries, "" where there is none."""
    layers = [name for name in m.tensors if NUMBERED.search(name)]
    return next((w for w in WRAPPERS if layers and all(name.startswith(w) for name in layers)), "")


def gaps(m: Manifest) -> Iterator[Gap]:
    """What a checkpoint's headers lack against its own config; nothing for quantised or unknown layouts."""
    if m.config.get("quantization_config") or not m.tensors:
        return
    wrapper = wrapper_of(m)
    if wrapper:
        name = next(iter(n for n in m.tensors if n.startswith(wrapper)))
        yield Gap("renamed", (name,), name.removeprefix(wrapper), name)
        return
    family = FAMILIES.get(m.model_type or "")
    yield from _layers(m, family)
    yield from _ends(m, family)
    yield from _shapes(m, family)


def _layers(m: Manifest, family: Family | None) -> Iterator[Gap]:
    """Layers without any tensor; in a known family, layers without one that they need."""
    stacks: dict[int, set[str]] = {}
    for name in m.tensors:
        found = IN_LAYER.search(name)
        if found and (family is None or found[1] == family.stack):
            stacks.setdefault(int(found[2]), set()).add(found[3])
    if not stacks or m.num_layers is None or m.config.get("is_encoder_decoder"):
        return
    empty = tuple(f"layer {i}" for i in range(m.num_layers) if i not in stacks)
    if empty:
        yield Gap("absent", empty, f"{m.num_layers} layers", f"{m.num_layers - len(empty)} layers")
    wanted = family.layers if family else ()
    lost = tuple(
        f"layer {i}: {part}" for i in sorted(stacks) if i < m.num_layers for part in wanted if part not in stacks[i]
    )
    if lost:
        yield Gap("absent", lost, "every tensor of a layer", f"{len(lost)} are not there")


def _ends(m: Manifest, family: Family | None) -> Iterator[Gap]:
    """The embedding, the final norm and the language-model head of a known family."""
    if family is None:
        return
    embedded = any(name.endswith(EMBEDDINGS) for name in m.tensors)
    headed = any(name.endswith(VOCABULARY_HEADS) for name in m.tensors)
    tied = m.config.get("tie_word_embeddings", family.tied)
    lost = [part for part in family.outer if not any(n == part or n.endswith(f".{part}") for n in m.tensors)]
    if not embedded and not (tied and headed):
        lost.append("the token embedding")
    language = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in m.architectures)
    if m.role in ("policy", "reference") and language and not headed and not (tied and embedded):
        lost.append("the language-model head, which is not tied to the embedding")
    if lost:
        yield Gap("absent", tuple(lost), "embedding, final norm and head", "not in the checkpoint")


def _shapes(m: Manifest, family: Family | None) -> Iterator[Gap]:
    """Rows of the embedding against vocab_size, and the hidden size against the first layers' inputs."""
    if m.vocab_size and m.embedding_rows and m.embedding_rows != m.vocab_size and family is not None:
        name = next((n for n in m.tensors if n.endswith(EMBEDDINGS)), "embedding")
        yield Gap("shape", (name,), f"{m.vocab_size} rows (vocab_size)", f"{m.embedding_rows} rows")
    axes = {f".{part}": axis for part, axis in (family.hidden if family else {}).items()}
    inputs = {n: info for n, info in m.tensors.items() if len(info.shape) == 2 and n.endswith(tuple(axes))}
    for part, axis in axes.items():
        for name, info in inputs.items():
            if name.endswith(part) and m.hidden_size and info.shape[axis] != m.hidden_size:
                yield Gap("shape", (name,), f"{m.hidden_size} inputs (hidden size)", f"{info.shape}")
                break

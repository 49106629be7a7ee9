"""Which heads are among a model's tensors, under which names? Shared by REW002, REW003 and VAL007, no check itself."""

from __future__ import annotations

from typing import Any

from rlhf_doctor.finding import Evidence
from rlhf_doctor.instruments.manifest import heads_of
from rlhf_doctor.instruments.readings import Head, Loading, Manifest

__all__ = ["absent_head", "head_of_labels", "new_heads", "renamed_head", "scalar_heads"]

# The head that a class reads, as transformers names it; what is not listed is not judged.
SEQUENCE_SCORE = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi",
     "phi3", "stablelm", "starcoder2", "deepseek_v3", "glm4", "gptj", "opt", "gpt2", "gpt_neo", "bloom",
     "mpt", "gpt_neox", "falcon"}
)  # fmt: skip
TOKEN_CLASSIFIER = frozenset({"gpt2", "gpt_neo", "bloom", "mpt", "gpt_neox", "falcon", "bert", "distilbert", "roberta"})
TOKEN_SCORE = SEQUENCE_SCORE - TOKEN_CLASSIFIER - {"gemma3_text", "gptj", "opt"}

HEAD_PARTS = frozenset(
    {"score", "v_head", "value_head", "classifier", "summary", "reward_head", "out_proj", "regression_head"}
)


def scalar_heads(manifest: Manifest) -> tuple[Head, ...]:
    """Heads that end in one number or in labels, an adapter's own tensors included."""
    every = (*manifest.heads, *heads_of(manifest.adapter_tensors))
    return tuple(head for head in every if head.kind in ("scalar", "labels"))


def head_of_labels(manifest: Manifest, setup: Any) -> Head | None:
    """The head of several labels of a sequence classifier that is called as it is."""
    classifies = any(name.endswith("ForSequenceClassification") for name in manifest.architectures)
    return manifest.head("labels") if classifies and manifest.role not in setup.calls else None


def renamed_head(manifest: Manifest) -> tuple[str, Evidence] | None:
    """(what is wrong, evidence) where there is a head that the class's loader does not read."""
    heads = scalar_heads(manifest)
    expected = _expected(manifest)
    if manifest.origin != "checkpoint" or not heads or expected is None:
        return None
    if any(f".{head.name}".find(f".{expected}.") >= 0 for head in heads):
        return None
    names = ", ".join(f"{head.name} ({head.width} rows)" for head in heads)
    told = ", ".join(manifest.architectures) or "its class"
    return (
        f"has its head as {names}, while {told} reads {expected}.weight",
        Evidence("head among the checkpoint's tensors", f"{expected}.weight", names, where=manifest.path or ""),
    )


def absent_head(manifest: Manifest) -> tuple[str, Evidence] | None:
    """(what is wrong, evidence) where a checkpoint whose tensors are all known has no scalar head."""
    unknown = manifest.missing_shards or not manifest.tensors or (manifest.pickles and not manifest.heads)
    if manifest.origin != "checkpoint" or unknown or scalar_heads(manifest):
        return None
    told = ", ".join(manifest.architectures) or "no class"
    part = "adapter and its base hold" if manifest.adapter is not None else "tensors hold"
    return (
        f"has no head of one output ({told})",
        Evidence(
            f"heads of one output that the {part}",
            expected=f"{_expected(manifest) or 'score'}.weight, shape (1, {manifest.hidden_size or 'hidden size'})",
            observed=f"none among {len(manifest.tensors) + len(manifest.adapter_tensors)} tensors",
            where=manifest.path or "",
        ),
    )


def new_heads(loading: Loading, manifest: Manifest) -> list[str]:
    """Weights of an output head that a loader had to make up."""
    heads = {head.name for head in manifest.heads}
    return [
        name
        for name in loading.missing
        if name.endswith("weight") and (name in heads or HEAD_PARTS & set(name.lower().split(".")))
    ]


def _expected(manifest: Manifest) -> str | None:
    """The module that the loader attaches as head, None where it is not known."""
    prefix = manifest.raw_config.get("value_head_prefix")
    if isinstance(prefix, str) and prefix:  # OpenRLHF's
        return prefix
    kind = manifest.model_type or ""
    if any(name.endswith("ForSequenceClassification") for name in manifest.architectures):
        return "score" if kind in SEQUENCE_SCORE else None
    if any(name.endswith("ForTokenClassification") for name in manifest.architectures):
        return "classifier" if kind in TOKEN_CLASSIFIER else "score" if kind in TOKEN_SCORE else None
    return None

"""SYS007: a checkpoint holds every weight that its architecture needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.anatomy import Gap, gaps
from rlhf_doctor.instruments.readings import Loading, Manifest

# REW003 and VAL007 are about the heads of reward and critic. The rest here is never learnt, or tied and left out.
HEADS = ("score", "v_head", "value_head", "classifier", "summary", "reward_head", "critic_head", "scalar_head")
NOT_LEARNT = ("rotary_emb", "inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids", "lora_")
VERB = {"absent": "lacks", "shape": "has another shape for", "renamed": "holds under another name"}


@check(
    "SYS007",
    "a checkpoint holds every weight of its architecture",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("REF002", "POL007", "REW009", "REW010", "VAL007", "VAL015"),
    across_roles=True,
)
def weights_not_in_checkpoint(
    manifest: Mapping[Role, Manifest], loading: Mapping[Role, Loading] | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The names and shapes in a checkpoint's headers against its own config: all layers, in the families known here
        (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX) all tensors of each, the embedding with its rows, the final
        norm, an untied language-model head. Where the model is loaded, what the loader reported as missing. Heads of
        reward and critic have checks of their own; quantised checkpoints are left to the loader.

    Why it matters:
        Loaders fill what is missing with random numbers and say so in one line among hundreds. A state dict that was
        saved from a wrapper has a prefix before every name, and then nothing at all is loaded.

    What it looks like when broken:
        A loss or KL in the first step as if from scratch; scores that differ between two starts of the same script.

    How to fix:
        1. Save with the model's own save_pretrained, not with the wrapper's state_dict.
        2. Rename the tensors: strip the prefix that the evidence shows.
        3. After resizing embeddings, save config and weights together, so that vocab_size and rows agree.

    Source:
        https://github.com/hiyouga/LlamaFactory/issues/1584 (wrapper's prefix: nothing loaded);
        https://github.com/deepspeedai/DeepSpeedExamples/issues/280 (padded vocabulary, embeddings made anew);
        https://github.com/huggingface/trl/issues/1783 (a head's bias is dropped by the stock class).
    """
    for role, m in manifest.items():
        if m.origin != "checkpoint" or m.unloadable:
            continue
        found = list(gaps(m)) or list(_from_loader(m, (loading or {}).get(role)))
        for gap in found:
            names = ", ".join(gap.names[:3]) + (f" and {len(gap.names) - 3} others" if len(gap.names) > 3 else "")
            yield Finding(
                f"The {spoken(role)}'s checkpoint {VERB[gap.kind]} {names}. Expected: {gap.expected}; found: "
                f"{gap.observed}. Whatever loads it puts random numbers there, or fails.",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence("tensors in the checkpoint", gap.expected, gap.observed, where=f"{m.path}: {names}"),
                ),
            )
        yield from _dropped_bias(role, m)


def _from_loader(m: Manifest, told: Loading | None) -> Iterator[Gap]:
    missing = tuple(n for n in (told.missing if told else ()) if not _left_out(n, m))
    if told and missing:
        yield Gap("absent", missing, f"every weight of {told.built}", f"{len(missing)} made anew")


def _left_out(name: str, m: Manifest) -> bool:
    tied = name.endswith(("lm_head.weight", "embed_out.weight")) and m.config.get("tie_word_embeddings", True)
    head = m.role in ("reward", "value") and any(part in HEADS for part in name.split("."))
    other_kind = m.role in ("policy", "reference") and not m.is_causal_lm  # SYS002 says so
    return bool(tied or head or other_kind) or any(part in name for part in NOT_LEARNT)


def _dropped_bias(role: Role, m: Manifest) -> Iterator[Finding]:
    stock = any(name.endswith("ForSequenceClassification") for name in m.architectures)
    bias = next((name for name in m.tensors if name.split(".")[-2:] == ["score", "bias"]), None)
    if stock and bias and m.model_type not in (None, "bert", "roberta") and not m.needs_remote_code:
        yield Finding(
            f"The {spoken(role)}'s checkpoint has {bias}, and {m.class_name} has no bias in its head: it is dropped on "
            "loading, which shifts every score by it. Fold it into the rewards' mean, or use a class with a bias.",
            role=role,
            severity=Severity.WARNING,
            confidence=Confidence.PROVEN,
            evidence=(Evidence("tensors of the head", "score.weight alone", f"{bias} too", where=str(m.path)),),
        )


def _rewrite(folder: Any, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@weights_not_in_checkpoint.fault("the policy's checkpoint lacks a projection")
def _(healthy_files: Any) -> Any:
    _rewrite(healthy_files.path("policy"), lambda t: {n: v for n, v in t.items() if "layers.1.mlp.down" not in n})
    return healthy_files


@weights_not_in_checkpoint.fault("the reward's state dict was saved from a wrapper")
def _(healthy_files: Any) -> Any:
    _rewrite(healthy_files.path("reward"), lambda t: {f"pretrained_model.{n}": v for n, v in t.items()})
    return healthy_files


@weights_not_in_checkpoint.fault("an embedding of another size than vocab_size")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("reference") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 2}))
    return healthy_files

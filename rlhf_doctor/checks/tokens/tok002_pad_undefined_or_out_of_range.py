"""TOK002: everyone pads with one token that everyone knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import blamed, listed, spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest, TokenizerInfo
from rlhf_doctor.instruments.stops import ids_in
from rlhf_doctor.instruments.vocabularies import Fed

# Sequence classifiers of these pool at their first token or over all: their pad id decides nothing.
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert")


@check(
    "TOK002", "everyone pads with one token that everyone knows", stage=Stage.STATIC, severity=Severity.ERROR,
    explains=("REW004", "REW005", "TOK001"), across_roles=True,
)  # fmt: skip
def pad_undefined_or_out_of_range(
    setup: Any, manifest: Mapping[Role, Manifest], vocabularies: Mapping[Role, Fed]
) -> Iterator[Finding]:
    """
    What it examines:
        The pad token of the tokenizer: that there is one, that its id has a row in every embedding it is fed to, and
        that model configs (a nested text config wins over the outer one) and the generation config name the same.
        A language model's config without any pad id is usual and sound, since its batches carry masks.

    Why it matters:
        A decoder that is a sequence classifier finds the end of a text by its config's pad id. With another id than
        the tokenizer pads with, it reads its score at a pad; with none, it refuses batches.

    What it looks like when broken:
        "Cannot handle batch sizes > 1 if no padding token is defined"; an index error in an embedding; rewards that
        change with the length of the longest neighbour.

    How to fix:
        1. Define the pad token once, in the tokenizer, and resize the embeddings if it is new.
        2. Copy its id to the config of reward and value (config.get_text_config().pad_token_id for nested ones) and to
           the policy's generation config.

    Source:
        https://github.com/huggingface/trl/pull/7318 (nested config); https://github.com/deepspeedai/DeepSpeedExamples/issues/719
        (pad set to EOS in the configs, another one in the tokenizer);
        https://github.com/huggingface/transformers/pull/35911 (how sequence classifiers find the last token).
    """
    graves: list[Finding] = []
    judged: set[str] = set()  # folders whose config was found wrong: a second role of theirs has no fault of its own
    for role, fed in vocabularies.items():
        m, info = manifest[role], fed.ids_of
        if info.pad_id is None:
            graves += [_undefined(info, manifest)]
            continue
        rows = m.embedding_rows or m.vocab_size
        if rows is not None and not 0 <= info.pad_id < rows:
            graves.append(
                _finding(
                    role,
                    f"The pad token {info.pad!r} has id {info.pad_id} and the {spoken(role)}'s embedding has {rows} "
                    "rows: it has no embedding. Resize the embedding, or pad with a token that it has.",
                    Evidence("pad id", f"below {rows}", str(info.pad_id), where=info.where),
                )
            )
        config = [f for f in _config(role, m, info) if f.severity is Severity.INFO or m.path not in judged]
        graves += config
        judged |= {m.path} if m.path and any(f.severity is None for f in config) else set()
    if "policy" in vocabularies:
        graves += _generation(manifest["policy"], vocabularies["policy"].ids_of)
    yield from _once([f for f in graves if f.severity is not Severity.INFO])
    yield from _once([f for f in graves if f.severity is Severity.INFO])


def _once(findings: list[Finding]) -> Iterator[Finding]:
    """One finding for a fault that shows in several roles: the first one's words, the evidence of all."""
    if not findings:
        return
    first = next((f for f in findings if f.severity is None), findings[0])
    roles = list(dict.fromkeys(f.role for f in findings))
    also = [role for role in roles if role != first.role]
    evidence = dict.fromkeys(e for f in findings for e in f.evidence)
    message = first.message + (f" Not right in {listed(also)} either." if also else "")
    yield replace(first, message=message, role=blamed(roles, "tokenizer"), evidence=tuple(evidence))


def _undefined(info: TokenizerInfo, manifest: Mapping[Role, Manifest]) -> Finding:
    known = {role: m.config.get("pad_token_id") for role, m in manifest.items()}
    stated = [f"{role} {pad}" for role, pad in known.items() if pad is not None]
    return _finding(
        "tokenizer",
        "The tokenizer has no pad token, so prompts and responses of different lengths cannot be batched. Define one"
        + (f"; the configs have one ({', '.join(stated)})." if stated else " before anything is encoded."),
        Evidence("pad token", "defined", "undefined", where=info.where),
        severity=Severity.WARNING if stated else None,
    )


def _config(role: Role, m: Manifest, info: TokenizerInfo) -> Iterator[Finding]:
    """The config's pad id: what a sequence classifier pools by, and mere paper elsewhere."""
    if "pad_token_id" not in m.config and not m.model_type:
        return
    told = m.config.get("pad_token_id")
    pools = (
        role == "reward"
        and m.model_type not in ENCODERS
        and any(name.endswith("ForSequenceClassification") for name in m.architectures)
    )
    if told == info.pad_id or (told is None and not pools):
        return
    rows = m.embedding_rows or m.vocab_size
    if isinstance(told, int) and rows is not None and told >= rows:
        yield _finding(
            role,
            f"The {spoken(role)}'s config has pad id {told} and its embedding has {rows} rows: a table with such a "
            f"padding index cannot be built. Set it to the tokenizer's, {info.pad_id} ({info.pad!r}).",
            Evidence("config.pad_token_id", f"below {rows}", str(told), where=m.path or m.class_name),
        )
        return
    nested = "" if told == m.raw_config.get("pad_token_id", told) else " (its nested text config decides)"
    yield _finding(
        role,
        f"The {spoken(role)}'s config has {'no pad id' if told is None else f'pad id {told}'}{nested} and the "
        f"tokenizer pads with {info.pad_id} ({info.pad!r}). "
        + (
            "The model looks for the end of a text by its config's id, so it reads its score at a pad or refuses "
            "batches: set it to the tokenizer's."
            if pools
            else "Nothing reads it as long as masks are passed; set it to the tokenizer's all the same."
        ),
        Evidence("config.pad_token_id", str(info.pad_id), str(told), where=m.path or m.class_name),
        severity=None if pools else Severity.INFO,
    )


def _generation(m: Manifest, info: TokenizerInfo) -> Iterator[Finding]:
    """Finished rows are filled with the generation config's pad: an id that is neither pad nor EOS looks like text."""
    told = m.generation_config.get("pad_token_id")
    if info.pad_id is None or not isinstance(told, int) or told == info.pad_id:
        return
    stops = ids_in(m.generation_config.get("eos_token_id")) | ids_in(info.eos_id)
    yield _finding(
        "policy",
        f"Generation fills finished rows with id {told} and the tokenizer's pad is {info.pad_id} ({info.pad!r}). A "
        "mask that is made from the pad id takes the filling for text: set the generation config's to the tokenizer's.",
        Evidence("generation_config.pad_token_id", str(info.pad_id), str(told), where=m.path or m.class_name),
        severity=Severity.INFO if told in stops else None,
    )


def _finding(role: Any, message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role=role, severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


@pad_undefined_or_out_of_range.fault("a tokenizer without a pad token")
def _(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.pad_token = None
    models = {role: copy.deepcopy(healthy.model(role)) for role in healthy.present}
    for model in models.values():
        model.config.pad_token_id = None
    return healthy.but(**models, tokenizer=tokenizer, optimizers=(), step=None)


@pad_undefined_or_out_of_range.fault("a pad token that was added and the embeddings not resized")
def _(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    return healthy.but(tokenizer=tokenizer, optimizers=(), step=None)


@pad_undefined_or_out_of_range.fault("a reward checkpoint whose config pads with EOS")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("reward") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    return healthy_files


@pad_undefined_or_out_of_range.fault("a critic checkpoint whose config pads beyond its embedding")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("value") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pad_token_id": config["vocab_size"] + 3}))
    return healthy_files

"""CFG004: every path is there."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.files import BadFile, read_json
from rlhf_doctor.nearest import near_path


@check(
    "CFG004",
    "every path is there",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("SYS001", "SYS007"),
    across_roles=True,
)
def path_not_found(setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The paths of models, tokenizers and a declared reference, and the base that an adapter's config names by an
        absolute path. A name that may be one of a model hub (owner/name) is no path, and is left to the loader.

    Why it matters:
        Frameworks that do not find a folder ask the hub for a model of that name, or start from an empty one.

    What it looks like when broken:
        A download where none was expected, an error about a repository id, or a fresh model without a word.

    How to fix:
        1. Correct the path; the nearest one that exists is named.
        2. After moving an adapter, set base_model_name_or_path in its adapter_config.json to where the base is now.

    Source:
        https://huggingface.co/docs/transformers/main_classes/model (from_pretrained takes a hub name or a path);
        https://github.com/hiyouga/LlamaFactory/issues/2477 (a merged model where an unmerged adapter was expected).
    """
    given: list[tuple[Role, str, Any]] = [(role, role, setup.model(role)) for role in MODEL_ROLES]
    given += [("tokenizer", "tokenizer", setup.tokenizer), ("reward", "reward_tokenizer", setup.reward_tokenizer)]
    given += [("reference", "declared reference", setup.declared.get("reference"))]
    for role, what, path in given:
        words = what == "declared reference" and path in ("policy", "adapter-off")
        if isinstance(path, (str, PathLike)) and path != "adapter-off" and not words and _absent(str(path), what):
            yield _finding(role, what, str(path))
    for role in MODEL_ROLES:
        folder = setup.path(role)
        base = _base(folder) if folder is not None else None
        if base is not None and Path(base).is_absolute() and not _exists(Path(base)):
            yield _finding(role, "base of the adapter", base)


def _base(folder: Path) -> str | None:
    try:
        given = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    except (BadFile, OSError, ValueError):
        return None  # whoever reads the checkpoint says what is wrong with this file
    named = given.get("base_model_name_or_path") if isinstance(given, dict) else None
    return named if isinstance(named, str) else None


def _absent(path: str, what: str) -> bool:
    """A path that does not exist; a plain word, or owner/name, may be a hub's name where it is not a model's folder."""
    hub = path.count("/") <= 1 and not path.startswith((".", "~", "/")) and not Path(path).parent.is_dir()
    plain = what == "declared reference" and "/" not in path
    return not (hub or plain) and not _exists(Path(path).expanduser())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _finding(role: Role, what: str, path: str) -> Finding:
    hint = "" if what.startswith("base") else near_path(Path(path)).removeprefix("; ")
    return Finding(
        f"The {what} is given as {path!r}, which does not exist. "
        + (hint[:1].upper() + hint[1:] or "Correct the path."),
        role=role,
        confidence=Confidence.PROVEN,
        evidence=(Evidence(f"path of the {what}", "a folder that exists", path, where=hint or path),),
    )


@path_not_found.fault("a reward path with a letter too many")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(reward=f"{healthy_files.path('reward')}s")


@path_not_found.fault("a tokenizer that is elsewhere")
def _(healthy: Any) -> Any:
    return healthy.but(tokenizer="/no/such/folder/tokenizer")


@path_not_found.fault("an adapter whose base was moved")
def _(healthy_files: Any) -> Any:
    import json

    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/moved/away/base"}
    (healthy_files.path("policy") / "adapter_config.json").write_text(json.dumps(adapter))
    return healthy_files

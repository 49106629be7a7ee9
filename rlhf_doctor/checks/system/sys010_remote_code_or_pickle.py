"""SYS010: a checkpoint loads without running code that it brings along."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import blamed, listed, spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.pickled import Pickled
from rlhf_doctor.instruments.readings import Manifest


@check("SYS010", "a checkpoint loads without running code of its own", stage=Stage.STATIC, severity=Severity.WARNING)
def remote_code_or_pickle(
    setup: Any, manifest: Mapping[Role, Manifest], pickled: Mapping[Role, Mapping[str, Pickled]] | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        Whether config.json or the tokenizer's config names Python files of the checkpoint (auto_map) for a model
        type, or a class of that type, that the installed transformers does not have; and what a pickle of weights
        would import on loading, read from its opcodes without loading it. A pickle of plain tensors is only mentioned.

    Why it matters:
        Loading such a checkpoint runs whatever its author, or whoever changed it since, wrote into it, with the
        rights of the training job. The model's class is then also not the one that anybody tested.

    What it looks like when broken:
        trust_remote_code=True is needed, or torch.load refuses with weights_only=True.

    How to fix:
        1. Prefer a revision with the architecture in transformers, and weights in safetensors.
        2. Convert a pickle once, in a place where nothing can be stolen, and save it as safetensors.
        3. If the code is needed, read it and pin its revision.

    Source:
        https://github.com/huggingface/transformers/blob/main/SECURITY.md (remote code, and formats that run code);
        https://docs.pytorch.org/docs/stable/generated/torch.load.html (weights_only);
        https://github.com/huggingface/safetensors.
    """
    foreign = {role: m for role, m in manifest.items() if m.needs_remote_code and not _native(m)}
    if foreign:
        ran = "It is run, as you asked." if setup.trust_remote_code else "It is not run unless you ask for it."
        yield Finding(
            f"The checkpoint of {listed(tuple(foreign))} can only be built by Python code that it brings along. {ran} "
            "Read and pin it, or take a checkpoint whose architecture transformers has.",
            role=blamed(tuple(foreign), "setup"),
            confidence=Confidence.PROVEN,
            evidence=tuple(
                Evidence("auto_map", "none", ", ".join(_named(m)) or "in the tokenizer's config", where=str(m.path))
                for m in foreign.values()
            ),
        )
    for role, files in (pickled or {}).items():
        for name, held in files.items():
            yield _pickle(role, manifest[role], name, held.imports)


def _pickle(role: Role, m: Manifest, name: str, imports: tuple[str, ...]) -> Finding:
    it = f"The {spoken(role)}'s weights in {name} are a pickle"
    shown = ", ".join(imports[:4])
    unsafe = f"{it} that imports {shown}: loading it can run anything. Convert it to safetensors in a safe place."
    plain = f"{it} of plain tensors, which loads safely with weights_only=True."
    return Finding(
        unsafe if imports else plain,
        role=role,
        severity=None if imports else Severity.INFO,
        confidence=Confidence.PROVEN,
        evidence=(Evidence("imports beyond tensors", "none", shown or "none", where=f"{m.path}/{name}"),),
    )


def _named(m: Manifest) -> tuple[str, ...]:
    given = m.raw_config.get("auto_map")
    return tuple(str(v) for v in given.values()) if isinstance(given, Mapping) else ()


def _native(m: Manifest) -> bool:
    """Whether the installed transformers has this model type, and the class that the folder names; neither is imported.

    A known type may still come with a class of its own: what the folder's code adds is lost without it.
    """
    spec, kind = importlib.util.find_spec("transformers"), m.model_type or ""
    if spec is None or spec.origin is None or not kind.replace("_", "").replace("-", "").isalnum():
        return False
    folder = Path(spec.origin).parent / "models" / kind.replace("-", "_")
    own = {name.rsplit(".", 1)[-1] for name in _named(m)} & set(m.architectures)
    code = "".join(file.read_text("utf-8") for file in folder.glob("modeling_*.py")) if own else ""
    return folder.is_dir() and all(f"class {name}(" in code for name in own)


@remote_code_or_pickle.fault("models whose class is in their own folder")
def _(healthy_files: Any) -> Any:
    import json

    extra = {"model_type": "homegrown", "auto_map": {"AutoModelForCausalLM": "modeling_homegrown.Homegrown"}}
    for role in healthy_files.present:
        path = healthy_files.path(role) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return healthy_files


@remote_code_or_pickle.fault("a reward of a known type whose class is in its own folder")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("reward") / "config.json"
    own = {"AutoModelForSequenceClassification": "modeling_scored.ScoredLlama"}
    extra = {"architectures": ["ScoredLlama"], "auto_map": own}
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return healthy_files


@remote_code_or_pickle.fault("reward weights in a pickle that runs code")
def _(healthy_files: Any) -> Any:
    import torch
    from safetensors.torch import load_file

    class Shell:
        def __reduce__(self) -> Any:
            return print, ("run on loading",)

    path = healthy_files.path("reward") / "model.safetensors"
    torch.save({**load_file(path), "extra": Shell()}, path.with_name("pytorch_model.bin"))
    path.unlink()
    return healthy_files

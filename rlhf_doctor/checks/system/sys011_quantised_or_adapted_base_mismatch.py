"""SYS011: an adapter sits on its own base, with its head and the right task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest

CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
HEADS = ("score", "v_head", "value_head", "classifier", "summary", "reward_head", "critic_head", "scalar_head")
PREFIXES = ("base_model.model.", "model.", "transformer.", "gpt_neox.")


@check(
    "SYS011", "an adapter sits on its own base, with its head", stage=Stage.STATIC, severity=Severity.ERROR,
    explains=("REW003", "OPT001", "SYS007", "REF002"), across_roles=True,
)  # fmt: skip
def quantised_or_adapted_base_mismatch(manifest: Mapping[Role, Manifest]) -> Iterator[Finding]:
    """
    What it examines:
        PEFT adapters, on disk and in memory: the shapes of their tensors against the base's, the name of the base
        against the one it was trained on, the task type against the role, and whether the adapter of a reward model
        or critic has its scalar head (among its own tensors, in value_head.safetensors, or in the base).

    Why it matters:
        An adapter is a difference from one particular base: on another it is noise, and if the shapes agree nothing
        complains. With task type CAUSAL_LM, PEFT neither trains nor saves the scalar head, so a reward model comes
        back with a random one.

    What it looks like when broken:
        A reward model of high accuracy in training scores like a coin after reloading; a policy talks nonsense
        although its curves were fine.

    How to fix:
        1. Train adapters of reward models and critics with task_type="SEQ_CLS" (or "TOKEN_CLS"), or name the head in
           modules_to_save.
        2. Load an adapter on the base that its adapter_config.json names; merge an SFT adapter before training on
           top of it, and use that merged model as base from then on.

    Source:
        https://github.com/huggingface/trl/issues/2164 and https://github.com/huggingface/peft/issues/577 (head neither
        trained nor saved); https://github.com/hiyouga/LlamaFactory/issues/5097 (another base);
        https://github.com/hiyouga/LlamaFactory/issues/430 (restored without the SFT adapter below it);
        https://github.com/huggingface/trl/pull/2743 (all-linear leaves the head out).
    """
    for role, m in manifest.items():
        if m.adapter is None or m.unloadable:
            continue
        yield from _task(role, m)
        yield from _base(role, m)
        yield from _name(role, m)


def _task(role: Role, m: Manifest) -> Iterator[Finding]:
    assert m.adapter is not None
    task = m.adapter.get("task_type")
    promised = [part for part in m.adapter.get("modules_to_save") or () if part in HEADS]
    saved = [n for n in (*m.adapter_tensors, *m.pickles) if "lora_" not in n and any(h in n.split(".") for h in HEADS)]
    where = f"{m.path}/adapter_config.json" if m.path else "peft_config"
    if role in ("policy", "reference"):
        if task in CLASSIFIES:
            yield _finding(
                role,
                f"The {spoken(role)}'s adapter was made for {task}; a language model's is CAUSAL_LM. Use the "
                "adapter that was trained on the language model.",
                Evidence("task_type", "CAUSAL_LM", str(task), where=where),
            )
        return
    heads = [head.name for head in m.heads if head.kind != "vocabulary"]
    if m.origin == "module":
        kept = any("modules_to_save" in name for name in heads)
        if role == "reward" and task == "CAUSAL_LM" and heads and not kept:
            yield _finding(
                role,
                "The reward model's adapter has task type CAUSAL_LM, so its scalar head was neither trained "
                "nor saved with it. Use SEQ_CLS, or name the head in modules_to_save.",
                Evidence("task_type", "SEQ_CLS, or the head in modules_to_save", "CAUSAL_LM", where=where),
            )
    elif not heads and not saved:
        sure = bool(m.tensors) or bool(promised)
        yield _finding(
            role,
            f"The {spoken(role)}'s adapter (task type {task}) holds no scalar head and its base has none"
            f"{'' if m.tensors else ' that could be read'}: it will be loaded with a random one. Train it "
            "with SEQ_CLS or modules_to_save and save it again.",
            Evidence("tensors of the head", "at least one", "none", where=where),
            None if sure else Severity.WARNING,
        )


def _base(role: Role, m: Manifest) -> Iterator[Finding]:
    """Shapes of the low-rank factors against the base's matrices: (r, in), (out, r) and (out, in) or turned."""
    if m.origin != "checkpoint" or not m.tensors or m.config.get("quantization_config"):
        return
    base = {_plain(name): info.shape for name, info in m.tensors.items()}
    targets = {
        name: f"{_plain(name.split('.lora_')[0])}.weight"
        for name in m.adapter_tensors
        if ".lora_A" in name or ".lora_B" in name
    }
    known = {name: target for name, target in targets.items() if target in base}
    wrong = [
        (name, m.adapter_tensors[name].shape[1 if ".lora_A" in name else 0], base[target])
        for name, target in known.items()
        if len(base[target]) == 2 and m.adapter_tensors[name].shape[1 if ".lora_A" in name else 0] not in base[target]
    ]
    if wrong:
        name, size, shape = wrong[0]
        yield _finding(
            role,
            f"The {spoken(role)}'s adapter does not fit its base: {len(wrong)} of {len(targets)} factors have "
            f"another size, {name} has {size} where the base's matrix is {shape}. Load the base it was "
            "trained on.",
            Evidence("sizes of the low-rank factors", str(shape), str(size), where=name),
        )
    elif targets and not known:
        name = next(iter(targets))
        yield _finding(
            role,
            f"The {spoken(role)}'s adapter changes layers that its base has not, {targets[name]} for one. "
            "Load the base it was trained on.",
            Evidence("layers of the base", targets[name], "absent", where=name),
        )


def _name(role: Role, m: Manifest) -> Iterator[Finding]:
    assert m.adapter is not None
    trained, loaded = m.adapter.get("base_model_name_or_path"), m.raw_config.get("_name_or_path")
    if m.origin == "module" and isinstance(trained, str) and isinstance(loaded, str) and trained and loaded:
        names = [PurePath(name.rstrip("/")).name.casefold() for name in (trained, loaded)]
        if names[0] != names[1]:
            yield _finding(
                role,
                f"The {spoken(role)}'s adapter was trained on {trained} and sits on {loaded}. Load it on the "
                "base it was trained on, unless that is the same model under another name.",
                Evidence("base of the adapter", trained, loaded, where="peft_config"),
                Severity.WARNING,
            )


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _finding(role: Role, message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role=role, severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


def _adapter(healthy_files: Any, folder: str, model: Any, **options: Any) -> Any:
    """Save an adapter for a model beside the four checkpoints and give its folder."""
    from peft import LoraConfig, get_peft_model

    path = healthy_files.path("policy").parent / folder
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)).save_pretrained(path)
    return path


@quantised_or_adapted_base_mismatch.fault("a reward adapter with task type CAUSAL_LM")
def _(healthy_files: Any) -> Any:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(healthy_files.path("policy"))
    return healthy_files.but(reward=_adapter(healthy_files, "adapter", base, task_type="CAUSAL_LM"))


@quantised_or_adapted_base_mismatch.fault("a policy adapter of another base")
def _(healthy_files: Any) -> Any:
    import json

    import transformers

    config = transformers.AutoConfig.from_pretrained(healthy_files.path("policy"))
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    other = transformers.AutoModelForCausalLM.from_config(config)
    path = _adapter(healthy_files, "adapter", other, task_type="CAUSAL_LM")
    file = path / "adapter_config.json"
    base = {"base_model_name_or_path": str(healthy_files.path("policy"))}
    file.write_text(json.dumps(json.loads(file.read_text()) | base))
    return healthy_files.but(policy=path)

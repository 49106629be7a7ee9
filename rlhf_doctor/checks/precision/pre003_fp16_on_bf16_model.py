"""PRE003: a bfloat16 model is not run in float16."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.precision import HeadRounding
from rlhf_doctor.instruments.readings import Manifest, Output

FP16 = ("fp16", "float16", "half", "f16", "torch.float16", "torch.half", "16", "16-mixed", "16-true", "fp16-mixed")


@check(
    "PRE003",
    "a bfloat16 model is not run in float16",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("PRE004", "REW011", "PRE001", "PRE002"),
    across_roles=True,
)
def fp16_on_bf16_model(
    setup: Any,
    options: Any,
    manifest: Mapping[Role, Manifest],
    output: Mapping[Role, Output] | None = None,
    head_rounding: Mapping[Role, HeadRounding] | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The dtype that each checkpoint was saved in, from config.json and the headers of its weights, against the dtype
        that is declared, asked for on the command line, or that the model in memory has. Where models can be called,
        also the dtype that their vocabulary product and their output really have: autocast changes it, and nothing in
        the weights shows that.

    Why it matters:
        bfloat16 reaches to 3e38, float16 to 65504. Models that were trained in bfloat16 have activations beyond that,
        and those become infinite, then NaN. Weights below 6e-8 become 0.

    What it looks like when broken:
        NaN rewards and a loss of 0 without any exception, empty responses or token 0 over and over, in some prompts
        only.

    How to fix:
        1. Run it in bfloat16, or in float32 where the hardware has none.
        2. Give autocast its dtype: torch.autocast("cuda", dtype=torch.bfloat16); without one it is float16.
        3. If float16 is chosen for its finer digits, check all four models for activations near 65504 first and train
           with a loss scaler.

    Source:
        https://github.com/huggingface/trl/issues/3236 (Gemma 3),
        https://github.com/deepspeedai/DeepSpeedExamples/issues/794 (Llama 2),
        https://github.com/hiyouga/LlamaFactory/issues/273; autocast: https://github.com/pytorch/rl/pull/3580. Qi et al.
        2025, https://arxiv.org/abs/2510.26788, train in float16 on purpose, for its finer digits.
    """
    declared = str(setup.declared.get("dtype") or "").lower()
    asked = str(options.dtype or "").lower()
    hit: dict[Role, tuple[str, str]] = {}
    for role, m in manifest.items():
        saved = _saved(m)
        given, head = (output or {}).get(role), (head_rounding or {}).get(role)
        computed = {given.dtype if given else "", head.head if head else ""}
        run = (
            "declared dtype"
            if declared in FP16
            else "--dtype"
            if asked in FP16
            else "weights in memory"
            if m.origin == "module" and _mostly("F16", m)
            else "what it computes, as under autocast"
            if m.origin == "module" and "float16" in computed
            else ""
        )
        if saved and run:
            hit[role] = (saved, run)
    if not hit:
        return
    roles = ", ".join(map(spoken, hit))
    yield Finding(
        f"Models that were saved in bfloat16 are run in float16: {roles}. Their activations may pass float16's 65504 "
        "and turn into NaN: run them in bfloat16 or float32.",
        role=next(iter(hit)) if len(hit) == 1 else "policy" if {*hit} == {"policy", "reference"} else "setup",
        confidence=Confidence.MEASURED,
        evidence=tuple(
            Evidence(f"dtype that the {spoken(role)} runs in", "bfloat16 or float32", f"float16 ({run})", where=saved)
            for role, (saved, run) in hit.items()
        ),
    )


def _saved(m: Manifest) -> str:
    """Where it says that a model is bfloat16, empty where it is not."""
    for name in ("dtype", "torch_dtype"):
        if str(m.config.get(name) or "").removeprefix("torch.") == "bfloat16":
            return f"{name} of {m.path + '/config.json' if m.path else 'the config'}"
    if m.origin in ("checkpoint", "module") and _mostly("BF16", m):
        return f"weights of {m.path}" if m.path else "weights in memory"
    source = str(m.raw_config.get("_name_or_path") or "")
    file = Path(source) / "config.json"
    if m.origin == "module" and source and file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        if isinstance(config, dict) and "bfloat16" in str(config.get("dtype") or config.get("torch_dtype")):
            return f"dtype of {file}"
    return ""


def _mostly(dtype: str, m: Manifest) -> bool:
    return m.weight_dtypes.get(dtype, 0) > 0.5 * max(sum(m.weight_dtypes.values()), 1)


@fp16_on_bf16_model.fault("float16 declared for bfloat16 checkpoints")
def _(healthy_files: Any) -> Any:
    import json

    for role in ("policy", "reference", "reward", "value"):
        file = healthy_files.path(role) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    return healthy_files.but(declared={"dtype": "fp16"})


@fp16_on_bf16_model.fault("a bfloat16 model turned to float16 in memory")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest import policies

    policy = copy.deepcopy(healthy.policy)
    policy.config.dtype = "bfloat16"
    return policies.alone(healthy, policy=policy.half(), declared={"dtype": "float16"})


@fp16_on_bf16_model.fault("a bfloat16 policy under an autocast that was given no dtype")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies

    def call(model: Any, ids: Any, mask: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):  # what "cuda" takes by itself
            return model(input_ids=ids, attention_mask=mask).logits.float()

    setup = policies.alone(healthy, policy=copy.deepcopy(healthy.policy).bfloat16())
    return setup.but(calls={**setup.calls, "policy": call})

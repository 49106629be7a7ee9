"""REF002: before the first update the policy is its reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.agreement import Agreement, Gap

HERE = ("policy", "adapter-off", "adapter_off", "copy", "self", "initial", "init", "sft")


@check(
    "REF002",
    "before the first update the policy is its reference",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REF001", "PRE004"),
    explains=("POL007",),
    across_roles=True,
)
def reference_differs_at_start(setup: Any, agreement: Agreement, begun: str = "") -> Iterator[Finding]:
    """
    What it examines:
        KL(policy || reference) in nats per token over the whole vocabulary, at positions of the probe sequences, in
        eval mode. With an adapter on the policy also the KL to the policy without it. A reference that is declared to
        be another model, and a training that has begun already, make a difference normal: it is mentioned only, and so
        is a fresh adapter that is switched off as reference.

    Why it matters:
        The penalty holds the policy to what it was. If the reference is another model, the first steps pull the policy
        there, away from what SFT taught it, and the measured KL says nothing about the drift.

    What it looks like when broken:
        KL above 0 in the first log line, a reward that falls first, rollouts that turn into the other model's style.
        The usual case is an adapter that already holds SFT: switched off, it leaves the raw base model.

    How to fix:
        1. Make the reference from the very checkpoint that the policy starts from, with the same adapter merged.
        2. With an adapter that holds SFT: merge it and train a fresh one, or keep a frozen copy of it as reference.
        3. If it is meant (a second stage, a resumed run), declare reference=PATH of the model that it is.

    Source:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; adapters: https://github.com/huggingface/trl/issues/1340;
        second stages: https://github.com/modelscope/ms-swift/issues/6910. Tolerance: logits that are off by σ cost σ²/2
        nats; σ is taken as eight roundings of the logits' spread in the coarser dtype, some 4e-3 nats for a large model
        in bfloat16, where 1e-3 is normal between engines (https://richardli.xyz/post/rl-collapse-training-inference)
        and another model costs tenths; 1e-5 in float32; 0.1 beside quantised weights.
    """
    off, ref = agreement.gaps.get("the policy with its adapter off"), agreement.gaps.get("the reference")
    name = "the reference" if ref is not None else "the policy with its adapter off"
    gap = ref or off
    if gap is None or not gap.open:
        if off is not None and setup.reference == "adapter-off":
            yield _fresh_adapter(off)
        return
    elsewhere = _another(setup)
    said = f"KL from the policy to {name} is {gap.mean:.2g} nats a token before the first update; it should be 0. "
    if elsewhere:
        said += (
            f"The reference is declared to be another model ({elsewhere}), as in a second stage: this is meant then."
        )
    elif begun:
        said += f"Training has begun already ({begun}), so the policy has moved away from it: this is normal then."
    elif name != "the reference":
        said += (
            "The adapter already holds something, such as SFT: merge it first, or keep a frozen copy as the reference."
        )
    else:
        said += "Make the reference from the checkpoint that the policy starts from, or declare reference=PATH."
    yield Finding(
        said,
        role="reference",
        severity=Severity.INFO if elsewhere or begun else None,
        confidence=Confidence.MEASURED,
        evidence=tuple(
            Evidence(
                f"KL(policy || {candidate}), nats per token",
                expected="0",
                observed=f"{g.mean:.3g} on average, {g.largest:.3g} at most",
                tolerance=f"{g.tolerance:.1g}",
                where=f"{g.positions} positions of the probe sequences",
                reproduce="(p.exp() * (p - q)).sum(-1).mean() of both models' log-softmax",
            )
            for candidate, g in agreement.gaps.items()
        ),
    )


def _fresh_adapter(gap: Gap) -> Finding:
    return Finding(
        "The reference is the policy with its adapter off. That is right here: the adapter is fresh, so both are the "
        "same model before the first update. With an adapter that holds SFT it would be the raw base model: merge it "
        "first.",
        role="reference",
        severity=Severity.INFO,
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "KL(policy || the policy with its adapter off), nats per token",
                expected="0",
                observed=f"{gap.mean:.3g} on average, {gap.largest:.3g} at most",
                tolerance=f"{gap.tolerance:.1g}",
                where=f"{gap.positions} positions of the probe sequences",
            ),
        ),
    )


def _another(setup: Any) -> str:
    """The declared reference where it is another model than the policy, else nothing."""
    declared = setup.declared.get("reference")
    if not isinstance(declared, (str, Path)) or str(declared).lower() in HERE:
        return ""
    path = setup.path("policy")
    config = getattr(setup.policy, "config", None)
    known = {str(path) if path else "", str(getattr(config, "_name_or_path", "") or "")} - {""}
    return "" if str(declared).rstrip("/") in {k.rstrip("/") for k in known} else str(declared)


@reference_differs_at_start.fault("a Hugging Face reference with other weights")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.alone(healthy, reference=policies.fresh(healthy.policy).requires_grad_(False))


@reference_differs_at_start.fault("a hand-written reference that is another draw of the same class")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    other = policies.hand_written(healthy, seed=7).requires_grad_(False)
    return policies.alone(healthy, policy=policies.hand_written(healthy), reference=other)


@reference_differs_at_start.fault("an adapter that holds SFT, switched off as reference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.adapted(healthy.policy, trained=True)
    return policies.alone(healthy, policy=policy, reference="adapter-off", declared={"reference": "adapter-off"})


@reference_differs_at_start.fault("checkpoints of two different runs")
def _(healthy_files: Any) -> Any:
    from safetensors.torch import load_file, save_file

    file = healthy_files.path("reference") / "model.safetensors"
    weights = {name: tensor * 1.2 if "norm" in name else tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return healthy_files

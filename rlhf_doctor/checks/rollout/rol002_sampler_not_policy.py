"""ROL002: responses are drawn from the distribution that is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.seen_draws import bent, cut
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.readings import Manifest

# Setting -> its neutral value, at which the sampled distribution is the policy's own.
NEUTRAL: Mapping[str, float] = {
    "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": 1,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1, "diversity_penalty": 0,
}  # fmt: skip
LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "force_words_ids", "constraints",
         "exponential_decay_length_penalty", "watermarking_config", "forced_bos_token_id", "forced_eos_token_id",
         "logit_bias")  # fmt: skip
# generate() falls back on 50; a module in memory shows it although nobody chose it.
UNCHOSEN_TOP_K = 50


@check(
    "ROL002",
    "responses are drawn from the distribution that is scored",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("ROL003", "MET002", "MET011", "ROL001"),
    across_roles=True,
)
def sampler_not_policy(
    setup: Any, policy_manifest: Manifest | None = None, drawing: Drawing | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        Sampling settings that change which tokens can be drawn or how likely they are: those declared, and those in the
        generation_config.json that the policy brings along, which engines and generate() use for whatever the loop
        leaves open. A shipped value counts unless a declared one of the same name replaces it. Values that change
        nothing (top_p 1, top_k 0 or -1, penalties of 1) and whether sampling is on by default do not count. Where a
        step can be watched, the draws too: whether the odds that torch.multinomial was given leave out part of the
        softmax of the logits or move likely tokens, and whether no token below some place in the order of likelihood
        was drawn. If the loss leaves out likely tokens too, the odds are not held against the sampler.

    Why it matters:
        The loss takes log-probabilities from the plain softmax. If tokens were drawn from a cut or bent distribution,
        the ratio carries the kept probability as a factor, the KL estimate can turn negative and become a reward.

    What it looks like when broken:
        A mean KL clearly below 0 over several steps, a ratio that is not 1 before any update (0.9 on average at top_p
        0.8), responses of one forced length, or near-greedy samples at a temperature that says otherwise.

    How to fix:
        1. Sample with temperature T, top_k=0 (or -1), top_p=1 and every penalty neutral, each passed explicitly.
        2. Or empty the policy's generation config: keep only the special token ids.
        3. Declare what the loop passes, so that it is known to replace what is shipped: --set top_p=1 --set top_k=0.
        4. If the loop scores with the same cut distribution, a trace shows it, and this may be ignored.

    Source:
        https://github.com/huggingface/trl/issues/235 and https://github.com/hiyouga/LlamaFactory/issues/664 (negative
        KL); https://github.com/huggingface/trl/issues/6789 (the factor); shipped settings:
        https://github.com/huggingface/trl/issues/5783 and https://github.com/NVIDIA-NeMo/RL/issues/3497;
        forced lengths: https://github.com/deepspeedai/DeepSpeedExamples/pull/347.
    """
    declared = {name: value for name, value in setup.declared.items() if _bends(name, value)}
    shipped = _shipped(policy_manifest, setup.declared) if policy_manifest else {}
    softer = Severity.WARNING if setup.step is not None else None  # a loop may score what it samples; a trace tells
    if declared:
        yield Finding(
            f"Responses are declared to be sampled with {_said(declared)}. Log-probabilities come from the whole "
            "softmax, so the sampler is not the policy that is scored: sample with top_k=0, top_p=1 and no penalties.",
            role="loop",
            severity=softer,
            confidence=Confidence.MEASURED,
            evidence=tuple(_evidence(declared, "declared")),
        )
    if shipped and policy_manifest is not None:
        where = f"{policy_manifest.path}/generation_config.json" if policy_manifest.path else "policy.generation_config"
        yield Finding(
            f"The policy brings sampling settings along, {_said(shipped)}, and nothing declared replaces them. "
            "Whatever the loop leaves open is filled from there, so it samples from another distribution than it "
            "scores: pass neutral values explicitly, or remove them from the generation config.",
            role="policy",
            severity=softer,
            confidence=Confidence.MEASURED,
            evidence=tuple(_evidence(shipped, where)),
        )
    if drawing is not None and not declared:
        yield from bent(drawing) or cut(drawing)


def _shipped(manifest: Manifest, declared: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(manifest.generation_config)
    if not found and manifest.origin == "checkpoint":  # older checkpoints keep them in config.json
        found = {name: manifest.raw_config.get(name) for name in (*NEUTRAL, *LISTS)}
    bending = {name: value for name, value in found.items() if name not in declared and _bends(name, value)}
    if manifest.origin == "module" and bending.get("top_k") == UNCHOSEN_TOP_K:
        del bending["top_k"]
    temperature = number(found.get("temperature"))
    if bending and temperature not in (None, 1.0) and "temperature" not in declared:
        bending["temperature"] = found["temperature"]
    return bending


def _bends(name: str, value: Any) -> bool:
    """Whether a setting changes the sampled distribution."""
    if name in LISTS:
        return value not in (None, False, 0, [], {}, (), "")
    if name not in NEUTRAL:
        return False
    given = number(value)
    if given is None or given == NEUTRAL[name]:
        return False
    below = name in ("top_k", "top_p", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams")
    return not (below and given <= 0) and not (name in ("top_p", "typical_p", "top_h") and given > 1)


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:40]}" for name, value in settings.items())


def _evidence(settings: Mapping[str, Any], where: str) -> Iterator[Evidence]:
    for name, value in settings.items():
        neutral = f"{NEUTRAL[name]:g}" if name in NEUTRAL else "1" if name == "temperature" else "none"
        yield Evidence(name, expected=neutral, observed=str(value)[:80], where=where)


@sampler_not_policy.fault("top-p declared for the rollouts")
def _(healthy: Any) -> Any:
    return healthy.but(step=None, declared={"top_p": 0.9, "top_k": 40})


@sampler_not_policy.fault("a shipped generation config, as Qwen's")
def _(healthy: Any) -> Any:
    import copy

    policy = copy.deepcopy(healthy.policy)
    policy.generation_config.update(top_p=0.8, top_k=20, repetition_penalty=1.05)
    return healthy.but(policy=policy, step=None, optimizers=())


@sampler_not_policy.fault("a checkpoint whose generation config forces a length")
def _(healthy_files: Any) -> Any:
    import json

    file = healthy_files.path("policy") / "generation_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | {"min_new_tokens": 20, "max_new_tokens": 20, "suppress_tokens": [2]}))
    return healthy_files

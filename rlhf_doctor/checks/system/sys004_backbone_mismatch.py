"""SYS004: the models share one backbone where the design expects it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest

SIZES = ("intermediate_size", "n_inner", "num_attention_heads", "n_head", "num_key_value_heads", "num_local_experts")


@check(
    "SYS004",
    "the models share one backbone where they should",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("REF002", "POL007"),
    across_roles=True,
)
def backbone_mismatch(setup: Any, manifest: Mapping[Role, Manifest]) -> Iterator[Finding]:
    """
    What it examines:
        Family, width, depth, heads and vocabulary of the four models, from their configs; for modules without a
        config, the shapes of the reference's weights against the policy's. Policy and reference must be one
        architecture. Critic and reward model usually are; a critic started from the policy has the policy's. A reward
        model of another family or size is only mentioned.

    Why it matters:
        The reference is the policy from before RL: with another network, the KL penalty pulls the policy towards
        another model, or cannot be computed at all. A critic is started from the reward model (or the policy) by
        copying weights, which other shapes make impossible.

    What it looks like when broken:
        KL is large in the first step and never comes down; or shapes fail to broadcast; or loose loading leaves the
        critic with random layers.

    How to fix:
        1. Load policy and reference from the same checkpoint.
        2. Start the critic from the reward model's or the policy's checkpoint.

    Source:
        https://github.com/huggingface/trl/issues/1727 (a maintainer: policy and reference should be identical);
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (critic initialised from the reward model).
    """
    policy, reference = manifest.get("policy"), manifest.get("reference")
    reward, value = manifest.get("reward"), manifest.get("value")
    if policy and reference:
        apart = list(_differences(policy, reference)) or list(_shapes(policy, reference))
        if apart:
            yield _finding("reference", "policy", apart, Severity.ERROR, "They should be one architecture: load both "
                           "from the same checkpoint.")  # fmt: skip
    if reward and value:
        apart = list(_differences(reward, value))
        like_policy = bool(policy and not list(_differences(policy, value)))
        started = setup.declared.get("value_init") in ("policy", "fresh", "sft", "base")
        if apart:
            yield _finding("value", "reward", apart, Severity.INFO if like_policy or started else Severity.WARNING,
                           "A critic is usually started from the reward model, or from the policy.")  # fmt: skip
    if reward and policy and _family(reward) and _family(policy) and _family(reward) != _family(policy):
        yield _finding("reward", "policy", [("family", str(_family(policy)), str(_family(reward)))], Severity.INFO,
                       "That is fine where texts are decoded and encoded again with its own tokenizer.")  # fmt: skip


def _finding(role: Role, other: Role, apart: list[tuple[str, str, str]], severity: Severity, advice: str) -> Finding:
    said = "; ".join(f"{what} {mine}, not {theirs}" for what, theirs, mine in apart[:4])
    return Finding(
        f"The {spoken(role)}'s backbone differs from the {spoken(other)}'s: {said}. {advice}",
        role=role,
        severity=severity,
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence(f"{spoken(role)}: {what}", theirs, mine, where=f"{spoken(other)} has {theirs}")
            for what, theirs, mine in apart
        ),
    )


def _family(m: Manifest) -> str | None:
    return m.model_type


def _differences(first: Manifest, second: Manifest) -> Iterator[tuple[str, str, str]]:
    """(what, the first's, the second's) of what both configs tell and tell differently."""
    pairs = [
        ("family", first.model_type, second.model_type),
        ("hidden size", first.hidden_size, second.hidden_size),
        ("layers", first.num_layers, second.num_layers),
        *((name, first.config.get(name), second.config.get(name)) for name in SIZES),
    ]
    if first.model_type and second.model_type and not (first.needs_remote_code or second.needs_remote_code):
        yield from ((what, str(a), str(b)) for what, a, b in pairs if a is not None and b is not None and a != b)


def _shapes(policy: Manifest, reference: Manifest) -> Iterator[tuple[str, str, str]]:
    """The same for modules without a config: each has matrices of shapes that the other lacks, or another depth."""
    if (policy.model_type and reference.model_type) or not policy.tensors or not reference.tensors:
        return
    mine, theirs = _matrices(policy), _matrices(reference)
    lacks, extra = mine - theirs, theirs - mine
    if lacks and extra:
        yield "weight matrices", _listed(lacks), _listed(extra)
    depths = _depth(policy), _depth(reference)
    if policy.class_name == reference.class_name and 0 not in depths and depths[0] != depths[1]:
        yield "layers", str(depths[0]), str(depths[1])


def _matrices(m: Manifest) -> Counter[tuple[int, ...]]:
    heads = {head.name for head in m.heads}
    return Counter(
        t.shape for name, t in m.tensors.items() if len(t.shape) == 2 and min(t.shape) > 1 and name not in heads
    )


def _listed(shapes: Counter[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in sorted(shapes)[:3])


def _depth(m: Manifest) -> int:
    numbers = [int(found[1]) for name in m.tensors if (found := re.search(r"\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


@backbone_mismatch.fault("a reference of another width")
def _(healthy: Any) -> Any:
    import copy

    config = copy.deepcopy(healthy.policy.config)
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    return healthy.but(reference=type(healthy.policy)(config).requires_grad_(False).eval())


@backbone_mismatch.fault("a hand-written reference with fewer layers")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    size = specimens.vocabulary(healthy)
    policy = specimens.HandWrittenDecoder(size, size, layers=3)
    return healthy.but(
        policy=policy, reference=specimens.HandWrittenDecoder(size, size).requires_grad_(False), optimizers=()
    )


@backbone_mismatch.fault("a critic that is neither the reward model's size nor the policy's")
def _(healthy: Any) -> Any:
    import copy

    config = copy.deepcopy(healthy.value.config)
    config.num_hidden_layers += 1
    return healthy.but(value=type(healthy.value)(config), optimizers=())

"""SYS003: models that must be separate share no trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.sharing import Sharing


@check(
    "SYS003",
    "models that must be separate share no trained weights",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    early=Stage.STATIC,
    explains=("REF003", "OPT003", "REW008", "VAL007", "REF005", "REF006", "KLD003", "SYS008"),
    across_roles=True,
)
def roles_share_weights(
    setup: Any, sharing: tuple[Sharing, ...], manifest: Mapping[Role, Manifest]
) -> Iterator[Finding]:
    """
    What it examines:
        The memory behind the parameters of the four models, as they are now. Where a trained model (policy, critic)
        and a fixed one (reference, reward) hold the same trainable tensors, the fixed one is called again with those
        tensors changed: if its output moves, training will move it. One module that holds policy and value, frozen
        layers that several models use, and the policy with its adapter switched off as reference are sound.

    Why it matters:
        The KL penalty is measured against the reference, and the critic's targets come from the reward model. If
        either drifts with what is trained, the yardstick bends with the thing it measures.

    What it looks like when broken:
        KL stays at 0, or small and wandering from differences between processors, while the text changes; the critic
        fits perfectly while the reward model forgets what it knew. Embeddings that are tied across models do it
        slowly: the bottom layers are frozen and the table is not.

    How to fix:
        1. Copy before training: reference = copy.deepcopy(policy).requires_grad_(False).eval().
        2. Start the critic from the reward model by copying its weights, not by passing the same object.
        3. With shared lower layers, freeze everything that is shared, the embedding included.
        4. With LoRA, use the policy with its adapter disabled as reference.

    Source:
        https://github.com/huggingface/trl/issues/2046 (one object as policy and reference, hidden by a KL that was
        not quite 0); https://github.com/CarperAI/trlx/issues/517 (tied embeddings let the reference drift). The value
        loss moving a shared trunk of policy and critic is by design: https://github.com/huggingface/trl/issues/1108.
    """
    for s in sharing:
        if {s.first, s.second} == {"policy", "value"}:
            yield from _trunk(s, setup)
            continue
        first, second = spoken(s.first), spoken(s.second)
        adapted = "policy" in manifest and manifest["policy"].adapter is not None and s.first == "policy"
        drifts = bool(s.trainable) and s.moves is not False
        useless = not s.trainable and s.whole and not adapted
        if not (s.same_object or drifts or useless):
            continue
        what = "are the same object" if s.same_object else f"share {_count(s.trainable or s.names)}"
        effect = (
            f"Training the {first} changes the {second}"
            if drifts
            else f"The {first} has no weights of its own to train"
        )
        yield Finding(
            f"The {first} and the {second} {what}. {effect}. They should be separate: copy the weights instead of "
            "passing the same tensors.",
            role="reference" if s.second == "reference" else s.first if s.first == "value" else s.second,
            confidence=Confidence.PROVEN if s.moves or s.same_object else Confidence.MEASURED,
            evidence=tuple(_evidence(s)),
        )


def _count(names: tuple[str, ...]) -> str:
    return f"{len(names)} tensors" if len(names) > 1 else f"the tensor {names[0]}"


def _evidence(s: Sharing) -> Iterator[Evidence]:
    shown = ", ".join((s.trainable or s.names)[:4]) + (" …" if len(s.trainable or s.names) > 4 else "")
    yield Evidence(
        f"tensors of the {spoken(s.first)} in the {spoken(s.second)}'s memory",
        "0 that train",
        f"{len(s.names)}, of which {len(s.trainable)} train",
        where=shown,
        reproduce=f"[p.data_ptr() for p in {s.first}.parameters()] against {s.second}'s",
    )
    if s.moves:
        yield Evidence(
            f"the {spoken(s.second)}'s output after the shared tensors changed", "the same", "another", where=s.second
        )


def _trunk(s: Sharing, setup: Any) -> Iterator[Finding]:
    if s.trainable and not s.same_object and setup.declared.get("shared_trunk") is not True:
        yield Finding(
            f"Policy and critic share {len(s.trainable)} trained tensors, so the value loss moves the policy too. That "
            "is a common design; declare shared_trunk=true if it is meant.",
            role="value",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=tuple(_evidence(s)),
        )


@roles_share_weights.fault("the policy is its own reference")
def _(healthy: Any) -> Any:
    return healthy.but(reference=healthy.policy)


@roles_share_weights.fault("the critic is the reward model")
def _(healthy: Any) -> Any:
    return healthy.but(reward=healthy.value)


@roles_share_weights.fault("hand-written policy and reference with one trained embedding")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest import specimens

    size = specimens.vocabulary(healthy)
    policy = specimens.HandWrittenDecoder(size, size)
    reference = copy.deepcopy(policy).requires_grad_(False)
    reference.table = policy.table
    return healthy.but(policy=policy, reference=reference, optimizers=())

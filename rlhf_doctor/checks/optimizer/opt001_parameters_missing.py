"""OPT001: what should train requires gradients and is in an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.reach import Held, Reach, is_adapter
from rlhf_doctor.instruments.readings import Manifest, Parameters

TRAINED: tuple[Role, ...] = ("policy", "value")
WRAPPING = ("weight", "modules_to_save", "default", "original_module")


@check(
    "OPT001",
    "what should train requires gradients and is in an optimizer",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("SYS012",),
    early=Stage.STATIC,
    explains=("OPT002", "VAL008", "VAL009"),
)
def parameters_missing(
    setup: Any,
    parameters: Mapping[Role, Parameters],
    manifest: Mapping[Role, Manifest],
    reach: Mapping[Role, Reach] | None = None,
    held: Held | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Of policy and critic in memory: which parameters require gradients, which of those the output depends on (read
        off the autograd graph), and which of those the given optimizers hold. An adapter or a scalar head that is
        frozen is a fault, and so are a model of which nothing trains and parameters that only optimizers over a copy
        hold. Frozen lower layers, and a frozen base under an adapter, are sound. Without optimizers, or with
        hand-written ones in the setup's state, only gradients are judged.

    Why it matters:
        An optimizer steps what it was built from. Whatever is not among it stays as it was, while losses, gradients and
        rewards of the log look alive.

    What it looks like when broken:
        The saved adapter is byte for byte the one that was loaded; only the value head moves; the reward never does.
        The optimizer was built before the model was wrapped, copied or moved, or the adapter was loaded for inference.

    How to fix:
        1. Load an adapter that will be trained with is_trainable=True, and do not prepare it for k-bit training twice.
        2. Build optimizers last, from the objects that the loop calls: after get_peft_model, deepcopy and prepare.
        3. Count: sum(p.numel() for g in optimizer.param_groups for p in g["params"]) against the trainable parameters.
        4. Put the scalar head among modules_to_save, or require gradients of it by hand.

    Source:
        https://github.com/huggingface/trl/issues/6700 (inference mode), https://github.com/huggingface/trl/issues/1558
        (only the value head trains), https://github.com/huggingface/trl/pull/4081 (k-bit preparation),
        https://github.com/hiyouga/LlamaFactory/issues/1646 (nothing trainable).
    """
    judged = [role for role in TRAINED if role in parameters and not parameters[role].loaded_here]
    if not judged:
        raise Unavailable("needs policy and critic in memory: checkpoints do not say what will be trained")
    reported: set[int] = set()
    for role in judged:
        if role == "value" and setup.value is setup.policy and parameters[role].trainable == 0:
            continue  # one module, and the policy's finding says it
        frozen = _frozen(role, parameters[role], manifest.get(role), (reach or {}).get(role))
        if frozen is not None:
            yield frozen
        elif held is not None and not held.undecidable:
            loose = _loose(role, parameters[role], manifest.get(role), (reach or {}).get(role), held, reported)
            if loose is not None:
                yield loose


def _frozen(role: Role, p: Parameters, manifest: Manifest | None, reach: Reach | None) -> Finding | None:
    trainable = _reached(p, reach)
    head = _head(manifest) if role == "value" else ""
    names = manifest.adapter_tensors if manifest else {}
    if p.trainable == 0:
        said = "none of its parameters requires gradients"
    elif not trainable:
        said = f"its output depends on no parameter that requires gradients; only {_few(p.trainable_names)} do"
    elif names and not any(is_adapter(name) for name in p.trainable_names):
        said = "its adapter is frozen: no parameter of it requires gradients"
    elif head and not any(_part(head) in name.split(".") for name in p.trainable_names):
        said = f"its scalar head {_part(head)!r} is frozen while other parameters train"
    else:
        return None
    return Finding(
        f"The {spoken(role)} will not learn: {said}. Require gradients of what should train before the optimizer is "
        "built.",
        role=role,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "scalars that require gradients and act on the output",
                expected="above 0, the head and the adapter among them",
                observed=f"{p.trainable} require gradients, of {p.total}; {len(trainable)} tensors act",
                where=_few(trainable or p.trainable_names),
                reproduce=f"[n for n, p in {role}.named_parameters() if p.requires_grad]",
            ),
        ),
    )


def _loose(
    role: Role, p: Parameters, manifest: Manifest | None, reach: Reach | None, held: Held, reported: set[int]
) -> Finding | None:
    should = _reached(p, reach)
    missing = [n for n in should if n not in held.names[role] and held.ids[role].get(n) not in reported]
    if not missing:
        return None
    reported.update(held.ids[role][n] for n in missing if n in held.ids[role])
    none = not any(n in held.names[role] for n in should)
    head = _part(_head(manifest)) if role == "value" else ""
    grave = none or any(head in n.split(".") for n in missing if head)
    copied = held.copies[role] > 0.9
    said = "no optimizer holds any of its parameters" if none else f"no optimizer holds {_few(missing)}"
    if none and copied:
        said += "; one holds a copy of them, of the same shapes, that is no model of this setup"
    return Finding(
        f"The {spoken(role)} will not learn{'' if none else ' in full'}: {said}. Build the optimizer from the very "
        "model that the loop calls, after the last time it was wrapped or copied.",
        role=role,
        severity=None if grave else Severity.WARNING,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "trainable tensors that act on the output and are in no optimizer",
                expected="0",
                observed=f"{len(missing)} of {len(should)}",
                where=_few(missing),
                reproduce=f"set(map(id, {role}.parameters())) - {{id(p) for g in o.param_groups for p in g['params']}}",
            ),
        ),
    )


def _reached(p: Parameters, reach: Reach | None) -> Sequence[str]:
    return reach.names if reach is not None and reach.complete else p.trainable_names


def _head(manifest: Manifest | None) -> str:
    head = manifest.head("scalar") if manifest else None
    return head.name if head else ""


def _part(name: str) -> str:
    """The module's own name in a parameter's: ``score`` of ``model.score.modules_to_save.default.weight``."""
    return next((part for part in reversed(name.split(".")) if part not in WRAPPING), "")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@parameters_missing.fault("an optimizer over a copy of the policy")
def _(healthy: Any) -> Any:
    import copy

    import torch

    both = [*copy.deepcopy(healthy.policy).parameters(), *healthy.value.parameters()]
    return healthy.but(step=None, optimizers=[torch.optim.Adam(both, lr=1e-4)])


@parameters_missing.fault("an adapter loaded for inference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.adapted(healthy.policy).requires_grad_(False)
    return policies.alone(healthy, policy=policy, reference="adapter-off")


@parameters_missing.fault("a hand-written critic whose head is frozen")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    critic = specimens.hand_written_critic(healthy)
    critic.out.requires_grad_(False)
    return policies.alone(healthy, value=critic)


@parameters_missing.fault("one module of which only the value head trains")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    both = policies.TwoHeads(specimens.vocabulary(healthy)).eval()
    for name, parameter in both.named_parameters():
        parameter.requires_grad_(name.startswith("v_head"))
    return policies.alone(healthy, policy=both, value=both)

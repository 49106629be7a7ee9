"""A role's parameters as they are in memory: trainable or not, in an optimizer or not, finite, shared."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Parameters

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["parameters"]


@role_fact(Stage.PROBE, early=Stage.STATIC)
def parameters(role: Role, models: Models | None, setup: Any) -> Parameters:
    """Read every parameter once; nothing is called.

    Raises:
        Unavailable: the role is a function, or has to be loaded first.
    """
    given = setup.model(role)
    if models is None and not callable(getattr(given, "named_parameters", None)):
        raise Unavailable("needs --stage probe, which loads models" if given is not None else f"needs a {role} model")
    import torch

    live = None if models is None else models.get(role)
    loaded_here, module = (False, given) if live is None else (live.loaded_here, live.module)
    named = list(module.named_parameters())
    held = {id(p) for optimizer in setup.optimizers for p in _held_by(optimizer)} if setup.optimizers else None
    trainable = [(name, p) for name, p in named if p.requires_grad]
    dtypes = Counter[str]()
    for _, parameter in trainable or named:
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return Parameters(
        total=sum(p.numel() for _, p in named),
        trainable=sum(p.numel() for _, p in trainable),
        in_optimizer=None if held is None else sum(p.numel() for _, p in named if id(p) in held),
        trainable_not_in_optimizer=() if held is None else tuple(n for n, p in trainable if id(p) not in held),
        frozen_in_optimizer=tuple(n for n, p in named if held and id(p) in held and not p.requires_grad),
        trainable_names=tuple(n for n, _ in trainable),
        not_materialised=tuple(n for n, p in named if p.is_meta or p.numel() == 0),
        non_finite=tuple(n for n, p in named if p.is_floating_point() and not p.is_meta and not _finite(p)),
        storages={}
        if loaded_here
        else {p.untyped_storage().data_ptr(): n for n, p in reversed(named) if not p.is_meta and p.numel()},
        dtypes=dict(dtypes),
        training=module.training,
        active_dropout=tuple(
            name
            for name, child in module.named_modules()
            if isinstance(child, torch.nn.modules.dropout._DropoutNd) and child.training and child.p > 0
        ),
        loaded_here=loaded_here,
    )


def _held_by(optimizer: Any) -> list[Any]:
    groups = getattr(optimizer, "param_groups", None) or []
    return [p for group in groups for p in (group.get("params", ()) if isinstance(group, dict) else ())]


def _finite(parameter: Any) -> bool:
    import torch

    # A sum is finite when its parts are, or overflows: only then every part is looked at.
    with torch.no_grad():
        return bool(torch.isfinite(parameter.sum(dtype=torch.float32))) or bool(torch.isfinite(parameter).all())

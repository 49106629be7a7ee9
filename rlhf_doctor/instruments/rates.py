"""Learning rates and Adam's settings, as declared and as the optimizers have them. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.reach import is_adapter
from rlhf_doctor.instruments.readings import Manifest

__all__ = ["Rate", "number", "rates"]

TRAINED: tuple[Role, ...] = ("policy", "value")


@dataclass(frozen=True)
class Rate:
    """One learning rate. ``where`` says what it is read from.

    ``adam``: whether the optimizer has Adam's ``betas`` (True where only declared). ``peak``: the rate that a schedule
    started from where it left a note of it (``initial_lr``). ``parameters``: how many scalars the role's model has,
    None where that is unknown; ``adapter``: whether only an adapter (and heads) is trained, None where unknown.
    """

    role: Role
    where: str
    lr: float
    adam: bool
    peak: float | None = None
    eps: float | None = None
    betas: tuple[float, ...] = ()
    parameters: int | None = None
    adapter: bool | None = None
    declared: bool = False


@fact(Stage.STATIC)
def rates(setup: Any, manifest: Mapping[Role, Manifest] | None = None) -> tuple[Rate, ...]:
    """Every declared rate and every parameter group of the optimizers.

    Raises:
        Unavailable: neither rates are declared nor optimizers given.
    """
    known = manifest or {}
    sizes = {role: _size(known[role]) for role in TRAINED if role in known}
    adapted = {role: _adapted(setup.model(role), known[role]) for role in TRAINED if role in known}
    found = [
        Rate(role, f"declared {name}", value, True, None, None, (), sizes.get(role), adapted.get(role), True)
        for name, role in (("learning_rate", TRAINED[0]), ("critic_learning_rate", TRAINED[1]))
        if (value := number(setup.declared.get(name))) is not None
    ]
    owners = {
        id(p): role
        for role in reversed(TRAINED)
        if callable(getattr(setup.model(role), "parameters", None))
        for p in setup.model(role).parameters()
    }
    for i, optimizer in enumerate(setup.optimizers):
        for j, group in enumerate(getattr(optimizer, "param_groups", None) or ()):
            lr = number(group.get("lr")) if isinstance(group, Mapping) else None
            if lr is None:
                continue
            role = next((owners[id(p)] for p in group.get("params", ()) if id(p) in owners), TRAINED[0])
            found.append(
                Rate(
                    role,
                    f"optimizers[{i}].param_groups[{j}] ({type(optimizer).__name__})",
                    lr,
                    "betas" in group,
                    number(group.get("initial_lr")),
                    number(group.get("eps")),
                    tuple(b for b in map(number, group.get("betas") or ()) if b is not None),
                    sizes.get(role),
                    adapted.get(role),
                )
            )
    if not found:
        raise Unavailable("needs a declared learning_rate or the optimizers")
    return tuple(found)


def number(value: Any) -> float | None:
    """A plain float of a number, a numeric text or a tensor of one number; None of anything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _size(manifest: Manifest) -> int | None:
    return sum(prod(info.shape) for info in manifest.tensors.values()) or None


def _adapted(model: Any, manifest: Manifest) -> bool:
    if manifest.adapter is not None or manifest.adapter_tensors:
        return True
    named = getattr(model, "named_parameters", None)
    return any(is_adapter(name) for name, p in named() if p.requires_grad) if callable(named) else False

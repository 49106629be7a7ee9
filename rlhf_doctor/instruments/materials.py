"""Whether a role's weights are really there: in memory, of some size, and written by somebody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import role_fact
from rlhf_doctor.finding import Role, Stage

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["Materials", "materials"]


@dataclass(frozen=True)
class Materials:
    """``absent``: parameter -> why it is not there. ``constant``: matrices of the body whose entries are all one
    number, heads and adapters left out, which may start at zero. ``matrices`` counts all of the body's."""

    absent: dict[str, str]
    constant: tuple[str, ...]
    matrices: int


@role_fact(Stage.PROBE)
def materials(role: Role, models: Models, setup: Any) -> Materials:
    """Look at every parameter once; nothing is called.

    Raises:
        Unavailable: the role is a function.
    """
    given = setup.model(role)
    # A model whose parameters have no shape yet cannot be called, and so is no live model; here it is only looked at.
    module = given if callable(getattr(given, "named_parameters", None)) else models.get(role).module
    named = list(module.named_parameters())
    absent = {name: why for name, p in named if (why := _absent(p))}
    body = [
        (n, p)
        for n, p in named
        if n not in absent and p.dim() >= 2 and p.is_floating_point() and not _may_be_zero(n, p)
    ]
    return Materials(absent, tuple(name for name, p in body if _constant(p)), len(body))


def _absent(parameter: Any) -> str:
    from torch.nn.parameter import is_lazy

    if is_lazy(parameter):
        return "never initialised"
    if parameter.is_meta:
        return "on the meta device"
    return "empty" if parameter.numel() == 0 else ""


def _may_be_zero(name: str, parameter: Any) -> bool:
    return "lora_" in name or "adapter" in name or min(parameter.shape) == 1


def _constant(parameter: Any) -> bool:
    flat = parameter.detach().reshape(-1)
    probe = flat[:: max(flat.numel() // 4096, 1)]
    return bool((probe == probe[0]).all()) and bool((flat == flat[0]).all())

"""Which roles hold the same memory, and whether one moves when the other is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Inputs, Parameters

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["Sharing", "sharing"]

# The roles that RL never trains.
FIXED: tuple[Role, ...] = ("reference", "reward")


@dataclass(frozen=True)
class Sharing:
    """Two roles that hold some of the same memory.

    ``names`` are the shared tensors as the second role calls them, ``trainable`` those of them that train in either
    role. ``whole`` says that one of the two has no tensor of its own. ``moves``: whether the second role's output
    changed when the trainable ones were changed; None where it could not be called so.
    """

    first: Role
    second: Role
    same_object: bool
    names: tuple[str, ...]
    trainable: tuple[str, ...]
    whole: bool
    moves: bool | None


@fact(Stage.PROBE, early=Stage.STATIC)
def sharing(
    setup: Any, models: Models | None, parameters: Mapping[Role, Parameters], inputs: Inputs | None = None
) -> tuple[Sharing, ...]:
    """Pairs of models in memory that share storage: trained role first, untrained second.

    A shared tensor that trains is replaced by a changed copy inside the second role only, which is then called again;
    a reference that switches the policy's adapter off does not move, one that is the policy does. Where nothing may be
    called, pairs of which that would have to be known are left out.
    """
    found = []
    order: tuple[Role, ...] = ("policy", "value", "reference", "reward")
    for first, second in combinations((r for r in order if r in parameters), 2):
        one, two = parameters[first], parameters[second]
        common = one.storages.keys() & two.storages.keys()
        if not common or (first in FIXED and second in FIXED):
            continue
        trains = _trained(one) | _trained(two)
        learnt = tuple(
            sorted(two.storages[s] for s in common if one.storages[s] in trains or two.storages[s] in trains)
        )
        same = setup.model(first) is setup.model(second)
        if models is None and learnt and not same:
            continue
        found.append(
            Sharing(
                first,
                second,
                same_object=same,
                names=tuple(sorted(two.storages[s] for s in common)),
                trainable=learnt,
                whole=len(common) in (len(one.storages), len(two.storages)),
                moves=_moves(models.get(second), learnt, inputs)
                if models is not None and learnt and second in FIXED and inputs
                else None,
            )
        )
    return tuple(found)


def _trained(one: Parameters) -> set[str]:
    return set(one.trainable_names) - set(one.trainable_not_in_optimizer)


def _moves(live: Live, names: Sequence[str], inputs: Inputs) -> bool | None:
    """Whether the output differs after the named parameters are exchanged for changed copies, inside this call only."""
    import torch

    from rlhf_doctor.instruments.models import padded

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = live.module

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return live.read(ids, mask).tensor

    ids, mask = padded(inputs.sequences, inputs.pad_id, "right")
    wanted = set(names)
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            with live.kept():
                before = live.read(ids, mask).tensor.clone()
            changed = {}
            for name, p in live.module.named_parameters():
                if name in wanted and p.is_floating_point():
                    noise = torch.randn(p.shape, generator=draw).to(p)
                    changed[f"inner.{name}"] = p + noise * (0.02 + 0.1 * p.abs().mean())
            with live.kept():
                after = torch.func.functional_call(Around(), changed, (ids, mask))
    except (Broken, Unavailable):
        return None
    return not torch.allclose(before.float(), after.float(), rtol=1e-5, atol=1e-7, equal_nan=True)

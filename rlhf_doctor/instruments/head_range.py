"""How far a scalar head's output can go: the last projection is driven up and the output watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import HeadRange, Inputs

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["DRIVE", "head_range"]

DRIVE = 1e6
ENDS = {"Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
VIEWS = ("Squeeze", "View", "UnsafeView", "ReshapeAlias", "Select", "Slice", "Index", "ToCopy", "Alias", "Unsqueeze",
         "Clone", "Expand", "Permute", "Transpose", "T", "Gather")  # fmt: skip
SQUASHING = ("Sigmoid", "Tanh", "Softmax", "Relu", "Clamp", "Hardtanh", "Hardsigmoid", "Softplus", "LogSigmoid",
             "Silu", "Gelu", "Elu", "Exp", "Abs", "Neg", "LogSoftmax", "Atan", "Erf")  # fmt: skip


@role_fact(Stage.PROBE)
def head_range(role: str, models: Models, inputs: Inputs) -> HeadRange:
    """Extremes of the output with the last projection to one number multiplied by ±1,000,000.

    The multiplication happens on the way, no weight is touched. A free head's output grows with the drive in both
    directions; a bounded one's does not. Where no projection ends in one number, an output that a squashing operation
    is the last to touch has the bounds of that operation, and others' are not known.

    Raises:
        Unavailable: the role is a function, or has no projection to a single number and ends in no squashing.
        Broken: the model cannot be called.
    """
    import torch

    from rlhf_doctor.instruments.models import padded
    from rlhf_doctor.instruments.tapping import EmbeddingTap, ProjectionDrive

    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    _ = live.module
    ids, mask = padded(inputs.sequences[1:2], inputs.pad_id, "right")
    with live.kept():
        with ProjectionDrive() as noted, torch.enable_grad():
            plain = live.read(ids, mask).tensor
        if not noted.shapes:
            with EmbeddingTap(ids), torch.enable_grad():
                last = _last(live.read(ids, mask).tensor.grad_fn)
            if last not in ENDS:
                raise Unavailable(f"the {role} has no projection to a single number")
            low, high = ENDS[last]
            return HeadRange(
                low, high, float("inf"), bounded_below=True, bounded_above=True, activations=(last.lower(),)
            )
        driven = []
        with torch.no_grad():
            for factor in (DRIVE, -DRIVE):
                with ProjectionDrive(noted.shapes[-1], factor):
                    driven.append(live.read(ids, mask).tensor.detach().double().cpu())
        activations = _activations(plain.grad_fn)
    low = min(float(d.min()) for d in driven)
    high = max(float(d.max()) for d in driven)
    plain = plain.detach().double().cpu()
    reach = max(float(plain.abs().max()), 1e-3)
    # A free head moves by the drive; one that stays within a hundredth of that is held.
    follows = DRIVE * reach / 100
    return HeadRange(
        low, high, DRIVE, bounded_below=low > -follows, bounded_above=high < follows, activations=activations
    )


def _last(node: Any) -> str:
    """The operation that made the output's numbers, behind whatever only arranges them."""
    while node is not None:
        name = str(node.name().removesuffix("Backward0").removesuffix("Backward1"))
        if name not in VIEWS:
            return name
        node = next((child for child, _ in node.next_functions if child is not None), None)
    return ""


def _activations(node: Any) -> tuple[str, ...]:
    """Squashing operations between the output and the first projection below it, nearest to the output first."""
    found: list[str] = []
    for _ in range(32):
        if node is None:
            break
        name = node.name().removesuffix("Backward0").removesuffix("Backward1")
        if name in ("Addmm", "Mm", "Bmm", "Mv", "Linear", "UnsafeView") and name != "UnsafeView":
            break
        if name in SQUASHING:
            found.append(name.lower())
        node = next((child for child, _ in node.next_functions if child is not None), None)
    return tuple(found)

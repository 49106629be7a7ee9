"""Replace the embedding's output by a leaf, and catch what modules give, without touching the user's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["EmbeddingTap", "ProjectionDrive", "positions_axis", "trunk_outputs"]


class EmbeddingTap(TorchFunctionMode):
    """While active, every look-up of exactly these ids gives a leaf that gradients can be taken at.

    Args:
        ids: (B, T) int64; a look-up of its transpose counts too. Look-ups of other ids (positions, types) pass.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids
        self.leaves: list[torch.Tensor] = []
        self.transposed: list[bool] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.nn.functional.embedding, torch.embedding, torch.Tensor.__getitem__):
            return result
        looked_up = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor) and _integer(a)]
        if not isinstance(result, torch.Tensor) or not result.is_floating_point() or not looked_up:
            return result
        for turned, ids in ((False, self.ids), (True, self.ids.T)):
            if any(a.shape == ids.shape and torch.equal(a, ids.to(a.dtype)) for a in looked_up):
                leaf = result.detach().requires_grad_(True)
                self.leaves.append(leaf)
                self.transposed.append(turned)
                return leaf
        return result

    def gradients(self, target: torch.Tensor) -> torch.Tensor:
        """|∂ target / ∂ embedding|: (B, T), the L2 norm over the embedding axis, summed over the look-ups.

        Raises:
            RuntimeError: the target does not depend on the embeddings through anything differentiable.
        """
        gradients = torch.autograd.grad(target, self.leaves, allow_unused=True, retain_graph=True)
        total = torch.zeros(self.ids.shape, dtype=torch.float64)
        for gradient, turned in zip(gradients, self.transposed, strict=True):
            if gradient is not None:
                norm = gradient.detach().double().cpu().norm(dim=-1)
                total += norm.T if turned else norm
        return total


def _integer(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_complex()


class ProjectionDrive(TorchFunctionMode):
    """While active, notes projections to one number and multiplies those whose result has this shape by ``factor``.

    An adapter on a head makes it the sum of several projections: all of them are driven.

    Args:
        shape: of the results to multiply; None only notes.
        factor: the drive.
    """

    def __init__(self, shape: tuple[int, ...] | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.factor = factor
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PROJECTIONS and isinstance(result, torch.Tensor) and _to_one_number(args, result):
            if tuple(result.shape) == self.shape:
                result = result * self.factor
            self.shapes.append(tuple(result.shape))
        return result


PROJECTIONS = (
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.mv,
    torch.einsum,
    torch.addmm,
    torch.Tensor.mv,
)


def _to_one_number(args: tuple[Any, ...], result: torch.Tensor) -> bool:
    given = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if given is None or not result.is_floating_point():
        return False
    return result.dim() < given.dim() or (result.shape[-1] == 1 and given.shape[-1] != 1)


def positions_axis(tensor: torch.Tensor, batch: int, length: int) -> int | None:
    """The axis of a 3-D activation that runs over positions, its batch axis being 0 (or 1 where time comes first)."""
    if tensor.dim() != 3:
        return None
    if tensor.shape[0] == batch:
        return 1 if tensor.shape[1] == length else 2 if tensor.shape[2] == length else None
    return 0 if tensor.shape[1] == batch and tensor.shape[0] == length else None


@contextmanager
def trunk_outputs(batch: int, length: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Collect (module class, activation) of every per-position activation, in the order they are made.

    An activation is given as (batch, length, features). Uses a global hook, so no module is touched.
    """
    caught: list[tuple[str, torch.Tensor]] = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, torch.Tensor) or not first.is_floating_point():
            return
        axis = positions_axis(first, batch, length)
        if axis is not None:
            turned = {0: (1, 0, 2), 2: (0, 2, 1)}.get(axis)
            caught.append((type(module).__name__, first.permute(turned) if turned else first))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()

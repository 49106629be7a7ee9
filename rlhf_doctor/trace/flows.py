"""What backward passes bring to a few parameters of each trained role, and what is there before and after them.

The gradient that each backward pass brings to a parameter is caught before it is added up; what an optimizer then finds
tells what was left from before, and what was cut away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rlhf_doctor.trace.taps import Recorder

if TYPE_CHECKING:
    from rlhf_doctor.finding import Role
    from rlhf_doctor.setups import RLHFSetup
    from rlhf_doctor.trace.calls import Call

__all__ = ["CUT", "LEFT", "Flow", "GradientRecorder"]

SAMPLE = 4096  # entries of a parameter that are watched
LEFT = 1e-5  # of a gradient: what was there before its backward pass and should not have been
CUT = 1e-8  # of a gradient: what no clip that is meant and no loss scale leaves


@dataclass
class Flow:
    """Of one role, by update: what its gradient held before the first backward pass, and what its optimizer found.

    Both over what the backward passes brought: 0 and 1 where all is well and nothing is clipped.
    """

    before: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)  # the same at the start of later passes, for steps made by hand


class GradientRecorder(Recorder):
    """A recorder that adds up what backward passes bring to a few parameters of each trained role, if it listens."""

    def __init__(self, setup: RLHFSetup, *, listens: bool, **options: Any) -> None:
        super().__init__(setup, **options)
        self.listens = listens
        self.flows: dict[Role, Flow] = {}
        self.watched: list[_Watched] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the parameters, taken off afterwards."""
        seen: set[int] = set()
        handles = []
        roles: tuple[Role, ...] = ("policy", "value") if self.listens else ()
        for role in roles:
            module = self._modules.get(role)
            named = [] if module is None else [p for p in module.parameters() if p.requires_grad and p.numel() > 1]
            for p in _few(named):
                if id(p) not in seen:
                    seen.add(id(p))
                    one = _Watched(p, role, self.flows.setdefault(role, Flow()))
                    self.watched.append(one)
                    handles.append(p.register_hook(one.brought))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make(self, role: Role, *given: Any) -> Call:
        for one in self.watched:
            if one.role == role:
                one.looked()
        return super()._make(role, *given)

    def stepped(self, optimizer: Any) -> None:
        """An optimizer steps, or would have."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for one in self.watched:
            if id(one.parameter) in held:
                one.stepped()
        super().stepped(optimizer)


class _Watched:
    """One parameter: the sum of what backward passes brought since its last update."""

    def __init__(self, parameter: torch.Tensor, role: str, flow: Flow) -> None:
        self.parameter, self.role, self.flow = parameter, role, flow
        self.sum: torch.Tensor | None = None
        self.passes = 0
        self.updates = 0
        self.weights = self._part(parameter)

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1)
        return flat[:: max(1, len(flat) // SAMPLE)].double().cpu()

    def brought(self, gradient: torch.Tensor) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            weights = self._part(self.parameter)
            if not torch.equal(weights, self.weights):  # updated by hand
                self.weights, self.sum, self.passes = weights, None, 0
                self.updates += 1
            mine = self._part(gradient)
            before = self.parameter.grad
            if self.passes == 0 and self.updates and float(mine.norm()):
                self.flow.before.append(0.0 if before is None else float(self._part(before).norm() / mine.norm()))
            self.sum = mine if self.sum is None else self.sum + mine
            self.passes += 1

    def stepped(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if self.sum is not None and float(self.sum.norm()):
                now = self.parameter.grad
                self.flow.found.append(0.0 if now is None else float(self._part(now).norm() / self.sum.norm()))
            self.sum, self.passes = None, 0
            self.updates += 1

    def looked(self) -> None:
        """A later pass begins: where steps are made by hand, the gradient that they used may still be there."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            now = self.parameter.grad
            if self.sum is not None and now is not None and float(self.sum.norm()):
                self.flow.seen.append(float(self._part(now).norm() / self.sum.norm()))


def _few(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Some that most certainly get a gradient: of the middle and of the end."""
    count = len(parameters)
    return [parameters[i] for i in sorted({count // 3, count // 2, 2 * count // 3, count - 1})] if count else []

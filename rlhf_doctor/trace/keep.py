"""Everything that a step may change, bit for bit as it was afterwards: also after a crash or Ctrl-C."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rlhf_doctor.instruments.models import generators_kept, module_kept

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Snapshot", "live_optimizers", "run_kept", "without_autocast"]

DEEPEST = 6  # containers and objects within one another that are looked into
MOST = 20_000  # of them


class Snapshot:
    """Parameters, buffers, gradients, flags, optimizers, ``state``, generators, and the loop's own counters.

    The loop's own state is what can be reached from ``step``: closures, instances, lists, dicts, generators, tensors.
    Iterators that cannot be copied (Python generators) are left as they are.

    Attributes:
        exact: whether steps from this state run without autocast, so that rounding hides nothing.
    """

    def __init__(self, setup: RLHFSetup) -> None:
        self.exact = False
        self.modules = _modules(setup)
        self.undo: list[Callable[[], None]] = []
        self.weights: dict[int, torch.Tensor] = {}  # id of a parameter -> its numbers
        self.owned = owned = set[int]()
        for module in self.modules:
            for parameter in module.parameters():
                if id(parameter) not in owned and not parameter.is_meta:
                    owned.add(id(parameter))
                    self.weights[id(parameter)] = self._tensor(parameter.data, parameter)
                    if parameter.grad is not None:
                        self._tensor(parameter.grad)
            owned |= {id(buffer) for buffer in module.buffers()}
        optimizers = [*setup.optimizers, *(o for o in live_optimizers() if _steps_any(o, owned))]
        self.optimizers = list({id(o): o for o in optimizers}.values())
        seen = {id(o) for o in (*self.modules, setup, setup.tokenizer, setup.reward_tokenizer)}
        for holder in (*self.optimizers, *setup.state):
            if id(holder) not in seen:
                seen.add(id(holder))
                self._holder(holder, seen)
        if setup.step is not None:
            self._reach(setup.step, seen, 0)

    def _tensor(self, tensor: torch.Tensor, parameter: torch.Tensor | None = None) -> torch.Tensor:
        saved = tensor.detach().clone()

        def back() -> None:
            now = tensor if parameter is None else parameter.data
            if now.data_ptr() != tensor.data_ptr() and parameter is not None:
                parameter.data = tensor
            if not torch.equal(tensor, saved):
                tensor.copy_(saved)

        self.undo.append(back)
        return saved

    def _module(self, module: torch.nn.Module) -> None:
        """A module that is no role's: a sampler's copy of the policy, a moving average."""
        for parameter in module.parameters():
            if id(parameter) not in self.owned and not parameter.is_meta:
                self.owned.add(id(parameter))
                self._tensor(parameter.data, parameter)
        for buffer in module.buffers():
            if id(buffer) not in self.owned and not buffer.is_meta:
                self.owned.add(id(buffer))
                self._tensor(buffer)

    def _holder(self, holder: Any, seen: set[int]) -> None:
        """Something with a state of its own: an optimizer, a schedule, a controller, a sampler."""
        if isinstance(holder, torch.Generator):
            state = holder.get_state()
            self.undo.append(lambda: _ignore(holder.set_state(state)))
        elif isinstance(holder, torch.optim.Optimizer):
            self.undo.append(_optimizer_kept(holder))
        elif _is_stateful(holder):
            try:
                saved = copy.deepcopy(holder.state_dict())
            except Exception:  # some only have the method, and nothing behind it
                return
            self.undo.append(lambda: holder.load_state_dict(copy.deepcopy(saved)))
        else:
            self._reach(holder, seen, 0, inside=True)

    def _reach(self, thing: Any, seen: set[int], depth: int, *, inside: bool = False) -> None:
        if depth > DEEPEST or len(seen) > MOST or (id(thing) in seen and not inside) or _immutable(thing):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            self._module(thing)
            return
        if isinstance(thing, torch.Tensor):
            if not isinstance(thing, torch.nn.Parameter) and thing.grad_fn is None and not thing.is_meta:
                self._tensor(thing)
        elif isinstance(thing, random.Random):
            state = thing.getstate()
            self.undo.append(lambda: thing.setstate(state))
        elif isinstance(thing, (torch.Generator, torch.optim.Optimizer)) or _is_stateful(thing):
            self._holder(thing, seen)
        elif type(thing).__module__.startswith("numpy.random"):
            _numpy_generator(thing, self.undo)
        elif isinstance(thing, FunctionType):
            self._function(thing, seen, depth)
        elif isinstance(thing, MethodType):
            self._reach(thing.__self__, seen, depth + 1)
            self._function(thing.__func__, seen, depth)
        elif isinstance(thing, (dict, list, set)) or type(thing).__name__ == "deque":
            self._container(thing, seen, depth)
        elif isinstance(thing, tuple):
            for value in thing:
                self._reach(value, seen, depth + 1)
        elif type(thing).__name__.endswith("iterator") and not hasattr(thing, "__dict__"):
            return
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, ModuleType)) and _users(thing):
            self._container(vars(thing), seen, depth)

    def _function(self, function: Any, seen: set[int], depth: int) -> None:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            copied = _copied_iterator(content)
            self.undo.append(
                lambda cell=cell, content=content, copied=copied: setattr(  # type: ignore[misc]
                    cell, "cell_contents", content if copied is None else copy.copy(copied)
                )
            )
            self._reach(content, seen, depth + 1)
        names = set(function.__code__.co_names) & set(function.__globals__)
        for name in names:
            value = function.__globals__[name]
            if isinstance(value, (ModuleType, type)):
                continue
            if _immutable(value) or _copied_iterator(value) is not None:
                copied = _copied_iterator(value)
                self.undo.append(
                    lambda g=function.__globals__, name=name, value=value, copied=copied: g.__setitem__(  # type: ignore[misc]
                        name, value if copied is None else copy.copy(copied)
                    )
                )
            elif not isinstance(value, FunctionType) or value.__module__ == function.__module__:
                self._reach(value, seen, depth + 1)
        for value in function.__defaults__ or ():
            self._reach(value, seen, depth + 1)

    def _container(self, thing: Any, seen: set[int], depth: int) -> None:
        if isinstance(thing, dict):
            saved = dict(thing)
            iterators = {k: c for k, v in saved.items() if (c := _copied_iterator(v)) is not None}

            def back() -> None:
                now = {**saved, **{k: copy.copy(c) for k, c in iterators.items()}}
                if list(thing) != list(now) or any(thing[k] is not now[k] for k in now):
                    thing.clear()
                    thing.update(now)

            self.undo.append(back)
            values = list(saved.values())
        else:
            items = list(thing)

            def back_items() -> None:
                if len(thing) != len(items) or any(a is not b for a, b in zip(thing, items, strict=False)):
                    thing.clear()
                    (thing.update if isinstance(thing, set) else thing.extend)(items)

            self.undo.append(back_items)
            values = items
        if len(values) > 64 and all(_immutable(v) for v in values[:64]):  # a corpus, not a state
            return
        for value in values:
            self._reach(value, seen, depth + 1)

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for action in reversed(self.undo):
                action()


def _ignore(_: Any) -> None:
    """What a setter returns is of no interest."""


def _users(thing: Any) -> bool:
    """Whether an object's attributes may be a loop's own state: not those of a library's machinery."""
    return type(thing).__module__.split(".")[0] not in ("torch", "transformers", "tokenizers", "numpy", "logging")


def _is_stateful(thing: Any) -> bool:
    return (
        not isinstance(thing, type)
        and callable(getattr(type(thing), "state_dict", None))
        and callable(getattr(type(thing), "load_state_dict", None))
    )


def _immutable(value: Any) -> bool:
    plain = (int, float, complex, str, bytes, bool, frozenset, range, torch.dtype, torch.device)
    return value is None or isinstance(value, plain)


def _copied_iterator(value: Any) -> Any:
    """A copy of an iterator over a list, a range, zip, cycle …; None of anything else."""
    kind = type(value)  # which, unlike an object with a __getattr__ of its own, can be asked for any name
    if hasattr(kind, "__next__") and not hasattr(kind, "gi_frame") and not hasattr(kind, "read"):
        try:
            return copy.copy(value)
        except Exception:  # files, sockets, data loaders' workers: they cannot be copied
            return None
    return None


def _numpy_generator(thing: Any, undo: list[Callable[[], None]]) -> None:
    if hasattr(thing, "bit_generator"):
        state = copy.deepcopy(thing.bit_generator.state)
        undo.append(lambda: setattr(thing.bit_generator, "state", state))
    elif hasattr(thing, "get_state"):
        state = thing.get_state()
        undo.append(lambda: thing.set_state(state))


def _optimizer_kept(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Gives what puts an optimizer's groups and moments back, in their own precision (loading a state casts it)."""
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    held = {
        p: {k: (v, v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v)) for k, v in state.items()}
        for p, state in optimizer.state.items()
    }

    def back() -> None:
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, values in groups:
            group.clear()
            group.update(values)
        for p in [p for p in optimizer.state if p not in held]:
            del optimizer.state[p]
        for p, state in held.items():
            optimizer.state[p] = {k: saved if not isinstance(v, torch.Tensor) else v for k, (v, saved) in state.items()}
            for v, saved in state.values():
                if isinstance(v, torch.Tensor) and not torch.equal(v, saved):
                    v.copy_(saved)

    return back


def _modules(setup: RLHFSetup) -> list[torch.nn.Module]:
    found = [m for m in map(setup.model, setup.present) if isinstance(m, torch.nn.Module)]
    return list({id(m): m for m in found}.values())


def live_optimizers() -> list[Any]:
    """Every torch optimizer alive in this process."""
    kinds: list[type] = [torch.optim.Optimizer]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [o for o in gc.get_referrers(*kinds) if isinstance(o, torch.optim.Optimizer)]


def _steps_any(optimizer: Any, owned: set[int]) -> bool:
    return any(id(p) in owned for group in optimizer.param_groups for p in group["params"])


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, autocast regions compute in the precision of the weights."""
    enter = torch.autocast.__enter__

    def entered(self: torch.autocast) -> Any:
        found = enter(self)  # type: ignore[no-untyped-call]
        torch.set_autocast_enabled(self.device, False)
        return found

    torch.autocast.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def run_kept(snapshot: Snapshot) -> Iterator[None]:
    """Run a step inside: everything is as it was afterwards, and the snapshot may be used again."""
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        if snapshot.exact:
            stack.enter_context(without_autocast())
        for module in snapshot.modules:
            stack.enter_context(module_kept(module))
        try:
            yield
        finally:
            snapshot.restore()

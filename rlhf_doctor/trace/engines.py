"""Samplers that are not the setup's policy itself: copies of it that a loop keeps, or makes within a step."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_doctor.finding import MODEL_ROLES
from rlhf_doctor.trace.keep import run_kept
from rlhf_doctor.trace.runs import Run, Stepper, _set_generators
from rlhf_doctor.trace.taps import Enough, Recorder

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["unlisted_modules", "watched_run"]

MOST = 5_000  # objects that are looked into


class Watcher(Recorder):
    """A recorder that takes weights of the policy's own shapes, which no role owns, for a copy of the policy."""

    def __init__(self, setup: RLHFSetup, *, temperatures: Sequence[float], **options: Any) -> None:
        super().__init__(setup, temperatures=temperatures, **options)
        self._shapes = {
            id(table): {tuple(w.shape) for w in self._kept if id(w) in table and "policy" in table[id(w)]}
            for table in (self._tokens, self._heads)
        }

    def _owned(self, table: Mapping[int, set[Any]], values: Sequence[Any]) -> set[Any] | None:
        found = super()._owned(table, values)
        if found is not None or id(table) not in self._shapes:
            return found
        for value in values:
            if not isinstance(value, Tensor):
                continue
            weight = value if isinstance(value, torch.nn.Parameter) else value._base
            if (
                isinstance(weight, torch.nn.Parameter)
                and tuple(weight.shape) in self._shapes[id(table)]
                and id(weight) not in self._owners
            ):
                return {"policy"}
        return None


def watched_run(
    setup: RLHFSetup, temperatures: Sequence[float], *, times: int = 2, hold: bool = False, seed: int | None = None
) -> Run:
    """Run the step with copies of the policy watched too, and put everything back.

    Args:
        setup: its step is run.
        temperatures: at which log-probabilities are wanted, the declared one first.
        times: how often in a row.
        hold: leave out optimizers' steps and stop before the first of them.
        seed: of other random numbers than those of the examination; None: the same.
    """
    stepper = Stepper(setup, temperatures)
    recorder = Watcher(
        setup,
        temperatures=temperatures,
        hold=hold,
        last_window=1 if hold else None,
        known_optimizers=stepper.snapshot.optimizers,
    )
    boundaries: list[int] = []
    stopped, error = False, ""
    with run_kept(stepper.snapshot), _kept(unlisted_modules(setup)):
        if seed is None:
            _set_generators(stepper.generators)
        else:
            _seeded(seed)
        try:
            with recorder.watching(), torch.enable_grad():
                for _ in range(times):
                    setup.step()  # type: ignore[misc]  # whoever asks has seen that there is one
                    boundaries.append(recorder.order)
        except Enough:
            stopped = True
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return Run(recorder.calls, recorder.texts, recorder.steps, stopped, 0.0, {}, boundaries, None, error)


def _seeded(seed: int) -> None:
    import random
    import sys

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def unlisted_modules(setup: RLHFSetup) -> list[torch.nn.Module]:
    """Modules that the step can reach and that are none of the setup's models, nor a part of one."""
    listed = {
        id(inner)
        for role in MODEL_ROLES
        if isinstance(model := setup.model(role), torch.nn.Module)
        for inner in model.modules()
    }
    found: list[torch.nn.Module] = []
    seen, queue = {id(setup)}, deque([setup.step])
    while queue and len(seen) < MOST:
        thing = queue.popleft()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, Tensor, str, bytes, int, float)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            if id(thing) not in listed:
                found.append(thing)
                seen |= {id(inner) for inner in thing.modules()}
            continue
        queue.extend(_held(thing))
    return found


def _held(thing: Any) -> list[Any]:
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, FunctionType):
        names = set(thing.__code__.co_names) & set(thing.__globals__)
        cells = [c.cell_contents for c in thing.__closure__ or () if _filled(c)]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__globals__[name] for name in names)]
    if isinstance(thing, (list, tuple, set, deque)):
        return list(thing)[:64]
    if isinstance(thing, dict):
        return list(thing.values())[:256]
    if type(thing).__module__.split(".")[0] in ("torch", "transformers", "tokenizers", "numpy", "logging"):
        return []
    return [vars(thing)] if hasattr(thing, "__dict__") else [x for x in gc.get_referents(thing) if not callable(x)]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where nothing is in it yet
    except ValueError:
        return False
    return True


@contextmanager
def _kept(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Parameters, buffers and modes of modules as they were."""
    undo: list[Callable[[], Any]] = []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            saved = tensor.detach().clone()
            undo.append(lambda tensor=tensor, saved=saved: tensor.data.copy_(saved))  # type: ignore[misc]
        for inner in module.modules():
            undo.append(lambda inner=inner, mode=inner.training: setattr(inner, "training", mode))  # type: ignore[misc]
    try:
        yield
    finally:
        with torch.no_grad():
            for action in undo:
                action()

"""Listeners outside of the models: at optimizers, at reward functions, and what is put in the place of an output."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlhf_doctor.trace.taps import Recorder

__all__ = ["as_scores", "eager", "function_tapped", "like", "optimizers_tapped", "replaced"]


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """The output with one tensor in it exchanged."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        for key, value in output.items():
            if value is old:
                output[key] = new  # type: ignore[index]  # a dict or a ModelOutput
                return output
    if isinstance(output, tuple):
        made = [replaced(value, old, new) for value in output]
        return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
    if isinstance(output, list):
        return [replaced(value, old, new) for value in output]
    for key, value in getattr(output, "__dict__", {}).items():
        if value is old:
            with contextlib.suppress(AttributeError):
                setattr(output, key, new)
    return output


def as_scores(returned: Any) -> Tensor | None:
    """The scores (B,) that a reward function returned, None where they are none."""
    if isinstance(returned, Tensor):
        return returned.detach().reshape(-1).double().cpu() if returned.dim() <= 2 else None
    with contextlib.suppress(TypeError, ValueError):
        return torch.tensor([float(x) for x in returned], dtype=torch.float64)
    return None


def like(returned: Any, scores: Tensor) -> Any:
    """Scores (B,) in the form in which a reward function returned its own."""
    if isinstance(returned, Tensor):
        return scores.to(returned.dtype).to(returned.device).reshape(returned.shape)
    if hasattr(returned, "__array__"):
        return scores.numpy().astype(returned.dtype).reshape(returned.shape)
    kind = type(returned)
    values = scores.tolist()
    if returned and isinstance(returned[0], Tensor):
        values = [s.to(r.dtype).reshape(r.shape) for s, r in zip(scores, returned, strict=True)]
    return kind(values) if kind in (list, tuple) else values


class _Standin:
    """An object in another's place: it is called otherwise, and is the other in everything else."""

    def __init__(self, other: Any, call: Callable[..., Any]) -> None:
        vars(self).update(_other=other, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._other, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._other)


@contextmanager
def function_tapped(recorder: Recorder, function: Any) -> Iterator[None]:
    """Put a listener wherever the program keeps this function: module attributes, instances, closures."""

    @functools.wraps(function, updated=())
    def heard(*args: Any, **kwargs: Any) -> Any:
        return recorder.texts_scored((*args, *kwargs.values()), function(*args, **kwargs))

    listened = heard if callable(getattr(function, "__get__", None)) else _Standin(function, heard)
    setup_fields = vars(recorder.setup)
    undo: list[Callable[[], None]] = []
    if hasattr(function, "__self__") and hasattr(function, "__name__"):
        holder, name = function.__self__, function.__name__
        with contextlib.suppress(AttributeError, TypeError):
            had = name in vars(holder)
            before = vars(holder).get(name)
            setattr(holder, name, listened)
            undo.append(lambda: setattr(holder, name, before) if had else delattr(holder, name))
    for place in gc.get_referrers(function):
        if place is setup_fields or place is vars(heard) or place is vars(listened):
            continue
        if isinstance(place, dict):
            for key in [k for k, v in place.items() if v is function]:
                place[key] = listened
                undo.append(lambda place=place, key=key: place.__setitem__(key, function))  # type: ignore[misc]
        elif (
            type(place).__name__ == "cell"
            and place.cell_contents is function
            and all(
                place is not own for own in getattr(heard, "__closure__", None) or ()
            )  # cells are equal where their contents are
        ):
            place.cell_contents = listened
            undo.append(lambda place=place: setattr(place, "cell_contents", function))  # type: ignore[misc]
        elif isinstance(place, list):
            for i in [i for i, v in enumerate(place) if v is function]:
                place[i] = listened
                undo.append(lambda place=place, i=i: place.__setitem__(i, function))  # type: ignore[misc]
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


@contextmanager
def eager() -> Iterator[None]:
    """Compiled models run as they are written, so that their parts can be seen."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        yield
        return
    with stance("force_eager"):
        yield


@contextmanager
def optimizers_tapped(recorder: Recorder) -> Iterator[None]:
    """See every step of torch's optimizers; where steps are held, the call returns without one."""
    from torch.optim.optimizer import (
        Optimizer,
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    if not recorder.hold:

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            recorder.stepped(optimizer)

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            recorder.note_weights(recorder.steps[-1][2], after=True)

        handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return
    patched: list[tuple[type, Any]] = []

    def held(optimizer: Any, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        loss = closure() if callable(closure) else None
        recorder.stepped(optimizer)
        return loss

    held.hooked = True  # type: ignore[attr-defined]  # so that torch wraps it no further
    kinds: list[type] = [Optimizer]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "step" in vars(kind):
            patched.append((kind, vars(kind)["step"]))
            type.__setattr__(kind, "step", held)
    own: list[tuple[Any, Any]] = []
    optimizer: Any
    for optimizer in recorder.known_optimizers:  # learning-rate schedules wrap the step of the instance
        if "step" in vars(optimizer):
            own.append((optimizer, vars(optimizer)["step"]))
            optimizer.step = functools.partial(held, optimizer)
            optimizer.step._wrapped_by_lr_sched = True  # or the schedule warns that it was taken out
    try:
        yield
    finally:
        for kind, step in patched:
            type.__setattr__(kind, "step", step)
        for optimizer, step in own:
            optimizer.step = step

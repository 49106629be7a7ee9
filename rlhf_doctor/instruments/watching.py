"""Learn how a loop calls its models: one step is begun, its first call of a model copied, and everything put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.keep import Snapshot, run_kept

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["learn_call"]


class _Seen(BaseException):
    """Ends a step as soon as the call is known; no ``except Exception`` of the loop catches it."""


def learn_call(setup: RLHFSetup, module: torch.nn.Module) -> tuple[Callable[..., Any], str]:
    """How the setup's own step calls a module: (ids, mask) -> output, and the call in words.

    Integer (B, T) arguments become the ids (the first), the mask (only zeros and ones) and positions counted from the
    mask (anything else); what is no tensor is passed on as the loop passed it.

    Raises:
        Unavailable: there is no step, it never calls the module, or with arguments that cannot be rebuilt.
    """
    if setup.step is None:
        raise Unavailable("needs calls[...] in the setup, or a step to learn the call from")
    caught: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def hook(called: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if any(_is_ids(a) for a in (*args, *kwargs.values())):
            caught.append((args, dict(kwargs)))
            raise _Seen

    with run_kept(Snapshot(setup)), torch.enable_grad():
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            setup.step()
        except _Seen:
            pass
        except Exception as error:
            raise Unavailable(f"the step raised before it called the model: {type(error).__name__}: {error}") from error
        finally:
            handle.remove()
    if not caught:
        raise Unavailable("the step never calls the model with token ids")
    args, kwargs = caught[0]
    slots = [_slot(a) for a in (*args, *kwargs.values())]
    first = slots.index("ids") if "ids" in slots else slots.index("positions")
    slots = ["ids" if i == first else "positions" if s == "ids" else s for i, s in enumerate(slots)]
    if "unknown" in slots:
        raise Unavailable("the step calls the model with tensors that cannot be rebuilt for other inputs")
    names = [f"argument {i}" for i in range(len(args))] + list(kwargs)

    def call(ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
        made = [_fill(slot, a, ids, mask) for slot, a in zip(slots, (*args, *kwargs.values()), strict=True)]
        return module(*made[: len(args)], **dict(zip(kwargs, made[len(args) :], strict=True)), **more)

    words = ", ".join(f"{n}: {s}" for n, s in zip(names, slots, strict=True) if s != "as is")
    return call, f"as its step does ({words})"


def _is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and value.dim() == 2


def _slot(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "as is"
    if value.dim() == 2 and bool(((value == 0) | (value == 1)).all()):
        return "mask"
    return "ids" if _is_ids(value) else "unknown"


def _fill(slot: str, value: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    if slot == "ids":
        return ids
    if slot == "positions":
        return (mask.cumsum(-1) - 1).clamp(min=0)
    return mask.to(value.dtype) if slot == "mask" else value

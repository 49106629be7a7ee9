"""Which trainable parameters a role's output depends on, and which of them an optimizer holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact, role_fact
from rlhf_doctor.finding import MODEL_ROLES, Role, Stage
from rlhf_doctor.instruments.readings import Inputs

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["ADAPTER_PARTS", "Held", "Reach", "held", "is_adapter", "reach"]

LEAVES = (type(None), str, bytes, int, float, FunctionType)
ADAPTER_PARTS = ("lora_", "adapter", "ia3_", "vera_", "hada_", "lokr_", "oft_", "boft_", "prompt_encoder", "randlora_")


@dataclass(frozen=True)
class Reach:
    """``names``: the trainable parameters that the output depends on, as the autograd graph shows.

    ``complete`` is False where a part of the graph is hidden (a checkpointed segment, an output without a graph): then
    a parameter that is not in ``names`` may still matter.
    """

    names: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class Held:
    """What the optimizers hold. ``names``: role -> its parameters in an optimizer, frozen ones included.

    ``ids``: role -> name -> identity, for parameters that two roles share. ``copies``: role -> the share of its
    trainable scalars for which an optimizer holds a tensor of the same shape and dtype that belongs to no role.
    ``undecidable``: why a parameter that is in no optimizer may be trained all the same, empty where it cannot.
    """

    names: Mapping[Role, frozenset[str]]
    ids: Mapping[Role, Mapping[str, int]]
    copies: Mapping[Role, float]
    undecidable: str


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a parameter-efficient adapter."""
    return any(part in name for part in ADAPTER_PARTS)


@role_fact(Stage.PROBE)
def reach(role: Role, models: Models, inputs: Inputs) -> Reach:
    """Walk the autograd graph of one forward pass of one sequence; nothing is differentiated.

    Raises:
        Unavailable: the role is a function, or was loaded from a path, whose loop's settings are not in the files.
        Broken: the model cannot be called.
    """
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap

    live = models.get(role)
    named = {id(p): name for name, p in live.module.named_parameters() if p.requires_grad}
    if live.loaded_here:
        raise Unavailable(f"needs the {role} in memory: a checkpoint does not say what will be trained")
    ids = torch.tensor([list(inputs.sequences[-1])], device=live.device)
    with live.kept(), torch.enable_grad():
        root = live.read(ids, torch.ones_like(ids)).tensor.grad_fn
        if root is None:
            # Nothing that trains acts on it, or the forward pass records nothing at all: the embedding tells which.
            with EmbeddingTap(ids):
                recorded = live.read(ids, torch.ones_like(ids)).tensor.requires_grad
            return Reach((), recorded)
    seen: set[Any] = set()
    queue = [root]
    found: list[str] = []
    hidden = False
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in named:
            found.append(named[id(variable)])
        hidden = hidden or "Checkpoint" in node.name()
        queue += [child for child, _ in node.next_functions if child is not None]
    return Reach(tuple(sorted(found)), not hidden)


@fact(Stage.PROBE)
def held(setup: Any) -> Held:
    """What the setup's optimizers, and the objects in its state, hold of the models in memory.

    Raises:
        Unavailable: no optimizers are given.
    """
    optimizers = [*setup.optimizers, *(thing for thing in setup.state if hasattr(thing, "param_groups"))]
    in_optimizers = [p for optimizer in optimizers for p in _groups(optimizer)]
    if not in_optimizers:
        raise Unavailable("needs the optimizers")
    in_state = [t for thing in setup.state if not hasattr(thing, "param_groups") for t in _tensors(thing)]
    taken = {id(p) for p in (*in_optimizers, *in_state)}
    ids = {role: _parameters(setup.model(role)) for role in MODEL_ROLES}
    owned = {i for names in ids.values() for i in names.values()}
    strangers = [p for p in in_optimizers if id(p) not in owned]
    return Held(
        names={role: frozenset(n for n, i in names.items() if i in taken) for role, names in ids.items()},
        ids=ids,
        copies={role: _copied(setup.model(role), strangers) for role in MODEL_ROLES},
        undecidable=_undecidable(setup, strangers, [t for t in in_state if id(t) not in owned]),
    )


def _groups(optimizer: Any) -> list[Any]:
    groups = getattr(optimizer, "param_groups", None) or []
    return [p for group in groups if isinstance(group, dict) for p in group.get("params", ())]


def _parameters(model: Any) -> dict[str, int]:
    named = getattr(model, "named_parameters", None)
    return {name: id(p) for name, p in named()} if callable(named) else {}


def _copied(model: Any, strangers: list[Any]) -> float:
    named = getattr(model, "named_parameters", None)
    mine = [p for _, p in named() if p.requires_grad] if callable(named) else []
    free = Counter((tuple(s.shape), s.dtype) for s in strangers)
    matched = 0
    for p in mine:
        if free[tuple(p.shape), p.dtype] > 0:
            free[tuple(p.shape), p.dtype] -= 1
            matched += p.numel()
    return float(matched / max(sum(p.numel() for p in mine), 1))


def _undecidable(setup: Any, strangers: list[Any], unknown: list[Any]) -> str:
    """Master copies of half-precision weights and flattened shards belong to no role and train one all the same."""
    if unknown:
        return "state holds tensors of a hand-written optimizer"
    models = [setup.model(role) for role in MODEL_ROLES if hasattr(setup.model(role), "parameters")]
    half = {tuple(p.shape) for m in models for p in m.parameters() if p.element_size() == 2}
    if any(tuple(s.shape) in half and s.element_size() == 4 for s in strangers):
        return "an optimizer holds float32 copies of half-precision weights"
    biggest = max((p.numel() for m in models for p in m.parameters()), default=0)
    if any(s.dim() == 1 and s.numel() > biggest for s in strangers):
        return "an optimizer holds flattened parameters"
    return ""


def _tensors(thing: Any, depth: int = 3) -> Iterator[Any]:
    """Floating-point tensors of more than one number in an object's attributes, lists and dicts; not in modules."""
    if hasattr(thing, "is_floating_point") and hasattr(thing, "numel"):
        if thing.is_floating_point() and thing.numel() > 1:
            yield thing
        return
    if depth == 0 or hasattr(thing, "forward") or isinstance(thing, LEAVES):
        return
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from _tensors(part, depth - 1)

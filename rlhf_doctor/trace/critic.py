"""What a step did with the critic: which parameters are its own, where it was trained, what its target followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_doctor.trace.recover import return_response

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiments
    from rlhf_doctor.trace.places import Placed
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = [
    "Part",
    "Span",
    "heads",
    "own_parameters",
    "own_values",
    "part_in_training",
    "past_the_end",
    "raw_response",
    "steady",
    "trained_spans",
    "unrewarded_end",
]

LEAST = -0.1  # of a unit: rounding leaves 0.001, and whitened advantages have a deviation below 10
UNMOVED = 1e-4  # of what the same score does within the response

Part = Literal["not called", "called without gradient", "no gradient came back", "gradient is zero", "trained"]


def own_parameters(setup: Any) -> dict[str, Any]:
    """The critic's parameters by name that are not the policy's as well; of one module for both, its scalar heads."""
    parameters = _parameters(setup.value)
    if setup.value is setup.policy:
        return {name: parameters[name] for name in heads(parameters)}
    shared = {id(p) for p in _parameters(setup.policy).values()}
    return {name: p for name, p in parameters.items() if id(p) not in shared}


def heads(parameters: Mapping[str, Any]) -> list[str]:
    """Names of the matrices with one output: the critic's last layer. An adapter of rank 1 is none."""
    return [n for n, p in parameters.items() if p.dim() == 2 and p.shape[0] == 1 and "lora_" not in n]


def _parameters(model: Any) -> dict[str, Any]:
    named = getattr(model, "named_parameters", None)
    return dict(named()) if callable(named) else {}


def part_in_training(calls: Any) -> Part:
    """How far the critic's outputs took part in a step's backward passes, from the calls of a run."""
    ours = [c for c in calls if c.role == "value"]
    if not ours:
        return "not called"
    back = [c for c in ours if c.backwards and "scalar" in c.gradient]
    if any(bool((c.gradient["scalar"] != 0).any()) for c in back):
        return "trained"
    if back:
        return "gradient is zero"
    return "no gradient came back" if any(c.with_grad for c in ours) else "called without gradient"


@dataclass(frozen=True)
class Span:
    """Where one sample's values were trained: the first and the last state, and the response's length."""

    first: int
    last: int
    length: int


def _gradients(table: Table) -> Iterator[tuple[Placed, Floats]]:
    """The critic's passes with their gradients (N,); of a loop that updates by hand, those at the first weights."""
    weights = None
    for placed in table.placed:
        call = placed.call
        if call.role != "value" or "scalar" not in call.gradient:
            continue
        weights = call.weights if weights is None else weights
        if call.weights is not None and weights is not None and not bool((call.weights == weights).all()):
            return  # from here on a clip may have cut gradients to 0
        yield placed, call.gradient["scalar"].double().cpu().numpy()


def trained_spans(table: Table) -> list[Span]:
    """Of every sample with a gradient; state t precedes token t, and the prompt's states are below 0."""
    trained: dict[int, list[int]] = {}
    for placed, gradient in _gradients(table):
        at = (gradient != 0) & (placed.sample >= 0)
        for sample, state in zip(placed.sample[at].tolist(), placed.state[at].tolist(), strict=True):
            trained.setdefault(sample, []).append(state)
    lengths = table.real.sum(1)
    return [Span(min(t), max(t), int(lengths[s])) for s, t in trained.items()]


def past_the_end(table: Table) -> Floats:
    """(S,) ∂L/∂V of the state after each response's last token, NaN where no gradient was seen there."""
    found = np.full(len(table.samples), np.nan)
    lengths = np.array([len(s.response) for s in table.samples] or [0])
    for placed, gradient in _gradients(table):
        at = (placed.sample >= 0) & (placed.state == lengths[np.maximum(placed.sample, 0)])
        for sample, size in zip(placed.sample[at].tolist(), gradient[at].tolist(), strict=True):
            if np.isnan(found[sample]):
                found[sample] = size
    return found


def unrewarded_end(experiments: Experiments) -> bool:
    """Whether the critic is trained in the state after the end although no score is part of its target there.

    Where a score is, as in TRL, which puts it there, a changed one moves that state's gradient like the others'.
    """
    base = experiments.base
    before = past_the_end(base)
    trained = np.isfinite(before) & (before != 0)
    if not trained.any() or "all scores" not in experiments.done:
        return False
    changed = experiments.done["all scores"]
    moved = np.abs(past_the_end(changed.table) - before)
    inside = np.abs(np.nan_to_num(raw_response(experiments, "all scores"))).max(1, initial=0.0)
    known = trained & changed.touched & np.isfinite(moved) & (inside > 0)
    return bool(known.any() and (moved[known] < UNMOVED * inside[known]).all())


def steady(experiments: Experiments) -> NDArray[np.bool_]:
    """(S, T): response tokens whose values were trained at the initial weights."""
    base = experiments.base
    return np.asarray(base.real & ((base["value_window"] == 0) | (not experiments.by_hand)))


def raw_response(experiments: Experiments, name: str) -> Floats:
    """How the critic's gradient moved at the response tokens in a changed run, (S, T), NaN elsewhere."""
    return np.where(steady(experiments), experiments.done[name].moved(experiments.base, "value_gradient"), np.nan)


def own_values(traced: Traced) -> float | None:
    """What a unit of the rollout's value takes off its own target, where it takes off some in every row.

    A return has none of it; an advantage the whole, over its deviation where advantages are whitened.
    """
    from rlhf_doctor.trace.gains import trusted

    changed, base = traced.experiments.done.get("rollout outputs"), traced.base
    if changed is None or not base.has("old_value"):
        return None
    pushed = changed.moved(base, "old_value")
    at = (changed.amounts != 0) & base.real & trusted(traced)[:, None] & np.isfinite(pushed) & (pushed != 0)
    own = (return_response(traced.recovered, traced.experiments, changed)[at] / pushed[at]).tolist()
    own = [x for x in own if x == x]
    return sum(own) / len(own) if len(own) > 1 and max(own) < LEAST else None

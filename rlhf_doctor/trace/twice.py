"""Two runs of a step from the same state, call by call up to the first update: what differs first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_doctor.finding import MODEL_ROLES, Role

if TYPE_CHECKING:
    from rlhf_doctor.trace.calls import Call, ScoredTexts
    from rlhf_doctor.trace.runs import Run

__all__ = ["Difference", "dropout_at_work", "dropout_rates", "first_difference", "has_dropout", "without_dropout"]

NOISY = 1e-5  # of a quantity's range
TOLERANCE = f"{NOISY:g} of the range"
Kind = Literal["prompts", "sampling", "outputs", "gradients"]


@dataclass(frozen=True)
class Difference:
    """The first call of a role that differs; ``nth`` counts that role's calls from 0."""

    kind: Kind
    said: str
    role: Role
    nth: int
    observed: str
    tolerance: str
    training: bool = False  # the mode that the model was in


def first_difference(first: Run, again: Run) -> Difference | None:
    """What differs first between two runs, up to the first update of either; gradients after everything else."""
    mine, theirs = _before_updates(first), _before_updates(again)
    late: Difference | None = None
    for a, b in zip(mine, theirs, strict=False):
        if a.role != b.role:
            said = f"the {a.role} model in one, the {b.role} model in the other"
            return Difference("outputs", "order of the models' calls", a.role, a.nth, said, "none", a.training)
        found = _tokens(a, b, _samples(mine)) or _outputs(a, b)
        if found is not None:
            return found
        late = late or _gradients(a, b)
    return _texts(first.texts, again.texts) or late


def _before_updates(run: Run) -> list[Call]:
    """Calls at the initial weights: those before any optimizer's step, and before a role's weights are seen to move."""
    end = min((order for order, _, _ in run.steps), default=float("inf"))
    start: dict[Role, Any] = {}
    kept = []
    for call in sorted(run.calls, key=lambda c: c.order):
        known = start.setdefault(call.role, call.weights)
        if call.order > end or (known is not None and call.weights is not None and bool((known != call.weights).any())):
            break
        kept.append(call)
    return kept


def _samples(calls: Sequence[Call]) -> bool:
    """Whether the policy's first calls grow by one token each: they sample."""
    ours = [c for c in calls if c.role == "policy"][:2]
    return len(ours) == 2 and ours[1].ids.shape[1] in (1, ours[0].ids.shape[1] + 1)


def _tokens(a: Call, b: Call, samples: bool) -> Difference | None:
    if a.ids.shape == b.ids.shape and bool((a.ids == b.ids).all()):
        return None
    begins = a.role == "policy" and a.nth == 0
    if a.ids.shape == b.ids.shape:
        observed = f"{int((a.ids != b.ids).any(1).sum())} of {len(a.ids)} rows of token ids differ"
    else:
        observed = f"token ids of shape {tuple(a.ids.shape)} and {tuple(b.ids.shape)}"
    if a.with_grad:
        kind, said = "gradients", "order of the samples in the update"
    elif begins:
        kind, said = "prompts", "prompts" if samples else "prompts or the tokens drawn"
    else:
        kind, said = "sampling", "tokens drawn"
    return Difference(kind, said, a.role, a.nth, observed, "none: tokens are exact", a.training)  # type: ignore[arg-type]


def _numbers(tensor: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(tensor.detach().double().cpu().numpy())


def _apart(a: Any, b: Any) -> float:
    """The largest difference over the range; infinite where shapes differ."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    x, y = _numbers(a), _numbers(b)
    if x.shape != y.shape:
        return float("inf")
    both = np.isfinite(x) & np.isfinite(y)
    if (np.isfinite(x) != np.isfinite(y)).any():
        return float("inf")
    span = max(float(np.ptp(x[both])), float(np.abs(x[both]).max()), 1e-30) if both.any() else 1.0
    return float(np.abs(x - y)[both].max()) / span if both.any() else 0.0


def _outputs(a: Call, b: Call) -> Difference | None:
    worst = max(_apart(a.scalar, b.scalar), _apart(a.at_columns, b.at_columns), _apart(a.entropy, b.entropy))
    if worst <= NOISY:
        return None
    observed = f"{worst:.2g} of their range apart, on the same tokens"
    return Difference("outputs", f"outputs of the {a.role} model", a.role, a.nth, observed, TOLERANCE, a.training)


def _gradients(a: Call, b: Call) -> Difference | None:
    name = "scalar" if "scalar" in a.gradient else "at_action"
    if name not in a.gradient or name not in b.gradient:
        return None
    worst = _apart(a.gradient[name], b.gradient[name])
    if worst <= NOISY:
        return None
    said, observed = f"gradients at the {a.role} model's output", f"{worst:.2g} of their range apart"
    return Difference("gradients", said, a.role, a.nth, observed, TOLERANCE, a.training)


def _texts(a: Sequence[ScoredTexts], b: Sequence[ScoredTexts]) -> Difference | None:
    for nth, (x, y) in enumerate(zip(a, b, strict=False)):
        if (apart := _apart(x.scores, y.scores)) > NOISY:
            observed = f"{apart:.2g} of their range apart"
            return Difference("outputs", "scores of the reward function", "reward", nth, observed, TOLERANCE)
    return None


def dropout_at_work(setup: Any, found: Difference) -> bool:
    """Whether a model that can differ for it was in training mode with a dropout rate above 0."""
    roles = [found.role] if found.kind == "outputs" else list(MODEL_ROLES)
    modules = (m for role in roles for m in _modules(setup.model(role)))
    return any((found.training or getattr(m, "training", False)) and bool(_rates(m)) for m in modules)


def has_dropout(model: Any) -> bool:
    """Whether any module of a model has a dropout rate above 0, in whatever mode it is."""
    return bool(dropout_rates(model))


def dropout_rates(model: Any) -> list[float]:
    """The highest dropout rate of each module that has one above 0, as a module or as a setting of a layer."""
    return [max(rates.values()) for module in _modules(model) if (rates := _rates(module))]


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Inside, every dropout rate of a model is 0."""
    held = [(module, name, rate) for module in _modules(model) for name, rate in _rates(module).items()]
    for module, name, _ in held:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in held:
            setattr(module, name, rate)


def _rates(module: Any) -> dict[str, float]:
    """Name -> rate of the dropout that a module does itself."""
    return {
        name: rate
        for name, rate in vars(module).items()
        if isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0
        if "dropout" in name or (name == "p" and "dropout" in type(module).__name__.lower())
    }


def _modules(model: Any) -> list[Any]:
    listed = getattr(model, "modules", None)
    return list(listed()) if callable(listed) else []

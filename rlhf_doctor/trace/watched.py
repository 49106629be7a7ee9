"""What a step shows that is seen once and cannot be run again: the same table, and the targets found by regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.trace.interventions import Experiments, _first_update_alone, _require_policy, _second_step
from rlhf_doctor.trace.recover import EDGES, Edge, Recovered, _fits, _rewards, masked
from rlhf_doctor.trace.runs import Run
from rlhf_doctor.trace.table import Table, tabulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]

__all__ = ["ONCE", "Line", "targets", "watched"]

ONCE = "needs the step to be run again with one thing changed; a watched run is seen once"
BY_REGRESSION = "by regression"
EXACT = 2e-3  # of the range: float32 leaves 1e-5, another rule tenths
SURE = 1e-2  # of a coefficient: its standard error
FEWEST = 4  # numbers for every unknown
KINDS: Mapping[str, Callable[[Floats], Floats]] = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: np.expm1(-x) + x,
    "none": lambda x: 0.0 * x,
}


@dataclass(frozen=True)
class Line:
    """The critic's gradients explained: ``kappa`` per row (S,), the KL's weight, gamma and gamma · lambda."""

    kappa: Floats
    kind: str
    kl_coef: float
    gamma: float
    gamma_lam: float
    misfit: float
    count: int


def watched(setup: RLHFSetup, run: Run, temperature: float) -> Traced:
    """What a watched run tells; ``run.boundaries`` are the ends of its iterations, as far as they were seen.

    Raises:
        Broken: the policy was never called.
    """
    _require_policy(run)
    base = tabulate(run, setup, temperature)
    _first_update_alone(base)
    found = Experiments(base, run, None, None, None, reasons={"*": ONCE}, by_hand=True, runs=1)
    if len(run.boundaries) == 1 and run.calls and run.calls[-1].order > run.boundaries[0]:
        last = max([c.order for c in run.calls] + [order for order, _, _ in run.steps])
        run.boundaries.append(last)
    _second_step(found, run, setup, temperature)
    return Traced(found, _recovered(base, found.second, dict(setup.declared)), temperature, watched=True)


def _recovered(base: Table, second: Table | None, declared: dict[str, object]) -> Recovered:
    made = Recovered(base)
    line, reason = targets(base)
    if line is None:
        made.reasons["returns"] = reason
    else:
        inside = base.real & (base["value_window"] == 0) & np.isfinite(base["value_gradient"])
        made.kappa = np.where(inside, line.kappa[:, None], np.nan)
        made.returns = np.where(inside, base["value"] - base["value_gradient"] / line.kappa[:, None], np.nan)
        made.raw_advantages = made.returns - (base["old_value"] if base.has("old_value") else base["value"])
        made.gamma, made.gamma_lam = line.gamma, line.gamma_lam
        made.lam = line.gamma_lam / line.gamma if line.gamma else None
    _fits(made, base)
    _rewards(made, base, declared)
    made.edges = {name: Edge(name, None, ONCE) for name in EDGES}
    if line is not None:
        # At the start the policy is the reference: the KL shows in the second iteration alone.
        later = targets(second)[0] if second is not None else None
        if later is not None and abs(later.gamma_lam - line.gamma_lam) > SURE * abs(line.gamma_lam):
            later = None
        _edges(made, [(base, line), *([(second, later)] if second is not None and later is not None else [])])
    return made


# ---- the critic's targets ------------------------------------------------------------------------------------------


def targets(base: Table) -> tuple[Line | None, str]:
    """Kappa, gamma, lambda and the KL's weight from the first minibatch, or why they cannot be had.

    With the gradient g = κ (V − R), R the λ-return and β k the penalty, the tokens t before the last obey
    V_t = g_t / κ − β k_t + γ V_{t+1} − γλ g_{t+1} / κ at the initial weights: four unknowns, linear.
    https://arxiv.org/abs/1506.02438
    """
    if not base.has("value_gradient"):
        return None, "no critic was trained"
    _, value, gradient = _first(base)
    if not np.isfinite(gradient).any():
        return None, "no critic was trained"
    if base.has("old_value"):
        apart = np.abs(value - base["old_value"])
        if not np.isfinite(apart).any() or np.nanmax(apart) > EXACT * max(_range(value), 1e-12):
            return None, "the values of the rollout are not those of the first minibatch, so no target can be read off"
    lengths = np.maximum(base.real.sum(1), 1).astype(np.float64)
    ratio = base["old_logp"] - base["ref_logp"]
    best: Line | None = None
    for scale in (np.ones(len(lengths)), 1 / lengths):
        for kind, of in KINDS.items():
            line = _line(value, gradient / scale[:, None], of(ratio) if kind != "none" else 0 * value, kind, scale)
            if line is not None and (best is None or line.misfit < 0.5 * best.misfit):
                best = line
    if best is None:
        return None, "the critic's gradients in the first minibatch fit no discounted sum of rewards"
    return best, ""


def _first(base: Table) -> tuple[Any, Floats, Floats]:
    """(which, values, their gradients) of the tokens in the table's first minibatch."""
    window = base["value_window"]
    first = base.real & (window == np.nanmin(window, initial=np.inf))
    return first, np.where(first, base["value"], np.nan), np.where(first, base["value_gradient"], np.nan)


def _line(value: Floats, gradient: Floats, penalty: Floats, kind: str, scale: Floats) -> Line | None:
    columns = [gradient[:, :-1], value[:, 1:], gradient[:, 1:], penalty[:, :-1]][: 3 if kind == "none" else 4]
    wanted = value[:, :-1]
    known = np.isfinite(wanted) & np.all([np.isfinite(c) for c in columns], axis=0)
    known &= (gradient[:, :-1] != 0) & (gradient[:, 1:] != 0)  # a clip of the values lets nothing through
    count = int(known.sum())
    if count < FEWEST * len(columns):
        return None
    x, y = np.stack([c[known] for c in columns], 1), wanted[known]
    size = np.abs(x).max(0)
    if (size == 0).any():
        return None
    found, _, rank, _ = np.linalg.lstsq(x / size, y, rcond=None)
    left = x / size @ found - y
    misfit = float(np.abs(left).max()) / max(_range(y), 1e-12)
    if rank < len(columns) or misfit > EXACT:
        return None
    spread = np.sqrt((left**2).sum() / (count - len(columns)) * np.diag(np.linalg.inv((x / size).T @ (x / size))))
    if spread[0] > SURE * abs(found[0]) or spread[1] > SURE * abs(found[1]) or found[0] == 0:
        return None
    if kind != "none" and spread[3] > SURE * abs(found[3]):  # the policy still is the reference: rounding alone
        return None
    inverse, gamma, carried = (found / size)[:3]
    kl = -float((found / size)[3]) if kind != "none" else 0.0
    return Line(scale / inverse, kind, kl, float(gamma), float(-carried / inverse), misfit, count)


def _range(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(np.ptp(known)) if len(known) else 0.0


# ---- who influences whom ---------------------------------------------------------------------------------------------


def _edges(made: Recovered, seen: Sequence[tuple[Table, Line]]) -> None:
    line = next((line for _, line in seen if line.kind != "none"), seen[0][1])
    if line.kind != "none":
        made.edges[EDGES[3]] = Edge(EDGES[3], line.kl_coef, BY_REGRESSION)
    scores = np.concatenate([base.scores for base, _ in seen])
    ended = np.concatenate([np.array([s.ended for s in base.samples], dtype=bool) for base, _ in seen])
    last, after = (
        np.concatenate(parts) for parts in zip(*[_last(base, each, line) for base, each in seen], strict=True)
    )
    gain = None
    for chosen in (np.ones(len(ended), dtype=bool), ended):
        for bootstrap in (0.0, (line.gamma - line.gamma_lam) * after):  # the score in the last slot, or in the next
            gain = gain if gain is not None else _slope(scores, np.where(chosen, last - bootstrap, np.nan))
    if gain is not None:
        made.edges[EDGES[0]] = Edge(EDGES[0], gain, BY_REGRESSION)
    advantage = _baseline(made, seen[0][0])
    if advantage is not None:
        made.edges[EDGES[2]] = Edge(EDGES[2], advantage, BY_REGRESSION)
        if gain is not None:
            made.edges[EDGES[1]] = Edge(EDGES[1], gain, BY_REGRESSION)


def _last(base: Table, own: Line, line: Line) -> tuple[Floats, Floats]:
    """(target at the last token without the penalty there, value of the state after it), both (S,)."""
    rows, last = np.arange(len(base.samples)), np.maximum(base.real.sum(1) - 1, 0)
    first, _, _ = _first(base)
    found = np.where(first, base["value"] - base["value_gradient"] / own.kappa[:, None], np.nan)[rows, last]
    if line.kind != "none":
        found = found + line.kl_coef * KINDS[line.kind](base["old_logp"] - base["ref_logp"])[rows, last]
    return found, base["value_after"][:, 0]


def _slope(x: Floats, y: Floats) -> float | None:
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < FEWEST or _range(x[known]) <= 0 or _range(y[known]) <= 0:
        return None
    slope, intercept = np.polyfit(x[known], y[known], 1)
    misfit = np.abs(slope * x[known] + intercept - y[known]).max()
    return float(slope) if misfit < EXACT * _range(y[known]) else None


def _baseline(made: Recovered, base: Table) -> float | None:
    """What a unit of a value takes off the advantage at its own token, in units of the returns."""
    weight = masked(base, base["weight"]) / made.row_scale[:, None]
    old = base["old_value"] if base.has("old_value") else base["value"]
    known = np.isfinite(weight) & np.isfinite(made.returns) & np.isfinite(old) & (base["window"] == 0)
    if known.sum() < FEWEST * 3:
        return None
    x = np.stack([made.returns[known], old[known], np.ones(int(known.sum()))], 1)
    found, _, rank, _ = np.linalg.lstsq(x, weight[known], rcond=None)
    misfit = np.abs(x @ found - weight[known]).max()
    if rank < 3 or misfit > EXACT * _range(weight[known]) or found[0] == 0:
        return None
    return float(found[1] / found[0])

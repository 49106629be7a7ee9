"""Whose scores, values, advantages and masks a sample is trained with: its own, or another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.interventions import Experiment, Experiments
from rlhf_doctor.trace.recover import Recovered
from rlhf_doctor.trace.spans import Spans, spans
from rlhf_doctor.trace.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Moved", "Slots", "masks_of_others", "score_moves", "slots_off", "value_moves"]

FAINT = 1e-3  # of the largest movement: what a shared mean or deviation and rounding leave
LOSSES: tuple[Role, ...] = ("policy", "value")
MISFIT = 0.05  # of the range of the weights: another account must fit this well
BETTER = 8.0  # times


@dataclass(frozen=True)
class Moved:
    """Samples whose own number was changed, and those that moved although they should not have; of which target."""

    target: str  # "critic's target" or "policy's weights"
    touched: tuple[int, ...]
    moved: tuple[int, ...]
    own: float  # largest movement within the touched samples
    other: float  # and outside of them


def score_moves(found: Experiments, recovered: Recovered) -> Moved | None:
    """One sample's score was changed: who moved, where it is another sample and the one itself did not; else None."""
    experiment = found.done.get("one score")
    if experiment is None:
        return None
    for name, target in (("value_gradient", "critic's target"), ("weight", "policy's weights")):
        moves = _moves(found.base, experiment, name)
        seen = moves is not None and np.isfinite(moves[experiment.touched]).any()
        if moves is None or not seen:
            continue
        wrong = _elsewhere(moves, experiment.touched, target)
        if wrong is not None:
            return wrong
    return None


def value_moves(found: Experiments) -> Moved | None:
    """Rollout values of some samples were changed: the same of them."""
    experiment = found.done.get("rollout outputs")
    if experiment is None or not found.base.has("old_value"):
        return None
    moves = _moves(found.base, experiment, "value_gradient")
    return None if moves is None else _elsewhere(moves, experiment.touched, "critic's target")


def _moves(base: Table, experiment: Experiment, name: str) -> Floats | None:
    """(S, T) how far each token's number went from where the untouched ones say it should be, over the largest."""
    if not base.has(name) or not experiment.table.has(name):
        return None
    before, after = base[name], experiment.table[name]
    if before.shape != after.shape:
        return None
    known = np.isfinite(before) & np.isfinite(after) & base.real
    moves = np.where(known, after - before, np.nan)
    window = base["window" if name == "weight" else "value_window"]
    if name == "weight" and base.has("value_gradient"):  # a shared mean and deviation move all by one line: what is off the line moved by itself
        for w in np.unique(window[np.isfinite(window)]):
            inside = known & (window == w)
            moves[inside] = _off_line(before[inside], after[inside])
    top = float(np.nanmax(np.abs(moves))) if known.any() else 0.0
    span = float(np.ptp(before[known])) if known.any() else 0.0
    return np.abs(moves) / top if top > 1e-5 * max(span, 1e-12) else None


def _off_line(x: Floats, y: Floats) -> Floats:
    """Residuals of y from the line that most of the points lie on: least squares on the nearer ones, repeated."""
    keep = np.ones(len(x), dtype=bool)
    residual: Floats = y - x
    for _ in range(12):
        if keep.sum() < 4 or np.ptp(x[keep]) == 0:
            break
        slope, intercept = np.polyfit(x[keep], y[keep], 1)
        residual = y - (slope * x + intercept)
        keep = np.abs(residual) <= np.quantile(np.abs(residual), 0.6)
    return residual


def _elsewhere(moves: Floats, touched: Bools, target: str) -> Moved | None:
    sizes = np.where(np.isfinite(moves).any(1), np.nanmax(np.where(np.isfinite(moves), moves, -1.0), 1), np.nan)
    own = float(np.nanmax(sizes[touched], initial=0.0))
    others = np.where(touched, np.nan, sizes)
    other = float(np.nanmax(others, initial=0.0))
    if other < 0.5 or own > FAINT * other * 10:
        return None
    strayed = np.flatnonzero(np.nan_to_num(others) > 0.2 * other)
    return Moved(target, tuple(map(int, np.flatnonzero(touched))), tuple(map(int, strayed)), own, other)


def masks_of_others(table: Table) -> Spans | None:
    """The trained spans, where they are as long as the responses, but those of other samples; else None."""
    for role in LOSSES:
        seen = spans(table, role)
        counts, lengths = seen.counts[seen.rows], seen.lengths[seen.rows]
        if len(counts) < 3 or (counts == lengths).all() or (seen.before > 0).any():
            continue
        every = sorted(table.real.sum(1).tolist())
        spare = list(every)
        fits = all(_take(spare, c) for c in counts.tolist())
        wrong = int((counts != lengths).sum())
        if fits and wrong >= 2 and (counts > lengths).any() and (counts < lengths).any():
            return seen
    return None


def _take(spare: list[int], one: int) -> bool:
    if one in spare:
        spare.remove(one)
        return True
    return False


@dataclass(frozen=True)
class Slots:
    """The policy's weights fit the advantages ``offset`` tokens on, and not those of their own tokens."""

    offset: int
    misfit: float
    own: float
    tokens: int


def slots_off(base: Table, recovered: Recovered) -> Slots | None:
    """Whether the weights are the advantages of the token before or after."""
    weight, raw = base["weight"], recovered.raw_advantages
    if raw.shape != weight.shape or not np.isfinite(raw).any():
        return None
    window = base["window"] == 0
    lengths = np.maximum(base.real.sum(1), 1)[:, None].astype(np.float64)
    best: Slots | None = None
    for scale in (1.0, lengths):
        scaled = np.where(window & base.real, weight * scale, np.nan)
        own, count = _misfit(scaled, raw)
        for offset in (1, -1):
            other, shared = _misfit(scaled, _shifted(raw, offset))
            if count >= 6 and shared >= 6 and other < MISFIT and own > BETTER * other and own > 2 * MISFIT:
                better = best is None or other < best.misfit
                best = Slots(offset, other, own, shared) if better else best
    return best


def _shifted(values: Floats, offset: int) -> Floats:
    found = np.full(values.shape, np.nan)
    if offset > 0:
        found[:, :-offset] = values[:, offset:]
    else:
        found[:, -offset:] = values[:, :offset]
    return found


def _misfit(y: Floats, x: Floats) -> tuple[float, int]:
    """Root mean square distance from the best line over the range, and how many points."""
    both = np.isfinite(x) & np.isfinite(y) & (y != 0)
    if both.sum() < 4 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return np.inf, 0
    slope, intercept = np.polyfit(x[both], y[both], 1)
    residual = y[both] - (slope * x[both] + intercept)
    return float(np.sqrt(np.mean(residual**2)) / np.ptp(y[both])), int(both.sum())

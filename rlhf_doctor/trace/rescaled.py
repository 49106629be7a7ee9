"""Rewards that the batch's own mean and deviation scale: what a change does, as if these two had stayed.

With r = a u + c for every token of a batch, a change of some u moves a and c a little, and with them every reward. The
samples that were not touched show that line: their rewards in both runs, which generalized advantage estimation turned
round gives of the critic's targets G_t = r_t + γ(1−λ) V_(t+1) + γλ G_(t+1). https://arxiv.org/abs/1506.02438
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.trace.interventions import Experiment
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = ["Rates", "elsewhere", "rates_of_scaled", "rewards_of", "steadied", "values_ahead"]

MOVED = 1e-4  # of what was added: float32 leaves a tenth of it
ONE_LINE = 0.1  # of what moved: the line is some thousandths of the change, and float32 leaves a hundredth of that
FEW = 3  # tokens for each number that is fitted
SLACK = 1.05  # γ and γλ are at most 1, up to what rounding leaves of them


@dataclass(frozen=True)
class Rates:
    """γ and λ; ``later``: whether a score stands in the slot after a response's end, beside that slot's value."""

    gamma: float
    lam: float
    later: bool = False


def elsewhere(moved: Floats, experiment: Experiment) -> bool:
    """Whether targets ``moved`` (S, T) in samples that were not touched, or there is no such sample."""
    away = np.abs(moved[~experiment.touched])
    if not len(away):
        return True
    size = float(np.nan_to_num(np.abs(experiment.amounts)).max(initial=0.0))
    return bool((away[np.isfinite(away)] > MOVED * size).any())


def rates_of_scaled(base: Table, targets: Floats, moved: Floats, experiment: Experiment) -> Rates | None:
    """γ and λ off how the ``targets`` (S, T) of samples moved that were not touched; None where it is no such line.

    With a = 1 + s before and after, ΔG_t = γλ ΔG_(t+1) + s (G_t − γ(1−λ) V_(t+1) − γλ G_(t+1)) + c: least squares.
    """
    if not elsewhere(moved, experiment):
        return None
    ends, best = _ends(base, True)[0] > 0, None
    if ends.any() and not ends[~experiment.touched].any():
        return None  # whether a score stands after the end of a shorter response does not show
    for later in (False, True):
        ahead = [_next(base, moved), values_ahead(base, base, later), _next(base, targets)]
        x = np.stack([ahead[0], targets, *ahead[1:], np.ones(targets.shape), *_ends(base, later)], -1)
        still = base.real & ~experiment.touched[:, None] & np.isfinite(moved) & np.isfinite(x).all(-1)
        solved, misfit = _fitted(x[still], moved[still])
        if misfit > ONE_LINE or not solved[1] or (best is not None and misfit > 0.3 * best[0]):
            continue
        product = float(solved[0])
        gamma = product - float(solved[2] / solved[1])
        if 0 < gamma < SLACK and abs(product) < SLACK:
            best = misfit, Rates(gamma, product / gamma, later)
    return None if best is None else best[1]


def steadied(base: Table, targets: Floats, moved: Floats, experiment: Experiment, rates: Rates) -> Floats | None:
    """How the ``targets`` (S, T) would have ``moved`` at the line of the unchanged run; None where there is no line."""
    was, now = (values_ahead(base, table, rates.later) for table in (base, experiment.table))
    before, after = rewards_of(base, targets, was, rates), rewards_of(base, targets + moved, now, rates)
    known = np.isfinite(before) & np.isfinite(after)
    constant = np.ones(before.shape) + sum(rates.gamma * rates.lam * column for column in _ends(base, rates.later))
    shown = [(np.stack([before, constant], -1), known & ~experiment.touched[:, None])]
    if not shown[0][1].any() and experiment.amounts.ndim == 1:  # every score was changed, and shows at the last token
        last = base.real & (_next(base, np.ones(before.shape)) == 0)
        share = np.where(_ends(base, True)[0] > 0, rates.gamma * rates.lam, 1.0) if rates.later else 1.0
        ended = np.array([s.ended for s in base.samples], dtype=np.float64)
        scores = (experiment.amounts, experiment.amounts * ended)  # or at that of those that ended
        shown = [(np.stack([before, constant, np.where(last, share * x[:, None], 0.0)], -1), known) for x in scores]
    solved, misfit = min((_fitted(x[still], (after - before)[still]) for x, still in shown), key=lambda fit: fit[1])
    if misfit > ONE_LINE or solved[0] <= -1:
        return None
    grown = (after - float(solved[1]) * constant) / (1 + float(solved[0])) - before
    pushed = rates.gamma * (1 - rates.lam) * np.nan_to_num(now - was)
    made = grown + pushed
    for t in range(made.shape[1] - 1, -1, -1):
        if t + 1 < made.shape[1]:
            made[:, t] += np.where(base.real[:, t + 1], rates.gamma * rates.lam * made[:, t + 1], 0.0)
        made[:, t] = np.where(np.isfinite(made[:, t]), made[:, t], moved[:, t])  # where a clipped value hides a target
    return made


def _fitted(x: Floats, y: Floats) -> tuple[Floats, float]:
    """Least squares of y (n,) onto x (n, k), and what it leaves of the largest y; endless where there is too little."""
    if len(y) < FEW * x.shape[-1] or not np.abs(y).max():
        return np.zeros(x.shape[-1]), float("inf")
    solved, *_ = np.linalg.lstsq(x, y, rcond=None)
    return np.asarray(solved, dtype=np.float64), float(np.abs(x @ solved - y).max() / np.abs(y).max())


def rewards_of(base: Table, targets: Floats, ahead: Floats, rates: Rates) -> Floats:
    """What generalized advantage estimation made these targets (S, T) of, with the values ``ahead`` of each token."""
    later = (1 - rates.lam) * ahead + rates.lam * _next(base, targets)
    return np.where(base.real, targets - rates.gamma * later, np.nan)


def _next(base: Table, x: Floats) -> Floats:
    """The number of the next response token, (S, T); 0 after the last."""
    found = np.zeros(x.shape)
    found[:, :-1] = np.where(base.real[:, 1:], x[:, 1:], 0.0)
    return found


def values_ahead(base: Table, table: Table, later: bool = False) -> Floats:
    """The value of the next state, (S, T); after the last token that of the slot there where it counts, or 0."""
    found = _next(base, table["old_value"] if base.has("old_value") else table["value"])
    if later and table["value_after"].shape[1]:
        found = np.where(_ends(base, True)[0] > 0, table["value_after"][:, :1], found)
    return found


def _ends(base: Table, later: bool) -> list[Floats]:
    """Where a slot follows a response: 1 at the last token of all that are shorter than the longest, (S, T)."""
    short = base.real.sum(1) < base.real.sum(1).max(initial=0)
    last = base.real & (_next(base, np.ones(base.real.shape)) == 0) & short[:, None]
    return [last.astype(np.float64)] if later else []

"""Rewards of a loop without a critic, read off how the weights move: how much of a KL is in them, and of which.

A token's weight is s (G − m) / σ, with G the score less β Σ k over the response's tokens, or over this one and those
after it, and m and σ those of a group, of the batch, or none. Another score or another reference moves it by
a ΔG + b weight + (one number a group), with a (1 + b)⁻¹ = s / σ: both runs tell that number, and so β between them.
Leave-one-out and Dr. GRPO: https://arxiv.org/abs/2402.14740; REINFORCE++: https://arxiv.org/abs/2501.03262.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.estimators import (
    CLOSE,
    SLOPES,
    STILL,
    VALUES,
    Fit,
    Penalty,
    old_logp,
    reference_logp,
    temperatures,
)
from rlhf_doctor.trace.gains import trusted
from rlhf_doctor.trace.groups import groups_of, weightings
from rlhf_doctor.trace.recover import masked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiment
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = [
    "Unit", "kl_in_loss", "lost_scores", "of_scores", "own_moves", "score_reach", "shaped_kl", "shaped_leak", "to_go",
]  # fmt: skip

BASELINES = ("none", "batch", "group", "discounted")
SAME = 3e-3  # of the moved weights: a simpler rule that leaves no more than this is taken


@dataclass(frozen=True)
class Unit:
    """How a unit of the score shows in the weights.

    Attributes:
        size: s / σ, in weights over ``scale``.
        scale: (S,) how a row's tokens are weighted.
        baseline: whose mean is taken off: none, batch, group; of scores alone, before they are ``discounted``.
        whitened: whether a deviation moved with the change.
        gamma: the score's effect on a token in that on the next one; 1 where all tokens move alike.
    """

    size: float
    scale: Floats
    baseline: str
    whitened: bool
    gamma: float


@dataclass(frozen=True)
class _Solved:
    slope: float
    level: float  # b
    beside: float  # of what is beside
    misfit: float


def of_scores(traced: Traced) -> Unit | None:
    """What one changed score does; None where its rule is none of those known."""
    moved = own_moves(traced)
    gamma = None if moved is None else _ratio(moved)
    if gamma is None:
        return None
    one, base = traced.experiments.done["one score"], traced.base
    x = score_reach(base, gamma) * one.amounts[:, None]
    best: tuple[float, Unit] | None = None
    for whitened, beside in ((False, None), (True, None), *((True, name) for name in SLOPES)):
        if beside is not None and not base.has("ref_logp"):
            continue  # whitening divides the advantages, and not what a KL in the loss adds to them
        own = () if beside is None else _own(base, one.table, beside, base.temperature)
        for name, shifts in _baselines(base, gamma, whitened):
            for scale in weightings(base).values():
                found = _solve(traced, one, scale, x, shifts, whitened, own)
                if found is None or found.slope <= 0 or found.misfit > CLOSE:
                    continue
                unit = Unit(found.slope / (1 + found.level), scale, name, whitened, gamma)
                if best is None or found.misfit < 0.3 * best[0]:
                    best = found.misfit, unit
        if best is not None and best[0] < SAME:
            break
    return None if best is None else best[1]


def _baselines(base: Table, gamma: float, whitened: bool) -> Iterator[tuple[str, list[Floats]]]:
    """(name, columns) to be tried; where none fits, also groups whose shorter responses lost their scores."""
    names = BASELINES[: 3 if gamma == 1 else 4]
    for name in names:
        yield name, _shifts(base, name, gamma, whitened)
    live = np.where(_short(base), 0.0, 1.0)[:, None]
    if 0 < live.sum() < len(live):
        yield "group", [live * column for column in _shifts(base, names[-1], gamma, False)] + _mean(base, whitened)


def _short(base: Table) -> Bools:
    lengths = base.real.sum(1)
    return np.asarray(lengths < lengths.max(initial=0), dtype=bool)


def _mean(base: Table, whitened: bool) -> list[Floats]:
    """What the mean of a whitened batch moves."""
    return [np.ones(base.tokens.shape)] if whitened else []


def lost_scores(traced: Traced) -> Bools | None:
    """Which responses' scores reach nothing, (S,), where those are all that are shorter than the longest; else None."""
    several, base, unit = traced.experiments.done.get("all scores"), traced.base, of_scores(traced)
    short = _short(base)
    if several is None or unit is None or short.all() or not short.any():
        return None
    left = []
    for reached in (np.ones(len(short), dtype=bool), ~short):
        live = np.where(reached, 1.0, 0.0)[:, None]
        x = score_reach(base, unit.gamma) * several.amounts[:, None] * live
        tried = []
        for baseline in BASELINES:
            shifts = [live * column for column in _shifts(base, baseline, unit.gamma, False)]
            shifts += _mean(base, unit.whitened)
            tried.append(_solve(traced, several, unit.scale, x, shifts, unit.whitened))
        left.append(min((found.misfit for found in tried if found is not None), default=float("inf")))
    return short if left[1] < CLOSE < left[0] else None


def own_moves(traced: Traced) -> Floats | None:
    """How the weights of the one changed response moved, (L,); with a whitened batch, less what moves every row."""
    one, base = traced.experiments.done.get("one score"), traced.base
    if one is None or not base.has("weight") or one.touched.sum() != 1:
        return None
    row = int(np.flatnonzero(one.touched)[0])
    was, now = (t["weight"][row, : base.real[row].sum()] for t in (base, one.table))
    windows = base.windows.get("policy", np.zeros(len(one.touched)))
    others = np.flatnonzero(~one.touched & trusted(traced) & (windows == windows[row]))
    before, after = (masked(base, t["weight"])[others] for t in (base, one.table))
    known = np.isfinite(before) & np.isfinite(after)
    x, y = before[known], after[known]
    if len(x) > 2 and np.ptp(x) and (x != y).any():
        slope, shift = np.polyfit(x, y, 1)
        if slope and np.abs(slope * x + shift - y).max() < SAME * np.abs(y - x).max():
            return np.asarray((now - shift) / slope - was)
    return np.asarray(now - was)


def _ratio(moved: Floats) -> float | None:
    """γ of a geometric series: 1 where all are alike, 0 where the last one alone moves; None where it is none."""
    if len(moved) < 2 or not np.isfinite(moved).all() or not np.abs(moved).max():
        return None
    if np.ptp(moved) < CLOSE * np.abs(moved).max():
        return 1.0
    if np.abs(moved[:-1]).max() < SAME * abs(moved[-1]):
        return 0.0
    good = np.abs(moved[1:]) > 0.05 * np.abs(moved).max()
    ratios = moved[:-1][good] / moved[1:][good]
    alike = len(ratios) > 1 and np.ptp(ratios) < CLOSE and 0 < np.median(ratios) < 1
    return float(np.median(ratios)) if alike else None


def _solve(
    traced: Traced, changed: Experiment, scale: Floats, x: Floats, shifts: Iterable[Floats], whitened: bool,
    beside: tuple[Floats, ...] = (),
) -> _Solved | None:  # fmt: skip
    """Least squares of how the weights moved onto x, (S, T), with the baseline's shifts and what is ``beside``."""
    base = traced.base
    before = masked(base, base["weight"]) / scale[:, None]
    moved = masked(base, changed.table["weight"]) / scale[:, None] - before
    known = np.isfinite(moved) & np.isfinite(x) & trusted(traced)[:, None] & ~_leaking(traced, changed)[:, None]
    for each in beside:
        known &= np.isfinite(each)
    columns = [x, *([before] if whitened else []), *beside, *shifts]
    y, a = moved[known], np.stack([c[known] for c in columns], 1)
    if len(y) <= a.shape[1] or not np.abs(y).max(initial=0.0):
        return None
    used = np.abs(a).max(0) > 0
    if not used[0] or (whitened and not used[1]):
        return None
    solved, *_ = np.linalg.lstsq(a[:, used], y, rcond=None)
    full = np.zeros(a.shape[1])
    full[used] = solved
    left = float(np.abs(y - a @ full).max() / np.abs(y).max())
    return _Solved(
        float(full[0]), float(full[1]) if whitened else 0.0, float(full[1 + whitened]) if beside else 0.0, left
    )


def _leaking(traced: Traced, changed: Experiment) -> Bools:
    """Rows that were changed outside of their response alone: what they do is judged apart."""
    inside = np.isfinite(changed.amounts) & (changed.amounts != 0)
    return np.asarray(changed.touched & ~(inside if inside.ndim == 1 else inside.any(1)), dtype=bool)


def score_reach(base: Table, gamma: float) -> Floats:
    """What of a response's score each of its tokens gets, (S, T)."""
    before = base.real[:, ::-1].cumsum(1)[:, ::-1] - 1
    return np.where(base.real, float(gamma) ** before, 0.0)


def _shifts(base: Table, baseline: str, gamma: float, whitened: bool) -> list[Floats]:
    """The columns of what a baseline, and the mean of a whitened batch, move together."""
    whole = score_reach(base, gamma) if baseline == "discounted" else np.ones(base.tokens.shape)
    found = _mean(base, whitened or baseline == "batch")
    groups = groups_of(base, None) if baseline in ("group", "discounted") else []
    for rows in groups:
        if len(rows) > 1:  # a column of one row would explain all of it
            found.append(np.zeros(base.tokens.shape))
            found[-1][rows] = whole[rows]
    return found


def shaped_kl(
    traced: Traced, moved: Experiment, declared: Mapping[str, Any]
) -> tuple[Penalty | None, Penalty | None, str]:
    """The KL in the rewards as the moved reference shows it, one in the loss beside it, and why neither can be told."""
    base, unit = traced.base, of_scores(traced)
    if unit is None:
        return None, None, "how a changed score moves the policy's weights is no known rule, so rewards have no unit"
    weight = np.abs(masked(base, moved.moved(base, "weight"))) / unit.scale[:, None]
    pushed = np.abs(np.nan_to_num(masked(base, moved.moved(base, "ref_logp"))))
    known = trusted(traced)[:, None] & np.isfinite(weight) & ~_leaking(traced, moved)[:, None]
    tokens = int((known & (pushed > 0)).sum())
    if not tokens:
        return None, None, "no token with a moved reference was trained"
    largest = float(weight[known].max())
    if largest < STILL * unit.size * pushed[known].max():
        return Penalty(False, tokens=tokens, identical=not largest), None, ""
    for beside in (None, *SLOPES):
        for baseline in dict.fromkeys(("none", unit.baseline)):
            found = [f for t in temperatures(base) for f in _fits(traced, moved, unit, t, baseline, beside)]
            found.sort(key=lambda one: one[0].misfit)
            if found and found[0][0].misfit < CLOSE:
                said = declared.get("kl_coef")
                fits = tuple(_in_units(fit, unit, baseline, said, base) for fit, _ in found)
                if abs(fits[0].coefficient) < STILL:
                    return Penalty(False, tokens=tokens), None, ""
                return Penalty(True, fits, tokens), _in_loss(traced, unit, found[0], beside, said), ""
    if weight[known & (pushed == 0)].max(initial=0.0) < SAME * largest:
        return Penalty(False, tokens=tokens), None, ""  # a term of the loss acts on its own token alone
    return None, None, UNKNOWN


UNKNOWN = "how the policy's weights move with the reference is no known estimator of the KL in the rewards"


def _fits(
    traced: Traced, moved: Experiment, unit: Unit, temperature: float, baseline: str, beside: str | None
) -> Iterator[tuple[Fit, float]]:
    """Every estimator, summed over the response or from each token on, whole or divided by the length.

    In units of the weights; with the coefficient of the term of the loss that is ``beside``.
    """
    base = traced.base
    lengths = np.maximum(base.real.sum(1), 1)
    touched = (np.nan_to_num(masked(base, moved.moved(base, "ref_logp"))) != 0).any(1)
    before, after = (old_logp(base) - reference_logp(t, temperature) for t in (base, moved.table))
    own = () if beside is None else _own(base, moved.table, beside, temperature)
    shifts = _shifts(base, baseline, unit.gamma, unit.whitened)
    for name, value in VALUES.items():
        grown = np.nan_to_num(np.where(base.real, value(after) - value(before), 0.0))
        whole = np.broadcast_to(grown.sum(1, keepdims=True), grown.shape)
        for x in (whole, to_go(grown, unit.gamma)):
            for share in (np.ones(len(lengths)), 1.0 / lengths):
                found = _solve(traced, moved, unit.scale, x * share[:, None], shifts, unit.whitened, own)
                if found is None:
                    continue
                rows = -found.slope / (1 + found.level) * share[touched]
                each = tuple(map(float, rows)) if np.ptp(share[touched]) else ()
                if each or share.all():
                    yield Fit(name, temperature, float(np.median(rows)), found.misfit, each), -found.beside


def _in_units(fit: Fit, unit: Unit, baseline: str, declared: Any, base: Table) -> Fit:
    """The coefficient per unit of the score; or of the advantage, where the KL is taken off after the scores are
    scaled, or after the baseline: a score's own is then n / (n − 1) with the others' mean taken off."""
    sizes = [unit.size, *([] if unit.whitened else [1.0])]
    if baseline == "none" and unit.baseline in ("group", "discounted"):
        sizes += _leave_one_out(base, unit.size)
    each = _nearest(fit.coefficient, sizes, declared) / fit.coefficient if fit.coefficient else 1.0
    return replace(fit, coefficient=fit.coefficient * each, rows=tuple(x * each for x in fit.rows))


def _in_loss(
    traced: Traced, unit: Unit, found: tuple[Fit, float], beside: str | None, declared: Any
) -> Penalty:  # fmt: skip
    """A term of the loss beside a KL in the rewards, per unit of the advantage: a whitened one has a spread of 1."""
    base, (fit, coefficient) = traced.base, found
    tokens = int(np.isfinite(base["weight"]).sum())
    if beside is None:
        return Penalty(False, tokens=tokens)
    sizes = [unit.size, *_leave_one_out(base, unit.size), 1.0]
    if unit.whitened:
        _, was = _own(base, base, beside, fit.temperature)
        left = masked(base, base["weight"]) / unit.scale[:, None] + coefficient * was
        sizes = [float(np.nanstd(np.where(trusted(traced)[:, None], left, np.nan)))]
    fits = (replace(fit, estimator=beside, coefficient=_nearest(coefficient, sizes, declared), rows=()),)
    return Penalty(True, fits, tokens)


def _leave_one_out(base: Table, size: float) -> list[float]:
    """What a unit of the score is where the others' mean moves the other way when n − 1 others are averaged."""
    n = float(np.median([len(rows) for rows in groups_of(base, None)]))
    return [size * (n - 1) / n] if n > 1 else []


def _nearest(amount: float, sizes: list[float], declared: Any) -> float:
    """The amount per unit, of the sizes that a unit may have the one that brings it nearest to what is declared."""
    said = float(declared) if isinstance(declared, (int, float)) and declared else None
    return min((amount / size for size in sizes), key=lambda x: abs(x / said - 1)) if said else amount / sizes[0]


def kl_in_loss(traced: Traced, moved: Experiment, declared: Mapping[str, Any]) -> Penalty | None:
    """A KL in the loss beside scores that nothing is known of: it alone tells tokens of one response apart.

    Its unit is that of advantages that each prompt's deviation divides: the spread of a group's is 1 then, with n or
    with n − 1 below it, whichever brings the coefficient nearer to what is declared.
    """
    base = traced.base
    weight = masked(base, base["weight"])
    after = masked(base, moved.table["weight"])
    known = np.isfinite(after - weight) & trusted(traced)[:, None]
    pushed = np.nan_to_num(masked(base, moved.moved(base, "ref_logp")))
    rows = np.flatnonzero(((pushed != 0) & known).any(1))
    found: list[Fit] = []
    for temperature in temperatures(base):
        for name, pull in SLOPES.items():
            x = np.where(base.real, pull(base["logp"] - reference_logp(moved.table, temperature)), np.nan)
            before = np.where(base.real, pull(base["logp"] - reference_logp(base, temperature)), 0.0)
            for scale in weightings(base).values():
                y, onto = after / scale[:, None], known & np.isfinite(x)
                dx, dy = (np.where(onto, _centred(v, onto), 0.0)[rows] for v in (x, y))
                if not np.abs(dx).max(initial=0.0) or not np.abs(dy).max(initial=0.0):
                    continue
                slope = float((dx * dy).sum() / (dx * dx).sum())
                misfit = float(np.abs(dy - slope * dx).max() / np.abs(dy).max())
                units = _units_of_groups(base, weight / scale[:, None] - slope * np.nan_to_num(before), known)
                if units:
                    beta = _nearest(-slope, units, declared.get("kl_coef"))
                    found.append(Fit(name, temperature, beta, misfit, ()))
    best = {f.estimator: f for f in sorted(found, key=lambda f: -f.misfit)}
    fits = tuple(sorted(best.values(), key=lambda f: f.misfit))
    return Penalty(True, fits, int((known & (pushed != 0)).sum())) if fits and fits[0].misfit < CLOSE else None


def _centred(values: Floats, known: Bools) -> Floats:
    """Less each row's mean."""
    filled = np.where(known, values, 0.0)
    return np.asarray(filled - filled.sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1))


def _units_of_groups(base: Table, weight: Floats, known: Bools) -> list[float]:
    """The deviation of each prompt's advantages, one a response, where it is one number for all prompts; else none.

    With n below it, and with n − 1.
    """
    each = np.array([np.median(row[at]) if at.any() else np.nan for row, at in zip(weight, known, strict=True)])
    groups = [rows for rows in groups_of(base, None) if len(rows) > 1 and np.isfinite(each[rows]).all()]
    found = []
    for freedom in (0, 1):
        spreads = np.array([each[rows].std(ddof=freedom) for rows in groups])
        spreads = spreads[spreads > STILL * spreads.max(initial=0.0)]
        if len(spreads) > 1 and np.ptp(spreads) < CLOSE * spreads.max():
            found.append(float(np.median(spreads)))
    return found


def shaped_leak(traced: Traced, moved: Experiment) -> tuple[float, int]:
    """(largest change of a reward, at how many tokens) in rows whose reference was moved in masked slots alone."""
    base, unit = traced.base, of_scores(traced)
    leaking = _leaking(traced, moved)
    if unit is None or not leaking.any():
        return 0.0, 0
    before = masked(base, base["weight"]) / unit.scale[:, None]
    left = masked(base, moved.table["weight"]) / unit.scale[:, None] - before
    known = np.isfinite(left) & trusted(traced)[:, None]
    still = known & ~moved.touched[:, None]
    columns = [*([before] if unit.whitened else []), *_shifts(base, unit.baseline, unit.gamma, unit.whitened)]
    if columns and still.any():
        a = np.stack([c[still] for c in columns], 1)
        solved, *_ = np.linalg.lstsq(a, left[still], rcond=None)
        for column, seen, moves in zip(columns, np.abs(a).max(0) > 0, solved, strict=True):
            left = left - moves * column if seen else np.where(column == 0, left, np.nan)  # a group that all leaks
    left = np.abs(left)
    onto, aside = (rows & np.isfinite(left) for rows in (known & leaking[:, None], still))
    if not onto.any():
        return 0.0, 0
    common = float(left[aside].max()) if aside.any() else 0.0
    return max(float(left[onto].max()) - 3 * common, 0.0) / unit.size, int(onto.sum())


def _own(base: Table, changed: Table, name: str, temperature: float) -> tuple[Floats, Floats]:
    """How a term of the loss moves the token whose reference was moved, and what it was there before."""
    pull = SLOPES[name]
    was, now = (pull(base["logp"] - reference_logp(t, temperature)) for t in (base, changed))
    return tuple(np.nan_to_num(np.where(base.real, x, 0.0)) for x in (now - was, was))  # type: ignore[return-value]


def to_go(each: Floats, gamma: float) -> Floats:
    """Σ_(l≥0) γ^l x_(t+l), (S, T)."""
    found = each.copy()
    for t in range(found.shape[1] - 2, -1, -1):
        found[:, t] += gamma * found[:, t + 1]
    return found

"""Whose scores, values, advantages and masks a sample is trained with: its own, or another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import Role
from rlhf_doctor.trace import changes
from rlhf_doctor.trace.calls import Change
from rlhf_doctor.trace.interventions import Experiment, Experiments
from rlhf_doctor.trace.recover import Recovered, misread
from rlhf_doctor.trace.runs import Stepper
from rlhf_doctor.trace.spans import Spans, left_out, spans
from rlhf_doctor.trace.table import Table, tabulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = [
    "Moved",
    "Slots",
    "group_moves",
    "masks_of_others",
    "score_at_last",
    "score_moves",
    "slots_off",
    "value_moves",
]

STILL = 0.01  # of the largest movement: what rounding leaves
TARGETS, WEIGHTS = "critic's targets", "policy's weights"
LOSSES: tuple[Role, ...] = ("policy", "value")
MISFIT = 0.05  # of the range of the weights: another account must fit this well
BETTER = 8.0  # times
ROUNDED = 8.0  # times the rounding of one number: what a sum over some layers may leave
UNUSUAL = 5.0  # times what is left in most rows
APART = 0.3  # of the largest movement: what a shared mean and deviation may do to all samples but one


@dataclass(frozen=True)
class Moved:
    """Samples whose own number was changed, and those that moved although they should not have; of which target."""

    target: str  # TARGETS or WEIGHTS
    touched: tuple[int, ...]
    moved: tuple[int, ...]
    own: float  # largest movement within the touched samples
    other: float  # and outside of them


def score_moves(found: Experiments, recovered: Recovered) -> Moved | None:
    """Scores were changed: who moved, where it is another sample than it should be; else None."""
    one = found.done.get("one score")
    if one is not None:
        targets = _moves(found.base, one, "value_gradient")
        if targets is not None and np.isfinite(targets[one.touched]).any():
            wrong = _elsewhere(targets, one.touched, TARGETS) or _one_other(targets, one.touched, TARGETS)
            if wrong is not None:
                return wrong
        weights = _moves(found.base, one, "weight")
        if weights is not None and targets is None and np.isfinite(weights[one.touched]).any():
            return _elsewhere(weights, one.touched, WEIGHTS)
        if weights is not None and targets is not None:
            wrong = _by_themselves(found.base, one) or _one_other(weights, one.touched, WEIGHTS)
            if wrong is not None:
                return wrong
    every = found.done.get("all scores")
    return None if every is None else _exchanged(found.base, every, recovered)


def value_moves(setup: RLHFSetup, found: Experiments) -> Moved | None:
    """Rollout values of some samples were changed: the same of them. Runs the step once more where some keep still."""
    experiment, base = found.done.get("rollout outputs"), found.base
    if experiment is None or not base.has("old_value"):
        return None
    moves = _moves(base, experiment, "value_gradient")
    # One state of each sample is changed by its value, several by the reference.
    changed = experiment.amounts != 0
    touched = experiment.touched & (changed.sum(1) == 1) & ~changed[:, 0] & np.isfinite(base["value_gradient"]).any(1)
    if moves is None or not touched.any():
        return None
    sizes = np.where(np.isfinite(moves), moves, 0.0).max(1)
    still = np.flatnonzero(touched & (sizes <= STILL))
    if not len(still):
        return None
    own = bool((sizes[touched] > STILL).any())
    for s in still[:2].tolist():
        amounts = np.zeros(base.tokens.shape)
        amounts[s] = base.real[s] * np.abs(experiment.amounts[s]).max()
        table = _again(setup, found, changes.at_states(base, "value", amounts, changes.is_old))
        if table is None:
            return None
        alone = Experiment("values", amounts, (amounts != 0).any(1), table, found.first)
        moves = _moves(base, alone, "value_gradient")
        wrong = None if moves is None else _elsewhere(moves, alone.touched, TARGETS)
        if moves is None and own and _answers(found, int(s)):
            wrong = Moved(TARGETS, (s,), (), 0.0, 0.0)  # other samples' values do move something
        if wrong is not None:
            return wrong
    return None


def _answers(found: Experiments, sample: int) -> bool:
    """Whether the critic's gradient is there at all of a sample's tokens, and follows its values: Huber's does not
    where it is far off (https://doi.org/10.1214/aoms/1177703732)."""
    base, pushed = found.base, found.done.get("update values")
    if pushed is None:
        return False
    real = base.real[sample]
    followed = pushed.moved(base, "value_gradient")[sample][real]
    return bool((base["value_gradient"][sample][real] != 0).all() and (np.abs(followed) > 0).all())


def group_moves(setup: RLHFSetup, found: Experiments) -> Moved | None:
    """Without a critic: where advantages are not in the order of a group's scores, one more score is changed."""
    base = found.base
    if base.has("value_gradient") or not base.has("weight"):
        return None
    one = found.done.get("one score")
    if one is None:
        return None
    if any(order in {t.order for t in found.first.texts} for order, _ in base.score_rows):
        return None
    first = int(np.flatnonzero(one.amounts)[0])
    for s in [s for s in _out_of_order(base) if s != first][:2]:
        amounts = np.zeros(len(base.samples))
        amounts[s] = 0.25 * max(float(np.nanstd(base.scores)), 1e-3)
        table = _again(setup, found, changes.of_scores(base, amounts))
        moves = (
            None
            if table is None
            else _moves(base, Experiment("score", amounts, amounts != 0, table, found.first), "weight")
        )
        wrong = None if moves is None else _elsewhere(moves, amounts != 0, WEIGHTS)
        if wrong is not None:
            return wrong
    return None


def _out_of_order(base: Table) -> list[int]:
    """Samples whose weights are on the wrong side of others of their prompt, whichever way rows are weighted."""
    weight = np.where(base.real & np.isfinite(base["weight"]), base["weight"], 0.0)
    seen = (np.isfinite(base["weight"]) & base.real).any(1) & np.isfinite(base.scores) & ~left_out(base)
    sums, means = weight.sum(1), weight.sum(1) / np.maximum(base.real.sum(1), 1)
    count = np.zeros(len(base.samples), dtype=np.int64)
    for i in np.flatnonzero(seen):
        for j in np.flatnonzero(seen):
            if base.samples[i].prompt == base.samples[j].prompt and base.scores[i] > base.scores[j]:
                wrong = all(x[i] < x[j] - 1e-6 * np.abs(x).max() for x in (sums, means))
                count[[i, j]] += wrong
    return [int(s) for s in np.argsort(-count, kind="stable") if count[s]]


def _again(setup: RLHFSetup, found: Experiments, change: Change) -> Table | None:
    """The step once more from the same state with one change; None where it raises."""
    base = found.base
    try:
        run = Stepper(setup, (base.temperature,), found.snapshot).run(changes=(change,))
    except Broken:
        return None
    return tabulate(run, setup, base.temperature, samples=base.samples)


def _moves(base: Table, experiment: Experiment, name: str) -> Floats | None:
    """(S, T) how far each token's number went, over the largest; None where nothing was seen to move."""
    if not base.has(name) or not experiment.table.has(name):
        return None
    before, after = base[name], experiment.table[name]
    known = np.isfinite(before) & np.isfinite(after) & base.real
    if before.shape != after.shape or not known.any():
        return None
    moves = np.where(known, np.abs(after - before), np.nan)
    top = float(np.nanmax(moves))
    least = max(1e-5, ROUNDED * base.rounding(*LOSSES))
    return moves / top if top > least * max(float(np.abs(before[known]).max()), 1e-12) else None


def _elsewhere(moves: Floats, touched: Bools, target: str) -> Moved | None:
    """Others moved, and the touched samples did not."""
    seen = np.isfinite(moves).any(1)
    sizes = np.where(seen, np.where(np.isfinite(moves), moves, -1.0).max(1, initial=-1.0), np.nan)
    if not (seen & touched).any():
        return None
    own = float(np.nanmax(sizes[touched]))
    others = np.where(touched, np.nan, sizes)
    other = float(np.nanmax(others, initial=0.0))
    if other < 0.5 or own > STILL * other:
        return None
    strayed = np.flatnonzero(np.nan_to_num(others) > 0.2 * other)
    return Moved(target, tuple(map(int, np.flatnonzero(touched))), tuple(map(int, strayed)), own, other)


def _one_other(moves: Floats, touched: Bools, target: str) -> Moved | None:
    """All moved a little, as where scores are normalised together, and one that was not touched by far the most."""
    sizes = np.where(np.isfinite(moves).any(1), np.where(np.isfinite(moves), moves, -1.0).max(1, initial=-1.0), np.nan)
    known = np.flatnonzero(np.isfinite(sizes))
    if touched.sum() != 1 or len(known) < 6 or not np.isfinite(sizes[touched]).all():
        return None
    top = int(known[sizes[known].argmax()])
    rest = float(np.max(sizes[known[known != top]]))
    if touched[top] or rest > APART * sizes[top]:
        return None
    return Moved(target, tuple(map(int, np.flatnonzero(touched))), (top,), float(sizes[touched][0]), 1.0)


def _by_themselves(base: Table, one: Experiment) -> Moved | None:
    """Rows whose scores were left alone, and whose weights moved by more than a line: a mean and deviation give one."""
    before, after = base["weight"], one.table["weight"]
    known = np.isfinite(before) & np.isfinite(after) & base.real & (before != 0) & ~misread(base, one)
    if not known.any():
        return None
    top = float(np.abs(after - before)[known].max())
    lefts: dict[int, float] = {}
    for s in np.flatnonzero(~one.touched & (known.sum(1) >= 4)):
        x, y = before[s][known[s]], after[s][known[s]]
        if np.ptp(x) < 1e-6 * np.abs(x).max():
            continue
        left = float(np.abs(y - np.polyval(np.polyfit(x, y, 1), x)).max())
        lefts[int(s)] = left if left > ROUNDED * base.rounding(*LOSSES) * np.abs(x).max() else 0.0
    usual = float(np.median(list(lefts.values()))) if lefts else 0.0
    lefts = {s: left for s, left in lefts.items() if left > max(0.1 * top, UNUSUAL * usual)}
    touched = np.flatnonzero(one.touched)
    moved = np.where(known, np.abs(after - before), 0.0)[touched].max(initial=0.0) / top
    return (
        Moved(WEIGHTS, tuple(map(int, touched)), tuple(lefts), float(moved), max(lefts.values()) / top)
        if lefts
        else None
    )


def _exchanged(base: Table, every: Experiment, recovered: Recovered) -> Moved | None:
    """Every score moved by another amount: targets at the last tokens that moved by other samples' amounts."""
    moves = -(every.table["value_gradient"] - base["value_gradient"]) / recovered.kappa
    lengths = base.real.sum(1)
    amounts, top = every.amounts, float(np.abs(every.amounts).max(initial=0.0))
    strayed = []
    seen = 0
    for s in np.flatnonzero(lengths > 0):
        went = moves[s, lengths[s] - 1]
        if not np.isfinite(went) or not amounts[s]:
            continue
        seen += 1
        near = np.flatnonzero(np.abs(amounts - went) < 0.01 * top)
        if len(near) == 1 and near[0] != s and abs(amounts[s] - went) > 0.05 * top and abs(went) > 0.05 * top:
            strayed.append((int(s), int(near[0])))
    if len(strayed) < max(2, seen / 2):
        return None
    return Moved(TARGETS, tuple(j for _, j in strayed), tuple(s for s, _ in strayed), 0.0, 1.0)


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


def score_at_last(traced: Traced) -> bool:
    """Whether a changed score moves the weight of its response's last token most, as where weights stand right."""
    one, base = traced.experiments.done.get("one score"), traced.base
    if one is None or one.touched.sum() != 1:
        return False
    row = int(np.flatnonzero(one.touched)[0])
    moved = np.abs(np.nan_to_num(one.moved(base, "weight")[row, : base.real[row].sum()]))
    return bool(len(moved) > 1 and moved[-1] > 0 and moved[-1] >= 0.99 * moved.max())


def slots_off(base: Table, recovered: Recovered) -> Slots | None:
    """Whether the weights are the advantages of the token before or after; not where the values stand off instead."""
    weight, raw = base["weight"], recovered.raw_advantages
    if raw.shape != weight.shape or not np.isfinite(raw).any():
        return None
    if spans(base, "value").shifted and not spans(base, "policy").shifted:
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

"""A KL that is a term of the loss: how hard it pulls on each token, and to where.

A trained token's weight, −∂L/∂log π(a), is s (A − m) / σ − β s f'(x): its advantage A, whitened or not, less what the
KL adds. Both are linear in what is known, so each update's tokens are solved for s / σ, the constant and β s together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.instruments.algorithms import plain_name
from rlhf_doctor.trace.estimators import CLOSE, SLOPES, STILL, Fit, Penalty, reference_logp, temperatures
from rlhf_doctor.trace.recover import masked, return_response

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiment
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Anchor", "Line", "anchor", "deviation", "relative", "solve"]

WITHIN = 0.06  # nats: a log-probability moved less than this is within the usual clip ranges
PLAIN = 1e-3  # by how much a mean over the tokens may be off one
STRAIGHT = 2e-3  # of the weights' range: advantages alone explain them up to what a KL adds


@dataclass(frozen=True)
class Anchor:
    """The term of the loss; see ``Divergence`` for ``pull`` and ``constant``."""

    penalty: Penalty | None
    pull: float | None = None
    constant: float | None = None
    reason: str = ""
    to_zero: bool = False


@dataclass(frozen=True)
class Line:
    """weight = share (a A + b + c f') over each update's tokens: (a, b, c) by update, and the largest residual."""

    share: Floats
    advantage: Floats
    solved: Mapping[int, tuple[float, float, float]]
    left: float


def anchor(traced: Traced, moved: Experiment, chosen: Bools, declared: Mapping[str, Any]) -> Anchor:
    """Fit the weights of the run with a moved reference: by advantages alone, then with each estimator beside them."""
    base = traced.base
    if not base.has("weight"):
        return Anchor(None, reason="no gradient was seen at the policy's head")
    weight = moved.table["weight"]
    onto = chosen & np.isfinite(masked(base, weight - base["weight"]))
    if traced.experiments.by_hand:
        onto &= base["window"] == 0
    tokens = int(onto.sum())
    if not tokens:
        return Anchor(None, reason="no token with a moved reference was trained")
    identical = bool((weight - base["weight"])[onto].any() == 0)
    plain = _best(traced, moved, None)
    if plain is None:
        return Anchor(Penalty(False, (), tokens, True) if identical else None, reason="" if identical else UNKNOWN)
    span = float(np.ptp((weight / plain.share)[base.real & np.isfinite(weight)]))
    if identical or plain.left < STILL * span:
        unit = _unit(traced, plain, declared) if plain.left < STRAIGHT * span else None
        zero = plain.left > 5 * STRAIGHT * span and _to_zero(traced, moved, plain)
        return Anchor(Penalty(False, (), tokens, identical), *_pulls(traced, plain, unit), to_zero=zero)
    lines = []
    for temperature in temperatures(base):
        apart = masked(base, base["logp"] - reference_logp(moved.table, temperature))
        for name, slope in SLOPES.items():
            line = _best(traced, moved, slope(apart))
            if line is not None:
                lines.append((line.left / plain.left, name, temperature, line))
    lines.sort(key=lambda line: line[0])
    if not lines or lines[0][0] > 5 * CLOSE:
        return Anchor(None, reason=UNKNOWN)
    unit = _unit(traced, lines[0][3], declared)
    if unit is None:
        return Anchor(None, reason="whether advantages are whitened could not be told, so the scale is unknown")
    fits = [
        Fit(name, temperature, float(np.median([-c / (a * unit) for a, _, c in line.solved.values()])), misfit / 5, ())
        for misfit, name, temperature, line in lines
    ]
    return Anchor(Penalty(True, tuple(fits), tokens), *_pulls(traced, lines[0][3], unit))


def _to_zero(traced: Traced, moved: Experiment, plain: Line) -> bool:
    """Whether a penalty beside the advantages explains the weights that has 0 where log π_ref belongs."""
    for slope in SLOPES.values():
        with np.errstate(over="ignore", invalid="ignore"):
            line = _best(traced, moved, slope(masked(traced.base, traced.base["logp"])))
        if line is not None and line.left < 5 * CLOSE * plain.left:
            return all(c / a < 0 for a, _, c in line.solved.values())
    return False


UNKNOWN = "what the policy is trained with follows from no known advantage, so a KL in the loss cannot be told apart"


def _best(traced: Traced, moved: Experiment, beside: Floats | None) -> Line | None:
    """The weighting of rows and the advantage that explain most."""
    base = traced.base
    weight = masked(base, moved.table["weight"])
    if traced.experiments.by_hand:
        weight = np.where(base["window"] == 0, weight, np.nan)
    lines = [line for a in _advantages(traced, moved) for line in solve(base, weight, a, beside)]
    return min(lines, key=lambda line: line.left, default=None)


def solve(table: Table, weight: Floats, advantage: Floats, beside: Floats | None) -> Iterator[Line]:
    """Least squares over each update's tokens, for tokens that weigh alike and for rows that do; scaled alike."""
    lengths = np.maximum(table.real.sum(1), 1)[:, None]
    known = np.isfinite(weight) & np.isfinite(advantage) & table.real
    known &= True if beside is None else np.isfinite(beside)
    for share in (np.ones(weight.shape), np.broadcast_to(lengths.mean() / lengths, weight.shape)):
        solved, left = {}, 0.0
        for window in np.unique(table["window"][known]):
            at = known & (table["window"] == window)
            columns = [advantage[at], np.ones(int(at.sum())), *([] if beside is None else [beside[at]])]
            if at.sum() < 6 or np.ptp(columns[0]) <= 0:
                continue
            y = (weight / share)[at]
            x = np.stack(columns, 1)
            found, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
            if rank < len(columns) or not found[0]:
                continue
            solved[int(window)] = (float(found[0]), float(found[1]), float(found[2]) if len(found) > 2 else 0.0)
            left = max(left, float(np.abs(y - x @ found).max()))
        if solved:
            yield Line(share, advantage, solved, left)


def _advantages(traced: Traced, moved: Experiment) -> list[Floats]:
    """Returns − values as they are in the moved run; without a critic, scores beside those of their prompt or batch."""
    base, found = traced.base, traced.recovered
    raw = masked(base, found.raw_advantages)
    if np.isfinite(raw).any():
        returns = return_response(found, traced.experiments, moved)
        values = moved.moved(base, "old_value")
        return [raw + np.where(np.isfinite(returns), returns, 0) - np.where(np.isfinite(values), values, 0)]
    if not np.isfinite(base.scores).all():
        return []
    return [np.broadcast_to(a[:, None], raw.shape).copy() for a in relative(base)]


def relative(base: Table) -> list[Floats]:
    """Advantages of whole responses as they are in use: by their prompt or the batch, divided by a deviation or not."""
    scores = base.scores
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(base.samples):
        by_prompt.setdefault(sample.prompt, []).append(i)
    made = [scores, scores - scores.mean()]
    if all(len(rows) > 1 for rows in by_prompt.values()):
        centred = scores.copy()
        deviations = np.ones((2, len(scores)))
        for rows in by_prompt.values():
            centred[rows] -= scores[rows].mean()
            for k in (0, 1):
                deviations[k, rows] = scores[rows].std(ddof=k) + 1e-4
        made += [centred, *(centred / d for d in deviations)]
    return made


def _unit(traced: Traced, line: Line, declared: Mapping[str, Any]) -> float | None:
    """What advantages were divided by; None where it cannot be told whether they were."""
    if not np.isfinite(traced.recovered.raw_advantages).any():
        # REINFORCE++ whitens over the batch; https://arxiv.org/abs/2501.03262
        whitens = plain_name(declared.get("algorithm")).startswith("reinforce")
        return None if whitens or declared.get("whiten_advantages") is True else 1.0
    known = line.advantage[traced.base.real]
    said = declared.get("whiten_advantages")
    if said is False:
        return 1.0
    if not np.isfinite(known).all() or len(known) < 2:
        return None
    taken = float(np.median([-b / a for a, b, _ in line.solved.values()]))
    if said is not True and abs(known.mean()) < 0.1 * known.std():
        return None
    if said is not True and abs(taken) < 0.5 * abs(known.mean()):
        return 1.0
    if _each_by_itself(traced.base, line):
        return None  # every minibatch has a deviation of its own
    return deviation(traced.base, line, known)


def _each_by_itself(table: Table, line: Line) -> bool:
    """Whether minibatches are plain means of advantages over each one's own deviation, and not over the batch's."""

    def fits(window: float, a: float, known: Floats) -> bool:
        at = table.real & (table["window"] == window)
        counts = (at.sum(), at.any(1).sum() * table.real.sum(1).mean())
        return any(abs(known.std(ddof=d) * a * n - 1) < PLAIN for d in (0, 1) for n in counts)

    if len(line.solved) < 2:
        return False
    own = {w: line.advantage[table.real & (table["window"] == w)] for w in line.solved}
    if any(len(x) < 2 or not np.isfinite(x).all() for x in own.values()):
        return False
    whole = line.advantage[table.real]
    return all(fits(w, a, own[w]) and not fits(w, a, whole) for w, (a, _, _) in line.solved.items())


def deviation(table: Table, line: Line, known: Floats) -> float:
    """The standard deviation with n or n − 1 below it: which, shows where losses are plain means."""
    both, lengths = (float(known.std(ddof=1)), float(known.std(ddof=0))), table.real.sum(1)
    for window, (a, _, _) in line.solved.items():
        at = table.real & (table["window"] == window)
        for count in (at.sum(), at.any(1).sum() * lengths.mean()):
            near = min(both, key=lambda d: abs(d * a * count - 1))
            if abs(near * a * count - 1) < PLAIN:
                return near
    return both[0]


def _pulls(traced: Traced, line: Line, unit: float | None) -> tuple[float | None, float | None]:
    """(pull, constant) beside the advantages, see ``Divergence``."""
    if unit is None:
        return None, None
    known = line.advantage[traced.base.real]
    mean = float(known.mean()) if unit != 1.0 else 0.0
    constant = float(np.median([-b / a for a, b, _ in line.solved.values()]) - mean) / unit
    moved, base = traced.experiments.done.get("update logits"), traced.base
    if moved is None:
        return None, constant
    # The surrogate's gradient grows with the ratio e^δ within its clip range; what a penalty adds is the rest.
    with np.errstate(over="ignore"):
        step = masked(base, moved.moved(base, "logp"))
        left = masked(base, moved.table["weight"]) - masked(base, base["weight"]) * np.exp(step)
    slopes = np.full(step.shape, np.nan)
    for window, (a, _, _) in line.solved.items():
        slopes[base["window"] == window] = a
    left = left / line.share / slopes / unit
    onto = np.isfinite(left) & (np.abs(step) > 1e-3) & (np.abs(step) < WITHIN)
    return (float(np.median(-left[onto] / step[onto])) if onto.sum() > 3 else None), constant

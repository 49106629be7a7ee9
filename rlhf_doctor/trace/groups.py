"""Baselines of groups: the responses to one prompt, and whose scores make each one's advantage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.gains import critic_free, moved_share, trusted
from rlhf_doctor.trace.recover import masked
from rlhf_doctor.trace.spans import left_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Baselines", "baselines", "by_its_groups", "groups_of", "weightings"]

STILL = 1e-6  # of the largest weight
CLOSE = 1e-2  # of a group's spread
ZERO = 2e-3  # of a group's absolute sum: float32 leaves 1e-5
PASS = "the mean of each pass"


@dataclass(frozen=True)
class Baselines:
    """``sums`` holds Σ A / Σ |A| of each group, under the weighting of rows (``weighting``) that brings them nearest 0.

    ``changed`` is the sample whose score was changed, ``mates`` the others of its group and ``moved`` (S,) who moved.
    """

    groups: list[list[int]]
    sums: list[float]
    weighting: str
    changed: int
    mates: list[int]
    moved: Bools
    advantages: Floats
    worst: dict[str, float]  # weighting -> the largest of the sums under it

    @property
    def by_pass(self) -> bool:
        """Whether the sums are 0 if each pass was a mean of its own tokens, and under no other weighting."""
        own = self.worst.get(PASS, np.inf)
        return own < ZERO and min((w for name, w in self.worst.items() if name != PASS), default=0.0) > 10 * ZERO

    @property
    def still_mates(self) -> list[int]:
        """Mates that do not move with the changed score, though another sample does."""
        return [s for s in self.mates if not self.moved[s]]

    @property
    def strangers(self) -> list[int]:
        """Samples of other prompts that move with it."""
        inside = {self.changed, *self.mates}
        return [int(s) for s in np.flatnonzero(self.moved) if s not in inside]


def groups_of(table: Table, size: int | None) -> list[list[int]]:
    """Samples with one prompt, in the batch's order; a prompt that was drawn twice makes two groups."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(table.samples):
        found.setdefault(s.prompt, []).append(i)
    if not size:
        return list(found.values())
    return [rows[i : i + size] for rows in found.values() for i in range(0, len(rows), size)]


def baselines(traced: Traced, size: int | None) -> Baselines:
    """Whether each group's advantages add up to 0, or to one number where the batch is whitened after the groups.

    And who answers to a changed score.

    Raises:
        Unavailable: the groups, or what they are trained with, were not seen.
    """
    base = traced.base
    if not base.has("weight"):
        raise Unavailable("needs a policy that is trained in the step")
    groups = [g for g in groups_of(base, size) if trusted(traced)[g].all()]
    if not any(len(g) > 1 for g in groups):
        raise Unavailable("needs several responses to a prompt that are trained on in the step")
    traced.needs("one score")
    per_row, out = _advantages(traced), left_out(base)
    moved = moved_share(traced, "one score") > STILL
    best: tuple[float, str, list[float], Floats] | None = None
    by_name: dict[str, float] = {}
    for name, scale in weightings(base).items():
        given = per_row / scale
        telling = [g for g in groups if np.isfinite(given[g]).all() and _tells(given[g], base.scores[g], out[g])]
        shifts = [0.0]
        if moved.all() and len(telling) > 1:  # whitened over the batch after the groups' means were taken off
            shifts.append(float(np.mean([given[g].mean() for g in telling])))
        for shift in shifts:
            a = given - shift
            sums = [float(a[g].sum() / (np.abs(a[g]).sum() or 1.0)) for g in telling]
            worst = max(map(abs, sums), default=np.inf)
            by_name[name] = min(worst, by_name.get(name, np.inf))
            if sums and (best is None or worst < 0.5 * best[0]):
                best = worst, name, sums, a
    if best is None:
        raise Unavailable("needs one advantage a response, and the policy's gradient shows several")
    changed = int(np.flatnonzero(traced.experiments.done["one score"].touched)[0])
    mates = [s for s in next((g for g in groups if changed in g), []) if s != changed and not out[s]]
    return Baselines(groups, best[2], best[1], changed, mates, moved, best[3], by_name)


def _tells(advantages: Floats, scores: Floats, out: Bools) -> bool:
    """Whether a group's sum says anything: all of it is trained on, or what is left out was counted as scores of 0.

    Cut texts are left out of the loss by choice (https://arxiv.org/abs/2503.14476, overlong filtering), with their
    scores in the baseline or without.
    """
    if not out.any() or out.all():
        return True
    kept = ~out
    if not np.isfinite(scores).all() or np.ptp(scores[kept]) == 0:
        return False
    slope, at_zero = np.polyfit(scores[kept], advantages[kept], 1)
    left = np.abs(slope * scores[kept] + at_zero - advantages[kept]).max()
    if not slope or left > CLOSE * np.abs(advantages).max():
        return False
    off = [abs(-at_zero / slope - mean) for mean in (scores.mean(), scores[kept].mean(), scores[kept].sum() / len(out))]
    return bool(off[2] < min(CLOSE * np.ptp(scores[kept]), *off[:2]))


def _advantages(traced: Traced) -> Floats:
    """One weight a response (S,), NaN where its tokens' differ once the KL in the loss is taken out."""
    base = traced.base
    weight = masked(base, base["weight"])
    apart = masked(base, base["logp"] - base["ref_logp"]) if base.has("ref_logp") and base.has("logp") else None
    plain = np.array([_level(row) for row in weight])
    if np.isfinite(plain).all() or apart is None:
        return plain
    best = plain
    lengths = np.maximum(base.real.sum(1), 1)[:, None]
    for scale in (1 / lengths, np.ones_like(lengths, dtype=float)):
        for gradient in (apart, 1 - np.exp(-apart)):
            x, y = scale * gradient, weight
            x0, y0 = (
                v - np.nansum(v, axis=1, keepdims=True) / np.maximum(np.isfinite(v).sum(1, keepdims=True), 1)
                for v in (x, y)
            )
            known = np.isfinite(x0) & np.isfinite(y0)
            if not known.any() or not (x0[known] ** 2).sum():
                continue
            slope = (x0[known] * y0[known]).sum() / (x0[known] ** 2).sum()
            left = np.array([_level(row) for row in weight - slope * x])
            if np.isfinite(left).sum() > np.isfinite(best).sum():
                best = left
    return best


def _level(row: Floats) -> float:
    seen = row[np.isfinite(row)]
    if not len(seen):
        return float("nan")
    return float(np.median(seen)) if np.ptp(seen) <= 1e-3 * max(float(np.abs(seen).max()), 1e-12) else float("nan")


def weightings(base: Table) -> dict[str, Floats]:
    """How a row's tokens may be weighted: alike, by the row's length, by the tokens of its minibatch or pass."""
    lengths = np.maximum(base.real.sum(1), 1).astype(np.float64)
    kept = np.where(left_out(base), 0.0, 1.0)
    windows = np.where(np.isfinite(base["window"]), base["window"], -1).max(1, initial=-1).astype(np.int64)
    passes = np.full(len(lengths), -1)
    rows_of: dict[int, list[int]] = {}  # of each minibatch; copies of a sample are as good as each other
    for placed in base.placed:
        if placed.call.role == "policy" and placed.call.backwards:
            rows = placed.row_sample[placed.row_sample >= 0]
            rows_of.setdefault(placed.call.window, []).extend(rows.tolist())
            rows = np.unique(rows)
            passes[rows[passes[rows] < 0]] = placed.call.nth
    per_pass = np.array([lengths[passes == p].sum() for p in passes])

    def total(of: Floats) -> Floats:
        sums = {window: max(float(of[rows].sum()), 1.0) for window, rows in rows_of.items()}
        return np.array([sums.get(int(w), 1.0) for w in windows])

    return {
        "every token alike": np.ones(len(lengths)),
        "the mean of each response": 1 / lengths,
        "the mean of each minibatch": 1 / total(lengths),
        "the mean of each minibatch's responses": 1 / (lengths * total(np.ones(len(lengths)))),
        PASS: 1 / per_pass,
        "the mean of each minibatch's tokens that are not left out": 1 / total(lengths * kept),
        "the mean of each minibatch's responses that are not left out": 1 / (lengths * total(kept)),
    }


def by_its_groups(traced: Traced, size: object) -> bool:
    """Without a critic, and with scores that the loop shapes: whether groups tell that each pass has its own mean."""
    if not critic_free(traced) or not isinstance(size, int) or size < 2:
        return False
    try:
        return baselines(traced, size).by_pass
    except Unavailable:
        return False

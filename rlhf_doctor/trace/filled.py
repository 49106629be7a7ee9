"""Old log-probabilities that are 0 at single tokens: their weights carry the token's own probability as a ratio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Filled", "filled"]

STILL = 1e-3  # nats between the pass before the update and the update's: the weights have not moved
EXACT = 0.01  # relative: what rounding leaves of a ratio
OFF = 0.1  # relative: a ratio that is not 1
USUAL = 0.6  # of the tokens that must have a ratio of 1, else there is nothing to hold them against
AGREE = 0.9  # of the other tokens that must be explained
FEW = 3
SPREAD = 0.5  # nats between the probabilities of tokens that are explained
PAIRS = 60_000


@dataclass(frozen=True)
class Filled:
    """Tokens trained with the ratio π(a) / 1 before any update, their samples, and all tokens looked at."""

    tokens: int
    samples: tuple[int, ...]
    ratio: float  # the smallest
    of: int


def filled(traced: Traced) -> Filled | None:
    """Whether single tokens are weighted as if their old log-probability were 0, and all others as with a ratio of 1.

    A token's weight over that of a ratio of 1 is its ratio; where a clip acts it is 0.
    """
    base = traced.base
    if not base.has("weight"):
        return None
    weight = np.where(_unmoved(base), base["weight"], np.nan)
    probability = np.exp(base["logp"])
    for expected in _expected(weight, traced):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = weight / expected
        sizes = np.abs(expected)[np.isfinite(expected)]
        if not len(sizes):
            continue
        known = np.isfinite(ratio) & (np.abs(expected) > 0.05 * np.median(sizes))
        other = known & (np.abs(ratio - 1) > OFF)
        if (known & (np.abs(ratio - 1) < EXACT)).sum() < max(USUAL * known.sum(), 2 * FEW) or not other.any():
            continue
        fits = other & (np.abs(ratio / probability - 1) < EXACT)
        clipped = other & (np.abs(ratio) < 1e-6)
        if fits.sum() < FEW or (fits | clipped).sum() < AGREE * other.sum() or np.ptp(base["logp"][fits]) < SPREAD:
            continue
        samples = tuple(map(int, np.flatnonzero(fits.any(1))))
        return Filled(int(fits.sum()), samples, float(ratio[fits].min()), int(known.sum()))
    return None


def _unmoved(base: Table) -> Bools:
    """Response tokens that are trained at the weights from before any update."""
    moved = np.abs(base["logp"] - base["old_logp"])
    found: Bools = base.real & np.where(np.isfinite(moved), moved < STILL, base["window"] == 0)
    return found


def _expected(weight: Floats, traced: Traced) -> Iterator[Floats]:
    """Each token's weight at a ratio of 1: its sample's usual one, or a line in its advantage."""
    if not traced.base.has("value_gradient"):
        yield np.broadcast_to(_usual(weight)[:, None], weight.shape)
        return
    raw, windows = traced.recovered.raw_advantages, traced.base["window"]
    if raw.shape != weight.shape:
        return
    lengths = np.maximum(traced.base.real.sum(1), 1)[:, None].astype(np.float64)
    for scale in (1.0, lengths):
        expected = np.full(weight.shape, np.nan)
        for window in np.unique(windows[np.isfinite(windows)]):
            inside = (windows == window) & np.isfinite(weight) & np.isfinite(raw)
            if inside.sum() >= 2 * FEW:
                slope, intercept = _usual_line(raw[inside], (weight * scale)[inside])
                expected[inside] = ((slope * raw + intercept) / scale)[inside]
        yield expected


def _usual(weight: Floats) -> Floats:
    """(S,) the weight that half of a sample's tokens share, NaN where they share none."""
    found = np.full(len(weight), np.nan)
    for s in np.flatnonzero(np.isfinite(weight).sum(1) >= FEW):
        row = weight[s][np.isfinite(weight[s])]
        alike = np.abs(row[:, None] - row[None]) < EXACT * np.abs(row)[:, None]
        if alike.sum(1).max() >= max(2, len(row) / 2):
            found[s] = row[alike.sum(1).argmax()]
    return found


def _usual_line(x: Floats, y: Floats) -> tuple[float, float]:
    """The line through most of the points: the median of the slopes of pairs (Theil and Sen)."""
    few = np.linspace(0, len(x) - 1, min(len(x), int((2 * PAIRS) ** 0.5))).round().astype(int)
    i, j = np.triu_indices(len(few), 1)
    dx, dy = x[few[i]] - x[few[j]], y[few[i]] - y[few[j]]
    apart = np.abs(dx) > 1e-3 * max(float(np.ptp(x)), 1e-300)
    slope = float(np.median(dy[apart] / dx[apart])) if apart.any() else 0.0
    return slope, float(np.median(y - slope * x))

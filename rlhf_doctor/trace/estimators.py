"""Estimators of the KL from one token, and what a fit of them to what moved says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.table import Table, _logp, _put

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["CLOSE", "SLOPES", "STILL", "VALUES", "Fit", "Penalty", "old_logp", "reference_logp", "temperatures"]

CLOSE = 1e-2  # misfit over range: float32 leaves some 1e-4, another estimator some 1e-1
STILL = 1e-4  # of a moved log-probability: a coefficient below is rounding

VALUES: Mapping[str, Callable[[Any], Any]] = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: np.expm1(-x) + x,
    "|k1|": np.abs,
}
SLOPES: Mapping[str, Callable[[Any], Any]] = {
    "k2": lambda x: x,
    "k3": lambda x: -np.expm1(-x),
    "|k1|": np.sign,
}


@dataclass(frozen=True)
class Fit:
    """``coefficient`` · estimator explains what moved up to ``misfit`` of its range; ``rows``: of each sample alone."""

    estimator: str
    temperature: float  # at which the reference's log-probabilities explain it
    coefficient: float
    misfit: float
    rows: tuple[float, ...]

    @property
    def uneven(self) -> float:
        """Largest over smallest coefficient of the samples."""
        sizes = np.abs(self.rows)
        return float(sizes.max() / sizes.min()) if len(sizes) and sizes.min() > 0 else float("inf")


@dataclass(frozen=True)
class Penalty:
    """What the moved reference did in one place. ``fits`` are sorted, the best first; no fit where nothing moved."""

    there: bool
    fits: tuple[Fit, ...] = ()
    tokens: int = 0
    identical: bool = False  # not one bit moved

    @property
    def best(self) -> Fit | None:
        """The estimator that explains what moved, None where none does or several do."""
        good = [f for f in self.fits if f.misfit < CLOSE]
        if not good or (len(self.fits) > 1 and self.fits[1].misfit < 3 * good[0].misfit):
            return None
        return good[0]


def old_logp(table: Table) -> Floats:
    """Log-probabilities of the rollout, or those of the first update where these were not seen."""
    return np.where(np.isfinite(table["old_logp"]), table["old_logp"], table["logp"])


def reference_logp(table: Table, temperature: float) -> Floats:
    """The reference's log-probabilities at another temperature than the declared one, (S, T)."""
    if temperature == table.temperature:
        return table["ref_logp"]
    at = Table(table.samples, table.tokens, table.real, {}, [], [], {}, table.scores, "", [], temperature)
    for placed in table.placed:
        if placed.call.role == "reference" and temperature in placed.call.lse:
            _put(at, "ref_logp", placed, _logp(at, placed, temperature))
    return at["ref_logp"]


def temperatures(base: Table) -> list[float]:
    """At which the reference may have been read: the declared one, and 1."""
    seen = [p.call for p in base.placed if p.call.role == "reference"]
    return [base.temperature, *(t for t in (seen[0].lse if seen else ()) if t == 1.0 and t != base.temperature)]

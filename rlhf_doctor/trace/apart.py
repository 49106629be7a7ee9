"""Where the policy is not trained with returns − values: what explains both it and the critic's targets instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.anchor import Line, solve
from rlhf_doctor.trace.gains import Discount, discount, trusted
from rlhf_doctor.trace.recover import masked
from rlhf_doctor.trace.rescaled import Rates, rewards_of, values_ahead

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced

    Floats = NDArray[np.float64]

__all__ = ["Bootstrap", "OtherRates", "Scales", "bootstrap_apart", "rates_apart", "scales_apart"]

STRAIGHT = 2e-3  # of the range: float32 leaves 1e-5
BENT = 5e-3  # of the range: some times that is no rounding
BETTER = 0.1  # of what returns − values leave: what explains the weights must leave less
FEW = 10  # tokens of an update
APART = 0.05  # of a factor
DRIFT = 1.25  # between a batch's statistics and the next one's; a fault leaves the whole scale of the returns


@dataclass(frozen=True)
class Scales:
    """return = c · advantage + ``factor`` · value + constant, exactly; ``misfit`` is that of a factor of 1."""

    factor: float
    misfit: float
    tokens: int


@dataclass(frozen=True)
class OtherRates:
    """The discount and lambda that explain the policy's advantages, beside those of the critic's targets."""

    gamma: float
    lam: float
    misfit: float  # of returns − values
    left: float
    critic: Discount


@dataclass(frozen=True)
class Bootstrap:
    """Which responses count the value after their last token in the policy's advantages alone (or the targets alone).

    ``factor`` is that of the value, ``misfit`` what returns − values leave of the weights, ``left`` what remains.
    """

    ended: bool
    factor: float
    gamma: float
    misfit: float
    left: float
    samples: tuple[int, ...]


def _weights(traced: Traced) -> Floats:
    return np.where(trusted(traced)[:, None], masked(traced.base, traced.base["weight"]), np.nan)


def _values(traced: Traced) -> Floats:
    base = traced.base
    return masked(base, base["old_value"] if base.has("old_value") else base["value"])


def _span(weight: Floats, line: Line) -> float:
    return float(np.nanmax(weight / line.share) - np.nanmin(weight / line.share)) or 1.0


def _lines(traced: Traced, advantage: Floats, beside: Floats | None = None) -> Iterator[tuple[float, Line]]:
    """(largest residual over the weights' range, line) for each way of weighing rows; none that points down."""
    weight = _weights(traced)
    if not np.isfinite(weight).any():
        return
    for line in solve(traced.base, weight, advantage, beside):
        if all(a > 0 for a, _, _ in line.solved.values()):
            yield line.left / _span(weight, line), line


def _bent(traced: Traced) -> float | None:
    """How far the weights are from a line of returns − values; None where they are near one, or nothing is known."""
    left = min((left for left, _ in _lines(traced, masked(traced.base, traced.recovered.raw_advantages))), default=None)
    return left if left is not None and left > BENT else None


def scales_apart(traced: Traced) -> Scales | None:
    """Whether values are taken off at another scale than that of the targets that the critic is trained towards."""
    base, values, weight = traced.base, _values(traced), _weights(traced)
    returns = masked(base, traced.recovered.returns)
    known = np.isfinite(returns) & np.isfinite(values) & np.isfinite(weight)
    if _bent(traced) is None:
        return None
    lengths = np.maximum(base.real.sum(1), 1)[:, None]
    for share in (np.ones(weight.shape), np.broadcast_to(1 / lengths, weight.shape)):
        factors, misfit, tokens = [], np.inf, 0
        for window in np.unique(base["window"][known]):
            at = known & (base["window"] == window)
            found = _factor((weight / share)[at], values[at], returns[at])
            if found is None:
                continue
            factors.append(found[0])
            misfit, tokens = min(misfit, found[1]), tokens + int(at.sum())
        if factors and np.ptp(factors) < APART * abs(factors[0]) and misfit > BENT and np.isfinite(factors).all():
            factor = float(np.median(factors))
            if factor > APART and not 1 / DRIFT < factor < DRIFT:
                return Scales(factor, misfit, tokens)
    return None


def _factor(weight: Floats, values: Floats, returns: Floats) -> tuple[float, float] | None:
    """(that of the values, misfit of 1); a factor of NaN where no line explains the returns, None for too little."""
    span = float(np.ptp(returns)) if len(returns) else 0.0
    if len(returns) < FEW or not span or np.ptp(weight) <= 0 or np.ptp(values) <= 0:
        return None
    x = np.stack([weight / np.abs(weight).max(), values, np.ones(len(values))], 1)
    found, _, rank, _ = np.linalg.lstsq(x, returns, rcond=None)
    fixed = np.linalg.lstsq(x[:, [0, 2]], returns - values, rcond=None)[0]
    misfit = float(np.abs(returns - values - x[:, [0, 2]] @ fixed).max()) / span
    left = float(np.abs(returns - x @ found).max()) / span
    good = rank == 3 and found[0] > 0 and left < min(STRAIGHT, BETTER * misfit)
    return float(found[1]) if good else float("nan"), misfit


def rates_apart(traced: Traced, declared: Mapping[str, Any]) -> OtherRates | None:
    """Another γ or λ of the policy's advantages than declared, where the critic's targets have sound ones."""
    critic = _rates(traced, declared)
    gamma, lam = declared.get("gamma"), declared.get("lam")
    if critic is None or not isinstance(gamma, (int, float)) or not isinstance(lam, (int, float)):
        return None
    bent = _bent(traced)
    if bent is None:
        return None
    base, values = traced.base, _values(traced)
    assert critic.product is not None
    assert critic.gamma is not None
    rates = Rates(critic.gamma, critic.product / critic.gamma if critic.gamma else 0.0)
    rewards = rewards_of(base, traced.recovered.returns, values_ahead(base, base), rates)
    tried = [(float(gamma), float(lam)), *((g, n) for g in (0.0, float(gamma), 1.0) for n in (0.0, float(lam), 1.0))]
    for g, n in dict.fromkeys(tried):
        made = _discounted(traced, rewards, values, g, n)
        left = min((left for left, _ in _lines(traced, made)), default=1.0)
        if left < min(STRAIGHT, BETTER * bent):
            return None if (g, n) == (gamma, lam) else OtherRates(g, n, bent, left, critic)
    return None


def _rates(traced: Traced, declared: Mapping[str, Any]) -> Discount | None:
    """Of the critic's targets: as measured, else as declared where nothing speaks against it."""
    found = discount(traced, "target")
    gamma, lam = declared.get("gamma"), declared.get("lam")
    if found.product is not None and found.sound and found.gamma is not None:
        return found
    if not isinstance(gamma, (int, float)) or not isinstance(lam, (int, float)):
        return None
    if found.product is not None and abs(found.product - gamma * lam) > APART:
        return None
    return Discount(gamma * lam, float(gamma), 0.0, 0)


def _discounted(traced: Traced, rewards: Floats, values: Floats, gamma: float, lam: float) -> Floats:
    made = np.full(rewards.shape, np.nan)
    for s, length in enumerate(traced.base.real.sum(1)):
        running = 0.0
        for t in range(length - 1, -1, -1):
            ahead = values[s, t + 1] if t + 1 < length else 0.0
            running = rewards[s, t] + gamma * ahead - values[s, t] + gamma * lam * running
            made[s, t] = running
    return made


def bootstrap_apart(traced: Traced, declared: Mapping[str, Any]) -> Bootstrap | None:
    """Whether the value after the last token of some responses counts for the policy, or the critic, and not for both.

    Beside returns − values it adds γ V(s_L) (γλ)^(L-1-t) to token t of these responses.
    """
    base, rates = traced.base, _rates(traced, declared)
    if rates is None or rates.product is None or rates.gamma is None or not rates.gamma or not base.has("value_after"):
        return None
    bent = _bent(traced)
    if bent is None:
        return None
    lengths, after = base.real.sum(1), base["value_after"][:, 0]
    ended = np.array([s.ended for s in base.samples], dtype=bool)
    ahead = np.where(base.real, lengths[:, None] - 1 - np.arange(base.real.shape[1]), 0)
    raw, good = masked(base, traced.recovered.raw_advantages), trusted(traced) & np.isfinite(after)
    for kind in (False, True):
        chosen = (ended == kind) & np.isfinite(after)
        if (chosen & good).sum() < 2 or not (trusted(traced) & ~chosen).any():
            continue
        beside = np.where(chosen[:, None], np.nan_to_num(after)[:, None] * rates.product**ahead, 0.0)
        for left, line in _lines(traced, raw, beside):
            factors = [c / a for a, _, c in line.solved.values() if c]
            if left < min(STRAIGHT, BETTER * bent) and factors and np.ptp(np.abs(factors)) < APART:
                factor = float(np.median(factors))
                if abs(abs(factor) - rates.gamma) < APART * rates.gamma:
                    return Bootstrap(kind, factor, rates.gamma, bent, left, tuple(np.flatnonzero(chosen & good)))
    return None

"""The advantage estimator, measured: padding, what follows the last token, and the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.gains import FOLLOWS, NOTHING, PRECISE, Response, follows, score_gains, trusted, value_gains
from rlhf_doctor.trace.recover import _fit_windows, masked, return_response

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Terminal", "advantages_by_definition", "baseline", "crossed", "kl_part", "leaks", "recursion", "terminal"]


def leaks(traced: Traced) -> Floats:
    """How far the critic's target of each sample moves for one unit in every slot that is no response token, (S,).

    Raises:
        Unavailable: that was not tried, or no critic's target was seen.
    """
    traced.needs("poison")
    if not traced.base.has("value_gradient") or not np.isfinite(traced.recovered.returns).any():
        raise Unavailable("needs a critic whose target shows in its gradient")
    from rlhf_doctor.trace.interventions import POISON

    experiment = traced.experiments.done["poison"]
    moved = np.abs(masked(traced.base, return_response(traced.recovered, traced.experiments, experiment))) / POISON
    largest: Floats = np.where(np.isfinite(moved), moved, 0.0).max(1)
    return largest


@dataclass(frozen=True)
class Terminal:
    """How well the rewards of last tokens are explained by the score alone, and with ``name`` added.

    ``without`` and ``best`` are the largest residuals of reward = score + constant, over the range of that value.
    """

    samples: Ints
    without: float
    best: float
    name: str

    @property
    def bootstraps(self) -> bool:
        """Whether a value explains what the score does not."""
        return self.without > 5 * PRECISE and self.best < min(5 * PRECISE, 0.1 * self.without)

    @property
    def decided(self) -> bool:
        """Whether either explains the rewards."""
        return min(self.without, self.best) < 5 * PRECISE


def terminal(traced: Traced, product: float, gamma: float, *, ended: bool) -> Terminal | None:
    """Whether the last tokens of responses that have ended (or were cut) count a value of what follows.

    None where fewer than two such responses were seen.
    """
    base, made = traced.base, traced.recovered
    rows = np.arange(len(base.samples))
    last = np.maximum(base.real.sum(1) - 1, 0)
    left = made.returns[rows, last] - base.scores - kl_part(traced, product, gamma)[rows, last]
    kind = np.array([s.ended for s in base.samples], dtype=bool)
    known = trusted(traced) & np.isfinite(left) & (kind == ended)
    found: list[Terminal] = []
    candidates = (
        ("γ of the value of the state after it", gamma, base["value_after"][:, 0]),
        ("γ(1-λ) of the value of the state after it", gamma - product, base["value_after"][:, 0]),
        ("γ of the value of its own state", gamma, base["old_value"][rows, last]),
    )
    for name, weight, value in candidates:
        good = known & np.isfinite(value)
        span = float(np.ptp(value[good])) if good.sum() > 1 else 0.0
        if span > NOTHING:
            off, on = (float(np.ptp(left[good] - w * value[good])) / span for w in (0.0, weight))
            found.append(Terminal(np.flatnonzero(good), off, on, name))
    return min(found, key=lambda one: one.best, default=None)


def recursion(traced: Traced) -> Response | None:
    """A rollout value whose effect on the advantages is none of looking one state ahead; None where all are."""
    if not follows(traced.recovered):
        return None
    rows = value_gains(traced, "policy")
    strays: list[tuple[float, Response]] = []
    right: list[float] = []
    for row in rows:
        own, before = row.gain[row.at], row.gain[: row.at][::-1]
        if abs(own) < 2 * PRECISE:
            continue
        ahead = float(before[0]) if len(before) else 0.0
        uneven = len(before) > 2 and np.abs(before[1:-1] ** 2 - before[:-2] * before[2:]).max() > 5 * PRECISE
        if abs(own + 1) > 5 * PRECISE or not -5 * PRECISE < ahead < 1 + 5 * PRECISE or uneven:
            strays.append((-ahead / float(own), row))
        elif len(before):
            right.append(-ahead / float(own))
    # One that is as the others are, and in other units, weighs less and looks nowhere else.
    return next((row for x, row in strays if not any(abs(x - y) < 5 * PRECISE for y in right)), None)


def baseline(traced: Traced) -> tuple[float, float, Response, bool] | None:
    """(effect of V(s_u) on token u, of the score on the last token, where, whether something else explains the first).

    Values that the loop takes from other states or rows leave their own tokens alone too: then the critic's target does
    not answer to them either. None where either effect was not seen.
    """
    rows, scores = value_gains(traced, "policy"), score_gains(traced, "policy")
    if not rows or not scores:
        return None
    made = traced.recovered
    row = max(rows, key=lambda one: abs(one.gain[one.at]))
    score = float(scores[0].gain[np.abs(scores[0].gain).argmax()])
    answered = any(np.abs(one.gain[: one.at + 1]).max() > NOTHING for one in value_gains(traced, "target"))
    weight = masked(traced.base, traced.base["weight"]) / made.row_scale[:, None]
    whole = _fit_windows(weight, made.returns, traced.base)
    returns = bool(whole) and all(fit.misfit < FOLLOWS for fit in whole.values())
    subtracted = bool(score) and float((row.gain / score).min()) < -0.5  # from another token
    return float(row.gain[row.at]), score, row, subtracted or not (answered or returns)


def crossed(traced: Traced) -> tuple[float, float]:
    """(change of the values' gradient when only the policy's logits change, over its largest entry; that entry)."""
    base, changed = traced.base, traced.experiments.done["update logits"]
    gradient = np.abs(masked(base, base["value_gradient"]))
    moved = np.abs(masked(base, changed.moved(base, "value_gradient")))
    size = float(np.nan_to_num(gradient).max(initial=0.0))
    moved = np.where(np.isfinite(moved) & trusted(traced)[:, None], moved, 0.0)
    return (float(moved.max(initial=0.0)) / size if size else 0.0), size


def kl_part(traced: Traced, product: float, gamma: float) -> Floats:
    """What the KL adds to each token's reward, (S, T): the estimator that fits the tokens before the last one best.

    All 0 where nothing of the kind shows.
    """
    base, made = traced.base, traced.recovered
    values = base["old_value"] if base.has("old_value") else base["value"]
    nothing = np.zeros(base.tokens.shape)
    if not base.has("old_logp") or not base.has("ref_logp") or not np.isfinite(made.returns).any():
        return nothing
    ahead = (gamma - product) * values[:, 1:] + product * made.returns[:, 1:]
    rewards = np.where(base.real[:, :-1] & base.real[:, 1:], made.returns[:, :-1] - ahead, np.nan)
    k1 = masked(base, base["old_logp"] - base["ref_logp"])
    best, left = nothing, np.inf
    for k in (k1, k1**2, np.expm1(-k1) + k1, np.abs(k1)):
        known = np.isfinite(rewards) & np.isfinite(k[:, :-1]) & trusted(traced)[:, None]
        x, y = k[:, :-1][known], rewards[known]
        if len(x) < 2 or float(np.abs(x).max()) < 1e-6:
            continue
        weight = float((x * y).sum() / (x * x).sum())
        misfit = float(np.abs(y - weight * x).max())
        if misfit < left:
            best, left = np.nan_to_num(weight * k), misfit
    return best


def advantages_by_definition(
    traced: Traced, declared: Mapping[str, Any], product: float, gamma: float
) -> Floats | None:
    """Raw advantages of all samples, those not trained at the initial weights included, (S, T).

    From scores, rollout values and log-probabilities; None unless they give what was measured of the others.
    """
    base, made = traced.base, traced.recovered
    if not np.isfinite(base.scores).all() or not base.has("old_value"):
        return None
    lengths = base.real.sum(1)
    rows, last = np.arange(len(lengths)), np.maximum(lengths - 1, 0)
    clip = declared.get("reward_clip")
    scores = np.clip(base.scores, -clip, clip) if isinstance(clip, (int, float)) and clip > 0 else base.scores
    cut = np.array([not s.ended for s in base.samples], dtype=bool)
    kl = kl_part(traced, product, gamma)
    good = trusted(traced) & np.isfinite(made.returns[rows, last])
    left = made.returns[rows, last] - scores - kl[rows, last]
    penalty = declared.get("missing_eos_penalty")
    amount = -float(penalty) if isinstance(penalty, (int, float)) else 0.0
    if (good & cut).any():
        amount = float(np.median(left[good & cut]))
    rewards = kl.copy()
    rewards[rows, last] += scores + amount * cut
    found = np.full(base.tokens.shape, np.nan)
    values = base["old_value"]
    for s, length in enumerate(lengths):
        running = 0.0
        for t in range(length - 1, -1, -1):
            ahead = values[s, t + 1] if t + 1 < length else 0.0
            running = rewards[s, t] + gamma * ahead - values[s, t] + product * running
            found[s, t] = running
    known = good[:, None] & np.isfinite(made.raw_advantages) & base.real
    if not known.any() or not np.isfinite(found[base.real]).all():
        return None
    spread = float(np.ptp(made.raw_advantages[known])) or 1.0
    return found if float(np.abs(found - made.raw_advantages)[known].max()) < NOTHING * spread else None

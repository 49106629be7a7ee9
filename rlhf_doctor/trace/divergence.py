"""What the divergence from the reference does to rewards and losses, read off a step whose reference was moved.

With x = log π(a) − log π_ref(a) a penalty β f(x) in the reward moves the reward by −β Δf, and a term β f(x) of the loss
moves the policy's weight by −β Δf'. Which f and which β these are is what is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.recover import _line, masked, policy_response, return_response
from rlhf_doctor.trace.table import Table, _logp, _put

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiment

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["CLOSE", "VALUES", "Divergence", "Fit", "Penalty", "Scale", "divergence", "old_logp", "reference_logp"]

CLOSE = 1e-2  # misfit over range: float32 leaves some 1e-4, another estimator some 1e-1
STILL = 1e-4  # of a moved log-probability: a coefficient below is rounding
WITHIN = 0.06  # nats: a log-probability moved less than this is within the usual clip ranges

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


@dataclass(frozen=True)
class Scale:
    """What one unit of loss per token is worth in the policy's weights, (S, T), and the constant beside advantages."""

    unit: Floats
    constant: float | None  # mean pull on every trained token that no advantage explains, in advantage's units


@dataclass
class Divergence:
    """``reward`` and ``loss`` are None where it could not be seen, and ``reasons`` says why.

    Attributes:
        pull: how the loss's pull on a token falls with its log-probability, whatever it is pulled to: β of a k2 or k3
            term towards any anchor; None where unknown.
        constant: the pull that is the same everywhere: −β of a k1 term in the loss; None where unknown.
    """

    reward: Penalty | None = None
    loss: Penalty | None = None
    pull: float | None = None
    constant: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def old_logp(table: Table) -> Floats:
    """Log-probabilities of the rollout, or those of the first update where these were not seen."""
    return np.where(np.isfinite(table["old_logp"]), table["old_logp"], table["logp"])


def reference_logp(table: Table, temperature: float) -> Floats:
    """The reference's log-probabilities at another temperature than the declared one, (S, T)."""
    if temperature == table.temperature:
        return table["ref_logp"]
    at = Table(
        table.samples, table.tokens, table.real, {}, [], [], table.prompt_known, {}, table.scores, "", [], temperature
    )
    for placed in table.placed:
        if placed.call.role == "reference" and temperature in placed.call.lse:
            _put(at, "ref_logp", placed, _logp(at, placed, temperature))
    return at["ref_logp"]


def divergence(traced: Traced, declared: Mapping[str, Any]) -> Divergence:
    """What the reference does, as far as the experiments tell."""
    made, moved = Divergence(), traced.experiments.done.get("rollout outputs")
    base, scale = traced.base, _scale(traced, declared)
    if moved is None or not base.has("ref_logp"):
        reasons = traced.experiments.reasons
        why = reasons.get("rollout outputs") or reasons.get("*") or "the reference was not seen on the samples"
        made.reasons = {"reward": why, "loss": why}
    else:
        pushed = masked(base, moved.moved(base, "ref_logp"))
        chosen = np.isfinite(pushed) & (pushed != 0)
        if not chosen.any():
            made.reasons = dict.fromkeys(
                ("reward", "loss"), "the reference's outputs on the samples could not be moved"
            )
        else:
            made.reward = _in_reward(traced, moved, chosen, made.reasons)
            made.loss = _in_loss(traced, moved, chosen, scale, made.reasons)
    if scale is not None:
        made.constant, made.pull = scale.constant, _pull(traced, scale)
    return made


# ---- in the reward ---------------------------------------------------------------------------------------------------


def _in_reward(traced: Traced, moved: Experiment, chosen: Bools, reasons: dict[str, str]) -> Penalty | None:
    found, base = traced.recovered, traced.base
    if not np.isfinite(found.returns).any():
        reasons["reward"] = found.reasons.get("returns", "no critic was trained, so no rewards can be read")
        return None
    returns = _first_only(traced, return_response(found, traced.experiments, moved))
    decay = found.gamma_lam if found.gamma_lam is not None else found.gamma_lam_of_policy
    onto = chosen & np.isfinite(returns)
    if decay is None or not onto.any():
        reasons["reward"] = (
            "the discount of the rewards could not be measured" if decay is None else "no target was seen"
        )
        return None
    rewards = returns.copy()
    for s, length in enumerate(base.real.sum(1)):
        rewards[s, : max(length - 1, 0)] -= decay * returns[s, 1:length]
    onto &= np.isfinite(rewards)
    gain = _gain_of_scores(traced) if traced.recovered.edges else 1.0
    raw = masked(base, moved.moved(base, "value_gradient"))[onto]
    return _penalty(traced, moved, -rewards / gain, onto, VALUES, bool(len(raw)) and bool((raw == 0).all()))


def _gain_of_scores(traced: Traced) -> float:
    """What a unit of the score is worth in rewards: other than 1 where rewards are scaled as a whole."""
    edge = traced.recovered.edges.get("reward → value target")
    gain = None if edge is None else edge.gain
    return gain if gain is not None and gain > 0.05 and abs(gain - 1) > 0.01 else 1.0


def _first_only(traced: Traced, values: Floats) -> Floats:
    """Where updates cannot be held back, only what is read before the first of them counts."""
    if not traced.experiments.by_hand:
        return values
    return np.where(traced.base["value_window"] == 0, values, np.nan)


# ---- in the loss -----------------------------------------------------------------------------------------------------


def _in_loss(
    traced: Traced, moved: Experiment, chosen: Bools, scale: Scale | None, reasons: dict[str, str]
) -> Penalty | None:
    found, base = traced.recovered, traced.base
    if not base.has("weight"):
        reasons["loss"] = "no gradient was seen at the policy's head"
        return None
    weights = masked(base, moved.moved(base, "weight"))
    returns = return_response(found, traced.experiments, moved)
    still = bool((weights[chosen & np.isfinite(weights)] == 0).all())
    if still:
        return Penalty(False, tokens=int((chosen & np.isfinite(weights)).sum()), identical=True)
    left = policy_response(found, traced.experiments, moved)
    if _explained(traced):
        left = left - np.where(np.isfinite(returns), returns, 0.0)
    if traced.experiments.by_hand:
        left = np.where(base["window"] == 0, left, np.nan)
    onto = chosen & np.isfinite(left)
    if not onto.any():
        reasons["loss"] = "no token with a moved reference was trained"
        return None
    pushed = float(np.abs(masked(base, moved.moved(base, "ref_logp"))[onto]).max())
    if _explained(traced) and float(np.abs(left[onto]).max()) < STILL * pushed:
        return Penalty(False, tokens=int(onto.sum()))
    if scale is None:
        reasons["loss"] = "what the policy is trained with follows from no known advantage, so the scale is unknown"
        return None
    return _penalty(traced, moved, -left / scale.unit, onto, SLOPES, False)


def _explained(traced: Traced) -> bool:
    """Whether weights are given in units of returns."""
    fits = traced.recovered.fits
    return bool(fits) and all(f.slope and f.misfit < CLOSE for f in fits.values())


def _scale(traced: Traced, declared: Mapping[str, Any]) -> Scale | None:
    return _scale_with_critic(traced, declared) if traced.recovered.fits else _scale_of_groups(traced)


def _scale_with_critic(traced: Traced, declared: Mapping[str, Any]) -> Scale | None:
    """Weights are s (A − m) / σ − s β f': in units of returns, a unit of loss is σ."""
    found, base = traced.recovered, traced.base
    if not _explained(traced):
        return None
    raw = masked(base, found.raw_advantages)
    known = raw[np.isfinite(raw)]
    taken = float(np.median([-f.intercept / f.slope for f in found.fits.values()]))
    deviation, mean = float(known.std(ddof=1)), float(known.mean())
    if traced.experiments.by_hand or len(known) < base.real.sum():
        return None
    whitened, plain = abs(taken - mean) < 0.5 * deviation, abs(taken) < 0.5 * deviation
    said = declared.get("whiten_advantages")
    if isinstance(said, bool):
        whitened, plain = said, not said
    if whitened == plain:
        return None
    unit = _deviation(traced, known) if whitened else 1.0
    constant = (taken - (mean if whitened else 0.0)) / unit
    return Scale(np.full(base.tokens.shape, unit), constant)


def _deviation(traced: Traced, known: Floats) -> float:
    """The standard deviation with n or n − 1 below it: which, shows where losses are plain means."""
    base, both = traced.base, [float(known.std(ddof=1)), float(known.std(ddof=0))]
    for window, fit in traced.recovered.fits.items():
        rows = int((base["window"] == window).any(1).sum())
        for count in (fit.count, rows):
            seen = 1 / (fit.slope * count)
            near = min(both, key=lambda d: abs(d - seen))
            if abs(near - seen) < 1e-3 * near:
                return near
    return both[0]


def _scale_of_groups(traced: Traced) -> Scale | None:
    """Without a critic the advantage is one number a response: its score beside those of its prompt or its batch."""
    base = traced.base
    weight, lengths = masked(base, base["weight"]), np.maximum(base.real.sum(1), 1)
    known = np.isfinite(weight) & (base["window"] >= 0)
    if not known.any() or not np.isfinite(base.scores).all():
        return None
    best: tuple[float, Floats, float] | None = None
    for share in _shares(base, lengths, known):
        for advantage in _relative(base):
            each = np.broadcast_to(advantage[:, None], weight.shape)
            x, y = each[known], (weight / share)[known]
            if np.ptp(x) <= 0 or np.ptp(y) <= 0:
                continue
            slope, intercept = _line(x, y)
            misfit = float(np.abs(slope * x + intercept - y).max() / np.ptp(y))
            if slope > 0 and misfit < CLOSE and (best is None or misfit < best[0]):
                best = misfit, share * slope, -intercept / slope
    return None if best is None else Scale(best[1], best[2])


def _shares(base: Table, lengths: Any, known: Bools) -> list[Floats]:
    """What a token may weigh in its update: one of all tokens, of its row's, or of the rows."""
    window = base["window"]
    tokens, rows = np.ones(window.shape), np.ones(window.shape)
    for number in np.unique(window[known]):
        inside = known & (window == number)
        tokens[inside], rows[inside] = inside.sum(), inside.any(1).sum()
    return [1 / tokens, 1 / (rows * lengths[:, None]), 1 / rows]


def _relative(base: Table) -> list[Floats]:
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


def _pull(traced: Traced, scale: Scale) -> float | None:
    """β of a term that pulls back to anywhere: w' − w e^δ = −β s δ for a log-probability moved by δ in the update.

    The surrogate's gradient grows with the ratio e^δ within its clip range; what a penalty adds is the rest.
    """
    moved, base = traced.experiments.done.get("update logits"), traced.base
    if moved is None:
        return None
    with np.errstate(over="ignore"):
        step = masked(base, moved.moved(base, "logp"))
        left = masked(base, moved.table["weight"]) - masked(base, base["weight"]) * np.exp(step)
    if _explained(traced):
        slopes = np.full(step.shape, np.nan)
        for window, fit in traced.recovered.fits.items():
            slopes[base["window"] == window] = fit.slope
        left = left / traced.recovered.row_scale[:, None] / slopes
    onto = np.isfinite(left) & (np.abs(step) > 1e-3) & (np.abs(step) < WITHIN) & np.isfinite(scale.unit)
    if onto.sum() < 4:
        return None
    return float(np.median(-(left / scale.unit / np.where(onto, step, 1.0))[onto]))


# ---- fitting ---------------------------------------------------------------------------------------------------------


def _penalty(
    traced: Traced, moved: Experiment, grown: Floats, onto: Bools, kinds: Mapping[str, Callable[[Any], Any]], same: bool
) -> Penalty:
    """Fit every estimator to how the penalty grew, (S, T), at the tokens of ``onto``."""
    base = traced.base
    y, logp = grown[onto], old_logp(base)
    pushed = np.abs(masked(base, moved.moved(base, "ref_logp")))[onto].max()
    if float(np.abs(y).max()) < STILL * pushed:
        return Penalty(False, tokens=len(y), identical=same)
    rows = np.broadcast_to(np.arange(len(base.samples))[:, None], onto.shape)[onto]
    fits = []
    for temperature in _temperatures(base):
        before = logp - reference_logp(base, temperature)
        after = logp - reference_logp(moved.table, temperature)
        made = {name: (f(after) - f(before))[onto] for name, f in kinds.items()}
        if kinds is VALUES:
            made["full"] = _full(base, moved, temperature)[onto]
        fits += [f for name, x in made.items() if (f := _fit(name, temperature, x, y, rows)) is not None]
    return Penalty(True, tuple(sorted(fits, key=lambda f: f.misfit)), len(y))


def _temperatures(base: Table) -> list[float]:
    seen = [p.call for p in base.placed if p.call.role == "reference"]
    return [base.temperature, *(t for t in (seen[0].lse if seen else ()) if t == 1.0 and t != base.temperature)]


def _full(base: Table, moved: Experiment, temperature: float) -> Floats:
    """How KL(π ‖ π_ref) over the whole vocabulary grew: log Σ_v q_v e^(pushed v) − π(a) push."""
    push = np.where(np.isfinite(base["ref_logp"]), moved.amounts, 0.0) / temperature
    rose = reference_logp(moved.table, temperature) - reference_logp(base, temperature)
    return (push - rose) - np.exp(old_logp(base)) * push


def _fit(name: str, temperature: float, x: Floats, y: Floats, rows: Any) -> Fit | None:
    """y = β x, or β of each sample where that explains much more."""
    known = np.isfinite(x)
    x, y, rows = x[known], y[known], rows[known]
    if not len(x) or float(np.abs(x).max()) == 0:
        return None
    coefficient = float((x * y).sum() / (x * x).sum())
    each = np.full(len(x), coefficient)
    by_row = []
    for row in np.unique(rows):
        at = rows == row
        if (x[at] ** 2).sum() > 1e-2 * (x * x).max():
            by_row.append(float((x[at] * y[at]).sum() / (x[at] ** 2).sum()))
            each[at] = by_row[-1]
    span = float(np.abs(y).max())
    misfit, alone = (float(np.abs(y - b * x).max()) / span for b in (coefficient, each))
    uneven = alone < CLOSE < misfit and len(x) > 2 * len(by_row)
    return Fit(name, temperature, coefficient, alone if uneven else misfit, tuple(by_row) if uneven else ())

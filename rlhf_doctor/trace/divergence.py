"""What the divergence from the reference does to rewards and losses, read off a step whose reference was moved.

With x = log π(a) − log π_ref(a) a penalty β f(x) in the reward moves the reward by −β Δf, and a term β f(x) of the loss
moves the policy's weight by −β Δf'. Which f and which β these are is what is fitted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.instruments.rates import number
from rlhf_doctor.trace.anchor import anchor
from rlhf_doctor.trace.estimators import CLOSE, STILL, VALUES, Fit, Penalty, old_logp, reference_logp, temperatures
from rlhf_doctor.trace.gains import critic_free
from rlhf_doctor.trace.recover import masked, return_response
from rlhf_doctor.trace.shaped import kl_in_loss, shaped_kl

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiment
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Divergence", "divergence", "shaped_by_the_update"]


@dataclass
class Divergence:
    """``reward`` and ``loss`` are None where it could not be seen, and ``reasons`` says why.

    Attributes:
        pull: how the loss's pull on a token falls with its log-probability, whatever it is pulled to: β of a k2 or k3
            term towards any anchor; None where unknown.
        to_zero: whether a term of the loss has 0 in place of the reference's log-probabilities.
        constant: the pull that is the same everywhere: −β of a k1 term in the loss; None where unknown.
    """

    reward: Penalty | None = None
    loss: Penalty | None = None
    pull: float | None = None
    constant: float | None = None
    to_zero: bool = False
    reasons: dict[str, str] = field(default_factory=dict)


def divergence(traced: Traced, declared: Mapping[str, Any]) -> Divergence:
    """What the reference does, as far as the experiments tell."""
    made, moved = Divergence(), traced.experiments.done.get("rollout outputs")
    base = traced.base
    if moved is None or not base.has("ref_logp"):
        reasons = traced.experiments.reasons
        why = reasons.get("rollout outputs") or reasons.get("*") or "the reference was not seen on the samples"
        made.reasons = {"reward": why, "loss": why}
        return made
    pushed = masked(base, moved.moved(base, "ref_logp"))
    chosen = np.isfinite(pushed) & (pushed != 0)
    if not chosen.any():
        why = "the reference's outputs on the samples could not be moved"
        made.reasons = {"reward": why, "loss": why}
        return made
    beside = None
    if critic_free(traced):
        made.reward, beside, why = shaped_kl(traced, moved, declared)
        made.reasons |= {"reward": why} if why else {}
    else:
        made.reward = _in_reward(traced, moved, chosen, declared, made.reasons)
    found = anchor(traced, moved, chosen, declared)
    if found.penalty is None and beside is None and critic_free(traced):
        beside = kl_in_loss(traced, moved, declared)
    made.loss, made.pull, made.constant = beside or found.penalty, found.pull, found.constant
    made.to_zero = found.to_zero
    if found.reason and made.loss is None:
        made.reasons["loss"] = found.reason
    return made


# ---- in the reward ---------------------------------------------------------------------------------------------------


def _in_reward(
    traced: Traced, moved: Experiment, chosen: Bools, declared: Mapping[str, Any], reasons: dict[str, str]
) -> Penalty | None:
    found, base = traced.recovered, traced.base
    if not np.isfinite(found.returns).any():
        reasons["reward"] = found.reasons.get("returns", "no critic was trained, so no rewards can be read")
        return None
    returns = _first_only(traced, return_response(found, traced.experiments, moved))
    decay = found.gamma_lam if found.gamma_lam is not None else found.gamma_lam_of_policy
    if decay is None and found.scores_shared:
        gamma, lam = number(declared.get("gamma")), number(declared.get("lam"))
        decay = None if gamma is None or lam is None else gamma * lam
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
    if not onto.any():
        reasons["reward"] = "too few of the critic's targets show to tell what a token's reward is"
        return None
    gains = _gains_of_scores(traced) if traced.recovered.edges else [1.0]
    raw = masked(base, moved.moved(base, "value_gradient"))[onto]
    same = bool(len(raw)) and bool((raw == 0).all())
    made = [_penalty(traced, moved, -rewards / gain, onto, same) for gain in dict.fromkeys([1.0, *gains])]
    declared_one = (x for x in made if x.best is not None and _is(x.best.coefficient, declared.get("kl_coef")))
    return next(declared_one, made[-1])  # the scores alone may be normalised, and the KL taken off afterwards


def shaped_by_the_update(traced: Traced, changed: Experiment, declared: Mapping[str, Any]) -> bool:
    """Whether a KL in the rewards explains how the critic's targets follow the log-probabilities of the update.

    Where a step has one pass of the policy alone, it is in that pass's log-probabilities.
    """
    base, found = traced.base, traced.recovered
    measured = found.gamma_lam if found.gamma_lam is not None else found.gamma_lam_of_policy
    gamma, lam = (number(declared.get(name)) or 1.0 for name in ("gamma", "lam"))
    if not base.has("ref_logp"):
        return False
    before, after = (masked(base, t["logp"]) - base["ref_logp"] for t in (base, changed.table))
    targets = return_response(found, traced.experiments, changed)
    decay = gamma * lam if measured is None else measured
    rewards = targets.copy()
    rewards[:, :-1] -= decay * np.where(base.real[:, 1:], targets[:, 1:], 0.0)
    for value in VALUES.values():
        x = value(after) - value(before)
        known = np.isfinite(x) & np.isfinite(rewards)
        if _off_a_line(x[known], rewards[known]) < CLOSE:
            return True
    return False


def _off_a_line(x: Floats, y: Floats) -> float:
    """The largest residual from a line through 0, over the largest of y; endless where there is too little."""
    if len(x) < 4 or not (x * x).sum() or not np.abs(y).max():
        return float("inf")
    return float(np.abs(y - (x * y).sum() / (x * x).sum() * x).max() / np.abs(y).max())


def _is(measured: float, declared: Any) -> bool:
    return isinstance(declared, (int, float)) and abs(measured - declared) < 0.02 * abs(declared)


def _gains_of_scores(traced: Traced) -> list[float]:
    """What a unit of the score may be worth in rewards: other than 1 where rewards are scaled as a whole."""
    found = traced.recovered
    edge = found.edges.get("reward → value target")
    gain = _scale_of_scores(traced) if found.scores_shared else None if edge is None else edge.gain
    if gain is None or gain <= 0.05 or abs(gain - 1) <= 0.01:
        return [1.0]
    behind = [r.gamma * r.lam for r in found.rates if r is not None and r.later]
    return [*(gain / share for share in behind if share), gain]  # that of a score one slot after the last token


def _scale_of_scores(traced: Traced) -> float | None:
    """What the last rewards are of the scores where a batch's deviation divides both: a change would move that too."""
    base, rewards = traced.base, traced.recovered.rewards
    if rewards is None:
        return None
    rows, last = np.arange(len(base.samples)), np.maximum(base.real.sum(1) - 1, 0)
    y, ended = rewards[rows, last], np.array([float(s.ended) for s in base.samples])
    known = np.isfinite(y) & np.isfinite(base.scores)
    x = np.stack([base.scores, ended, np.ones(len(ended))], 1)[known]
    if len(x) < 4 or np.ptp(x[:, 0]) == 0:
        return None
    slope = float(np.linalg.lstsq(x, y[known], rcond=None)[0][0])
    return slope if slope > 0 else None


def _first_only(traced: Traced, values: Floats) -> Floats:
    """Where updates cannot be held back, only what is read before the first of them counts."""
    if not traced.experiments.by_hand:
        return values
    return np.where(traced.base["value_window"] == 0, values, np.nan)


def _penalty(traced: Traced, moved: Experiment, grown: Floats, onto: Bools, same: bool) -> Penalty:
    """Fit every estimator to how the penalty grew, (S, T), at the tokens of ``onto``."""
    base = traced.base
    y, logp = grown[onto], old_logp(base)
    pushed = np.abs(masked(base, moved.moved(base, "ref_logp")))[onto].max()
    if float(np.abs(y).max()) < STILL * pushed:
        return Penalty(False, tokens=len(y), identical=same)
    rows = np.broadcast_to(np.arange(len(base.samples))[:, None], onto.shape)[onto]
    fits = []
    for temperature in temperatures(base):
        before = logp - reference_logp(base, temperature)
        after = logp - reference_logp(moved.table, temperature)
        made = {name: (f(after) - f(before))[onto] for name, f in VALUES.items()}
        made["full"] = _full(base, moved, temperature)[onto]
        fits += [f for name, x in made.items() if (f := _fit(name, temperature, x, y, rows)) is not None]
    return Penalty(True, tuple(sorted(fits, key=lambda f: f.misfit)), len(y))


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

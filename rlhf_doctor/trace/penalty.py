"""What the last token's reward holds besides the score: penalties for texts without an end, and KL of masked slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.calls import CANDIDATES
from rlhf_doctor.trace.divergence import Divergence
from rlhf_doctor.trace.estimators import VALUES, old_logp, reference_logp
from rlhf_doctor.trace.gains import critic_free, trusted
from rlhf_doctor.trace.groups import groups_of
from rlhf_doctor.trace.recover import masked, return_response
from rlhf_doctor.trace.shaped import of_scores, shaped_leak

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Leak", "Surplus", "kl_leak", "surplus"]

PLANE = 1e-3  # of the rewards' range: float32 leaves 1e-6
NEAR = 0.02  # of a gain


@dataclass(frozen=True)
class Surplus:
    """Per sample, (S,): what the reward at the last token holds beside the ``score`` and its KL, NaN where unknown."""

    amount: Floats
    score: Floats
    ended: Bools
    slots: Ints  # after the response
    decay: float | None
    reason: str = ""


@dataclass(frozen=True)
class Leak:
    """Numbers that moved on samples whose reference was moved in masked slots alone, and how many could have.

    ``rewards`` and ``rewards_tokens``: the critic's targets at response tokens; ``gradient``: policy gradient in masked
    slots, ``gradient_before`` in the unchanged run; ``steady``: reward per masked slot that the unchanged run shows.
    """

    rewards: float
    rewards_tokens: int
    gradient: float
    gradient_before: float
    where: str
    steady: float | None
    steady_samples: int
    samples: int
    slots: int  # masked ones of a reference pass that were moved
    later: float  # policy gradient in masked slots in a second step, of a run that has none in its first


def surplus(traced: Traced, declared: Mapping[str, Any], terms: Divergence) -> Surplus:
    """Read the reward at the last token of every response off the critic's target there, or off the weights."""
    base, found = traced.base, traced.recovered
    lengths = base.real.sum(1)
    rows, last = np.arange(len(lengths)), np.maximum(lengths - 1, 0)
    ended = np.array([s.ended for s in base.samples], dtype=bool)
    wide = declared.get("response_length")
    wide = wide if isinstance(wide, int) and wide >= base.tokens.shape[1] else base.tokens.shape[1]
    score = base.scores.copy()
    clip = declared.get("reward_clip")
    if isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0:
        score = np.clip(score, -clip, clip)
    nothing = np.full(len(lengths), np.nan)
    moved = traced.experiments.done.get("all scores")

    def said(reason: str) -> Surplus:
        return Surplus(nothing, score, ended, wide - lengths, found.gamma_lam, reason)

    if critic_free(traced) and declared.get("missing_eos_penalty"):
        amount = _of_weights(traced, score, ended, float(declared["missing_eos_penalty"]))
        if amount is not None:
            return Surplus(amount, score, ended, wide - lengths, None)
    if moved is None or not np.isfinite(found.returns).any():
        reasons = traced.experiments.reasons
        missing = reasons.get("all scores") or found.reasons.get("returns") or reasons.get("*")
        return said(missing or "the rewards could not be read")
    response = return_response(found, traced.experiments, moved)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = response[rows, last] / np.where(moved.amounts != 0, moved.amounts, np.nan)
    if traced.experiments.by_hand:
        gain = np.where(base["value_window"][rows, last] == 0, gain, np.nan)
    reward, taken = found.returns[rows, last], np.zeros(len(last))  # what the KL takes from it
    kl = terms.reward.best if terms.reward is not None and terms.reward.there else None
    if kl is not None and kl.estimator in VALUES:
        apart = (old_logp(base) - reference_logp(base, kl.temperature))[rows, last]
        taken = kl.coefficient * np.where(np.isfinite(apart), VALUES[kl.estimator](apart), 0.0)
    target = reward + taken
    amount = np.where(np.abs(gain - 1) < NEAR, target - score, np.nan)
    gamma, decay = found.gamma or declared.get("gamma"), found.gamma_lam
    if isinstance(gamma, (int, float)) and gamma and decay:  # the score stands in the slot after the last token
        after = base["value_after"][:, 0] if base.tokens.shape[1] else nothing
        later = (target - (gamma - decay) * after) / decay - score
        amount = np.where(np.isfinite(amount) | ~(np.abs(gain - decay) < NEAR), amount, later)
    if not np.isfinite(amount).any():
        penalty = declared.get("missing_eos_penalty")
        level = np.ones((len(score), 1))
        scaled, felt = None, gain[np.isfinite(gain) & (gain != 0)]
        unit = float(np.median(felt)) if len(felt) else 1.0
        for each in (target, reward / unit + taken):  # the scores alone are scaled, or the rewards as a whole
            if penalty and scaled is None:
                scaled = _of_scaled(each, score, ended, lengths, float(penalty), level)
        if scaled is None:
            return said("the scores are scaled or placed elsewhere on their way to the rewards")
        amount = scaled
    return Surplus(amount, score, ended, wide - lengths, decay)


def _of_weights(traced: Traced, score: Floats, ended: Bools, penalty: float) -> Floats | None:
    """The same from the weights of the last tokens, in a loop without a critic that takes off means and no more."""
    base, unit = traced.base, of_scores(traced)
    if unit is None or unit.baseline == "discounted":
        return None
    lengths = base.real.sum(1)
    last = np.maximum(lengths - 1, 0)
    weight = (masked(base, base["weight"]) / unit.scale[:, None])[np.arange(len(last)), last]
    groups = groups_of(base, None) if unit.baseline == "group" else [list(range(len(score)))]
    level = np.zeros((len(score), len(groups)))
    for column, rows in enumerate(groups):
        level[rows, column] = 1.0
    known = trusted(traced) & np.isfinite(weight)
    seen = level[known][:, level[known].any(0)]
    made = _of_scaled(weight[known], score[known], ended[known], lengths[known], penalty, seen)
    if made is None:
        return None
    found = np.full(len(score), np.nan)
    found[known] = made
    return found


def _of_scaled(
    target: Floats, score: Floats, ended: Bools, lengths: Ints, penalty: float, level: Floats
) -> Floats | None:
    """What was added to each score before all were scaled and shifted together; None where no simple rule fits.

    A rule says who loses the penalty: those that did not end, those too that are shorter than the longest, or none.
    Under the right one rewards lie on a plane over the scores and that, with the penalty's ratio of slopes; ``level``
    (S, G) are the rows that share a constant.
    """
    few = len(score) < 5 + level.shape[1]
    if not (np.isfinite(target) & np.isfinite(score)).all() or few or ended.all() or not ended.any():
        return None
    full, none = lengths == lengths.max(), np.zeros(len(score), dtype=bool)
    fits: list[tuple[float, Floats]] = []
    for flag in (~ended, ~(full & ended), none):  # taken from the ended alone is a bonus to the others, and a shift
        columns = np.stack([score, flag.astype(float), *level.T], 1)
        solved, *_ = np.linalg.lstsq(columns, target, rcond=None)
        left = float(np.abs(columns @ solved - target).max()) / max(float(np.ptp(target)), 1e-12)
        right = not flag.any() or (solved[0] and abs(abs(solved[1] / solved[0] / penalty) - 1) < NEAR)
        if right and flag.sum() < len(flag) - 1:
            sign = np.sign(solved[1] / solved[0]) if flag.any() else 0.0
            fits.append((left, flag * sign * abs(penalty)))
    best = min(fits, key=lambda fit: fit[0], default=None)
    return best[1] if best is not None and best[0] < PLANE else None


def kl_leak(traced: Traced, found: Surplus) -> Leak | None:
    """What the reference does in slots that hold no response token; None where it was not moved there."""
    moved, base = traced.experiments.done.get("rollout outputs"), traced.base
    steady, steady_samples = _steady(found)
    if moved is None:
        return None

    def still(name: str) -> Bools:
        away = masked(base, moved.moved(base, name))
        return np.asarray(~(np.isfinite(away) & (away != 0)).any(1), dtype=bool)

    chosen = moved.touched & still("ref_logp") & still("old_value")
    response = return_response(traced.recovered, traced.experiments, moved)
    if traced.experiments.by_hand:
        response = np.where(base["value_window"] == 0, response, np.nan)
    inside, others = np.isfinite(response) & chosen[:, None], np.isfinite(response) & ~moved.touched[:, None]
    largest = float(np.abs(response[inside]).max()) if inside.any() else 0.0
    common = float(np.abs(response[others]).max()) if others.any() else 0.0
    rewards, tokens = max(largest - 3 * common, 0.0), int(inside.sum())
    if critic_free(traced):
        rewards, tokens = shaped_leak(traced, moved)
    best = (0.0, 0.0, "")
    for where in ("after",) if any(base.earlier) else ("after", "prompt"):
        now, before = (t.outside.get(f"policy_{where}", np.zeros(len(chosen))) for t in (moved.table, base))
        grown = float((now - before)[chosen].sum()) if len(now) == len(chosen) == len(before) else 0.0
        if grown > best[0]:
            best = grown, float(before[chosen].sum()), "after the response" if where == "after" else "in the prompt"
    return Leak(
        rewards, tokens, best[0], best[1], best[2], steady, steady_samples,
        int(chosen.sum()), _slots(base, chosen), _later(traced),
    )  # fmt: skip


def _slots(base: Table, chosen: Bools) -> int:
    lengths, count = base.real.sum(1), 0
    for placed in base.placed:
        if placed.call.role == "reference" and placed.call.candidates is not None:
            at = np.maximum(placed.sample, 0)
            away = (placed.state < 0) | (placed.state >= lengths[at])
            following = placed.call.candidates[:, CANDIDATES.index(1)].cpu().numpy() >= 0
            count += int(((placed.sample >= 0) & chosen[at] & away & following).sum())
    return count


def _later(traced: Traced) -> float:
    """Once the policy has left its reference, a KL of masked slots has a gradient there."""
    base, second = traced.base, traced.experiments.second
    if second is None or any(base.outside.get(f"policy_{w}", np.zeros(1)).any() for w in ("after", "prompt")):
        return 0.0
    if any(p.altered and p.call.role == "policy" and p.call.backwards for p in second.placed):
        return 0.0  # texts that the second step did not draw: which of their slots are masked is not known
    return float(sum(second.outside.get(f"policy_{w}", np.zeros(1)).sum() for w in ("after", "prompt")))


def _steady(found: Surplus) -> tuple[float | None, int]:
    """The reward of each masked slot, where the surplus of ended responses is that of equal, discounted ones."""
    decay, known = found.decay, np.isfinite(found.amount) & found.ended
    if not decay or known.sum() < 3 or len(np.unique(found.slots[known])) < 2:
        return None, 0
    slots, y = found.slots[known].astype(float), found.amount[known]
    x = slots if abs(decay - 1) < 1e-6 else decay * (1 - decay**slots) / (1 - decay)
    if not (x * x).sum():
        return None, 0
    each = float((x * y).sum() / (x * x).sum())
    if np.abs(y - each * x).max() > 1e-2 * np.abs(y).max() or abs(each) < 1e-4:
        return None, 0
    return each, int(known.sum())

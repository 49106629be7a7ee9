"""Where the scores enter the rewards, and whether they arrive at the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.advantage import kl_part
from rlhf_doctor.trace.gains import (
    NOTHING,
    PRECISE,
    STILL,
    coupled,
    critic_free,
    follows,
    moved_share,
    ratios_ahead,
    score_gains,
    trusted,
    value_gains,
)
from rlhf_doctor.trace.recover import masked, return_response

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = ["Placement", "Reach", "entry", "placement", "reach", "read_elsewhere"]


ANSWERS = 0.5  # of the largest answer: other samples only move a mean or a deviation


@dataclass(frozen=True)
class Placement:
    """Where the scores enter. ``kind``: last, early, late, lost, spread, unknown; ``offset`` from the last token."""

    kind: str
    offset: int
    sample: int
    gain: Floats
    column: int = -1


def placement(traced: Traced, declared: float | None) -> Placement:
    """Where the scores enter the rewards, from what each of them does to its tokens.

    γλ is what the scores' own gains show, else a rollout value's, else the declared product.

    Raises:
        Unavailable: no score's effect was seen, or no γλ is known.
    """
    of = "policy" if follows(traced.recovered) or critic_free(traced) else "target"
    rows = score_gains(traced, of)
    if not rows:
        raise Unavailable("needs to see what a changed score does to the advantages, and that could not be seen")
    ahead = [
        x
        for row in value_gains(traced, of)
        if np.abs(row.gain[: row.at]).max(initial=0.0) > 20 * NOTHING
        for x in ratios_ahead(row.gain[: row.at])
    ]
    decay = float(np.median(ahead)) if ahead else declared
    found = [(row, *entry(row.gain / (np.abs(row.gain).max() or 1.0) if critic_free(traced) else row.gain, decay))
             for row in rows]  # fmt: skip
    for row, kind, offset in found:
        if kind in ("early", "spread"):
            return Placement(kind, offset, row.sample, row.gain)
    first = rows[0]
    if critic_free(traced) or coupled(traced, "one score"):  # the scale of the gains says nothing then
        return Placement("last" if found[0][1] != "unknown" else "unknown", 0, first.sample, first.gain)
    lengths = {kind: [len(row.gain) for row, k, _ in found if k == kind] for _, kind, _ in found}
    width = int(traced.base.real.sum(1).max())
    if set(lengths) == {"none", "last"} and set(lengths["last"]) == {width} and max(lengths["none"]) < width:
        lost = next(row for row, kind, _ in found if kind == "none")
        return Placement("lost", 0, lost.sample, lost.gain, width)
    late = [(row, offset) for row, kind, offset in found if kind == "late"]
    if late and set(lengths) <= {"late", "last"}:
        row, offset = max(late, key=lambda one: one[1])
        return Placement("late", offset, row.sample, row.gain)
    return Placement("last" if set(lengths) == {"last"} else "unknown", 0, first.sample, first.gain)


def entry(gain: Floats, decay: float | None) -> tuple[str, int]:
    """(kind, tokens from the last one to where the score enters): gain_t = Σ_l decay^l entry_(t+l)."""
    size, last = float(np.abs(gain).max()), len(gain) - 1
    if size < NOTHING:
        return "none", 0
    own = ratios_ahead(gain)
    if own and np.ptp(own) < 10 * PRECISE:
        decay = float(np.median(own))
    if decay is None:
        return "unknown", 0
    entry = gain - decay * np.append(gain[1:], 0.0)
    places = np.flatnonzero(np.abs(entry) > 10 * PRECISE * size)
    if len(places) == 1 and places[0] < last:
        return "early", int(places[0]) - last
    if len(places) == 1:
        if abs(gain[last] - 1) < 5 * PRECISE:
            return "last", 0
        steps = np.log(gain[last]) / np.log(decay) if gain[last] > 0 and 0 < decay < 1 else 0.0
        whole = round(float(steps))
        return ("late", whole) if whole > 0 and abs(gain[last] - decay**whole) < 5 * PRECISE else ("scaled", 0)
    if len(places) == len(gain) > 1 and np.ptp(entry) < 0.05 * np.abs(entry).max():
        return "spread", 0
    return "unknown", 0


@dataclass(frozen=True)
class Reach:
    """What the scores do to the policy.

    ``moved`` is the largest change of a weight when scores change, over the largest weight; ``sign`` that of the last
    token's advantage when its score rises, 0 where it is not known; ``arrives`` whether something other than the KL
    stands where the score belongs; ``dead`` (S,) the samples whose return does not answer, ``known`` (S,) those seen.
    """

    moved: float
    sign: int
    arrives: bool
    dead: Bools
    known: Bools
    rewards: Floats

    @property
    def none(self) -> bool:
        """Whether no score moves the policy at all."""
        return self.moved < STILL


def reach(traced: Traced, declared: Mapping[str, Any]) -> Reach:
    """Whether scores reach the policy's gradient, and what becomes of them.

    Raises:
        Unavailable: no score could be changed, or the policy's gradient was not seen.
    """
    traced.needs("one score")
    base = traced.base
    if not base.has("weight"):
        raise Unavailable("needs a policy that is trained in the step")
    names = [n for n in ("one score", "all scores") if n in traced.experiments.done]
    moved = max(float(moved_share(traced, n).max(initial=0.0)) for n in names)
    if moved < STILL and _deaf(traced):
        raise Unavailable("needs a policy loss that answers to its advantages, and changed values do not move it")
    count = len(base.samples)
    dead, known, rewards = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool), np.full(count, np.nan)
    for row in [] if critic_free(traced) else score_gains(traced, "target"):
        known[row.sample] = True
        dead[row.sample] = float(np.abs(row.gain).max()) < 5 * PRECISE
    return Reach(moved, _sign(traced), _arrives(traced, declared, rewards), dead, known, rewards)


def read_elsewhere(traced: Traced) -> list[int]:
    """The ended samples whose last token's return answers to the scores of other tokens alone; none without a critic.

    Rewards of every token leave the return of the last one where it was. What was cut may have got an end for scoring.
    """
    changed, base = traced.experiments.done.get("scores of other tokens"), traced.base
    if critic_free(traced) or changed is None:
        return []
    rows, last = np.arange(len(base.samples)), np.maximum(base.real.sum(1) - 1, 0)
    answer = np.abs(return_response(traced.recovered, traced.experiments, changed)[rows, last])
    answer = np.where(trusted(traced), np.nan_to_num(answer), 0.0)
    least = max(ANSWERS * float(answer.max(initial=0.0)), NOTHING * float(np.abs(changed.amounts).max(initial=0.0)))
    ended = np.array([s.ended for s in base.samples], dtype=bool)
    return [int(s) for s in np.flatnonzero(changed.touched & ended & (answer > least))]


def _deaf(traced: Traced) -> bool:
    """Whether changed rollout values move no weight either, so that nothing is to be learnt from one that stays."""
    experiment = traced.experiments.done.get("rollout outputs")
    if experiment is None or not np.nan_to_num(experiment.moved(traced.base, "old_value")).any():
        return False
    return float(moved_share(traced, "rollout outputs").max(initial=0.0)) < STILL


def _sign(traced: Traced) -> int:
    """-1 where a higher score lowers the last token's weight though a higher rollout value does so too."""
    if critic_free(traced) or follows(traced.recovered):
        return 0
    scores, values = score_gains(traced, "policy"), value_gains(traced, "policy")
    if not scores or not values:
        return 0
    gain = scores[0].gain[np.abs(scores[0].gain).argmax()]
    owns = [row.gain[row.at] for row in values]
    if abs(gain) < NOTHING * np.abs(owns).max() or max(owns) >= 0:  # all signs turned is the loss's matter
        return 0
    return int(np.sign(gain))


def _arrives(traced: Traced, declared: Mapping[str, Any], rewards: Floats) -> bool:
    base, made = traced.base, traced.recovered
    rows, last = np.arange(len(base.samples)), np.maximum(base.real.sum(1) - 1, 0)
    if critic_free(traced):
        weight = np.where(trusted(traced)[:, None], masked(base, base["weight"]), np.nan)
        flat = [w[np.isfinite(w)] for w in weight]
        size = max((float(np.abs(w).max()) for w in flat if len(w)), default=0.0)
        return size > 0 and all(np.ptp(w) < 1e-3 * size for w in flat if len(w))
    gamma, lam = (
        float(x) if isinstance(x, (int, float)) else 1.0 for x in (declared.get("gamma"), declared.get("lam"))
    )
    rewards[:] = (made.returns - kl_part(traced, gamma * lam, gamma))[rows, last]
    rewards[~trusted(traced)] = np.nan
    spread = float(np.nanstd(base.scores)) or 1.0
    seen = rewards[np.isfinite(rewards)]
    return bool(len(seen)) and float(np.abs(seen).max()) > NOTHING * spread

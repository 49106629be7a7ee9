"""How the policy's weights answer when its log-probabilities are moved in the update alone: the clip, seen at work.

With a token's log-ratio moved by x, PPO's clipped surrogate (https://arxiv.org/abs/1707.06347, eq. 7) turns its weight
w into w eˣ, and into 0 where w > 0 and eˣ > 1 + ε, or w < 0 and eˣ < 1 - ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.trace.recover import masked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.trace.interventions import Experiments

    Floats = NDArray[np.float64]

__all__ = ["Clip", "clip_of"]

NEAR = 0.25  # of the weight that is expected: penalties and bonuses beside the surrogate add some per cent
BEYOND = 1.3  # times the declared range: there a clip that acts has cut
FAR = 0.75  # nats, where no range is declared: beyond those in use, whose largest are 1 - 0.2 and 1 + 0.4
FEW = 5  # tokens that a statement needs
MOST = 0.85  # of them that must agree


@dataclass(frozen=True)
class Clip:
    """Tokens moved beyond the clip range: ``ratio`` eˣ, weight ``before``, and ``kept``: the weight after over w eˣ.

    ``kind``: "acts", "wide" (all weights follow the ratio), "one" (none does), "exchanged" (cut on the wrong side), ""
    (nothing of these). ``edges`` are, above and below 1, the largest |ratio - 1| whose weight stayed and the smallest
    whose weight vanished.
    """

    kind: str
    tokens: int
    agreeing: float
    ratio: Floats
    before: Floats
    kept: Floats
    edges: tuple[tuple[float, float], tuple[float, float]]


def clip_of(found: Experiments, declared: float | None) -> Clip | None:
    """Read off the run with moved log-probabilities; None where it was not made or moved too little."""
    pushed, base = found.done.get("update logits"), found.base
    if pushed is None:
        return None
    before, after = masked(base, base["weight"]), masked(base, pushed.table["weight"])
    moved = masked(base, pushed.table["logp"] - base["logp"])
    size = np.abs(before)
    known = np.isfinite(before) & np.isfinite(after) & np.isfinite(moved) & (np.abs(moved) > 1e-4) & (size > 0)
    if known.sum() < FEW:
        return None
    known &= size >= 0.25 * np.quantile(size[known], 0.9)  # where penalties and bonuses are small beside it
    ratio, weight = np.exp(moved[known]), before[known]
    kept = after[known] / weight / ratio
    beyond = np.abs(np.log(ratio)) > FAR if declared is None else np.abs(ratio - 1) > BEYOND * declared
    kind, agreeing = _kind(ratio[beyond], weight[beyond], kept[beyond])
    edges = _edges(ratio, weight, kept, 1), _edges(ratio, weight, kept, -1)
    return Clip(kind, int(beyond.sum()), agreeing, ratio, weight, kept, edges)


def _kind(ratio: Floats, weight: Floats, kept: Floats) -> tuple[str, float]:
    """Which of four clips explains most of the tokens, and the share that it explains."""
    inside = (weight > 0) != (ratio > 1)  # on the side that the clip leaves alone
    gone, follows, still = np.abs(kept) < NEAR, np.abs(kept - 1) < NEAR, np.abs(kept * ratio - 1) < 0.1
    follows &= ~still | (np.abs(ratio - 1) < 0.12)
    told = gone | follows | still
    if told.sum() < FEW or told.mean() < 0.5 or (~inside & told).sum() < 3:
        return "", 0.0
    kinds = {
        "acts": np.where(inside, follows, gone),
        "wide": follows,
        "one": still,
        "exchanged": np.where(inside, gone, follows),
    }
    kind, agreeing = max(((k, float(v[told].mean())) for k, v in kinds.items()), key=lambda pair: pair[1])
    if kind == "exchanged" and (inside & told).sum() < 3:
        return "", agreeing
    return (kind if agreeing >= MOST else ""), agreeing


def _edges(ratio: Floats, weight: Floats, kept: Floats, side: int) -> tuple[float, float]:
    should = ((weight > 0) == (ratio > 1)) & ((ratio > 1) == (side > 0))
    away = np.abs(ratio - 1)
    stayed, gone = should & (np.abs(kept - 1) < NEAR), should & (np.abs(kept) < NEAR)
    return float(away[stayed].max(initial=0.0)), float(away[gone].min(initial=np.inf))

"""Is an output held back by a bound? Shared by REW002 and VAL005, no check itself."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import HeadRange, Output

__all__ = ["described", "holds_back", "observed_scores"]

CLIPS = frozenset({"clamp", "hardtanh", "clampmin", "clampmax"})
# The narrowest clip of rewards in use is DeepSpeed-Chat's ±5.
NARROWEST_CLIP = 5.0


def observed_scores(
    output: Output | None, on_samples: OnSamples | None, preferences: PairScores | None
) -> tuple[float, ...]:
    """Every score of the reward that was measured; texts first, the probe's sequences where there are none."""
    found = [*(on_samples.numbers if on_samples else ())]
    found += [score for pair in (preferences.with_eos if preferences else ()) for score in pair]
    if not found and output is not None and output.kind in ("scalar per sequence", "scalar per token"):
        found += [output.minimum, output.maximum]
    return tuple(score for score in found if isfinite(score))


def holds_back(found: HeadRange, scores: tuple[float, ...], declared: Mapping[str, Any]) -> bool:
    """Whether a bound keeps the output from where it has to go.

    A clip does not where it leaves the observed scores their own span of room on either side; any other curve not
    where it reaches as far as the narrowest clip in use too. A declared ``reward_clip`` is as far as scores go.
    """
    clip = declared.get("reward_clip")
    limit = float(clip) if isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0 else None
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    low, high = min(low - (high - low), 0.0), max(high + (high - low), 0.0)
    if limit is not None:
        low, high = (max(low, -limit), min(high, limit)) if scores else (-limit, limit)
    if not (scores or limit) or not found.activations or not CLIPS.issuperset(found.activations):
        low, high = min(low, -NARROWEST_CLIP), max(high, NARROWEST_CLIP)
    return (found.bounded_below and found.low > low) or (found.bounded_above and found.high < high)


def described(found: HeadRange) -> str:
    """``between 0 and 1``, ``at or above 0``, ``at or below 3``."""
    if found.bounded_below and found.bounded_above:
        return f"between {found.low:.4g} and {found.high:.4g}"
    return f"at or above {found.low:.4g}" if found.bounded_below else f"at or below {found.high:.4g}"

"""What LOS002 says of a clip; no check itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_doctor.trace.ratio import Clip

__all__ = ["NORMAL", "SAID", "range_said"]

NORMAL = "With one update a step the old policy is the current one, and no clip can act; that is normal."
SAID = {
    "one": "The ratio is 1 by construction: moving the policy's log-probabilities in the update changes no weight. Old "
    "log-probabilities should be those of the rollout, computed once before the first update.",
    "wide": "The clip never acts: however far the policy has moved, the weights only follow the ratio. The range "
    "should be a fraction such as 0.2 around 1.",
    "exchanged": "The clip cuts on the wrong side: it leaves the weight where the policy has gone too far, and takes "
    "it where it should come back. Take the minimum of the surrogates, or the maximum of their negatives.",
}


def range_said(clip: Clip, declared: float) -> tuple[str, tuple[str, str, str]] | None:
    """(message, (quantity, expected, observed)) where the range is not the declared one.

    Both sides have to disagree, since the upper bound may be set by itself; the lower one alone says enough.
    """
    stayed, gone = clip.edges[1]
    above = clip.edges[0]
    wide = stayed > 1.05 * declared and (above[0] > 1.05 * declared or above[0] == 0.0)
    narrow = min(gone, above[1]) < 0.95 * declared
    if not wide and not narrow:
        return None
    low, high = (max(stayed, above[0]), min(gone, above[1]))
    return (
        f"The clip range is not the declared {declared:g}: {'it lets more pass' if wide else 'it cuts sooner'}. "
        "Pass the declared range to the loss.",
        ("|ratio - 1| at which weights vanish", f"{declared:g}", f"above {low:.3g}, at most {high:.3g}"),
    )

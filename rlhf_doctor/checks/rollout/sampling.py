"""What the checks of the rollout family share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["bent", "listed"]


def bent(declared: Mapping[str, Any]) -> bool:
    """Whether the sampled distribution is declared to be cut."""
    top_k, top_p = declared.get("top_k"), declared.get("top_p")
    cut_k = isinstance(top_k, (int, float)) and top_k > 0
    cut_p = isinstance(top_p, (int, float)) and 0 < top_p < 1
    return cut_k or cut_p


def listed(samples: Any) -> str:
    """``samples 1, 4 and 5``, few of them."""
    numbers = [str(s) for s in samples]
    if not numbers:
        return "no sample"
    if len(numbers) == 1:
        return f"sample {numbers[0]}"
    if len(numbers) > 4:
        return f"{len(numbers)} samples, {', '.join(numbers[:3])} among them"
    return f"samples {', '.join(numbers[:-1])} and {numbers[-1]}"

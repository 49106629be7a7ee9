"""Scores of full precision that were rounded on their way; no check itself: REW011 says it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from statistics import pstdev

from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity

__all__ = ["stepped"]

LEAST = 3  # different numbers: two are the classes of a verifier


def stepped(scores: list[float]) -> Iterator[Finding]:
    """Few different scores, on one grid of equal steps."""
    different = sorted(set(scores))
    if not LEAST <= len(different) <= len(scores) / 4:
        return
    gaps = [b - a for a, b in pairwise(different)]
    step = min(gaps)
    spread = pstdev(scores)
    if step < spread / 10 or any(abs(gap / step - round(gap / step)) > 1e-3 for gap in gaps):
        return
    yield Finding(
        f"The scores are rounded to steps of {step:.3g}, their standard deviation being {spread:.3g}, so different "
        "responses tie. They should differ: keep the head and everything behind it in float32, and take out a large "
        "offset before a cast.",
        role="reward",
        confidence=Confidence.MEASURED,
        severity=Severity.WARNING,
        evidence=(
            Evidence(
                f"different numbers among {len(scores)} scores of texts",
                "about as many",
                f"{len(different)}, all of them {step:.3g} apart or a multiple of it",
                tolerance="a quarter",
            ),
        ),
    )

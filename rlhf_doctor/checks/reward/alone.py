"""Responses that a step has scored by themselves; no check itself: REW006 says it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity
from rlhf_doctor.instruments.tracing import Traced

__all__ = ["given_alone"]

ALONE = 0.8  # of the rows: what else a batch may hold is filler


def given_alone(traced: Traced, setup: Any) -> Iterator[Finding]:
    """A reward that would see the prompt, and is given the responses by themselves."""
    from rlhf_doctor.trace.alone import without_prompt

    alone, rows = without_prompt(traced, setup)
    if rows and alone >= ALONE * rows:
        yield Finding(
            "The step gives the reward model the responses without their prompts, so a response scores the same "
            "whatever it answers. Give it prompt and response together, as in its training.",
            role="reward",
            confidence=Confidence.MEASURED,
            severity=Severity.WARNING,
            evidence=(
                Evidence(
                    "rows given to the reward model that are a response and nothing before it",
                    "0",
                    f"{alone} of {rows}",
                    f"{ALONE:.0%}",
                    where="the step's passes of the reward",
                ),
            ),
        )

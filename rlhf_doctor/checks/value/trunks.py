"""Whose body the critic's head reads; no check itself: VAL012 says it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity
from rlhf_doctor.instruments.tracing import Traced

__all__ = ["borrowed", "shared"]


def borrowed(traced: Traced, setup: Any) -> Iterator[Finding]:
    """A head that trains on top of a body which is not its own."""
    from rlhf_doctor.trace.critic import heads, own_parameters

    parameters, real = own_parameters(setup), traced.experiments.real
    first = heads(parameters)
    tops = tuple(f"{name.rpartition('.')[0]}." for name in first)
    below = [n for n in parameters if not n.startswith(tops)]
    body = [n for n in below if parameters[n].dim() > 1 and parameters[n].requires_grad]
    moved = real.moved.get("value", {}) if real is not None and not real.error else {}
    if not body or not any(n in moved for n in first) or any(n in moved for n in below):
        return
    yield Finding(
        "The critic's head trains and nothing below it does, although it is trainable: the head reads states that are "
        "not the critic's own, or detached ones. Run the head on the critic's own hidden states.",
        role="value",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "parameters of the critic below its head that changed in two training steps",
                "some",
                f"0 of {len(below)}, while {first[0]} changed",
                "0, compared bit for bit",
            ),
        ),
    )


def shared(setup: Any) -> Iterator[Finding]:
    """A trunk that is declared to be the policy's and the critic's: the value loss moves both."""
    if not setup.declared.get("shared_trunk"):
        return
    policy, value = ({id(p): p for p in _parameters(model)} for model in (setup.policy, setup.value))
    both = [p for i, p in policy.items() if i in value and p.requires_grad]
    if both:
        yield Finding(
            "Policy and critic share a trunk, as declared, so the value loss moves the policy too. That is normal; "
            "keep vf_coef small, around 0.1.",
            role="value",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "scalars that train in both policy and critic",
                    "any number with a shared trunk",
                    f"{sum(p.numel() for p in both)} in {len(both)} tensors",
                ),
            ),
        )


def _parameters(model: Any) -> Iterator[Any]:
    return iter(model.parameters()) if callable(getattr(model, "parameters", None)) else iter(())

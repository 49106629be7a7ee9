"""VAL006: the value depends on the state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Influence
from rlhf_doctor.instruments.variation import Variation


@check(
    "VAL006",
    "the value depends on the state",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("VAL001", "VAL002", "VAL005", "PRE004"),
)
def value_constant(value_variation: Variation, value_influence: Influence | None = None) -> Iterator[Finding]:
    """
    What it examines:
        V of every state of a text of 16 tokens, and of a second text in which every token is another one. The values
        should differ between the two texts at the same position. Where they do not because the head's weights are
        exactly zero, that is the start that some implementations choose, and is info: the first update moves them.

    Why it matters:
        A critic that gives one number for all states is a constant baseline: PPO with it is REINFORCE with extra work,
        and generalised advantage estimation spreads the whole noise of the return over all tokens. A critic that
        knows the position and not the text is little better.

    What it looks like when broken:
        Explained variance of exactly 0, values with standard deviation 0, a value loss equal to the variance of
        returns.

    How to fix:
        1. Look at what reaches the head: hidden states of the last layer, not of a detached or a pooled copy.
        2. Look for a bias that swamps the rest, a norm with a zero weight, a dead ReLU before the head.
        3. With a head of zeros check that it is in the optimizer.

    Source:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        https://arxiv.org/abs/1506.02438; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
        https://arxiv.org/abs/2403.17031 (how heads are initialised).
    """
    v = value_variation
    if not v.states:
        raise Unavailable("the critic does not give one value per state")
    between = max(abs(a - b) for a, b in zip(v.states, v.other_states, strict=True))
    within = max(v.states) - min(v.states)
    if between > v.rounding or (within <= v.rounding and _gradient(value_influence)):
        return
    position = within > v.rounding
    p = v.projection
    zero = p is not None and p.to_one and p.weight_zero and p.input_spread > 0
    yield Finding(
        "The critic's head is exactly zero, so V is the same for every state. That is a usual start; it should move "
        "with the first update."
        if zero
        else "The critic's value depends on the position only and not on the text. It should depend on the "
        "state: check what reaches the head."
        if position
        else f"The critic gives {v.base:.6g} for every state. It should depend on the state: check what "
        "reaches the head.",
        role="value",
        confidence=Confidence.PROVEN,
        severity=Severity.INFO if zero else None,
        evidence=(
            Evidence(
                "largest difference of V between two texts without a token in common, at the same position",
                expected="well above rounding",
                observed=f"{between:.3g}; over the positions of one text {within:.3g}",
                tolerance=f"{v.rounding:.2g}",
                reproduce=f"two texts of {v.length} tokens",
            ),
            Evidence(
                "largest difference of any feature that enters the last projection",
                expected="above 0",
                observed="unknown" if p is None else f"{p.input_spread:.3g}",
            ),
        ),
    )


def _gradient(influence: Influence | None) -> bool:
    """Whether V has a gradient at all: then a difference below rounding is no proof."""
    return influence is not None and influence.method == "gradient" and influence.coverage > 0


@value_constant.fault("hand-written, a constant in place of the head's output")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, squash=lambda x: x * 0 + 0.5))


@value_constant.fault("a body whose last norm has lost its weight")
def _(healthy: Any) -> Any:
    import copy

    value = copy.deepcopy(healthy.value)
    value.base_model.norm.weight.data.zero_()
    return healthy.but(value=value)


@value_constant.fault("values of the position and not of the text")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return values * 0 + mask.cumsum(1) / 10

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())

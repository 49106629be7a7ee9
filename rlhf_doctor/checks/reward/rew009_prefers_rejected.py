"""REW009: the reward model prefers the chosen responses."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.statistics import at_most, wilson
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.preferences import PairScores

USEFUL = 0.65
DOUBT, CHANCE = 0.01, 0.05


@check(
    "REW009",
    "the reward model prefers the chosen responses",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REW006", "REW007", "PRE004"),
    effect=True,
)
def reward_prefers_rejected(reward_preferences: PairScores, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The setup's preference pairs are scored, the end of sequence included, and the pairs whose chosen response
        scores higher are counted; ties do not count. It is a fault where they are no more than a coin would give
        (5%), and so few that a reward model of accuracy 0.65 would give as few less than once in a hundred times.
        Below that certainty nothing is said: five pairs are the fewest that can convince.

    Why it matters:
        PPO raises the score. If the score prefers what people rejected, PPO works hard towards it; if it does not know
        the difference, PPO goes nowhere in particular. Both runs look healthy from inside.

    What it looks like when broken:
        Reward up, people's judgement down. The usual causes: chosen and rejected exchanged in a column name, a label's
        index taken for another (element 1 of a pipeline's list is not always POSITIVE), a penalty where a bonus was
        meant, a head that was never restored.

    How to fix:
        1. Print three pairs with their scores and read them.
        2. A flipped sign shows as an accuracy far below one half: check the order of the columns and of the loss's
           arguments, -logsigmoid(chosen - rejected).
        3. An accuracy near one half: check that the head was loaded, that the template is the one of its training, and
           that pairs are not cut to identical texts.

    Source:
        https://github.com/huggingface/trl/pull/1738 (label order). InstructGPT's reward models predict 69.6% of the
        preferences of held-out labellers and 72.4% of those of their own: Ouyang et al. 2022,
        https://arxiv.org/abs/2203.02155; so 0.65 stands for one that is of use, and the test is a one-sided exact
        binomial test at 1%.
    """
    if setup.reward_loss is not None and setup.step is None:
        return  # a reward that is about to be trained knows nothing yet
    p = reward_preferences
    n, k = p.untied, p.right
    if n == 0 or not all(isfinite(score) for pair in p.with_eos for score in pair):
        return
    doubt = at_most(k, n, USEFUL)
    if at_most(n - k, n, 0.5) < CHANCE or doubt >= DOUBT:
        return
    low, high = wilson(k, n)
    margin = sum(c - r for c, r in p.with_eos) / len(p.with_eos)
    flipped = high < 0.5
    yield Finding(
        f"The reward model prefers the rejected response in {n - k} of {n} pairs: its sign is turned over. Check which "
        "column and which label is the chosen one, and the sign of the score."
        if flipped
        else f"The reward model prefers the chosen response in {k} of {n} pairs, no better than a coin. It "
        "should be well above one half: check its head, its template and the pairs.",
        role="reward",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "share of pairs whose chosen response scores higher",
                expected=f"above 0.5; {USEFUL} for a reward model of use",
                observed=f"{k / n:.2f} ({k} of {n}, {len(p.with_eos) - n} ties; 99% interval {low:.2f} to {high:.2f})",
                tolerance=f"a model of accuracy {USEFUL} gives this with probability {doubt:.1g}; limit {DOUBT:g}",
                where=f"{len(p.with_eos)} of the setup's {p.given} preference pairs",
            ),
            Evidence("mean of chosen score minus rejected score", "above 0", f"{margin:.4g}"),
        ),
    )


@reward_prefers_rejected.fault("the sign of the score is turned over")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Rescored(healthy.reward, lambda scores, ids, mask: -scores).eval())


@reward_prefers_rejected.fault("chosen and rejected are exchanged in the data")
def _(healthy: Any) -> Any:
    return healthy.but(preferences=[(prompt, rejected, chosen) for prompt, chosen, rejected in healthy.preferences])


@reward_prefers_rejected.fault("a reward that agrees with the pairs no more than a coin")
def _(healthy: Any) -> Any:
    turned = [(p, b, a) if i % 2 else (p, a, b) for i, (p, a, b) in enumerate(healthy.preferences)]
    return healthy.but(preferences=turned)


@reward_prefers_rejected.fault("a function that scores the opposite of what was asked")
def _(healthy: Any) -> Any:
    chosen = {c for _, c, _ in healthy.preferences}

    def penalty(prompts: list[str], responses: list[str]) -> list[float]:
        return [-1.0 if r in chosen else 0.0 for r in responses]

    return healthy.but(reward=penalty)

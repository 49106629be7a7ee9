"""REW013: the ranking does not hang on the final end of sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import fmean, pstdev
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.statistics import at_most, wilson
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.preferences import PairScores

CHANCE, DOUBT = 0.5, 0.01
LOST = 0.25


@check(
    "REW013",
    "the ranking does not hang on the final end of sequence",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("REW004", "REW006", "REW007", "REW009", "REW011"),
)
def reward_eos_sensitive(
    reward_preferences: PairScores, reward_open_preferences: Sequence[tuple[float, float]], setup: Any
) -> Iterator[Finding]:
    """
    What it examines:
        The preference pairs, scored with the end of sequence after each response and without. Only a reward model that
        ranks them better than chance with it is judged. It is a fault where, without it, the ranking turns over, or
        where a chosen response without its end loses to the rejected one with it in most pairs, so that the missing end
        outweighs the preference. A reward that pays for the end on purpose should say so by ``missing_eos_penalty``,
        and is then only judged by the first. A model that, without the end, ranks the pairs no better than chance and
        loses a quarter of them is worth knowing about: most were trained on finished texts alone.

    Why it matters:
        In PPO many responses are cut at the length limit and have no end. A reward model that was only ever trained on
        finished texts scores these by chance or on another scale, and loops that strip the end before scoring make all
        rewards so.

    What it looks like when broken:
        Scores that make no sense, a strong model below a weak one; adding the end token turns a negative score
        positive.

    How to fix:
        1. Find out what the reward was trained on, and give it the same: append the end (and the template's suffix) to
           finished responses before scoring.
        2. Do not strip special tokens between sampling and scoring.
        3. Give responses that were cut a fixed score (missing_eos_penalty), or train the reward on cut texts too.

    Source:
        https://github.com/OpenLMLab/MOSS-RLHF/issues/21; Huang et al. 2024, "The N+ Implementation Details of RLHF with
        PPO", https://arxiv.org/abs/2403.17031 (the EOS trick: responses without an end get a fixed low score). "Better
        than chance" is an exact binomial test at 1%.
    """
    p, open_ = reward_preferences, reward_open_preferences
    if not all(isfinite(s) for pair in (*p.with_eos, *open_) for s in pair):
        return
    n = len(p.with_eos)
    known = p.right
    bare = sum(c > r for c, r in open_)
    if at_most(n - known, n, CHANCE) >= DOUBT:  # with the end it knows no more than a coin: REW009's
        return
    lost = at_most(n - bare, n, CHANCE) >= DOUBT and known - bare >= LOST * n
    overtaken = sum(without[0] < with_[1] for with_, without in zip(p.with_eos, open_, strict=True))
    outweighs = wilson(overtaken, n)[0] > 0.5 and not setup.declared.get("missing_eos_penalty")
    if not lost and not outweighs:
        return
    turned = at_most(bare, n, CHANCE) < DOUBT
    gap = fmean(a - b for x, y in zip(p.with_eos, open_, strict=True) for a, b in zip(x, y, strict=True))
    spread = pstdev([s for pair in p.with_eos for s in pair])
    yield Finding(
        (
            f"Without the final end of sequence the reward model ranks {bare} of {n} pairs rightly, with it {known}. "
            if lost
            else "A chosen response without its end of sequence loses to the rejected one with it in "
            f"{overtaken} of {n} pairs. "
        )
        + "The end should not decide: append it to finished responses before scoring, and give cut ones a fixed score.",
        role="reward",
        confidence=Confidence.MEASURED,
        severity=None if turned or outweighs else Severity.INFO,
        evidence=(
            Evidence(
                "pairs ranked rightly, with and without the end of sequence",
                expected="about as many",
                observed=f"{known} and {bare} of {n}",
                tolerance="a quarter of the pairs, down to chance",
            ),
            Evidence(
                "pairs in which the chosen response without its end scores below the rejected one with it",
                expected="less than half",
                observed=f"{overtaken} of {n}",
            ),
            Evidence(
                "mean change of a score by the end", "within the spread", f"{gap:.3g}, the spread being {spread:.3g}"
            ),
        ),
    )


@reward_eos_sensitive.fault("the score's sign turns without the end of sequence")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    eos = healthy.tokenizer.eos_token_id

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        ended = ids.gather(1, scorers.last_real(mask)[:, None])[:, 0] == eos
        return scores.where(ended, -scores)

    return healthy.but(reward=scorers.Rescored(healthy.reward, rule).eval())


@reward_eos_sensitive.fault("the end of sequence is worth more than any preference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    eos = healthy.tokenizer.eos_token_id

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return scores + 20.0 * (ids.gather(1, scorers.last_real(mask)[:, None])[:, 0] == eos)

    reward = scorers.Rescored(healthy.reward, rule).eval()
    declared = {k: v for k, v in healthy.declared.items() if k != "missing_eos_penalty"}
    return healthy.but(reward=reward).but(declared={**declared, "missing_eos_penalty": None})

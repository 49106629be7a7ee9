"""REW012: the score follows content, not length or repetition."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from statistics import fmean, pstdev
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.statistics import spearman
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.growth import COUNTS, Growth
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.readings import Manifest

MONOTONE, CORRELATED, AGREE = 0.9, 0.5, 0.9
OVER_CONTENT = 2.0
FAR, STRAIGHT = 3.0, 1.6


@check(
    "REW012",
    "the score follows content, not length or repetition",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("REW001", "REW004", "REW006", "REW007", "REW011"),
    explains=("MET006", "MET008"),
)
def reward_length_bias(
    reward_growth: Growth, reward_on_samples: OnSamples, reward_manifest: Manifest
) -> Iterator[Finding]:
    """
    What it examines:
        Up to eight of the policy's own responses are cut or repeated to eight lengths, and scored; the same words in
        other orders and other responses' words are scored at one length. It is a bias where the score rises (or falls)
        steadily with length, for nearly every response in the same direction, by more than the spread of the samples'
        scores and by more than twice what exchanging the content does, and where the samples themselves rank by length
        too. Then single tokens are repeated 4, 8 and 16 times: a score that goes on rising in proportion, far beyond
        the best sample, counts a token.

    Why it matters:
        PPO finds whatever raises the score most cheaply. Length is cheaper than quality, and a repeated word is cheaper
        still: most of the reward gained in published runs was length, and a model that paid for "thanks" got nothing
        but thanks.

    What it looks like when broken:
        Reward and response length rise together; responses end in lists, summaries of themselves, or one word.

    How to fix:
        1. Balance the preference data: pairs of similar length, or some in which the shorter is chosen.
        2. Subtract the part of the score that length explains (a regression on samples), or train with a length term.
        3. Watch length, repetition and an independent judge during PPO, and stop when reward rises without them.

    Source:
        Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF",
        https://arxiv.org/abs/2310.03716; https://github.com/deepspeedai/DeepSpeedExamples/issues/491 ("thanks"). Reward
        models in use correlate strongly with length, so correlation alone is no finding; the steady rise of one and the
        same content is. Eight lengths in random order reach a rank correlation of 0.9 once in 400 times, and here the
        mean over the responses has to. A Transformer's response to a repeated token levels off, since attention
        averages: going from 8 to 16 then adds less than from 4 to 8; a count adds twice as much, 1.6 is between.
    """
    g, scores = reward_growth, reward_on_samples.numbers
    every = [s for rows in (g.ladder, g.content, tuple(g.repeats.values())) for row in rows for s in row]
    if reward_manifest.origin == "callable" or not all(isfinite(s) for s in (*every, *scores)):
        return  # what a written function pays for is what its author wrote
    spread = max(pstdev(scores), 1e-12)
    yield from _by_length(g, reward_on_samples, spread)
    yield from _by_repetition(g, max(scores), spread)


def _by_length(g: Growth, samples: OnSamples, spread: float) -> Iterator[Finding]:
    ranks = [spearman(g.lengths, row) for row in g.ladder]
    steady = fmean(ranks)
    same = max(sum(r > 0 for r in ranks), sum(r < 0 for r in ranks)) / len(ranks)
    rise = fmean(row[-1] - row[0] for row in g.ladder)
    content = fmean(pstdev(row) for row in g.content)
    lengths = [float(n) for n in samples.lengths]
    varied = len(set(lengths)) > 2
    natural = spearman(lengths, samples.numbers) if varied else steady
    if (
        abs(steady) < MONOTONE
        or same < AGREE
        or abs(rise) < max(spread, OVER_CONTENT * content)
        or natural * steady < 0
        or abs(natural) < CORRELATED
    ):
        return
    yield Finding(
        f"The score {'rises' if rise > 0 else 'falls'} with length and little else: the same words at {g.lengths[-1]} "
        f"instead of {g.lengths[0]} tokens score {rise:+.3g}, while other words of one length differ by {content:.3g}. "
        "It should follow content: balance the lengths in the preference pairs, or take out what length explains.",
        role="reward",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                f"rank correlation of score and length, the same words at {', '.join(map(str, g.lengths))} tokens",
                expected="either sign, far from ±1",
                observed=f"{steady:.2f} on average over {len(ranks)} responses",
                tolerance=f"{MONOTONE}",
            ),
            Evidence(
                "change of the score over these lengths",
                expected=(
                    f"below the spread of samples, {spread:.3g}, or below twice the effect of content, {content:.3g}"
                ),
                observed=f"{rise:+.3g}",
            ),
            Evidence(
                "rank correlation of score and length over the policy's samples",
                expected=f"below {CORRELATED}",
                observed=f"{natural:.2f}" if varied else "all samples have one length",
            ),
        ),
    )


def _by_repetition(g: Growth, best: float, spread: float) -> Iterator[Finding]:
    for token, (_, four, eight, sixteen) in g.repeats.items():
        straight = eight > four and sixteen - eight >= STRAIGHT * (eight - four)
        if not straight or sixteen < best + FAR * spread:
            continue
        yield Finding(
            f"Repeating {token} {COUNTS[-1]} times raises the score to {sixteen:.3g}, in proportion to the count, "
            f"while the best of the policy's samples scores {best:.3g}. Repetition should level off and not pay: add "
            "such texts as rejected responses, or penalise repetition.",
            role="reward",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    f"score with {', '.join(map(str, COUNTS))} times {token} before the end",
                    expected="levels off",
                    observed=", ".join(f"{s:.3g}" for s in g.repeats[token]),
                    tolerance=(
                        f"from 8 to 16 at most {STRAIGHT} times what 4 to 8 adds, or below {best + FAR * spread:.3g}"
                    ),
                ),
            ),
        )
        return


@reward_length_bias.fault("a score that grows by 0.3 with every token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.reward_of_length(healthy.reward, 0.3).eval())


@reward_length_bias.fault("hand-written, the sum over tokens instead of the last one")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return ((scores + 2) * mask).sum(1)

    return healthy.but(reward=scorers.Reader(healthy.reward, rule).eval())


@reward_length_bias.fault("one word is paid by the piece")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    word = healthy.tokenizer("lovely", add_special_tokens=False)["input_ids"][-1]

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return scores + ((ids == word) & mask.bool()).sum(1)

    return healthy.but(reward=scorers.Rescored(healthy.reward, rule).eval())

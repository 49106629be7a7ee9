"""REW011: every score is a finite number, fine enough to tell texts apart."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, isfinite, isinf, log2
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.reward.rounded import stepped
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import Manifest, Output

# Bits of the mantissa: the step between numbers of size 1 is 2 to the power of minus this.
MANTISSA = {"bfloat16": 7, "float16": 10}
TIES, FEWEST = 0.1, 3


@check(
    "REW011",
    "every score is a finite number, fine enough to tell texts apart",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("REW002", "REW006", "REW007", "REW010"),
)
def reward_not_finite(
    reward_manifest: Manifest,
    reward_output: Output | None = None,
    reward_on_samples: OnSamples | None = None,
    reward_preferences: PairScores | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The scores of the probe's sequences, of responses sampled from the policy, and of the preference pairs: whether
        all are finite. Where the score is in half precision, whether its steps are coarser than half the spread of the
        scores, and whether different responses of a pair tie. A reward function that abstains on some responses, by
        None or NaN, is a warning.

    Why it matters:
        One NaN score makes the whitened advantages of the whole batch NaN. Half precision overflows at 65504 (float16)
        or resolves scores around 50 only in steps of 0.25 (bfloat16): the better of two answers then ties with the
        worse one.

    What it looks like when broken:
        Loss 0 and gradient norm 0 or NaN from the first step, while some rewards still print as normal numbers; a
        reward that takes only a handful of values.

    How to fix:
        1. Score in the dtype that the model was trained in: bfloat16 models overflow in float16.
        2. Keep the head in float32: cast the last hidden state before it.
        3. Take out a large offset of the scores in the head.
        4. For a function: return a number for every response, and decide what an abstention is worth.

    Source:
        https://github.com/huggingface/trl/issues/3236 and https://github.com/hiyouga/LlamaFactory/issues/273
        (overflow in float16), https://github.com/huggingface/trl/pull/5775 (abstentions), https://github.com/PKU-Alignment/safe-rlhf/issues/133
        (similar texts score the same). A tenth of the pairs tied, three at least: float32 scores of different texts tie
        once in millions of pairs.
    """
    scores = [*(reward_on_samples.numbers if reward_on_samples else ())]
    scores += [s for pair in (reward_preferences.with_eos if reward_preferences else ()) for s in pair]
    if not scores and reward_output is None:
        raise Unavailable("needs a reward that can be called")
    bad = [s for s in scores if not isfinite(s)]
    function = reward_manifest.origin == "callable"
    if bad or (reward_output is not None and not reward_output.finite):
        abstains = function and len(bad) < len(scores) and not any(isinf(s) for s in bad)
        where = f"{len(scores)} scores of texts" if bad else "the probe's sequences"
        yield Finding(
            f"{len(bad) or 'Some'} of the scores of {where} are NaN or infinite"
            + (": the function abstains. It should return a number for every response." if abstains else ".")
            + ("" if abstains else " Every score should be finite: run the reward in the dtype it was trained in."),
            role="reward",
            confidence=Confidence.PROVEN,
            severity=Severity.WARNING if abstains else None,
            evidence=(
                Evidence(
                    "scores that are not finite",
                    expected="0",
                    observed=f"{len(bad)} of {len(scores)}"
                    if bad
                    else f"of shape {reward_output.shape}"
                    if reward_output
                    else "",
                    where=reward_manifest.class_name + (f", {reward_output.dtype}" if reward_output else ""),
                ),
            ),
        )
        return
    if reward_output is not None and reward_output.dtype in MANTISSA and not function:
        yield from _coarse(reward_output.dtype, reward_on_samples, reward_preferences)
    elif reward_output is not None and not function:
        yield from stepped(scores)


def _coarse(dtype: str, samples: OnSamples | None, pairs: PairScores | None) -> Iterator[Finding]:
    """Half precision that cannot tell texts apart."""
    evidence = []
    if samples is not None and samples.std > 0:
        step = 2.0 ** (floor(log2(max(abs(samples.mean), 1e-30))) - MANTISSA[dtype])
        if step > samples.std / 2:
            evidence.append(
                Evidence(
                    f"step between neighbouring {dtype} numbers at the mean score {samples.mean:.4g}",
                    expected="far below the spread of the scores",
                    observed=f"{step:.3g}, the standard deviation being {samples.std:.3g}",
                    tolerance="half a standard deviation",
                )
            )
    if pairs is not None:
        ties = len(pairs.with_eos) - pairs.untied
        if ties >= max(FEWEST, TIES * len(pairs.with_eos)):
            evidence.append(
                Evidence(
                    "pairs of different responses with exactly the same score",
                    expected="none",
                    observed=f"{ties} of {len(pairs.with_eos)}",
                    tolerance=f"{TIES:.0%}, at least {FEWEST}",
                )
            )
    if evidence:
        yield Finding(
            f"The scores are rounded to {dtype} so coarsely that different responses tie. They should differ: compute "
            "the head in float32, and take out a large offset.",
            role="reward",
            confidence=Confidence.MEASURED,
            severity=Severity.WARNING,
            evidence=tuple(evidence),
        )


@reward_not_finite.fault("scores overflow to infinity for the better texts")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return (scores * 60000).half().float()

    return healthy.but(reward=scorers.Rescored(healthy.reward, rule).eval())


@reward_not_finite.fault("scores around 50 in bfloat16")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: (s / 10 + 50).bfloat16()).eval())


@reward_not_finite.fault("a function that abstains on some responses")
def _(healthy: Any) -> Any:
    def sometimes(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [None if len(c) % 3 == 0 else float(len(c)) for c in completions]

    return healthy.but(reward=sometimes)


@reward_not_finite.fault("a large offset, rounded away on the way to float32")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import scorers

    last = scorers.last_real
    return healthy.but(
        reward=scorers.Reader(
            healthy.reward,
            lambda scores, ids, mask: (
                (3 * scores.gather(1, last(mask)[:, None])[:, 0] + 250).to(torch.bfloat16).float() - 250
            ),
        ).eval()
    )

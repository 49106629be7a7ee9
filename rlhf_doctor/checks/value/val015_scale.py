"""VAL015: the first values lie where the returns lie."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.bounds import observed_scores
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import Output

FACTOR, LEAST = 10.0, 1.0


@check(
    "VAL015",
    "the first values lie where the returns lie",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("VAL001", "VAL002", "VAL005", "PRE004"),
)
def value_scale(
    value_output: Output,
    setup: Any,
    value_on_samples: OnSamples | None = None,
    reward_output: Output | None = None,
    reward_on_samples: OnSamples | None = None,
    reward_preferences: PairScores | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The critic's values on the states of sampled responses (on the probe's sequences where there are no samples)
        beside the reward's scores: their root mean squares. Values ten times larger than scores, and than 1, are far
        outside the range of the returns. Small values beside large scores are what a fresh head gives, and are no
        fault.

    Why it matters:
        The first advantages are returns minus values. If the values are in the hundreds and the returns around 1, every
        advantage of the first updates is the critic's error, the value loss is in the ten thousands, and with a shared
        body its gradient overwrites what the policy knows.

    What it looks like when broken:
        A value loss of 1e4 in the first step, value clipping always on, a KL that jumps before the critic has settled.
        Usual causes: the critic copied a head before the reward's scores were normalised, scores divided by a factor in
        the loop, a temperature that divides values too.

    How to fix:
        1. Put the critic on the scale of the rewards that it is trained on: copy the normalised head, or start a new
        one
           with standard deviation 1 / sqrt(hidden size + 1).
        2. Apply scaling of rewards before the returns are computed, and nowhere else.
        3. Let the critic warm up alone for some steps.

    Source:
        Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (the value
        head copies the reward's, or is drawn with 1 / sqrt(d + 1)); https://github.com/huggingface/trl/issues/860
        (scores and values of other sizes). A factor of ten is far beyond what whitening and value clips of 0.2 to 0.5
        absorb.
    """
    scores = observed_scores(reward_output, reward_on_samples, reward_preferences)
    if not scores:
        raise Unavailable("needs the reward's scores to compare values with")
    values = value_on_samples.numbers if value_on_samples else (value_output.minimum, value_output.maximum)
    if not values or not all(isfinite(v) for v in values):
        return
    clip = setup.declared.get("reward_clip")
    if isinstance(clip, (int, float)) and not isinstance(clip, bool) and clip > 0:
        scores = tuple(max(-clip, min(clip, s)) for s in scores)
    size, returns = _root_mean_square(values), max(_root_mean_square(scores), LEAST)
    if size <= FACTOR * returns:
        return
    yield Finding(
        f"The critic's first values have a root mean square of {size:.3g}, the reward's scores one of "
        f"{_root_mean_square(scores):.3g}. Values should start on the scale of the returns: copy the reward's head as "
        "it is scaled now, or start a small one.",
        role="value",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "root mean square of the values, and of the scores",
                expected=f"values at most {FACTOR:g} times max(scores, {LEAST:g})",
                observed=f"{size:.4g} (mean {fmean(values):.4g}) and {_root_mean_square(scores):.4g}",
                tolerance=f"a factor of {FACTOR:g}",
                where="states of sampled responses" if value_on_samples else "the probe's sequences",
            ),
        ),
    )


def _root_mean_square(numbers: tuple[float, ...]) -> float:
    return sqrt(fmean(n * n for n in numbers))


@value_scale.fault("a Hugging Face critic whose head is a hundred times too large")
def _(healthy: Any) -> Any:
    import copy

    value = copy.deepcopy(healthy.value)
    value.score.weight.data.mul_(100)
    return healthy.but(value=value)


@value_scale.fault("hand-written, values in the hundreds")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, squash=lambda x: 500 * x + 300))

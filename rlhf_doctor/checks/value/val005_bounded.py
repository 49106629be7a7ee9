"""VAL005: the critic's output can reach the returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.bounds import described, holds_back, observed_scores
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import HeadRange, Output
from rlhf_doctor.instruments.variation import Variation


@check(
    "VAL005",
    "the critic's output can reach the returns",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("VAL002", "PRE004"),
    explains=("VAL006", "VAL015"),
)
def value_bounded(
    value_head_range: HeadRange,
    setup: Any,
    reward_output: Output | None = None,
    reward_on_samples: OnSamples | None = None,
    reward_preferences: PairScores | None = None,
    value_variation: Variation | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The critic's last projection is driven to ±1,000,000 times its size on the way, no weight is touched, and the
        output watched: it should follow in both directions. A clamp is fine where it leaves room around the reward
        model's observed scores (as much as their own span), and so is another curve where it reaches ±5 as well.

    Why it matters:
        Returns are scores less KL penalties: negative as often as positive, and of any size. A sigmoid cannot say less
        than 0, a tanh not more than 1, a ReLU is silent about every state that is worse than average and gives no
        gradient there. The value loss then has a floor, and the advantages a bias of one sign.

    What it looks like when broken:
        Values that pile up at 0 or at ±1; a value loss that falls and stays; advantages that are all positive or all
        negative before whitening.

    How to fix:
        1. End the critic in a linear layer: no sigmoid, tanh, softmax or ReLU behind it.
        2. If the values must be kept in range early in training, clip the change (cliprange_value) and not the value.
        3. If returns are large, normalise the rewards.

    Source:
        Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (a linear
        value head); Stiennon et al. 2020, https://arxiv.org/abs/2009.01325. The narrowest clip of rewards in use is
        ±5, in DeepSpeed-Chat.
    """
    r = value_head_range
    if not r.activations and value_variation is not None and value_variation.still:
        return  # nothing reaches the output: VAL006's
    scores = observed_scores(reward_output, reward_on_samples, reward_preferences)
    if not holds_back(r, scores, setup.declared):
        return
    seen = f"; the reward's scores go from {min(scores):.3g} to {max(scores):.3g}" if scores else ""
    yield Finding(
        f"The critic's values stay {described(r)} ({', '.join(r.activations) or 'a bound'} behind the last "
        f"projection){seen}. Returns go anywhere: the critic should end in a linear layer.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                f"values with the last projection driven to ±{r.drive:g} times its size",
                expected="follow in both directions",
                observed=f"stay {described(r)}",
                where=f"behind the last projection: {', '.join(r.activations) or 'a bound'}",
            ),
        ),
    )


def _squashed(healthy: Any, squash: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, squash=squash))


@value_bounded.fault("hand-written, a sigmoid behind the head")
def _(healthy: Any) -> Any:
    import torch

    return _squashed(healthy, torch.sigmoid)


@value_bounded.fault("hand-written, a tanh behind the head")
def _(healthy: Any) -> Any:
    import torch

    return _squashed(healthy, torch.tanh)


@value_bounded.fault("a ReLU behind a Hugging Face critic's head")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(value=scorers.Reader(healthy.value, lambda values, ids, mask: (None, values.relu())).eval())


@value_bounded.fault("a softmax over one value")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return values[..., None].softmax(-1)

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())

"""REW007: the same text scores the same twice."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.readings import Invariance, Parameters


@check(
    "REW007",
    "the same text scores the same twice",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("PRE004",),
    explains=("REW005", "REW009"),
)
def reward_not_deterministic(
    reward_invariance: Invariance | None = None,
    reward_parameters: Parameters | None = None,
    reward_on_samples: OnSamples | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The reward model scores one batch twice, in the mode (train or eval) in which it was handed over. A reward
        function is asked for the same samples twice. Train mode alone is no fault: only dropout that really acts, or
        other randomness in the forward pass, moves the score.

    Why it matters:
        Dropout in the reward adds noise to every score: the policy is rewarded for luck, the critic cannot fit the
        returns, and in group-relative methods the noise is divided by its own small spread and becomes the signal.

    What it looks like when broken:
        A spread of rewards for one repeated response; a value loss with a floor that no training removes; evaluation of
        the same checkpoint that differs from run to run.

    How to fix:
        1. Call reward.eval() after loading and after anything that calls train() on a parent module.
        2. If it is in eval mode already, look for dropout with training=True or a flag fixed at construction.
        3. A function that samples (a judge model): lower its temperature to 0 or average several answers.

    Source:
        https://github.com/deepspeedai/DeepSpeed/issues/1781 (a layer that does not hear eval()); Huang et al. 2024,
        "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (dropout is off in every
        model).
    """
    if reward_invariance is None and (reward_on_samples is None or not reward_on_samples.again):
        raise Unavailable("needs a reward model that can be called twice, or samples for a reward function")
    if reward_on_samples is not None and reward_on_samples.again:
        s = reward_on_samples
        apart = [abs(a - b) for a, b in zip(s.numbers, s.again, strict=True)]
        if max(apart) > 1e-6 * max(1.0, *(abs(n) for n in s.numbers)):
            yield Finding(
                f"The reward function gives other scores when it is asked for the same {len(apart)} responses again. "
                "It should be a function of prompt and response: fix its seed or lower its temperature.",
                role="reward",
                confidence=Confidence.PROVEN,
                severity=Severity.WARNING,
                evidence=(Evidence("largest difference between two askings", "0", f"{max(apart):.4g}"),),
            )
    if reward_invariance is None:
        return
    shift = reward_invariance.shifts.get("repeat")
    if shift is None or not shift.moved or not isfinite(shift.largest):
        return  # what is not finite is no draw of chance
    active = reward_parameters.active_dropout if reward_parameters else ()
    cause = f"{len(active)} dropout layers are active" if active else "something in its forward pass is random"
    deaf = reward_invariance.shifts.get("repeat in eval mode", shift).moved
    advice = (
        "eval() does not end it, so look for dropout with training=True" if deaf else "call eval() on it before scoring"
    )
    yield Finding(
        f"The reward model scores the same text differently twice, in {reward_invariance.mode} mode: {cause}. It "
        f"should be deterministic: {advice}.",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "difference between two scorings of one batch",
                expected="0",
                observed=f"{shift.largest:.4g}, {shift.largest / max(shift.scale, 1e-12):.2g} standard deviations",
                tolerance=f"{shift.tolerance:.2g}",
                where=", ".join(active[:3]) or shift.detail,
            ),
        ),
    )


@reward_not_deterministic.fault("hand-written, dropout and train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="last", dropout=0.1).train())


@reward_not_deterministic.fault("a GPT-2 classifier with its default dropout, left in train mode")
def _(healthy: Any) -> Any:
    import transformers

    from rlhf_doctor.selftest import specimens

    config = transformers.GPT2Config(
        vocab_size=specimens.vocabulary(healthy), n_embd=32, n_layer=2, n_head=4, n_positions=128, num_labels=1,
        bos_token_id=None, pad_token_id=healthy.tokenizer.pad_token_id,
        eos_token_id=healthy.tokenizer.eos_token_id,
    )  # fmt: skip
    return healthy.but(reward=transformers.GPT2ForSequenceClassification(config).train())


@reward_not_deterministic.fault("dropout that does not hear eval()")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import scorers

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return torch.nn.functional.dropout(scores, 0.3, training=True)

    return healthy.but(reward=scorers.Rescored(healthy.reward, rule).eval())

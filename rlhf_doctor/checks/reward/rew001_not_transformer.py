"""REW001: the reward model is a Transformer, like the policy it judges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.nontransformers import not_transformer
from rlhf_doctor.finding import Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Architecture, Census, Influence


@check(
    "REW001",
    "the reward model is a Transformer, like the policy it judges",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("REW004", "REW005", "SYS004", "REW006", "REW009", "REW012", "REW013"),
)
def reward_not_transformer(
    reward_architecture: Architecture,
    reward_census: Census,
    reward_influence: Influence,
    policy_architecture: Architecture | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        What the reward model does to a text, whatever its class is called: which operations mix tokens in a forward
        pass (attention, convolution, recurrence, a scan), whether the computation gets deeper with every token, and
        the influence map, a picture of which tokens move which output. Attention is a Transformer, an encoder
        included. A reward function has no architecture and is left alone, and so is a reward of the same other kind
        as the policy.

    Why it matters:
        The four models of RLHF share one architecture for plain reasons. The reward has to judge whole texts: is the
        answer true to the question, does the end keep what the start promised? A convolution sees a window of a few
        tokens; a recurrent network squeezes everything into one state and forgets; a bag of words cannot tell "good,
        not bad" from "bad, not good". The policy, a Transformer, can relate any two tokens, so it writes differences
        that such a judge cannot see, and it soon finds the ones that the judge takes for quality by mistake: PPO
        optimises the judge's blind spots. A Transformer reward started from the SFT model already understands the
        language from pretraining, needs tens of thousands of comparisons rather than millions, reads the policy's own
        token ids without re-encoding, and can itself be the start of the critic, which must read the same states.

    What it looks like when broken:
        The reward model's accuracy on pairs is a little above chance and stalls. In PPO the reward climbs fast while
        people see no better texts, and short patterns that score well are repeated.

    How to fix:
        1. Take the SFT model (or the pretrained model that the policy started from), drop the vocabulary head and add
           one linear layer of one output, read at the last token.
        2. Train it on preference pairs with the Bradley-Terry loss; some hours suffice.
        3. If speed was the reason for the small model: use a smaller Transformer of the same family and tokenizer, as
           InstructGPT did with a 6B reward for a 175B policy, and score once per response, not per token.

    Source:
        Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593 (the
        reward is the language model with a linear head); Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; Ouyang
        et al. 2022 (InstructGPT), https://arxiv.org/abs/2203.02155 (6B reward and value models, the value initialised
        from the reward); Bai et al. 2022, https://arxiv.org/abs/2204.05862 (larger preference models judge better); Gao
        et al. 2022, "Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760 (small reward
        models are exploited sooner).
    """
    found = not_transformer(
        "reward", "reward model", reward_architecture, reward_census, reward_influence, policy_architecture
    )
    if found is not None:
        yield found


@reward_not_transformer.fault("a CNN over the tokens, the maximum over time, one number")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.ConvolutionalScorer(specimens.vocabulary(healthy)).eval())


@reward_not_transformer.fault("an MLP on the mean of the embeddings")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.BagOfTokens(specimens.vocabulary(healthy)).eval())


@reward_not_transformer.fault("an LSTM whose last state is scored, giving a Hugging Face style output")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers, specimens

    return healthy.but(reward=scorers.LSTMScorer(specimens.vocabulary(healthy)).eval())


@reward_not_transformer.fault("a Mamba body with a scalar head")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers, specimens

    return healthy.but(reward=scorers.StateSpaceScorer(specimens.vocabulary(healthy)).eval())

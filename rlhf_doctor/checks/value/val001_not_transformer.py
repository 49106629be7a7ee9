"""VAL001: the critic is a Transformer, like the policy whose states it values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.nontransformers import not_transformer
from rlhf_doctor.finding import Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Architecture, Census, Influence


@check(
    "VAL001",
    "the critic is a Transformer, like the policy whose states it values",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("VAL003", "VAL004", "SYS004", "VAL007", "VAL015"),
)
def value_not_transformer(
    value_architecture: Architecture,
    value_census: Census,
    value_influence: Influence,
    policy_architecture: Architecture | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        What the critic does to a text, whatever its class is called: which operations mix tokens in a forward pass
        (attention, convolution, recurrence, a scan), whether the computation gets deeper with every token, and the
        influence map, a picture of which tokens move which value. A critic of the same other kind as the policy is
        left alone.

    Why it matters:
        In RLHF a state is the whole text so far, prompt and response. The critic has to say what the reward model
        will think of the finished text, judged from that state. A recurrent network carries the state in one vector
        that every token overwrites, so after some hundred tokens the prompt has faded; a convolution never saw it. The
        value then lacks what the reward depends on, the advantages keep the noise that a baseline should remove, and
        the policy learns from noise. There is a second reason: the usual critic starts as a copy of the reward model,
        which already maps texts to scores. Another architecture cannot take over those weights, starts from nothing,
        and spends the first part of the run learning to read.

    What it looks like when broken:
        Explained variance near 0 for a long time, a value loss that falls to the variance of the returns and stays,
        training that works for short responses and not for long ones, and a slow critic: a recurrent one cannot work
        on all tokens at once.

    How to fix:
        1. Copy the reward model, apply its scalar head at every token, and train that as the critic. Without a reward
           model of the same family copy the policy's body and add one linear layer of one output.
        2. Feed it the same token ids, mask and positions as the policy: state t is the prefix up to token t.
        3. If memory was the reason for the small network: share the policy's body and add a value head to it, use
           LoRA on one body, or an algorithm without critic (RLOO, GRPO).

    Source:
        Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325 (policy and
        value are separate Transformers, the value is initialised from the reward model); Ouyang et al. 2022
        (InstructGPT), https://arxiv.org/abs/2203.02155; Huang et al. 2024, "The N+ Implementation Details of RLHF with
        PPO", https://arxiv.org/abs/2403.17031; Ahmadian et al. 2024, "Back to Basics", https://arxiv.org/abs/2402.14740
        (the critic-free way).
    """
    found = not_transformer("value", "critic", value_architecture, value_census, value_influence, policy_architecture)
    if found is not None:
        yield found


@value_not_transformer.fault("a GRU critic")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.GRUCritic(specimens.vocabulary(healthy)))


@value_not_transformer.fault("a recurrent cell written as a loop over linear layers")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.HandWrittenRecurrence(specimens.vocabulary(healthy)))


@value_not_transformer.fault("a causal CNN critic that returns a dict")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers, specimens

    return healthy.but(value=scorers.CausalConvolutionCritic(specimens.vocabulary(healthy)))


@value_not_transformer.fault("a Mamba body with a scalar head at every token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers, specimens

    return healthy.but(value=scorers.StateSpaceScorer(specimens.vocabulary(healthy), per_token=True).eval())

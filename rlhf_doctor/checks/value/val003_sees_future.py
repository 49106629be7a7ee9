"""VAL003: the value of a state does not depend on what comes after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Architecture, Influence


@check(
    "VAL003",
    "the value of a state does not depend on what comes after it",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("VAL002", "PRE004"),
    explains=("VAL004",),
)
def value_sees_future(value_influence: Influence, value_architecture: Architecture) -> Iterator[Finding]:
    """
    What it examines:
        The influence map: how much V at each position moves with each token of the text, by its gradient to the
        embeddings. In a critic everything above the diagonal is exactly zero.

    Why it matters:
        The advantage of a token is what came after it minus what was expected before it. A critic that has read the
        rest of the response already knows the outcome: it explains the return away, the advantages shrink to nothing,
        and what is left tells the policy nothing about its choice. During generation there is no rest to read, so such
        a value means something else there.

    What it looks like when broken:
        Explained variance near 1 from early on, a tiny value loss, tiny advantages, and a policy that does not improve.
        Typical causes: a BERT-like encoder as critic, a decoder whose causal mask was replaced by the padding mask, a
        mean over the whole row added to every position.

    How to fix:
        1. Use a causal decoder, best a copy of the reward model with its head at every token.
        2. In a hand-written attention add the causal mask to the padding mask; do not replace it.
        3. Normalise and pool over the past only.

    Source:
        Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        https://arxiv.org/abs/1506.02438 (a baseline may depend on the state and not on what follows); Huang et al.
        2024, "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031. A masked position
        has a gradient of exactly zero; a millionth of the row's largest counts as zero.
    """
    i = value_influence
    if not i.tokens or i.causal:
        return
    t, s, strength = max(
        ((t, s, v) for t, row in enumerate(i.tokens) for s, v in enumerate(row) if s > t), key=lambda found: found[2]
    )
    looking = sum(any(v > i.floor for v in row[t + 1 :]) for t, row in enumerate(i.tokens))
    yield Finding(
        f"The critic sees the future: V at position {t} depends on token {s}, which comes later. It was measured to be "
        f"a {value_architecture.kind}. It should be causal, as the policy is: a decoder with a causal mask.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                f"|∂ V_{t} / ∂ embedding_{s}|, relative to the row's largest entry",
                expected="0",
                observed=f"{strength:.3g}",
                tolerance=f"{i.floor:g}",
                where=f"{value_architecture.class_name}, {i.tokens_of}",
                reproduce=f"gradient of V at every position of {len(i.tokens)} tokens to every embedding",
            ),
            Evidence(
                "positions that see a later token",
                expected=f"0 of {len(i.tokens)}",
                observed=f"{looking} of {{len(i.tokens)}}",
            ),
        ),
    )


@value_sees_future.fault("a BERT encoder with a scalar head at every token")
def _(healthy: Any) -> Any:
    import transformers

    from rlhf_doctor.selftest import specimens

    config = transformers.BertConfig(
        vocab_size=specimens.vocabulary(healthy), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return healthy.but(value=transformers.BertForTokenClassification(config).eval())


@value_sees_future.fault("hand-written attention without the causal mask")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, causal=False))


@value_sees_future.fault("values centred over the whole row inside the critic")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return {"values": values - (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)}

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())

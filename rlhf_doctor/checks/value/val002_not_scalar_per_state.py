"""VAL002: the critic gives one scalar per state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Output
from rlhf_doctor.instruments.variation import Variation


@check(
    "VAL002",
    "the critic gives one scalar per state",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("PRE004",),
    explains=("VAL003", "VAL005", "VAL006", "VAL015", "VAL007"),
)
def value_not_scalar_per_state(value_output: Output, value_variation: Variation | None = None) -> Iterator[Finding]:
    """
    What it examines:
        The critic is called on three sequences of different lengths, and the shape of what it gives is compared
        with (batch, tokens) or (batch, tokens, 1). A sequence classifier whose head is applied to every token before
        its forward pools them counts as one scalar per state, since loops read that head directly; so does a critic
        that leaves out the last token, after which no action follows. One value that is merely repeated along a
        sequence, and differs between sequences, is one value per sequence.

    Why it matters:
        In token-level PPO every prefix is a state, and the critic estimates the return from each of them. The
        advantage of every token is a difference of these estimates, so anything but one number per state has no
        meaning in the formula, and broadcasting often hides the mistake.

    What it looks like when broken:
        Vocabulary logits: the critic kept its language-model head. Two labels: the default of a classifier. One value
        per sequence: it pools, so every token of a response shares one baseline. Training runs, the value loss falls
        to some constant, and advantages are noise.

    How to fix:
        1. End the critic in a linear layer of one output, applied to the hidden state at every token.
        2. With a sequence-classification class, set num_labels=1 and read its head per token, or use the
           token-classification class.
        3. Squeeze the last axis: values have shape (batch, tokens), like the log-probabilities.

    Source:
        Stiennon et al. 2020, "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325 (a value
        function initialised from the reward model, one value per token); Huang et al. 2024, "The N+ Implementation
        Details of RLHF with PPO", https://arxiv.org/abs/2403.17031.
    """
    o = value_output
    if o.kind == "scalar per token":
        if value_variation is not None and value_variation.repeated:
            yield _repeated(value_variation, o)
        return
    if o.shape in ((o.batch, o.length - 1), (o.batch, o.length - 1, 1)):
        return
    meaning = {
        "vocabulary": "logits over the vocabulary at every token: it still has its language-model head",
        "vector per token": f"a vector of {o.shape[-1]} numbers at every token",
        "scalar per sequence": "one value for the whole sequence, so all its states share one baseline",
        "vector per sequence": f"a vector of {o.shape[-1]} numbers for the whole sequence",
        "vocabulary per sequence": "logits over the vocabulary, once per sequence",
    }.get(o.kind, "no shape that holds one number per state")
    yield Finding(
        f"The critic emits {meaning}. It should emit one scalar per state, shape (batch, tokens): end it in a linear "
        "layer of one output applied at every token.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "shape of the critic's output",
                expected=f"({o.batch}, {o.length}) or ({o.batch}, {o.length}, 1)",
                observed=str(o.shape),
                where=o.where,
                reproduce=f"value({o.call}) on {o.batch} sequences of {o.length} tokens",
            ),
        ),
    )


def _repeated(v: Variation, o: Output) -> Finding:
    return Finding(
        "The critic gives one value for the whole sequence, repeated at every token, so all states of a response "
        "share one baseline. It should emit one scalar per state: apply its head to the hidden state at every token.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                f"values of {len(v.states)} states of one text, and of another text",
                expected="different along a text",
                observed=f"all {v.states[0]:.6g}, and all {v.other_states[0]:.6g}",
                tolerance=f"{v.rounding:.2g}",
                where=o.where,
            ),
        ),
    )


@value_not_scalar_per_state.fault("the critic keeps its language-model head")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, width=specimens.vocabulary(healthy)))


@value_not_scalar_per_state.fault("a critic with two labels")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, width=2))


@value_not_scalar_per_state.fault("a critic that pools to one value per sequence")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, pool=True))


@value_not_scalar_per_state.fault("a Hugging Face critic whose last value is repeated at every token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return values.gather(1, scorers.last_real(mask)[:, None]).expand_as(values)

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())


@value_not_scalar_per_state.fault("a classifier with its default two labels")
def _(healthy: Any) -> Any:
    import transformers

    config = healthy.value.config.__class__(**{**healthy.value.config.to_dict(), "id2label": None})
    config.num_labels = 2
    return healthy.but(value=transformers.AutoModelForTokenClassification.from_config(config).eval())

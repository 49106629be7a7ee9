"""REW002: the reward model gives one free number per sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.bounds import described, holds_back, observed_scores
from rlhf_doctor.checks.heads import head_of_labels
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import HeadRange, Manifest, Output
from rlhf_doctor.instruments.variation import Variation

MEANINGS = {
    "vocabulary": "logits over the vocabulary at every token",
    "vector per token": "{n} numbers at every token",
    "scalar per token": "one number at every token",
    "vector per sequence": "{n} numbers for a sequence",
    "vocabulary per sequence": "logits over the vocabulary, once per sequence",
}


@check(
    "REW002",
    "the reward model gives one free number per sequence",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("PRE004",),
    early=Stage.STATIC,
    explains=("REW006", "REW009", "REW010", "REW004", "REW012", "REW013", "VAL007"),
    across_roles=True,
)
def reward_output_shape(
    reward_manifest: Manifest,
    setup: Any,
    reward_output: Output | None = None,
    reward_head_range: HeadRange | None = None,
    reward_on_samples: OnSamples | None = None,
    reward_preferences: PairScores | None = None,
    reward_variation: Variation | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The reward is called on three sequences of different lengths and its output's shape compared with (batch,) or
        (batch, 1). Then the last projection is driven to ±1,000,000 times its size: the score should follow in both
        directions. A clamp that lies well outside the observed scores is fine. Scores at every token are fine where
        the setup declares ``dense_rewards``, and info where a token classifier or a value head is meant to be read at
        the last token by the loop.

    Why it matters:
        PPO adds one number per response to the return. Two labels are the default of a sequence classifier: the loop
        takes one column or averages them, and neither is the preference. A probability has lost its tails: all good
        texts score 0.99, so the differences that training should follow are gone, and a Bradley-Terry score is a
        log-odds, not a probability.

    What it looks like when broken:
        A shape error at best. Else a reward between 0 and 1 that sticks to one end, or a reward model whose pairwise
        loss trained "fine" while its score in PPO means something else.

    How to fix:
        1. Load or build the reward with num_labels=1, in training and in PPO.
        2. Read it at the last real token, and return shape (batch,).
        3. Take the logit: no sigmoid, softmax or tanh behind the head. Scale or clip in the loop, outside the scores.

    Source:
        Ouyang et al. 2022 (InstructGPT), https://arxiv.org/abs/2203.02155 (the score is the scalar inside the sigmoid
        of the pairwise loss); the two labels: https://github.com/huggingface/trl/issues/653; a softmax or sigmoid
        behind the score: https://github.com/vllm-project/vllm/pull/18313. Clips in use are ±5 (DeepSpeed-Chat) and ±10
        (OpenRLHF, trlx): a clip that leaves the observed scores their own span of room is fine, any other curve only
        where it reaches ±5 too.
    """
    o = reward_output
    if o is None:
        if (head := head_of_labels(reward_manifest, setup)) is None:
            raise Unavailable("needs the reward model's output")
        evidence = Evidence("rows of the classifier's head", "1", str(head.width), where=head.name)
        yield _not_one(f"{head.width} labels for a sequence", evidence)
        return
    if o.kind == "scalar per token":
        yield from _per_token(o, reward_manifest, setup)
    elif o.kind != "scalar per sequence":
        labels = " that sum to one, probabilities of labels" if o.sums_to_one else ""
        width = o.shape[-1:] and o.shape[-1]
        meaning = MEANINGS.get(o.kind, "nothing that holds one number per sequence").format(n=width)
        yield _not_one(meaning + labels, _shape(o))
    if reward_head_range is None or o.kind not in ("scalar per sequence", "scalar per token"):
        return
    seen = observed_scores(o, reward_on_samples, reward_preferences)
    still = reward_variation is not None and reward_variation.still
    if still or not holds_back(reward_head_range, seen, setup.declared):
        return  # a constant is REW006's
    r = reward_head_range
    probability = r.bounded_below and r.bounded_above and r.low >= 0 and r.high <= 1
    what = "a probability" if probability else f"held {described(r)}"
    yield Finding(
        f"The reward model's score is {what}: however good or bad a text is, the score stays {described(r)}. It should "
        "be the free output of a linear layer: take the logit, before any squashing.",
        role="reward",
        confidence=Confidence.PROVEN,
        severity=None if r.bounded_below and r.bounded_above else Severity.WARNING,
        evidence=(
            Evidence(
                f"score with the last projection driven to ±{r.drive:g} times its size",
                expected="follows in both directions",
                observed=f"stays {described(r)}",
                where=f"behind the last projection: {', '.join(r.activations) or 'a bound'}",
            ),
        ),
    )


def _not_one(gives: str, evidence: Evidence) -> Finding:
    return Finding(
        f"The reward model gives {gives}. It should give one score per sequence, shape (batch,): use one label "
        "(num_labels=1) and read it at the last token.",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(evidence,),
    )


def _per_token(o: Output, manifest: Manifest, setup: Any) -> Iterator[Finding]:
    if setup.declared.get("dense_rewards"):
        return
    names = (*manifest.architectures, manifest.class_name, o.class_name)
    heads = {part for name in manifest.tensors for part in name.split(".")}
    read_by_loop = bool(heads & {"v_head", "value_head"}) or any(
        name.endswith(("ForTokenClassification", "WithValueHead")) or name == "TransformerDecoder" for name in names
    )
    yield Finding(
        "The reward model gives one number at every token. "
        + (
            "That is how token classifiers and value heads serve as rewards: the loop must read it at the last token "
            "of the response, not at a pad."
            if read_by_loop
            else "It should give one score per sequence, shape (batch,): read it at the last real token, or declare "
            "dense_rewards where a reward for every token is meant."
        ),
        role="reward",
        confidence=Confidence.PROVEN,
        severity=Severity.INFO if read_by_loop else None,
        evidence=(_shape(o),),
    )


def _shape(o: Output) -> Evidence:
    return Evidence(
        "shape of the reward's output",
        expected=f"({o.batch},) or ({o.batch}, 1)",
        observed=str(o.shape),
        where=o.where,
        reproduce=f"reward({o.call}) on {o.batch} sequences of {o.length} tokens",
    )


@reward_output_shape.fault("a classifier with its default two labels")
def _(healthy: Any) -> Any:
    import transformers

    config = healthy.reward.config.__class__(**{**healthy.reward.config.to_dict(), "num_labels": 2, "id2label": None})
    config.num_labels = 2
    return healthy.but(reward=transformers.AutoModelForSequenceClassification.from_config(config).eval())


@reward_output_shape.fault("hand-written, two labels")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, width=2, pool="last").eval())


@reward_output_shape.fault("hand-written, a score at every token that nobody declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy).eval())


@reward_output_shape.fault("a sigmoid behind the score")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Rescored(healthy.reward, lambda scores, ids, mask: scores.sigmoid()))


@reward_output_shape.fault("hand-written, a tanh behind the head")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="last", squash=torch.tanh).eval())

"""POL002: the policy gives one distribution over the vocabulary per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest, Output


@check(
    "POL002",
    "the policy gives one distribution over the vocabulary per token",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("PRE004",),
    explains=("POL007", "REF002", "SYS004"),
    across_roles=True,
)
def policy_output_shape(policy_output: Output, policy_manifest: Manifest) -> Iterator[Finding]:
    """
    What it examines:
        The policy is called on three sequences of different lengths. Its output should have the shape (batch, tokens,
        vocabulary) and hold logits. A last axis that is wider than the tokenizer is normal, since many heads are
        padded to a round number; a narrower one cannot give some tokens. Rows that are positive and sum to 1 are
        probabilities already.

    Why it matters:
        A policy is a distribution over the next token after every prefix. Loops take a log-softmax of its output; of
        probabilities that gives an almost uniform distribution, of hidden states nonsense, and neither raises.

    What it looks like when broken:
        Entropy stays near the logarithm of the vocabulary, the ratio stays near 1, gathering a token's log-probability
        fails for some ids only. A classifier as policy gives one vector per sequence.

    How to fix:
        1. Load the policy with a causal language-model class, so that it ends in its vocabulary head.
        2. Return the head's logits, before any softmax.
        3. After adding tokens to the tokenizer, call resize_token_embeddings, which resizes the head too.

    Source:
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (the policy is a language model);
        https://huggingface.co/docs/transformers/main_classes/model (resize_token_embeddings). A width counts as too
        narrow below the tokenizer's largest id, or, without a tokenizer, below nine tenths of the embedding's rows:
        embeddings are padded by a few hundred rows, which is less than a tenth of a real vocabulary.
    """
    o = policy_output
    tokens = policy_manifest.tokenizer.size if policy_manifest.tokenizer else int(0.9 * o.vocab_size)
    wanted = f"({o.batch}, {o.length}, {o.vocab_size})"
    if o.kind != "vocabulary":
        said = {
            "scalar per token": "one number at every token, like a critic",
            "scalar per sequence": "one number per sequence, like a reward model",
            "vector per token": f"{o.shape[-1]} numbers at every token",
            "vector per sequence": f"{o.shape[-1]} numbers per sequence, like a classifier",
            "vocabulary per sequence": "one distribution per sequence instead of one per token",
        }.get(o.kind, f"a tensor of shape {o.shape}")
    elif o.shape[-1] < min(tokens, o.vocab_size):
        said = f"{o.shape[-1]} numbers at every token, too few for a vocabulary of {max(tokens, o.vocab_size)}"
    elif o.sums_to_one:
        said, wanted = "probabilities, of which a loop takes a second softmax", "logits: any real numbers"
    else:
        return
    yield Finding(
        f"The policy emits {said}. It should emit logits over the vocabulary at every token: end it in its "
        "language-model head and return what the head gives.",
        role="policy",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "the policy's output",
                expected=wanted,
                observed=f"{o.shape}, from {o.minimum:.3g} to {o.maximum:.3g}",
                where=o.where,
                reproduce=f"policy({o.call}) on {o.batch} sequences of {o.length} tokens",
            ),
        ),
    )


@policy_output_shape.fault("a Hugging Face policy that returns probabilities")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "probabilities"))


@policy_output_shape.fault("a policy that returns hidden states")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "hidden"))


@policy_output_shape.fault("a policy that keeps the last position alone")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "last"))


@policy_output_shape.fault("a hand-written policy that gives one distribution per sequence")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.hand_written(healthy, pool="last"))

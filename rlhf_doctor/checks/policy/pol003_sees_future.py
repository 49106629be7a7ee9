"""POL003: the policy's logits depend on the past alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Influence, Invariance, Manifest


@check(
    "POL003",
    "the policy's logits depend on the past alone",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("POL002", "PRE004"),
    explains=("POL004", "POL006", "POL007", "REF001", "REF002"),
    across_roles=True,
)
def policy_sees_future(
    policy_influence: Influence, policy_manifest: Manifest, policy_invariance: Invariance | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The influence map: how much the logits after each token change with the embedding of every other token. All
        entries above the diagonal, where a later token acts on an earlier output, should be exactly 0. An
        encoder-decoder reads its whole prompt by design and is left out.

    Why it matters:
        When a text is scored in one pass, the logits at t must be those that the token t + 1 was sampled from, when
        nothing later existed. If they see later tokens, log-probabilities of the loop are not those of the sampler,
        and the loss can be lowered by reading the answer.

    What it looks like when broken:
        The ratio is far from 1 before any update, log-probabilities of responses are close to 0, the training reward
        is fine and the sampled text is not.

    How to fix:
        1. Apply a causal mask: scaled_dot_product_attention(..., is_causal=True), or a lower triangle in the mask.
        2. Combine it with the padding mask by "and"; a four-dimensional mask passed to a model replaces its own.
        3. With a BERT-like class, set is_decoder=True, or use a decoder.
        4. Shift labels, not inputs: the logits at t belong to the token t + 1.

    Source:
        Vaswani et al. 2017, "Attention is all you need", https://arxiv.org/abs/1706.03762, section 3.2.3 (masking keeps
        the decoder from attending to later positions). Influence counts from a millionth of the row's largest entry:
        a masked position's gradient is exactly 0, so nothing is gained by a larger threshold.
    """
    if policy_manifest.config.get("is_encoder_decoder"):
        raise Unavailable("an encoder-decoder reads its whole prompt")
    if not policy_influence.tokens:
        raise Unavailable("the policy shows no influence per position")
    if policy_influence.causal:
        return
    beside = policy_invariance.shifts.get("neighbours") if policy_invariance is not None else None
    if beside is not None and beside.moved:
        raise Unavailable("rows of a batch reach each other, so their influences cannot be told apart (POL004)")
    entries = [(v, t, s) for t, row in enumerate(policy_influence.tokens) for s, v in enumerate(row) if s > t]
    largest, t, s = max(entries)
    seeing = [entry for entry in entries if entry[0] > policy_influence.floor]
    yield Finding(
        f"The policy sees the future: its logits after token {t} depend on token {s}. They should depend on tokens 0 "
        "to t alone: apply a causal mask in every attention layer.",
        role="policy",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "influence of later tokens on the logits",
                expected="0",
                observed=f"{largest:.2g} of the row's largest, in {len(seeing)} of {len(entries)} places",
                tolerance=f"{policy_influence.floor:g}",
                where=f"output {t}, token {s}; {policy_influence.tokens_of}",
                reproduce=f"torch.autograd.grad(logits[0, {t}].sum(), embeddings)[0][0, {s}]",
            ),
        ),
    )


@policy_sees_future.fault("a hand-written decoder without its causal mask")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy, causal=False)
    return policies.paired(healthy, policy)


@policy_sees_future.fault("a Hugging Face model given a four-dimensional mask of ones")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "open"))


@policy_sees_future.fault("logits that mix in the next position's")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.Wrapped(healthy.policy, "ahead"))

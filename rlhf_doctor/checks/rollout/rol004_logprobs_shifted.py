"""ROL004: log-probabilities are those of the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.sampling import listed
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

WHERE = {-1: "the token before", 1: "the token after", -2: "the token two before"}


@check(
    "ROL004",
    "log-probabilities are those of the tokens that were drawn",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL010",),
    explains=("ROL003", "ROL001", "ADV008", "SYS008", "LOS001", "KLD005", "VAL013", "KLD003"),
    across_roles=True,
)
def logprobs_shifted(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        Which token every trained state takes as its action: the vocabulary entry whose logit gets the gradient of a
        log-probability. It should be the token that was drawn in that state. And whether the weights of the tokens
        are their own advantages, or those of the token before or after; or carry, at single tokens and before any
        update, the token's probability as a ratio, as an old log-probability of 0 makes it.

    Why it matters:
        A log-probability of another token teaches the policy to repeat its input, or other rows' answers. The loss
        falls, since old and new are wrong alike and the ratio is 1.

    What it looks like when broken:
        Very negative log-probabilities, an entropy estimate far above the real one, text that falls apart although
        loss, ratio and KL look healthy.

    How to fix:
        1. Pair logits[:, :-1] with ids[:, 1:]; the state before a token predicts it.
        2. Cut logits and labels with the same slice, and gather within a row.
        3. Never fill missing log-probabilities with 0, which says that the token was certain.

    Source:
        https://github.com/modelscope/ms-swift/pull/8196 and https://github.com/vllm-project/vllm/pull/29216 (one off),
        https://github.com/modelscope/ms-swift/issues/3069 (other rows),
        https://github.com/PrimeIntellect-ai/verifiers/pull/2078 (filled with 0). A sample counts when most of its
        trained tokens, and two at least, are off; in healthy loops none is. Filled tokens, three at least, have a
        ratio within 1 % of their probability while most others have one within 1 % of 1.
    """
    from rlhf_doctor.trace import passes, rows
    from rlhf_doctor.trace.filled import filled

    taken = passes.actions(traced.base)
    if taken is None:
        raise Unavailable("needs gradients of the policy's log-probabilities: none was seen at its head")
    if taken.wrong:
        where = WHERE.get(taken.usual, "tokens that stand nowhere near")
        yield Finding(
            f"In {taken.wrong} of {taken.samples} samples the trained log-probabilities are not those of the drawn "
            f"tokens, but of {where}. Pair the logits of each state with the token that follows it, in the same row.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "place of the trained token beside the drawn one",
                    "0 in every state",
                    f"other in {taken.off} of {taken.tokens} states, mostly {taken.said}",
                    where=f"response tokens of {taken.samples} samples",
                ),
            ),
        )
        return
    slots = rows.slots_off(traced.base, traced.recovered)
    if slots is not None and not (slots.offset > 0 and rows.score_at_last(traced)):  # else the values stand off
        there = "token after" if slots.offset > 0 else "token before"
        yield Finding(
            f"The log-probabilities stand one slot off: each is weighted with the advantage of the {there}. "
            "Cut log-probabilities, masks and advantages with the same slice, and fill nothing with 0.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "distance of the weights from a line through the tokens' own advantages, of their range",
                    "0",
                    f"{slots.own:.2g}; {slots.misfit:.2g} with those of the {there}",
                    f"{rows.MISFIT:g}",
                    f"{slots.tokens} tokens of the first minibatch",
                ),
            ),
        )
        return
    gaps = filled(traced)
    if gaps is not None:
        yield Finding(
            f"{gaps.tokens} tokens are trained as if their old log-probability were 0: before any update their ratio "
            f"is their own probability, down to {gaps.ratio:.2g}. Take every old log-probability from the policy, and "
            "leave tokens that have none out of the loss.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "ratio before the first update, by the tokens' weights",
                    "1 at every token",
                    f"the token's probability at {gaps.tokens} of {gaps.of} tokens",
                    "1 %",
                    listed(gaps.samples),
                ),
            ),
        )


@logprobs_shifted.fault("gathered one token late")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"logprobs": rollout_faults.logprobs_of_other_tokens(offset=-1)})


@logprobs_shifted.fault("gathered from the next row")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"logprobs": rollout_faults.logprobs_of_other_tokens(rows=1)})

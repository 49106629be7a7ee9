"""REW014: the missing-EOS penalty is taken from the responses that have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number

if TYPE_CHECKING:
    from rlhf_doctor.trace.penalty import Surplus

NEAR = 0.05  # of the penalty


@check(
    "REW014", "the missing-EOS penalty is taken from the responses that have none", stage=Stage.TRACE,
    severity=Severity.ERROR, after=("REW004", "ADV002", "VAL009", "VAL010"), explains=("ADV009", "SYS008"),
    across_roles=True,
)  # fmt: skip
def penalty_misfires(last_rewards: Surplus, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The reward at the last token of every response of a step, read off the critic's gradient, less its score and its
        KL. With a declared missing_eos_penalty it must be minus that where the response has no end of sequence (or the
        score must be replaced with it), and 0 where it has one.

    Why it matters:
        The penalty teaches the policy to end. On every response it is a constant and teaches nothing; on those that did
        end, or with the sign turned, it teaches never to end.

    What it looks like when broken:
        Responses get as long as the limit, or the share that ends stays where it was.

    How to fix:
        1. Look for the end of sequence along the tokens of each response, before it is cut or replaced with padding.
        2. Subtract the penalty: score[~ended] -= missing_eos_penalty, with a positive number.
        3. Use the id of the tokenizer's end of sequence, and all of them where there are several.

    Source:
        Huang et al. 2024, https://arxiv.org/abs/2403.17031 (the EOS trick); an end of sequence that was looked for in
        the prompt too: https://github.com/huggingface/trl/issues/6805; one that is another token:
        https://github.com/huggingface/trl/pull/5338. Tolerance: 5% of the penalty; float32 leaves 1e-5.
    """
    import numpy as np

    penalty = number(setup.declared.get("missing_eos_penalty"))
    if not penalty:
        raise Unavailable("needs missing_eos_penalty to be declared")
    amount, ended = last_rewards.amount, last_rewards.ended
    known = np.isfinite(amount)
    if not known.any():
        raise Unavailable(last_rewards.reason or "the rewards at the last tokens could not be read")
    near = NEAR * abs(penalty)
    taken = (np.abs(amount + penalty) < near) | (~ended & (np.abs(amount + last_rewards.score + penalty) < near))
    given, none = np.abs(amount - penalty) < near, np.abs(amount) < near
    strange = known & ~taken & ~given & ~none
    wrong = known & ((ended & ~none) | (~ended & ~taken))
    if strange.any():
        raise Unavailable("the rewards at the last tokens hold more than the score, the KL and the penalty")
    if not wrong.any():
        if not (known & ~ended).any():
            raise Unavailable("every response of the step ended, so no penalty was due")
        return
    late, early = known & ~ended, known & ended
    if given[late].any() and not taken[late].any():
        said = "is added to responses without an end of sequence: a bonus. Subtract it"
    elif given[early].any():
        said = "is added to responses that ended. Subtract it from those that did not"
    elif not taken[known].any():
        said = "is never taken. Subtract it from the score of each response without an end of sequence"
    elif taken[known].all():
        said = "is taken from every response. Take it from those without an end of sequence only"
    else:
        said = "is taken from the wrong responses. Look for the end of sequence in each response, along its tokens"
    yield Finding(
        f"The missing-EOS penalty of {penalty:g} {said}.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence(
                f"responses that {name} and lose {penalty:g}",
                expected,
                f"{int((taken & rows).sum())} of {int(rows.sum())}"
                + (f", {int((given & rows).sum())} gain it" if (given & rows).any() else ""),
                f"{NEAR:.0%} of the penalty",
                "reward at the last token less score and KL",
            )
            for name, rows, expected in (("ended", early, "0"), ("did not end", late, f"{int(late.sum())}"))
            if rows.any()
        ),
    )


@penalty_misfires.fault("a bonus")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"score": kl_faults.score_with(-1.0)})


@penalty_misfires.fault("never taken")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"score": kl_faults.score_with(0.0)})


@penalty_misfires.fault("taken from every response")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"score": kl_faults.score_with(always=True)})

"""ADV010: group-relative advantages compare the responses to one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.tracing import Traced

GROUPED = ("grpo", "rloo", "dr. grpo", "dr_grpo", "dapo", "gspo")
TOLERANCE = 2e-3


@check(
    "ADV010",
    "a group's advantages compare the responses to one prompt",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ADV002", "ADV008", "ADV009"),
    explains=("ADV004", "ADV009", "SYS008"),
)
def group_baseline_wrong(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Without a critic each response's advantage is read off the policy's gradient. Those of the responses to one
        prompt should add up to 0. And one score is changed and the step run again: all responses to that prompt should
        answer, since they share its baseline.

    Why it matters:
        The baseline is what makes a score comparable: prompts differ more than responses do. Compared across prompts,
        every response to an easy prompt is pushed up, and every one to a hard prompt down, whatever it says.

    What it looks like when broken:
        The reward rises on easy prompts only; all responses to one prompt become more alike; the mean advantage is not
        0 in the log.

    How to fix:
        1. Keep a prompt's responses next to each other and view the scores as (prompts, group size), in this order;
           with shuffled rows group by an id.
        2. Take the mean over the group's real responses only, and all of them; leave abstained or empty rows out of
           both the mean and the loss.
        3. Subtract the mean before dividing by the deviation, and compute both from this batch.

    Source:
        Shao et al. 2024, https://arxiv.org/abs/2402.03300 (GRPO), Ahmadian et al. 2024,
        https://arxiv.org/abs/2402.14740 (RLOO; its leave-one-out advantages add up to 0 as well); a wrong axis:
        https://github.com/huggingface/trl/issues/3991; empty responses in their peers' baseline:
        https://github.com/verl-project/verl/pull/6310. Tolerance 0.002 of the group's absolute sum, under the weighting
        of rows that comes nearest 0: float32 leaves 0.00001.
    """
    from rlhf_doctor.trace import gains
    from rlhf_doctor.trace.groups import baselines

    algorithm = str(setup.declared.get("algorithm") or "").lower()
    size = number(setup.declared.get("group_size"))
    if not gains.critic_free(traced):
        raise Unavailable("needs a critic-free algorithm: with a critic the baseline is its value")
    if not any(name in algorithm for name in GROUPED) and not (size and size > 1):
        raise Unavailable("needs algorithm grpo or rloo, or a group_size, to be declared")
    found = baselines(traced, int(size) if size else None)
    worst = max(found.sums, key=abs)
    if not found.moved.any():
        raise Unavailable("needs scores that reach the policy")
    if abs(worst) > TOLERANCE:
        other = (
            ""
            if not found.strangers
            else (f" A changed score moves the advantages of {len(found.strangers)} responses to other prompts.")
        )
        yield Finding(
            f"The advantages of the responses to one prompt do not add up to 0.{other} The baseline should be the mean "
            "score of the responses to the same prompt: group by prompt, over all of its responses.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "sum of a prompt's advantages over the sum of their sizes, in the worst group",
                    "0",
                    f"{worst:.3g}",
                    f"{TOLERANCE:g}",
                    where=f"{len(found.groups)} prompts; rows weighted by {found.weighting}",
                ),
                Evidence(
                    f"samples that move when the score of sample {found.changed} does",
                    f"{sorted([found.changed, *found.mates])}",
                    f"{[int(s) for s in found.moved.nonzero()[0]]}",
                ),
            ),
        )
    elif found.still_mates:
        yield Finding(
            f"{len(found.still_mates)} of the {len(found.mates) + 1} responses to one prompt do not answer to the "
            "changed score of another: the baseline is taken over a part of the group. It should be that of all "
            "responses to the prompt: group by the prompt, with the size that is sampled.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    f"samples that move when the score of sample {found.changed} does",
                    f"{sorted([found.changed, *found.mates])}",
                    f"{[int(s) for s in found.moved.nonzero()[0]]}",
                    "1e-06 of the largest weight",
                ),
            ),
        )


@group_baseline_wrong.fault("groups that mix prompts")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import group_loop

    return group_loop.setup(healthy, group_loop.mixed)


@group_baseline_wrong.fault("the mean of the whole batch")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import group_loop

    return group_loop.setup(healthy, group_loop.whole_batch)


@group_baseline_wrong.fault("divided by the deviation, the mean left in")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import group_loop

    return group_loop.setup(healthy, group_loop.mean_left_in)


@group_baseline_wrong.fault("half of the group")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import group_loop

    return group_loop.setup(healthy, group_loop.half)

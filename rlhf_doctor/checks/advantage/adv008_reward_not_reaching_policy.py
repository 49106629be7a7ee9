"""ADV008: a higher score raises what the policy is trained towards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "ADV008",
    "a higher score raises the advantages of its response",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ADV002", "ADV009"),
    explains=("SYS008", "ADV004", "ADV010"),
    effect=True,
)
def reward_not_reaching_policy(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        One sample's score is changed, then every sample's, and the step is run again: the gradients that the policy is
        trained with should move, and a higher score should raise the probability of the response's last token.

    Why it matters:
        It is what the whole run is for. A policy whose gradient does not hold the score follows the KL penalty and the
        critic's errors, and all of its curves look calm.

    What it looks like when broken:
        The reward stays where it was, or falls, while losses, KL and entropy look healthy.

    How to fix:
        1. Follow the score from the reward model to the reward tensor: an addition whose result is dropped, a tensor
           overwritten or masked afterwards, a mask that is 0 where the score was put.
        2. Compute advantages after the score has been added to the rewards.
        3. If the score enters with a minus, turn it: a higher score is a higher reward.

    Source:
        https://github.com/huggingface/trl/issues/3750 (a score that a mask may take away again) and
        https://github.com/verl-project/verl/issues/7278 (a return that is reset before it arrives). Tolerance 0.00001
        of the largest gradient: a score that is not used leaves exactly 0.
    """
    from rlhf_doctor.trace import arrival

    found = arrival.reach(traced, setup.declared)
    quantity = "largest change of the policy's gradient when scores change, over its largest entry"
    if found.none and not (found.known.any() and found.dead[found.known].all() and found.arrives):
        who = "the policy, though the critic is trained on it" if (found.known & ~found.dead).any() else "the policy"
        yield Finding(
            f"The reward model's score does not reach {who}: its gradient is the same whatever the score is. The score "
            "should be part of the advantages: follow it from the reward model to the policy loss.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(Evidence(quantity, "above 0", f"{found.moved:.3g}", "1e-05", where="the policy's head"),),
        )
    elif found.sign < 0:
        yield Finding(
            "A higher score lowers the probability of its response, while a higher value of a state lowers that of its "
            "token as it should: the score enters the advantages with a minus. Turn its sign.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("sign of the change of the last token's advantage for a higher score", "+1", "-1", "0"),
                Evidence(quantity, "above 0", f"{found.moved:.3g}", "1e-05", where="the policy's head"),
            ),
        )
    elif found.none:
        raise Unavailable("needs scores that still differ where they enter the rewards")


@reward_not_reaching_policy.fault("rewards of the KL alone")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.no_score})


@reward_not_reaching_policy.fault("scores of zero in place of the reward model's")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"score": advantage_faults.zeros_for_scores})

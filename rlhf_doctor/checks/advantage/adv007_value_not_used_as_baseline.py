"""ADV007: the critic's values are subtracted in the advantages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "ADV007",
    "the critic's values are the baseline of the advantages",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL009", "VAL013", "ADV005"),
    explains=("SYS008", "ADV001", "ADV004", "ADV006"),
    across_roles=True,
)
def value_not_used_as_baseline(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        One rollout value V(s_u) is changed and the step run again. The advantage of token u should fall by as much. If
        it does not move while a changed score does move it, the policy is trained without the critic.

    Why it matters:
        Without a baseline every token of a good response is pushed up by the whole return, whatever the state already
        promised: the gradient's mean is the same and its variance is many times larger. The critic is paid for and
        does nothing.

    What it looks like when broken:
        PPO that behaves like REINFORCE: noisy, dependent on the mean of the rewards; a value loss that falls and helps
        nothing.

    How to fix:
        1. Train the policy with A_t = return_t - V(s_t), and the critic with the return.
        2. Check that the advantages and not the returns are handed to the policy loss.
        3. Use the values of the rollout, with the mask, and not a tensor of zeros.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438 (the baseline in the estimator); a critic that gives no
        credit to single tokens: https://github.com/hpcaitech/ColossalAI/issues/3374. Tolerance 0.02 of what the same
        change of the score does; float32 leaves 0.0001, and a baseline moves it by 1.
    """
    from rlhf_doctor.trace import advantage, gains

    if gains.critic_free(traced):
        raise Unavailable("needs a critic: critic-free algorithms have another baseline")
    seen = advantage.baseline(traced)
    if seen is None:
        yield from _of_one_pass(traced)
        return
    own, score, response, elsewhere = seen
    if abs(own) > 0.02 * abs(score) or elsewhere:
        return
    if abs(score) == 0:
        raise Unavailable("needs a score that reaches the policy")
    yield Finding(
        "Changing a rollout value does not change the advantage of its token: the critic is not the policy's baseline. "
        "Train the policy with the return less the value of the state.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "change of token u's advantage for one unit of V at its state, over that for one unit of the score",
                "about -1",
                f"{own / score:.3g}",
                "0.02 around 0 is nothing",
                where=f"sample {response.sample}, u = {response.at}",
            ),
        ),
    )


def _of_one_pass(traced: Traced) -> Iterator[Finding]:
    """Where values are computed in the update alone, as in A2C: whether they move the policy's weights."""
    import numpy as np

    from rlhf_doctor.trace import gains

    pushed, base = traced.experiments.done.get("update values"), traced.base
    if pushed is None or base.has("old_value") or not base.has("weight"):
        raise Unavailable("needs a changed rollout value and a changed score, and what they do to the policy")
    share = gains.moved_share(traced, "update values")
    if share.max(initial=0.0) > gains.STILL:
        return
    yield Finding(
        "Changing the critic's values changes no advantage: the critic is not the policy's baseline. Train the policy "
        "with the return less the value of the state, detached.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "move of the policy's weights with all values, of the largest weight",
                "other than 0",
                f"{share.max(initial=0.0):.2g}",
                f"{gains.STILL:g}",
                where=f"{int(np.isfinite(base['weight'][base.real]).sum())} response tokens",
            ),
        ),
    )


@value_not_used_as_baseline.fault("advantages from values of zero")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.no_baseline})


@value_not_used_as_baseline.fault("returns in place of advantages")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"gae": advantage_faults.returns_for_advantages})

"""ADV005: no gradient flows through the advantages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

TOLERANCE = 1e-3


@check(
    "ADV005",
    "no gradient flows through the advantages",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("VAL012", "SYS008", "ADV001", "ADV004", "ADV006", "ADV007", "VAL009", "VAL010", "VAL011", "VAL013"),
    across_roles=True,
)
def advantage_not_detached(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again with the policy's logits changed in the update alone, so that its probability ratios are
        others. The gradient that reaches each value should not notice: the value loss holds no ratio. If it moves, the
        policy loss is connected to the critic through the advantages.

    Why it matters:
        The policy loss then trains the critic, towards values that make the advantages of likely tokens large: with
        ratio 1 every value is pushed down, whatever the return is.

    What it looks like when broken:
        Values drift away from the returns while the policy loss falls; explained variance turns negative; the critic's
        gradient norm follows the policy's.

    How to fix:
        1. Compute advantages and returns once after the rollout, under torch.no_grad(), from the rollout's values.
        2. If they are computed in the update, detach them before they are used in a loss.
        3. Test it: the gradient of the policy loss with respect to the critic's parameters is None or 0.

    Source:
        Schulman et al. 2017, https://arxiv.org/abs/1707.06347 (the advantage estimate is a constant in the surrogate);
        OpenAI's code stops the gradient there: https://github.com/openai/lm-human-preferences. Tolerance 0.001 of the
        largest value gradient: detached advantages leave exactly 0, attached ones move it by about its own size.
    """
    traced.needs("update logits")
    base = traced.base
    if not base.has("value_gradient"):
        raise Unavailable("needs a critic that is trained in the step")
    from rlhf_doctor.trace import advantage
    from rlhf_doctor.trace.divergence import shaped_by_the_update

    moved, size = advantage.crossed(traced)
    changed = traced.experiments.done["update logits"]
    if moved <= TOLERANCE or shaped_by_the_update(traced, changed, setup.declared):
        return
    yield Finding(
        "The policy loss reaches the critic through the advantages: changing the policy's probabilities alone changes "
        "the gradient of the values. It should not: compute advantages once after the rollout, without gradient.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "change of the values' gradient when only the policy's probabilities change, over its largest entry",
                "0",
                f"{moved:.3g}",
                f"{TOLERANCE:g}",
                where=f"the critic's head; largest entry {size:.3g}",
            ),
        ),
    )


@advantage_not_detached.fault("advantages of the live values in the policy loss")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts=advantage_faults.LiveAdvantages(whiten=False).parts())


@advantage_not_detached.fault("advantages of the live values, whitened with their graph")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts=advantage_faults.LiveAdvantages(whiten=True).parts())

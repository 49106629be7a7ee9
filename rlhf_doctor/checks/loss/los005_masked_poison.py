"""LOS005: what stands in masked slots does not reach the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.disturbed import Disturbed


@check(
    "LOS005",
    "what stands in masked slots does not reach the loss",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("PRE004",),
    effect=True,
)
def masked_poison(traced: Traced, disturbed: Disturbed | None = None) -> Iterator[Finding]:
    """
    What it examines:
        The gradients at the heads in the step as it is, and in one whose policy says absurd things in slots that belong
        to no response: its old log-probabilities there are some thousand nats away from those of the update. Every
        gradient should be finite, and no entropy bonus should act outside of the responses. What is infinite only in
        the second step is told as information: both log-probabilities come from nearly the same weights there, so
        that many sound loops multiply by the mask after exp and never meet it.

    Why it matters:
        exp of a masked log-ratio is infinite now and then, and infinity times a mask of 0 is NaN, as is NaN times 0.
        The next update then writes NaN into every weight. It happens after days, in the one batch with an odd pad.

    What it looks like when broken:
        Loss, KL or gradient norm that turn NaN although every response token is sound.

    How to fix:
        1. Select, do not multiply: torch.where(mask, x, 0) or masked_fill before exp, log and division.
        2. Fill masked log-probabilities with the same finite number in the old and in the new ones.
        3. Take the entropy's mean over the mask.

    Source:
        https://github.com/OpenRLHF/OpenRLHF/pull/1240 and https://github.com/google/tunix/pull/2310 (NaN times a mask
        of 0), https://github.com/huggingface/trl/pull/100 (no mask in the loss).
    """
    from rlhf_doctor.trace.disturbed import not_finite
    from rlhf_doctor.trace.outside import entropy_outside

    plain = not_finite(traced.base, first=True)
    if plain.outside and not plain.inside:
        yield _finding(
            "Masked slots have NaN or infinite gradients while those of all response tokens are finite: something "
            "infinite is multiplied by a mask of 0. Select with torch.where before exp, do not multiply after it.",
            ("rows outside of the responses whose gradient is not finite", "0", f"{plain.outside} of {plain.rows}"),
            "the step as it is",
        )
        return
    entropy, rows = entropy_outside(traced.base)
    if entropy:
        yield _finding(
            "The entropy bonus acts on slots that belong to no response. Take its mean over the mask of the response.",
            ("rows after the responses with the gradient of an entropy", "0", f"{entropy} of {rows}"),
            "the step as it is",
        )
        return
    if disturbed is None or not disturbed.poisoned:
        raise Unavailable("needs passes of the policy that have slots outside of the responses")
    said = disturbed.error.lower()
    raised = any(word in said for word in ("nan", "finite", "floatingpoint"))
    if disturbed.finite or raised:
        counts = f"{disturbed.finite.inside + disturbed.finite.outside} of {disturbed.finite.rows}"
        yield _finding(
            "Masked slots would reach the loss if their log-probabilities were ever far apart or infinite, as fillers "
            "and filters make them: gradients are then NaN or infinite. Nothing is wrong while they are not; selecting "
            "with torch.where before exp is safe in any case.",
            (
                "rows of the heads whose gradient is not finite",
                "0",
                f"{counts}{f'; the step raised {disturbed.error}' if raised else ''}",
            ),
            f"a step with {disturbed.poisoned} slots outside of the responses poisoned",
            Severity.INFO,
        )


def _finding(message: str, shown: tuple[str, str, str], where: str, severity: Severity | None = None) -> Finding:
    quantity, expected, observed = shown
    return Finding(
        message,
        role="loop",
        severity=severity,
        confidence=Confidence.PROVEN,
        evidence=(Evidence(quantity, expected=expected, observed=observed, where=where),),
    )


@masked_poison.fault("the entropy of pads counts")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts=loss_faults.with_entropy(0.01, pads=True))

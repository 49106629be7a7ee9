"""LOS004: the critic's gradient points from each value to its return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.disturbed import Disturbed

FEW = 6


@check(
    "LOS004",
    "the critic's gradient points from each value to its return",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("VAL002", "ROL003"),
    explains=("VAL009", "VAL010", "SYS008", "MET012"),
    across_roles=True,
)
def value_loss_wrong(traced: Traced, setup: Any, disturbed: Disturbed | None = None) -> Iterator[Finding]:
    """
    What it examines:
        The gradient at the critic's output for every response token. It must not be 0 everywhere, or at most tokens; it
        must grow when the value is raised; and with values moved in the update past their clip, those that left
        their return must be pulled back. A return does not answer to the rollout's value of its own state. Where the
        policy is not trained with return - value: whether the return is a line of that advantage and of the value,
        with another factor than 1 before the value.

    Why it matters:
        A critic that is not trained, or trained away from the returns, gives advantages that are mostly noise. The
        policy still learns something from the scores, so nobody looks.

    What it looks like when broken:
        Explained variance at or below 0; a value loss that stays or grows; a value clip fraction near 1.

    How to fix:
        1. Add vf_coef times the value loss to what is minimised, with a coefficient above 0.
        2. Minimise the mean of (V - R)², and square it.
        3. Clip V around the rollout's V, not around the return, and take the larger of the two squares.
        4. With normalised targets, bring the values back to the scale of the rewards before advantages are computed.

    Source:
        https://github.com/tensorflow/agents/issues/352 and https://arxiv.org/abs/2403.17031 (clipped value loss, the
        larger of two squares); values of another scale than the returns: https://github.com/marlbenchmark/on-policy/pull/13.
        A gradient counts as none where it is exactly 0; a critic that is right to the last bit
        is so at single tokens, not at a quarter of them.
    """
    from rlhf_doctor.trace.apart import scales_apart
    from rlhf_doctor.trace.critic import own_values
    from rlhf_doctor.trace.spans import left_out

    base = traced.base
    if setup.value is None:
        raise Unavailable("needs a critic")
    if not base.has("value_gradient"):
        yield from _left_out(traced, setup)
        return
    gradient = base["value_gradient"]
    known = base.real & (gradient == gradient)
    unused = left_out(base) & ~(known & (gradient != 0)).any(1)  # cut texts, left out of both losses
    known = known & (~unused[:, None] | unused.all())
    count = int(known.sum())
    none = int((gradient[known] == 0).sum())
    if none == count:
        yield _finding(
            "The critic's loss has no weight: its gradient is 0 at every token. The coefficient of the value loss "
            "should be above 0.",
            ("tokens whose value has a gradient", "all", f"0 of {count}"),
        )
        return
    if count >= FEW and none > 0.25 * count:
        yield _finding(
            "The critic learns nothing where it is far off: at many tokens the gradient of the value loss is exactly 0 "
            "before anything was updated. Values should be clipped around those of the rollout, not the returns.",
            ("tokens without a gradient, before any update", "0", f"{none} of {count}"),
        )
        return
    traced.needs("update values")
    pushed = traced.experiments.done["update values"]
    moved = pushed.moved(base, "value_gradient")[known]
    moved = moved[moved == moved]
    if len(moved) >= FEW and (moved < 0).mean() > 0.9:
        yield _finding(
            "The value loss is climbed: raising a value makes its gradient smaller, so that values run away from their "
            "returns. The squared error should be minimised.",
            ("tokens whose gradient grows with the value", "all", f"{int((moved > 0).sum())} of {len(moved)}"),
        )
    elif len(moved) >= FEW and (moved == 0).all() and len(set((gradient[known] > 0).tolist())) == 1:
        yield _finding(
            "The critic's gradient does not depend on how far its values are from the returns, and pushes all the same "
            "way. The error should be squared.",
            ("tokens whose gradient grows with the value", "all", f"0 of {len(moved)}, and one sign at all"),
        )
    elif disturbed is not None and disturbed.clip is not None and disturbed.clip.kind == "exchanged":
        yield _finding(
            "The value clip is the wrong way round: a value that moved away from its return has no gradient back. Take "
            "the larger of the clipped and the plain square.",
            (
                "values moved away from their return, past the clip, that are pulled back",
                "all",
                f"few or none of {disturbed.clip.away}",
            ),
        )
    elif (falls := own_values(traced)) is not None:
        yield _finding(
            "The critic is trained towards the advantages, not the returns. The target should be advantage + value.",
            ("move of a target with its own state's rollout value", "0", f"{falls:.3g}"),
        )
    elif (scales := scales_apart(traced)) is not None:
        yield _finding(
            "The critic's targets are on another scale than the values that are taken off for the advantages: a unit "
            f"of a value counts {scales.factor:.3g} in its target. Normalise both or neither: scale the values back "
            "before they are used, with the numbers that the returns were scaled with.",
            (
                "factor of the value in target = c · advantage + factor · value + constant, which fits every token",
                "1",
                f"{scales.factor:.4g}, over {scales.tokens} tokens (a factor of 1 leaves {scales.misfit:.2g} of the "
                "targets' range)",
            ),
        )


def _left_out(traced: Traced, setup: Any) -> Iterator[Finding]:
    """One module for both: its values are computed with gradients, and none comes back."""
    asked = [c for c in traced.experiments.first.calls if c.role == "value" and c.with_grad]
    if not asked or setup.value is not setup.policy or not traced.base.has("weight"):
        raise Unavailable("needs a gradient at the critic's output, and none was seen")
    yield _finding(
        "The value loss is not part of what is minimised: the values that the update computes get no gradient. Add "
        "vf_coef times the value loss to the policy's.",
        ("passes of the update whose values have a gradient", f"{len(asked)}", "0"),
    )


def _finding(message: str, shown: tuple[str, str, str]) -> Finding:
    quantity, expected, observed = shown
    return Finding(
        message,
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(quantity, expected=expected, observed=observed, where="the gradient at the critic's output"),
        ),
    )


@value_loss_wrong.fault("the coefficient is 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.zero})


@value_loss_wrong.fault("the targets are the advantages")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.towards_advantages})


@value_loss_wrong.fault("values run away from their returns")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.value_ascends})


@value_loss_wrong.fault("values are clipped around the returns")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.around_return})


@value_loss_wrong.fault("the smaller of the two squares is taken")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.smaller_value_loss})

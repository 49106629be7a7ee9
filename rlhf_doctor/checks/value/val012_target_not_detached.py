"""VAL012: the critic's loss differentiates its values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.value.trunks import borrowed, shared
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

UNEVEN = 1e-3  # relative; beside it the rounding of differences of gradients is allowed for
ROUNDINGS = 16


@check(
    "VAL012",
    "the critic's loss differentiates its values alone",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("VAL008", "VAL009", "VAL013"),
    explains=("VAL013", "LOS004", "SYS008"),
)
def value_target_not_detached(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The values of the update are raised by one amount at all states: towards a fixed target every token's gradient
        moves alike. And one sample's score is changed: towards a fixed target the gradients move by γλ from token to
        token. Where both fail, the target is made of the very values that are trained, and the gradient flows through
        it. Targets that are computed anew from current values, but detached, pass the second test. Also told is a
        critic whose head trains while its own body, which is trainable and is not the policy's, receives nothing: the
        head reads another model's states. A trunk that is declared to be shared is mentioned: the value loss moves it.

    Why it matters:
        With the gradient through the target the critic minimises the squared temporal difference over both of its ends:
        it moves the later values towards the earlier ones as well, and converges to something that is not the value
        function (the residual gradient). Through another model's states the value loss trains that model.

    What it looks like when broken:
        A value loss that falls faster than ever, with explained variance near 0; or a policy that changes while its own
        loss is 0.

    How to fix:
        1. Compute advantages and returns once, from the rollout's values, under no_grad().
        2. Where targets are refreshed, detach them.
        3. Run the critic's head on the critic's own hidden states; share a trunk by design or not at all.

    Source:
        Baird 1995, https://www.leemon.com/papers/1995b.pdf (residual gradients);
        https://github.com/huggingface/trl/issues/1108 (the value loss moving a shared trunk, normal where it is meant).
    """
    yield from borrowed(traced, setup)
    yield from shared(setup)
    traced.needs("update values", "one score")
    found = [_unevenness(traced, s) for s in range(len(traced.base.samples))]
    seen = [f for f in found if f is not None]
    if not seen:
        raise Unavailable("needs a response of three tokens or more that the critic is trained on")
    uneven = [f for f in seen if f[1] - f[0] > f[2]]
    ratios = _ratios(traced)
    if len(uneven) <= len(seen) / 2 or ratios is None:
        return
    shown = max(uneven, key=lambda f: f[1] - f[0])
    yield Finding(
        "The critic's target is made of the values that are being trained, and its gradient flows through the target. "
        "A target should be a fixed number: compute the returns from the rollout's values, or detach them.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "change of the critic's gradient for each unit by which all values of a response are raised",
                "one number for all of its tokens",
                f"{shown[0]:.3g} to {shown[1]:.3g}",
                f"{shown[2]:.1g}",
                f"{len(uneven)} of {len(seen)} responses",
            ),
            Evidence(
                "response of the gradient to a changed score, each token's as a share of the next one's",
                "one number, γλ",
                f"{min(ratios):.4g} to {max(ratios):.4g}",
                f"{UNEVEN:g} and rounding",
                "the sample whose score was changed",
            ),
        ),
    )


def _unevenness(traced: Traced, s: int) -> tuple[float, float, float] | None:
    """(least, most, tolerance) of one response's curvatures; None where too little of it was seen."""
    import numpy as np

    from rlhf_doctor.trace.critic import raw_response

    base, pushed = traced.base, traced.experiments.done["update values"]
    moved, amounts = raw_response(traced.experiments, "update values")[s], pushed.amounts[s]
    good = np.isfinite(moved) & (amounts != 0) & (pushed.table["value_gradient"][s] != 0)  # a clip cuts to exactly 0
    if good.sum() < 3:
        return None
    kappa = moved[good] / amounts[good]
    size = float(np.abs(kappa).max())
    parts = np.abs(base["value_gradient"][s, good]).max() + size * np.abs(base["value"][s, good]).max()
    noise = ROUNDINGS * base.rounding("value") * float(parts) / float(np.abs(amounts[good]).min())
    return float(kappa.min()), float(kappa.max()), UNEVEN * size + noise


def _ratios(traced: Traced) -> list[float] | None:
    """Of neighbouring tokens, earlier over later, in the sample whose score was changed; None where they are alike."""
    import numpy as np

    from rlhf_doctor.trace.critic import raw_response

    base, scored = traced.base, traced.experiments.done["one score"]
    response = raw_response(traced.experiments, "one score")
    for s in np.flatnonzero(scored.touched):
        row = response[s, : int(base.real[s].sum())]
        if len(row) < 3 or not np.isfinite(row).all() or not (np.abs(row) > 1e-3 * np.abs(row).max()).all():
            continue
        ratios = row[:-1] / row[1:]
        size = np.nanmax(np.abs(base["value_gradient"][s])) / np.abs(row).min() + 1
        if np.ptp(ratios) > np.abs(ratios).max() * (UNEVEN + ROUNDINGS * base.rounding("value") * size):
            return [float(r) for r in ratios]
    return None


@value_target_not_detached.fault("the returns are computed from the values that are trained")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts=value_faults.loss_of_live_targets())


@value_target_not_detached.fault("the critic's head reads the policy's hidden states")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts=value_faults.on_the_policys_states(healthy.policy))

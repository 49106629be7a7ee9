"""VAL011: the critic's target is the return from each state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.algorithms import number
from rlhf_doctor.instruments.tracing import Traced

ALIKE = 0.02  # of the spread; a discount of 0.99 already differs by more between the ends of three tokens' returns


@check(
    "VAL011",
    "the critic's target is the return from each state",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("VAL008", "VAL009", "VAL010", "VAL013"),
    explains=("ADV001", "ADV006", "KLD003", "SYS008", "MET012"),
    across_roles=True,
)
def value_target_is_raw_score(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run again from the same state with every score changed, and the critic's targets are read off its
        gradients. Two things are looked for in responses of three tokens and more: one and the same target at every
        state, which moves with the score by the same amount everywhere, although the policy's advantages discount the
        score; and a target that moves with the score at the last state alone, although the advantages carry it back.
        With γ = λ = 1 every state's return is the score, which is right.

    Why it matters:
        The advantages are differences against V. A critic that learns another quantity than they bootstrap from is a
        biased baseline; one that learns immediate rewards knows of the score at the last token alone, and every other
        token is as good as without a critic.

    What it looks like when broken:
        A value loss that settles at the scores' variance; values that are flat over a response, or jump at its end.

    How to fix:
        1. Train the critic towards advantages + values, both of the rollout, as they are before whitening.
        2. A critic with its own λ of 1 beside a policy with less is a design of its own (VAPO): then this warning
           says what you have chosen.

    Source:
        Schulman et al. 2016, https://arxiv.org/abs/1506.02438; returns that are no returns:
        https://arxiv.org/abs/2403.17031 (what the critic is regressed on); another λ for the critic by design:
        https://arxiv.org/abs/2504.05118. Targets are recovered to about 1e-4 of their spread.
    """
    import numpy as np

    from rlhf_doctor.trace.critic import steady
    from rlhf_doctor.trace.recover import masked, return_response

    traced.needs("all scores", "update values")
    base, changed, recovered = traced.base, traced.experiments.done["all scores"], traced.recovered
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = return_response(recovered, traced.experiments, changed) / changed.amounts[:, None]
    gains = np.where(steady(traced.experiments), gains, np.nan)
    lengths = base.real.sum(1)
    rows = [s for s in np.flatnonzero((lengths > 2) & changed.touched) if np.isfinite(gains[s, : lengths[s]]).all()]
    if not rows:
        raise Unavailable("needs a response of three tokens or more whose targets could be read off")
    decay = recovered.gamma_lam_of_policy
    if decay is None:
        gamma, lam = number(setup.declared.get("gamma")), number(setup.declared.get("lam"))
        decay = None if gamma is None or lam is None else gamma * lam
    if decay is None:
        raise Unavailable("needs declared gamma and lam, or a score that reaches the policy")
    spread = float(np.nanstd(masked(base, recovered.returns)))
    flat = [s for s in rows if _flat(gains[s, : lengths[s]], recovered.returns[s, : lengths[s]], spread)]
    sudden = [s for s in rows if _sudden(gains[s, : lengths[s]])]
    if len(flat) > 0.9 * len(rows) and decay < 0.99:
        yield _finding(
            "is one number for all states of a response, which follows the score",
            f"γλ^k of the score, {decay:.3g} from each token to the one before, as the policy's advantages have it",
            "1 at every token",
            len(flat),
        )
    elif len(sudden) > 0.9 * len(rows) and decay > 0.01 and not _bootstraps(traced):
        yield _finding(
            "holds the score at the last token alone and nothing of what comes later before it: an immediate reward",
            f"γλ^k of the score, {decay:.3g} from each token to the one before, as the policy's advantages have it",
            "0 at every token but the last",
            len(sudden),
        )


def _finding(what: str, expected: str, observed: str, count: int) -> Finding:
    return Finding(
        f"The critic's target {what}. It should be the return from each state: advantages + values of the rollout.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "share of the score in the critic's target, token by token",
                expected,
                observed,
                f"{ALIKE}",
                f"{count} responses of three tokens or more",
                "change every score and read the targets off the critic's gradients",
            ),
        ),
    )


def _flat(gains: Any, returns: Any, spread: float) -> bool:
    import numpy as np

    size = abs(float(gains[-1]))
    alike = np.ptp(gains) <= ALIKE * size and np.ptp(returns) <= ALIKE * spread
    return bool(size > 1e-2 and alike)


def _sudden(gains: Any) -> bool:
    import numpy as np

    return bool(abs(gains[-1]) > 1e-2 and np.abs(gains[:-1]).max() < 1e-3 * abs(gains[-1]))


def _bootstraps(traced: Traced) -> bool:
    """Whether a state's target follows the rollout value of the next: a one-step target."""
    import numpy as np

    from rlhf_doctor.trace.recover import return_response

    pushed = traced.experiments.done.get("rollout outputs")
    if pushed is None:
        return False
    moved = return_response(traced.recovered, traced.experiments, pushed)
    values = pushed.moved(traced.base, "old_value")
    places = [(s, t) for s, t in zip(*np.nonzero(pushed.amounts), strict=True) if t and values[s, t]]
    return any(abs(moved[s, t - 1] / values[s, t]) > 1e-2 for s, t in places)


@value_target_is_raw_score.fault("every state's target is the score")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts=value_faults.targets_of_scores())


@value_target_is_raw_score.fault("every state's target is its immediate reward")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts=value_faults.targets_of_rewards())

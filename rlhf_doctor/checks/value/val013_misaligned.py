"""VAL013: a value belongs to the state before its token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.critic import Span

MOST = 0.8  # of the samples: one whose first or last state has a gradient of exactly 0 by chance is not counted


@check(
    "VAL013",
    "a value belongs to the state before its token",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("VAL008",),
    explains=("ADV001", "ADV006", "VAL011", "LOS004", "ADV007", "SYS008", "ADV004", "KLD003"),
    across_roles=True,
)
def value_misaligned(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        At which positions the critic's head receives a gradient, sample by sample: V(s_t) is read at the token before
        a_t, so from the prompt's last token to the last but one of the response. A span that begins late and runs past
        the end, or begins in the prompt and ends early, is off its states. Then a value of the rollout is changed at
        one state, and the advantage that falls must be that state's. A span that only begins or ends elsewhere is a
        matter of the mask, and so is one that the policy's loss has as well.

    Why it matters:
        A value one position late has seen the action that it is the baseline of, so it explains the advantage away; one
        from the prompt is the same for every response. Nothing crashes: all shapes fit.

    What it looks like when broken:
        Explained variance that is too good or stays near 0; advantages that hardly differ between actions.

    How to fix:
        1. Slice values as log-probabilities: of a critic run on all tokens, values[:, prompt − 1 : −1].
        2. Shift values or mask once, not both.
        3. With padding find the response by its own start in each row.

    Source:
        https://github.com/CarperAI/trlx/pull/175 (values one off),
        https://github.com/hpcaitech/ColossalAI/issues/3622 (values of the prompt),
        https://github.com/verl-project/verl/issues/1758 (values and mask both shifted). Positions are exact. That the
        state after the last token is trained too is a convention, and let pass.
    """
    from rlhf_doctor.trace.critic import trained_spans
    from rlhf_doctor.trace.spans import spans

    trained = trained_spans(traced.base)
    if not trained:
        raise Unavailable("needs a critic that is trained on the responses")
    late = [s for s in trained if s.first > 0]
    early = [s for s in trained if s.first < 0 and s.last < s.length - 1]
    policy = spans(traced.base, "policy")
    if len(late) > MOST * len(trained) and any(s.last >= s.length for s in late):
        if not (~policy.first & (policy.after > 0)).any():
            yield _finding("after", [s for s in late if s.last >= s.length], [s.first for s in late])
    elif len(early) > MOST * len(trained):
        if not (~policy.last & (policy.before > 0)).any():
            yield _finding("before", early, [s.last - s.length + 1 for s in early])
    else:
        yield from _baselines(traced)


def _finding(side: str, spans: Sequence[Span], offsets: Sequence[int]) -> Finding:
    import numpy as np

    shift = int(np.median(offsets))
    alike = all(o == shift for o in offsets)
    where = f"{abs(shift)} position{'s' if abs(shift) > 1 else ''} {side} their states" if alike else "from the prompt"
    one = max(spans, key=lambda s: s.length)
    return Finding(
        f"The critic's values are {where}. The value of a token's state is read at the token before it: slice values "
        "as log-probabilities, from the prompt's last token to the response's last but one.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "states at which the critic is trained, 0 being the one before the first response token",
                f"0 to {one.length - 1}",
                f"{one.first} to {one.last}",
                "none: positions are exact",
                f"a response of {one.length} tokens; {len(offsets)} samples alike",
            ),
        ),
    )


def _baselines(traced: Traced) -> Iterator[Finding]:
    """One rollout value is raised: the advantage that falls should be that of its own state."""
    import numpy as np

    from rlhf_doctor.trace.recover import policy_response

    pushed = traced.experiments.done.get("rollout outputs")
    if pushed is None or not traced.base.has("old_value"):
        return
    response = policy_response(traced.recovered, traced.experiments, pushed)
    values = pushed.moved(traced.base, "old_value")
    offsets = []
    for s, t in zip(*np.nonzero(pushed.amounts * (values != 0) * np.isfinite(values)), strict=True):
        row = np.nan_to_num(response[s])
        if row.min() < -0.3 * np.abs(row).max() and np.abs(row).max() > 0:
            offsets.append(int(row.argmin()) - int(t))
    if len(offsets) > 1 and offsets[0] and set(offsets) == {offsets[0]}:
        k = offsets[0]
        yield Finding(
            f"The advantages are differences against values {abs(k)} position{'s' if abs(k) > 1 else ''} off: raising "
            "a state's value lowers another token's advantage. Align the rollout's values with the tokens that follow.",
            role="value",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "token whose advantage falls when a state's value is raised, counted from that state's",
                    "0",
                    f"{k:+d}",
                    "none: positions are exact",
                    f"{len(offsets)} samples, one state each",
                ),
            ),
        )


@value_misaligned.fault("every value is one state late")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"values": value_faults.values_late})


@value_misaligned.fault("every value is three states early")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"values": value_faults.values_early})

"""ROL005: the response's tokens are trained on, all of them and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.sampling import listed
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

LOSSES: tuple[tuple[Role, str], ...] = (("policy", "policy's loss"), ("value", "critic's loss"))
MOST = 0.9  # of the samples that must agree before a token counts as left out; at least two of them
FEW = 2


@check(
    "ROL005",
    "the response's tokens are trained on, all of them and nothing else",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL003", "ROL004", "ROL009", "ROL010", "VAL013"),
    explains=("LOS005", "LOS003", "ADV003", "KLD005", "ADV004", "ADV002", "ADV006", "ROL003", "SYS008", "KLD003"),
    across_roles=True,
)
def response_mask_wrong(traced: Traced) -> Iterator[Finding]:
    """
    What it examines:
        At which states gradients come back to the policy's head and to the critic's: in the prompt, after the end of a
        response, at its first and its last token. Each loss has a mask, and both are looked at. Where all states are
        moved alike, it is no mask and is left to the checks of alignment.

    Why it matters:
        Pads that are trained on teach the policy to write pads, and dilute every mean. A response whose end of sequence
        is left out never learns to stop: the score of ending goes nowhere.

    What it looks like when broken:
        Responses that grow to the limit, losses that depend on how much padding a batch has, entropy that falls for no
        reason.

    How to fix:
        1. Let the mask be 1 from the first token after the prompt up to and with the first end of sequence.
        2. Go by the first end of sequence, and never by pad ids, which may be the same id.
        3. Multiply both losses with this mask, and divide by its sum.

    Source:
        https://github.com/huggingface/trl/pull/100 and https://github.com/huggingface/trl/pull/487 (pads),
        https://github.com/CarperAI/trlx/pull/401 and https://github.com/CarperAI/trlx/pull/433 (the end),
        https://github.com/verl-project/verl/issues/1758 (the critic's mask). A masked gradient is 0 to the bit; what
        is below 1e-7 of the largest counts as 0. Rows that are left out whole are a choice of many recipes.
        So is a critic that is trained in the one state past the end too, where the score stands in TRL: a changed score
        must then move its gradient there.
    """
    from rlhf_doctor.trace.critic import unrewarded_end
    from rlhf_doctor.trace.spans import spans

    seen_any = False
    past = spans(traced.base, "policy").after
    for role, loss in LOSSES:
        seen = spans(traced.base, role)
        if not seen.rows.any():
            continue
        seen_any = True
        if seen.shifted:
            continue
        one_more = role == "value" and seen.after.any() and not past.any() and (seen.after <= 1).all()
        if one_more and not unrewarded_end(traced.experiments):
            seen.after[:] = 0  # the state past the end, where TRL's reward stands
        longer = seen.rows & (seen.lengths > 1)
        without_first = longer & ~seen.first & seen.inside.any(1)
        without_last = longer & ~seen.last & seen.inside.any(1)
        ended = longer & [s.ended for s in traced.base.samples]
        wrong = []
        if (seen.before > 0).any():
            wrong.append((seen.before > 0, f"{int(seen.before.sum())} states before the responses are trained on"))
        if (seen.after > 0).any():
            wrong.append((seen.after > 0, f"{int(seen.after.sum())} states after the responses are trained on"))
        if _most(without_last, longer):
            wrong.append((without_last, "the last token of the responses is left out"))
        elif _most(without_last & ended, ended):
            wrong.append((without_last & ended, "the end of sequence is left out"))
        if _most(without_first, longer):
            wrong.append((without_first, "the first token of the responses is left out"))
        if not wrong:
            continue
        said = " and ".join(what for _, what in wrong)
        yield Finding(
            f"In the {loss}, {said}. Its mask must hold the response's tokens up to and with the end of sequence, and "
            "nothing else.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=tuple(
                Evidence(
                    f"gradient at the {role}'s head",
                    "at the response's tokens, and only there",
                    what,
                    where=listed(which.nonzero()[0].tolist()),
                )
                for which, what in wrong
            ),
        )
    if not seen_any:
        raise Unavailable("needs gradients at the policy's or the critic's head: none was seen")


def _most(which: Any, of: Any) -> bool:
    return bool(of.sum() >= FEW and which.sum() >= MOST * of.sum())


@response_mask_wrong.fault("one pad after each end of sequence is trained on")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.trains_past_the_end})


@response_mask_wrong.fault("the last token is left out of the policy's loss")
def _(healthy: Any) -> Any:
    from reference_impl import ops
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"policy_loss": rollout_faults.leaves_out_the_last(ops.clipped_policy_loss)})


@response_mask_wrong.fault("the critic is trained on every column")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    parts = {"values": rollout_faults.values_of_every_column, "value_loss": rollout_faults.mask_left_out}
    return reference_step(healthy, parts=parts)

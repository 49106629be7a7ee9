"""ADV004: advantages are whitened over the response tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

SAID = {
    "none": "The advantages are not whitened, though whiten_advantages is declared.",
    "kept": "The advantages' mean is added back after whitening, so they are scaled only.",
    "variance": "The advantages are divided by their variance and not by their standard deviation.",
    "micro-batch": "The advantages are whitened in each micro-batch, so that memory settings change the training.",
    "row": "The advantages are whitened in each response by itself, so that good and bad responses are alike.",
    "pieces": "The advantages are whitened in each part of the width by itself, so that one response gets two scales.",
    "other": "The number that is taken off the advantages is not the mean of the response tokens'.",
    "minibatch": "The advantages are whitened in each minibatch, as OpenAI's first code did; others take the batch.",
}
TOLERANCE = 0.01


@check(
    "ADV004",
    "advantages are whitened over the response tokens",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("ADV002", "ADV003", "ADV005", "ADV006", "ADV007", "ADV008", "ADV009"),
)
def whitening_wrong(traced: Traced, setup: Any, kl_terms: Any) -> Iterator[Finding]:
    """
    What it examines:
        The policy's gradient gives what each token is trained with, the critic's the returns; without a critic they are
        the discounted scores less the KL in them. The one should be a line of return - value, less the mean over all
        response tokens of the batch, over their standard deviation. Which tokens the mean was taken over is found by
        comparison: all, those of a micro-batch, of a response, of a part of the width. Each minibatch by itself is
        info.

    Why it matters:
        The mean decides which tokens are pushed up and which down. Zeros of pads draw it towards 0, a micro-batch makes
        it depend on memory settings, and a single response loses its own level: a bad one is then praised in half of
        its tokens.

    What it looks like when broken:
        A policy loss that is not about 0 at the first update; training that changes with the batch's longest response
        or with the micro-batch size.

    How to fix:
        1. Whiten once after the advantages are computed: (A - A[mask].mean()) / (A[mask].std() + 1e-8), over the whole
           batch and, on several processes, over all of them.
        2. Leave the mean out; only rewards are scaled without shifting.
        3. Declare whiten_advantages: false if none is meant.

    Source:
        Huang et al. 2024, https://arxiv.org/abs/2403.17031 (whitening over the batch); in each minibatch:
        https://github.com/openai/lm-human-preferences; over the wrong processes:
        https://github.com/THUDM/slime/pull/2235. Tolerance 0.01 of a standard deviation; float32 leaves 0.0001. Where
        return - value does not explain the gradient, nothing is said.
    """
    from rlhf_doctor.trace import gains
    from rlhf_doctor.trace.whitening import each_response, shaped_returns, whitening

    declared = setup.declared.get("whiten_advantages")
    if declared is False:
        raise Unavailable("needs whiten_advantages, which is declared as false")
    if gains.critic_free(traced):
        if rows := each_response(traced):
            yield _in_each_response(rows)
            return
        found = whitening(traced, setup.declared, *shaped_returns(traced, setup.declared, kl_terms))
    elif traced.recovered.fits:
        found = whitening(traced, setup.declared)
    else:
        raise Unavailable(traced.recovered.reasons.get("advantages", "needs a critic and a policy that are trained"))
    if found.kind == "unknown":
        raise Unavailable("needs advantages that are the returns less the values, up to whitening")
    level = abs(found.mean) / found.deviation if found.deviation else 0.0
    if found.kind == "batch" or (found.kind == "none" and (declared is not True or level < TOLERANCE)):
        return
    normal = found.kind == "minibatch"
    yield Finding(
        SAID[found.kind]
        + ("" if normal else " Take off the mean of the batch's response tokens and divide by their deviation."),
        role="loop",
        confidence=Confidence.MEASURED,
        severity=Severity.INFO if normal else None,
        evidence=(
            Evidence(
                "number taken off the advantages",
                f"{found.mean:.4g}, the mean over {found.count} response tokens (standard deviation "
                f"{found.deviation:.3g})",
                f"{found.taken:.4g}",
                f"{TOLERANCE:g} standard deviations",
                where="the policy's gradient beside the critic's",
            ),
        ),
    )


def _in_each_response(rows: int) -> Finding:
    return Finding(
        SAID["row"] + " Take off the mean of the batch's response tokens and divide by their deviation.",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "responses whose tokens' advantages add up to 0",
                "none but by chance",
                f"all {rows}",
                where="the policy's gradient",
            ),
        ),
    )


@whitening_wrong.fault("left out though declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, settings={"whiten_advantages": False}, declared={"whiten_advantages": True})


@whitening_wrong.fault("statistics of the padded grid")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(
        healthy,
        parts={"policy_loss": advantage_faults.policy_loss_of(advantage_faults.white_grid)},
        settings={"whiten_advantages": False},
        declared={"whiten_advantages": True},
    )


@whitening_wrong.fault("each micro-batch by itself")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(
        healthy,
        parts={"policy_loss": advantage_faults.policy_loss_of(advantage_faults.white)},
        settings={"whiten_advantages": False, "micro_batch_size": 4},
        declared={"whiten_advantages": True},
    )


@whitening_wrong.fault("each response by itself")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(
        healthy,
        parts={"policy_loss": advantage_faults.policy_loss_of(advantage_faults.white_rows)},
        settings={"whiten_advantages": False},
        declared={"whiten_advantages": True},
    )


@whitening_wrong.fault("without a critic, over the slots after the responses too")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(whitened=True, over="slots"), whiten_advantages=True)


@whitening_wrong.fault("without a critic, each response by itself")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    returns = leave_one_out.Returns(gamma=0.9, whitened=True, over="rows")
    return leave_one_out.setup(healthy, returns, gamma=0.9, whiten_advantages=True)

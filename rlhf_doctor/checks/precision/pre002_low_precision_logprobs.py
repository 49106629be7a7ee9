"""PRE002: log-probabilities are as exact as the loss needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.precision import HeadRounding
from rlhf_doctor.instruments.tracing import Traced

HALF = ("bfloat16", "float16")
# Nats per token: of a model in half precision throughout, and of one that is exact up to its head or softmax.
IN_HALF, IN_FLOAT32 = 0.05, 1e-3


@check(
    "PRE002",
    "log-probabilities are as exact as the loss needs them",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("PRE003", "PRE004"),
    explains=("ROL003", "MET011"),
)
def low_precision_logprobs(
    policy_head_rounding: HeadRounding,
    reference_head_rounding: HeadRounding | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The last hidden states of policy and reference are multiplied with the vocabulary matrix once more, in float32,
        and the log-probabilities of the probe's tokens compared with those that the model's own output gives. A model
        that hands out log-probabilities in half precision has taken their log-softmax there. Where a step is given, the
        gradient of each drawn token's log-probability is looked at too: if all are numbers of half precision, also with
        the policy moved in the update, the loss is computed in it.

    Why it matters:
        Ratio and KL are differences of log-probabilities, clipped at 0.2 and penalised from thousandths on. An error of
        hundredths of a nat in each is a ratio that is off before anything was learnt.

    What it looks like when broken:
        A noisy KL that does not start at 0, a clip fraction above 0 in the first epoch, both gone in float32. Sizes of
        logits matter: half of a last digit is 0.03 at 10 in bfloat16, and 0.25 at 100.

    How to fix:
        1. Cast logits to float32 before the log-softmax: logits.float().log_softmax(-1).
        2. Keep the vocabulary head in float32, or multiply in float32, where logits are large.
        3. Return logits from the model rather than log-probabilities.
        4. Keep log-probabilities, their difference and the loss in float32, outside of half-precision casts.

    Source:
        https://github.com/OpenRLHF/OpenRLHF/pull/634 and https://github.com/deepspeedai/DeepSpeedExamples/pull/754
        (log-softmax in bfloat16); https://github.com/pytorch/torchtitan/pull/3667 (head in bfloat16);
        https://github.com/huggingface/trl/pull/3867 (about 0.01 nat per token is usual between engines in bfloat16).
        So a model in half precision is remarked on from five times that, a quarter of the clip range, and one that is
        exact up to its head from 1e-3 on, the size of a rollout's KL.
    """
    measured: dict[Role, HeadRounding | None] = {"policy": policy_head_rounding, "reference": reference_head_rounding}
    for role, one in measured.items():
        if one is None:
            continue
        avoidable = one.weights not in HALF or one.normalised
        limit = IN_FLOAT32 if avoidable else IN_HALF
        if one.mean <= limit or (one.head not in HALF and one.output not in HALF):
            continue
        what = "log-softmax" if one.normalised else "vocabulary head"
        yield Finding(
            f"The {role}'s {what} runs in {one.output if one.normalised else one.head}, and its log-probabilities are "
            f"off by {one.mean:.2g} nats a token. They should be good to {limit:g}: compute the head and the "
            "log-softmax in float32.",
            role=role,
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "log-probability of a token, as given against a float32 head",
                    expected="the same",
                    observed=f"{one.mean:.3g} nats apart on average, {one.largest:.3g} at most",
                    tolerance=f"{limit:g} on average",
                    where=f"weights {one.weights}, head {one.head}, output {one.output}",
                    reproduce="(hidden.float() @ head.weight.float().T).log_softmax(-1)",
                ),
            ),
        )
        return  # the reference is made from the policy
    if traced is not None:
        yield from _of_loss(traced)


def _of_loss(traced: Traced) -> Iterator[Finding]:
    """A loss in half precision of log-probabilities that were exact."""
    import torch

    from rlhf_doctor.trace.weighting import half_precision

    kind = half_precision(traced)
    if not kind:
        return
    logp = torch.as_tensor(traced.base["logp"][traced.base.real])
    logp = logp[logp.isfinite()]
    off = float((logp.to(getattr(torch, kind)).double() - logp).abs().mean()) if len(logp) else 0.0
    if off <= IN_FLOAT32:
        return
    yield Finding(
        f"The policy's loss is computed in {kind}, which rounds log-probabilities by {off:.2g} nats a token. They "
        f"should be good to {IN_FLOAT32:g}: keep log-probabilities, ratio and loss in float32.",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "gradient of a token's log-probability",
                "a float32 number",
                f"a {kind} number at every token",
                "1e-5 relative",
                where="the step as it is, and with the policy moved in the update",
            ),
            Evidence(
                "rounding of the drawn tokens' log-probabilities", "0", f"{off:.3g} nats", f"{IN_FLOAT32:g} on average"
            ),
        ),
    )


@low_precision_logprobs.fault("a hand-written float32 policy with its head in bfloat16")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    size = specimens.vocabulary(healthy)
    body = specimens.HandWrittenDecoder(size, 24)
    policy = policies.HalfHead(body, size, scale=4.0).eval()
    return policies.paired(healthy, policy)


@low_precision_logprobs.fault("a Hugging Face policy that gives log-probabilities in bfloat16")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.alone(healthy, policy=policies.Wrapped(healthy.policy, "log-softmax"))


@low_precision_logprobs.fault("a loss in bfloat16 of exact log-probabilities")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.in_bfloat16})


@low_precision_logprobs.fault("a bfloat16 model with logits of hundreds")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies

    policy = copy.deepcopy(healthy.policy)
    with torch.no_grad():
        policy.lm_head.weight.mul_(40)
    return policies.alone(healthy, policy=policy.bfloat16(), reference=policies.frozen(policy))

"""ROL008: the sampler has the policy's present weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing


@check(
    "ROL008",
    "the sampler has the policy's present weights",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("MET011", "ROL003", "ROL011", "ROL001"),
    across_roles=True,
)
def stale_rollout_weights(drawing: Drawing, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        What the model that draws the tokens says in each state, beside what the policy says in the same state when it
        is scored, in the first step and in the one after its updates. Where they agree in the first and no longer in
        the second, the sampler was left behind. A sampler may be the policy itself, or a copy that the loop keeps.

    Why it matters:
        Responses of an older policy are trained on as if they were the present one's. The further training goes, the
        less the responses have to do with it; with the ratio taken from the trainer's own passes, nothing shows.

    What it looks like when broken:
        Reward and text that stand still while the KL to the reference grows; a gap between engine and trainer that
        grows with every step and vanishes on a restart.

    How to fix:
        1. Copy all weights to the sampler after every update, heads and adapters included.
        2. Reset prefix and key-value caches at the same time.
        3. Draw with the adapter on: leave disable_adapter() before generating.

    Source:
        https://github.com/huggingface/trl/pull/3670 (never synchronised), https://github.com/OpenRLHF/OpenRLHF/issues/1349
        and https://github.com/NVIDIA-NeMo/RL/pull/3953 (adapters), https://github.com/PrimeIntellect-ai/prime-rl/pull/1650
        (caches). The limit is five times the gap of the first step, and at least 2e-4 nats in float32, 0.05 in half
        precision, where two kernels differ by that much.
    """
    from rlhf_doctor.trace import passes

    if drawing.by == "reference":
        yield Finding(
            "The responses are drawn by the reference, not by the policy: its adapter is off while it generates. Leave "
            "disable_adapter() before generating.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(Evidence("model that draws the tokens", "policy", "reference (the policy without its adapter)"),),
        )
        return
    drawing.needs_sampler()
    first = passes.sampler_gap(drawing, drawing.first)
    if first is None:
        raise Unavailable("needs a pass over the drawn texts at the weights that drew them")
    if first.share > passes.MOST and first.everywhere and drawing.by == "copy":
        yield _found(first, "from the first step on")
        return
    if first.share:
        raise Unavailable("needs a sampler that agrees with the scored policy in the first step")
    second = passes.sampler_gap(drawing, drawing.second, than=first) if drawing.second else None
    if second is None:
        raise Unavailable("needs a second step after the first one's updates")
    if second.share > passes.MOST:
        if drawing.second is not None and passes.dropped_out(drawing.second, setup.policy):
            raise Unavailable("needs an update without dropout: its passes say other things than the sampler anyway")
        yield _found(second, "after the first step's updates")


def _found(gap: Any, when: str) -> Finding:
    return Finding(
        f"The sampler has other weights than the policy {when}: in the same states they are {gap.typical:.2g} nats "
        f"apart in {gap.share:.0%} of the samples. Bring all of the policy's weights to the sampler before each "
        "rollout.",
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "log-probabilities where tokens are drawn, less those where they are scored, in nats",
                "0",
                f"{gap.typical:.3g} in the median state, at most {gap.largest:.3g}",
                f"{gap.limit:.1g}",
                f"{gap.tokens} states of {gap.samples} samples, {when}",
            ),
        ),
    )


@stale_rollout_weights.fault("a copy of the policy draws, and is never brought up to date")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.stale(healthy.policy)})


@stale_rollout_weights.fault("the sampler lacks the policy's head")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.stale(healthy.policy, body=True)})

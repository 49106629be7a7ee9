"""OPT002: a step changes the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "OPT002",
    "a step changes the policy",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("OPT001", "PRE001", "OPT004"),
    effect=True,
)
def nothing_updates(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Every parameter of the policy, bit by bit, before and after two whole steps in a row. At least one has to
        differ, and in one module that holds the critic too, one besides the critic's head. A schedule that is at rate
        0 in both steps is not judged.

    Why it matters:
        Losses, rewards and gradient norms of the log look alive in a run that learns nothing: they are computed from
        batches that change, not from weights that do.

    What it looks like when broken:
        The saved policy is byte for byte the one that was loaded; the ratio is 1 and the KL 0 in every update; the
        reward wanders without a trend.

    How to fix:
        1. Call backward, then step, then zero_grad, in this order, and on the very optimizer that holds the parameters.
        2. With accumulation, see that the number of passes after which a step is due is ever reached.
        3. Build the optimizer after the last copy or wrapping of the model; call neither step nor loss on a copy.
        4. With gradient checkpointing and a frozen embedding call enable_input_require_grads.
        5. Switch an adapter back on that was switched off for the reference.
        6. Look at the rate: integer division and rounding make 3e-6 a 0.

    Source:
        https://github.com/huggingface/trl/issues/6700, https://github.com/huggingface/trl/pull/927 and
        https://github.com/huggingface/transformers/issues/26221 (checkpointing without gradients of the inputs). A
        warm-up that starts at rate 0 is normal: https://github.com/verl-project/verl/issues/3674
    """
    from rlhf_doctor.trace.critic import own_parameters
    from rlhf_doctor.trace.schedule import steps_of

    found = traced.experiments
    real = found.real
    if real is None or real.error:
        raise Unavailable("needs a step that can be run twice in a row" + (f": {real.error}" if real else ""))
    if not hasattr(setup.policy, "parameters"):
        raise Unavailable("needs the policy in memory")
    moved = set(real.moved.get("policy", ()))
    layers = {name.rpartition(".")[0] for name in own_parameters(setup)} if setup.value is setup.policy else set()
    if any(name.rpartition(".")[0] not in layers for name in moved):
        return
    groups = [g for _, o, roles in real.steps if "policy" in roles for g in o.param_groups]
    if groups and all(float(g["lr"]) == 0 and float(g.get("initial_lr", 0)) > 0 for g in groups):
        raise Unavailable("the learning rate is 0 at this point of its schedule, so that nothing can change")
    steps = steps_of(real, "policy")
    pushed = traced.base.has("weight") and bool((abs(traced.base["weight"]) > 0).any())
    if groups and all(float(g["lr"]) == 0 for g in groups):
        why = "its learning rate is 0"
    elif not pushed:
        why = "no gradient of the loss reaches its logits"
    elif not steps:
        why = "its logits get a gradient, and no optimizer that holds its parameters is stepped"
    else:
        why = "its logits get a gradient and its optimizer is stepped, but the gradient does not arrive there"
    alone = f" beside the critic's head ({', '.join(sorted(moved))})" if moved else ""
    also = " The critic has not changed either." if setup.value is not None and "value" not in real.moved else ""
    yield Finding(
        f"After two steps not one parameter of the policy has changed{alone}: {why}.{also} It should move at every "
        "update: check the order of backward, step and zero_grad, and which parameters the optimizer holds.",
        role="policy",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "parameters of the policy that two steps change",
                expected="at least 1",
                observed="0",
                tolerance="bit for bit",
                where=f"{steps} optimizer steps on the policy in the first of them",
                reproduce="before = {n: p.clone() for n, p in policy.named_parameters()}; step(); step()",
            ),
        ),
    )


@nothing_updates.fault("the loss has lost its graph")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.without_gradient})


@nothing_updates.fault("a rate that integer division makes 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, settings={"learning_rate": 3e-6 // 1})

"""POL005: two identical passes of the policy agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing
from rlhf_doctor.instruments.readings import Invariance, Manifest, Parameters
from rlhf_doctor.instruments.repeats import repeat_fault


@check(
    "POL005",
    "two identical passes of the policy agree",
    stage=Stage.TRACE,
    early=Stage.PROBE,
    severity=Severity.ERROR,
    after=("POL002", "PRE004"),
    explains=(
        "REF004",
        "ROL003",
        "ROL009",
        "ROL011",
        "SYS009",
        "REF002",
        "POL004",
        "POL006",
        "LOS002",
        "LOS003",
        "ADV001",
        "ADV004",
        "ADV007",
    ),
    across_roles=True,
)
def policy_dropout_active(
    setup: Any,
    policy_invariance: Invariance,
    policy_parameters: Parameters | None = None,
    policy_manifest: Manifest | None = None,
    drawing: Drawing | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The policy is called twice on the same batch in the mode it was handed over in, and twice in eval mode. In eval
        mode any difference is a fault. In train mode a difference is one when there is no loop to look at; a loop may
        call eval() or train() itself, so where the step can be run its own passes over one text at the same weights
        decide: they are apart, and no more once all dropout rates are 0. Dropout that changes nothing yet, behind a
        fresh adapter or in the config of a checkpoint, is mentioned.

    Why it matters:
        The ratio compares the log-probability of a token now with that at the time of the rollout. With dropout the two
        differ although no weight has changed, the clipping acts on noise, and the KL to the reference never reaches 0.

    What it looks like when broken:
        A ratio off 1 and a clip fraction above 0 in the first epoch of the first step, a KL that does not repeat, runs
        with one seed that differ.

    How to fix:
        1. Set every dropout rate of the policy to 0 when loading it, lora_dropout included.
        2. Or call policy.eval() and leave it so during the update: gradients flow all the same.
        3. A fused or hand-written layer may read its training flag once, when it is built; build it in eval mode, or
           tie its dropout to self.training.

    Source:
        Huang et al. 2024, "The N+ implementation details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (dropout
        is disabled); https://github.com/huggingface/trl/pull/1540; a layer that ignores eval():
        https://github.com/deepspeedai/DeepSpeed/issues/1781; eval() during the update is harmless:
        https://github.com/huggingface/trl/issues/1066. The tolerance is a tenth of what rounding explains between
        batches of other shapes; on a CPU repeated calls agree exactly, on accelerators to some 1e-6 of the spread.
    """
    fault = repeat_fault(
        "policy", policy_invariance, policy_parameters, policy_manifest, has_step=setup.step is not None
    )
    in_step = _in_step(setup, drawing) if drawing is not None else None
    if in_step is not None and (fault is None or fault.severity is Severity.INFO):
        yield in_step
    elif fault is not None:
        yield fault


def _in_step(setup: Any, drawing: Drawing) -> Finding | None:
    from rlhf_doctor.trace.passes import dropout_apart
    from rlhf_doctor.trace.twice import dropout_rates

    apart = dropout_apart(drawing)
    if apart is None:
        return None
    rates = dropout_rates(setup.policy)
    return Finding(
        f"The step runs the policy in train mode, with dropout of up to {max(rates):g}: before any update its passes "
        f"over one text are up to {apart:.2g} nats a token apart, and they agree without dropout. Set every dropout "
        "rate to 0, or call policy.eval() and leave it so during the update.",
        role="policy",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "log-probabilities of one text at the same weights, in nats apart",
                "0",
                f"{apart:.3g}",
                f"{drawing.rounding:g}",
                f"{len(rates)} modules with a dropout rate above 0",
                "set the rates to 0 and run the step again: they agree",
            ),
        ),
    )


@policy_dropout_active.fault("a Hugging Face policy handed over in train mode")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest import policies

    policy = copy.deepcopy(healthy.policy)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return policies.alone(healthy, policy=policy.train())


@policy_dropout_active.fault("a hand-written policy in train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy, dropout=0.1)
    return policies.alone(healthy, reference=policies.frozen(policy), policy=policy.train())


@policy_dropout_active.fault("a policy whose dropout does not listen to eval()")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy)
    policy.norm = policies.AlwaysDropping(policy.norm)
    return policies.paired(healthy, policy.eval())


@policy_dropout_active.fault("a step that switches the policy's dropout on")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.in_train_mode(healthy, "policy")

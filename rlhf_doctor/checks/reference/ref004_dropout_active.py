"""REF004: two identical passes of the reference agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Invariance, Manifest, Parameters
from rlhf_doctor.instruments.repeats import repeat_fault
from rlhf_doctor.instruments.tracing import Traced


@check(
    "REF004",
    "two identical passes of the reference agree",
    stage=Stage.TRACE,
    early=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REF001", "PRE004"),
    explains=("REF002",),
    across_roles=True,
)
def reference_dropout_active(
    setup: Any,
    reference_invariance: Invariance,
    reference_parameters: Parameters | None = None,
    reference_manifest: Manifest | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The reference is called twice on the same batch in the mode it was handed over in, and twice in eval mode. In
        eval mode any difference is a fault. In train mode it is one when there is no loop to look at; a loop may call
        eval() or train() itself, so where the step can be run its own passes of the reference decide.

    Why it matters:
        The reference is the fixed point that the KL penalty is measured from. With dropout it is another model at every
        call, so the penalty has noise of the size of the thing it measures.

    What it looks like when broken:
        A KL above 0 in the first step although both models are the same, and another one for the same text each time.

    How to fix:
        1. Call reference.eval() once, after it is copied or loaded.
        2. Load it with every dropout rate set to 0.
        3. If it stays random in eval mode, look for a layer that reads its training flag when it is built.

    Source:
        https://github.com/huggingface/trl/pull/1540 (dropout of policy and reference disabled for this reason);
        https://github.com/deepspeedai/DeepSpeed/issues/1781; Huang et al. 2024, https://arxiv.org/abs/2403.17031. The
        tolerance is a tenth of what rounding explains between batches of other shapes.
    """
    fault = repeat_fault(
        "reference",
        reference_invariance,
        reference_parameters,
        reference_manifest,
        has_step=setup.step is not None,
    )
    in_step = _in_step(setup, traced) if traced is not None else None
    if in_step is not None and (fault is None or fault.severity is Severity.INFO):
        yield in_step
    elif fault is not None:
        yield fault


def _in_step(setup: Any, traced: Traced) -> Finding | None:
    """Passes of a step in train mode, with dropout, of a reference that is not the policy without its adapter."""
    from rlhf_doctor.trace.twice import dropout_rates

    model = setup.model("reference")
    rates = dropout_rates(model)
    passes = [placed.call for placed in traced.base.placed if placed.call.role == "reference"]
    dropping = sum(call.training for call in passes)
    if not rates or not dropping or model is setup.policy:
        return None
    return Finding(
        f"The step runs the reference in train mode, with dropout of up to {max(rates):g}, so that it is another model "
        "at every pass. Call reference.eval() before it scores, also where a trainer sets all of its modules to train "
        "mode.",
        role="reference",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "passes of the reference in train mode",
                "0",
                f"{dropping} of {len(passes)}",
                where=f"{len(rates)} modules with a dropout rate of up to {max(rates):g}",
            ),
        ),
    )


@reference_dropout_active.fault("a Hugging Face reference left in train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    reference = policies.frozen(healthy.policy)
    for layer in reference.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return policies.alone(healthy, reference=reference.train())


@reference_dropout_active.fault("a hand-written reference whose dropout does not listen to eval()")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy)
    reference = policies.frozen(policy)
    reference.norm = policies.AlwaysDropping(reference.norm)
    return policies.alone(healthy, policy=policy, reference=reference.eval())


@reference_dropout_active.fault("a step that sets all models to train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.in_train_mode(healthy, "reference")

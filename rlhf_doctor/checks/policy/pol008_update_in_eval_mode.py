"""POL008: a policy that is trained in eval mode is told to be sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check("POL008", "the policy's dropout is off in the update", stage=Stage.TRACE, severity=Severity.INFO)
def update_in_eval_mode(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The mode that the policy is in when the passes of the update run that gradients come back to, where it has
        dropout with a rate above 0.

    Why it matters:
        It is no fault, and is often taken for one. Gradients flow in eval mode all the same, and without dropout the
        ratio is 1 before the first update, as it should be. Only what asks for train mode is lost: gradient
        checkpointing, which transformers leaves off in eval mode, so that more memory is needed.

    What it looks like when broken:
        model.training is False in the update, and checkpointing that is switched on saves no memory.

    How to fix:
        1. Nothing has to be mended.
        2. If checkpointing is needed, set every dropout rate to 0 and call train() before the update.

    Source:
        https://github.com/huggingface/trl/issues/1066 (eval() during the update is harmless); Huang et al. 2024, "The
        N+ implementation details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (dropout is disabled).
    """
    from rlhf_doctor.trace.twice import dropout_rates

    trained = [p.call for p in traced.base.placed if p.call.role == "policy" and p.call.backwards]
    if not trained:
        raise Unavailable("needs a pass of the policy that gradients come back to")
    rates = dropout_rates(setup.policy)
    if not rates or any(call.training for call in trained):
        return
    yield Finding(
        "The policy is in eval mode in the update, so its dropout is off. That is harmless, and what PPO wants; only "
        "gradient checkpointing needs train mode, with dropout rates of 0.",
        role="policy",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "passes of the update in train mode",
                "none needed",
                f"0 of {len(trained)}",
                where=f"{len(rates)} modules with a dropout rate of up to {max(rates):g}",
            ),
        ),
    )


@update_in_eval_mode.fault("dropout rates above 0 and a step that leaves the policy in eval mode")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest.loops import reference_step

    policy = copy.deepcopy(healthy.policy)
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return reference_step(healthy, policy=policy.eval())

"""PRE004: parameters and outputs are finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Output, Parameters


@check(
    "PRE004",
    "parameters and outputs are finite",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("REW011", "REF002", "REW006", "VAL006"),
    across_roles=True,
)
def not_finite(
    parameters: Mapping[Role, Parameters] | None = None, output: Mapping[Role, Output] | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        Every parameter of the four models, and what they emit for the probe sequences at real tokens. Logits of minus
        infinity beside finite ones are normal: some heads mask unused rows of the vocabulary so. Scores of finite
        parameters that are not finite are REW011's.

    Why it matters:
        One NaN parameter makes every output NaN, one NaN output the loss, and one loss every parameter of the model
        that is trained on it.

    What it looks like when broken:
        Samples that are token 0 or "!" over and over, a loss that is logged as 0 or nan, a reward of nan. Nothing
        raises.

    How to fix:
        1. If parameters are not finite, go back to the last checkpoint that is, and look at the step in between: the
           learning rate, clipping of the gradient, float16.
        2. If only outputs are, run the model in float32; if they are finite there, its activations overflow.
        3. Look for a row of the mask that is all 0, a division by a count of 0, a logarithm of 0.

    Source:
        https://github.com/huggingface/trl/issues/3236 (NaN logged as a loss of 0); weights that reach the sampler:
        https://github.com/OpenRLHF/OpenRLHF/issues/1120. There is no tolerance.
    """
    for role in MODEL_ROLES:
        p, o = (parameters or {}).get(role), (output or {}).get(role)
        if p is not None and p.non_finite:
            names = ", ".join(p.non_finite[:4]) + (" …" if len(p.non_finite) > 4 else "")
            yield Finding(
                f"The {spoken(role)} has NaN or infinite entries in {len(p.non_finite)} of its tensors "
                f"({names}). Every entry should be "
                "finite: go back to the last checkpoint without them.",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(
                        "parameters with entries that are not finite",
                        "0",
                        str(len(p.non_finite)),
                        where=names,
                        reproduce=f"[n for n, p in {role}.named_parameters() if not p.isfinite().all()]",
                    ),
                ),
            )
        elif role != "reward" and o is not None and p is not None and o.meaningless:
            yield Finding(
                f"The {spoken(role)} emits NaN or infinite numbers for real tokens although its "
                "parameters are finite. They should be "
                "finite: run it in float32 to see whether it overflows, and look for divisions by 0.",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(
                        f"the {spoken(role)}'s output",
                        "finite",
                        f"from {o.minimum:g} to {o.maximum:g}",
                        where=f"{o.where}, {o.dtype}",
                        reproduce=f"{role}({o.call}) on {o.batch} sequences of {o.length} tokens",
                    ),
                ),
            )


@not_finite.fault("a Hugging Face policy with one NaN weight")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies

    policy = copy.deepcopy(healthy.policy)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    return policies.alone(healthy, policy=policy)


@not_finite.fault("a hand-written critic that divides by 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    critic = specimens.hand_written_critic(healthy, squash=lambda v: v / (v - v))
    return policies.alone(healthy, value=critic)

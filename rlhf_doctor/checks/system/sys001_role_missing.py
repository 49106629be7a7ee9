"""SYS001: every model that the declared algorithm needs is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.algorithms import algorithm_kind, critic_options, number
from rlhf_doctor.instruments.readings import Manifest, Output

NEED: Mapping[Role, str] = {
    "policy": "a policy, the model that is trained",
    "reward": "a reward, a model or a function that scores each response",
    "value": "a value model (critic), whose estimates the advantages are differences of",
    "reference": "a reference, the frozen policy from before RL that the KL penalty is measured against",
}


@check(
    "SYS001",
    "every model that the algorithm needs is there",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
)
def role_missing(
    setup: Any, manifest: Mapping[Role, Manifest], policy_output: Output | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The roles that are given, against the declared algorithm: PPO takes a policy, a reward, a value model
        (critic) and, where the KL coefficient is not zero, a reference. GRPO, RLOO and REINFORCE++ take no critic, and
        a reference only where a KL coefficient is declared. A reward function, a reference that is the policy with its
        adapter off, and a value head inside the policy's module count as given.

    Why it matters:
        Without a critic the advantage is the bare return; without a reference nothing holds the policy near the
        language it came from. Loops that fill the gap silently (zeros for values, the policy itself as reference)
        train on, towards something else.

    What it looks like when broken:
        KL is exactly 0 or absent from the log although a coefficient is configured; values are constant; or the run
        stops in the first step with an attribute error on None.

    How to fix:
        1. Give the model that the message names, or the path of its checkpoint.
        2. If it is left out on purpose, declare it so: kl_coef=0 for no reference, reference="adapter-off" for LoRA,
           algorithm="grpo" (or rloo, reinforce++) for no critic.

    Source:
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (the four models of RLHF with PPO); Shao et al. 2024,
        https://arxiv.org/abs/2402.03300 (GRPO: no critic); no reference is loaded where the coefficient is 0:
        https://github.com/huggingface/trl/issues/4040.
    """
    declared = setup.declared
    kind = algorithm_kind(declared)
    if kind is None:
        raise Unavailable("needs an algorithm to be declared")
    named = str(declared["algorithm"]) if declared.get("algorithm") else "PPO"
    for role in _needed(kind, declared):
        if setup.model(role) is not None or (role == "value" and _policy_has_values(manifest, policy_output)):
            continue
        said = f"algorithm {named}" if declared.get("algorithm") else ", ".join(critic_options(declared))
        yield Finding(
            f"{named} needs {NEED[role]}; none is given. Give it, or declare that it is left out on purpose.",
            role=role,
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(f"the setup's {role}", "a model, a path or a function", "None", where=f"declared: {said}"),
            ),
        )
    if kind == "critic-free" and setup.value is not None:
        yield Finding(
            f"{named} has no critic, so the one that is given is neither used nor trained.",
            role="value",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(Evidence("the setup's value", "None", type(setup.value).__name__),),
        )


def _needed(kind: str, declared: Mapping[str, Any]) -> tuple[Role, ...]:
    roles: list[Role] = ["policy", "reward"]
    if kind == "actor-critic":
        roles.append("value")
    coefficient = number(declared.get("kl_coef"))
    penalised = coefficient is None if kind == "actor-critic" else False
    if (penalised or (coefficient or 0) > 0) and declared.get("reference") != "adapter-off":
        roles.append("reference")
    return tuple(roles)


def _policy_has_values(manifest: Mapping[Role, Manifest], output: Output | None) -> bool:
    """Whether one module holds policy and value: a scalar head in it, or one number a token in what it returns."""
    policy = manifest.get("policy")
    if policy is not None and policy.head("scalar") is not None:
        return True
    per_token = ((output.batch, output.length), (output.batch, output.length, 1)) if output else ()
    return bool(output and any(shape in per_token for shape in output.all_shapes.values()))


@role_missing.fault("PPO without a critic")
def _(healthy: Any) -> Any:
    return healthy.but(value=None)


@role_missing.fault("a KL penalty without a reference")
def _(healthy: Any) -> Any:
    return healthy.but(reference=None, declared={"kl_coef": 0.05})


@role_missing.fault("checkpoint folders without a reward model")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(reward=None, declared={"algorithm": "ppo"})

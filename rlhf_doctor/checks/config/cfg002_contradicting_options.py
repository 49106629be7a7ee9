"""CFG002: no option contradicts another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.algorithms import algorithm_kind, critic_options, number
from rlhf_doctor.instruments.readings import Manifest

# What frameworks fill in by themselves: such a value says nothing about what its owner expects of it.
DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "lam": (0.95,),
    "vf_coef": (0.1, 0.5, 1.0),
    "clip_range_value": (0.2, 0.5),
    "value_init": ("reward", "policy", "fresh"),
}


@check(
    "CFG002",
    "no option contradicts another",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("LOS007", "LOS002"),
    across_roles=True,
)
def contradicting_options(setup: Any, manifest: Mapping[Role, Manifest] | None = None) -> Iterator[Finding]:
    """
    What it examines:
        The declared options against each other and against what is there: a batch that does not divide into its
        minibatches; an adaptive KL controller that has nothing to aim at; a reference that is
        declared to be the policy with its adapter off, without an adapter; tuned options of a critic under an
        algorithm without one.

    Why it matters:
        One of two contradicting options wins, and which one depends on the framework. The other was set by somebody
        who expected it to act.

    What it looks like when broken:
        Samples that are dropped in every batch; a KL coefficient that stays at 0 for ever; an option that can be
        changed at will without any effect.

    How to fix:
        1. Decide which of the two options you mean and remove the other.
        2. Make batch_size a multiple of num_minibatches.
        3. Give an adaptive controller a target.

    Source:
        https://github.com/huggingface/trl/pull/4912 (an option for a reference that does not exist);
        https://github.com/OpenRLHF/OpenRLHF/issues/822 (an option that another one bypasses); the adaptive controller:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2, which multiplies the coefficient.
    """
    declared = setup.declared
    if not declared:
        raise Unavailable("needs declared options")
    yield from _batch(declared)
    yield from _controller(declared)
    yield from _adapter(setup, (manifest or {}).get("policy"))
    if algorithm_kind(declared) == "critic-free":
        yield from _critic(declared)


def _batch(declared: Mapping[str, Any]) -> Iterator[Finding]:
    size, parts = declared.get("batch_size"), declared.get("num_minibatches")
    if isinstance(size, int) and isinstance(parts, int) and parts > 0 and size > 0 and size % parts:
        yield _finding(
            f"A batch of {size} does not divide into {parts} minibatches: {size % parts} samples are dropped, or the "
            f"last minibatch is smaller and weighs as much. Make batch_size a multiple of {parts}.",
            Evidence("batch_size modulo num_minibatches", "0", str(size % parts), where=f"declared: {size}, {parts}"),
        )


def _controller(declared: Mapping[str, Any]) -> Iterator[Finding]:
    if declared.get("kl_adaptive") is not True:
        return
    if not number(declared.get("kl_target")):
        said = "none" if declared.get("kl_target") is None else str(declared["kl_target"])
        yield _finding(
            "kl_adaptive is on without a kl_target: the controller has nothing to aim at. Declare the target, or use a "
            "fixed coefficient.",
            Evidence("kl_target under kl_adaptive", "above 0", said, where="declared"),
            None if "kl_target" in declared else Severity.WARNING,
        )


def _adapter(setup: Any, policy: Manifest | None) -> Iterator[Finding]:
    """The policy with its adapter off needs an adapter that can be switched off."""
    off = setup.reference == "adapter-off" if isinstance(setup.reference, str) else False
    if not (off or (setup.reference is None and setup.declared.get("reference") == "adapter-off")) or policy is None:
        return
    if policy.origin == "module" and policy.model_type is None:
        return  # a module of its owner's own may switch anything off under any name
    switches = hasattr(setup.policy, "disable_adapter") or getattr(setup.policy, "_hf_peft_config_loaded", False)
    adapted = policy.adapter is not None or any("lora" in n or "adapter" in n for n in policy.tensors)
    if not (adapted or policy.adapter_tensors or switches):
        yield _finding(
            "The reference is declared to be the policy with its adapter off, and the policy has no adapter: it would "
            "be its own reference. Give a frozen copy.",
            Evidence("adapter of the policy", "one", "none", where=policy.path or policy.class_name),
        )


def _critic(declared: Mapping[str, Any]) -> Iterator[Finding]:
    ignored = critic_options(declared)
    tuned = {name: value for name, value in ignored.items() if name in DEFAULTS and value not in DEFAULTS[name]}
    if ignored:
        names = ", ".join(f"{name}={value}" for name, value in (tuned or ignored).items())
        yield _finding(
            f"The algorithm {declared['algorithm']} has no critic, so {names} does nothing. Remove it, or use PPO.",
            Evidence("options that only a critic reads", "none", names, where="declared"),
            Severity.WARNING if tuned else Severity.INFO,
        )


def _finding(message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role="loop", severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


@contradicting_options.fault("a batch that does not divide into its minibatches")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"batch_size": 30, "num_minibatches": 4})


@contradicting_options.fault("an adaptive KL controller without a target")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(declared={"kl_adaptive": True, "kl_target": None})


@contradicting_options.fault("the adapter is off and there is none")
def _(healthy: Any) -> Any:
    return healthy.but(reference="adapter-off")


@contradicting_options.fault("a tuned lambda under GRPO")
def _(healthy: Any) -> Any:
    return healthy.but(value=None, declared={"algorithm": "grpo", "lam": 0.9, "group_size": 8})

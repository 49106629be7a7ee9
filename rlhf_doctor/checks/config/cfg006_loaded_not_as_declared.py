"""CFG006: what is in memory is what was declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.reach import is_adapter
from rlhf_doctor.instruments.readings import Manifest, Parameters

NAMES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
# Of an adapted model's scalars: heads and embeddings that are trained in full beside an adapter stay below it.
SHARE = 0.5


@check(
    "CFG006",
    "what is in memory is what was declared",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    early=Stage.STATIC,
)
def loaded_not_as_declared(
    setup: Any, parameters: Mapping[Role, Parameters], manifest: Mapping[Role, Manifest]
) -> Iterator[Finding]:
    """
    What it examines:
        Policy and critic in memory: the dtype of most of their trainable weights against the declared one; how much of
        a model under a PEFT adapter trains; and a declared shared trunk against memory that is not shared. Weights kept
        in float32 under a declared half precision are usual (master weights) and not remarked on.

    Why it matters:
        A configuration that does not reach the model is found out only by its results. Half precision where float32
        was asked for swallows small updates; an adapter over a base that was not frozen is full training at an
        adapter's learning rate, with a reference that moves.

    What it looks like when broken:
        Memory use far from what was planned; a "LoRA" run whose adapter-off reference drifts.

    How to fix:
        1. Pass dtype (torch_dtype in older releases) to from_pretrained, and look at model.dtype afterwards.
        2. Freeze the base before the adapter is attached, or let get_peft_model do it, and unfreeze nothing after it.

    Source:
        https://huggingface.co/docs/transformers/main_classes/model (dtype of from_pretrained);
        https://huggingface.co/docs/peft/quicktour (an adapter trains a small share of the parameters, 0.19% in its
        example; half leaves room for embeddings and heads in modules_to_save).
    """
    live = {role: p for role, p in parameters.items() if not p.loaded_here and role in ("policy", "value")}
    if not live:
        raise Unavailable("needs a policy or critic in memory")
    for role, p in live.items():
        yield from _dtype(role, p, setup.declared.get("dtype"))
        yield from _share(role, p, manifest[role])
    apart = len(live) == 2 and not live["policy"].storages.keys() & live["value"].storages.keys()
    if setup.declared.get("shared_trunk") is True and apart:
        yield _finding(
            "value",
            "shared_trunk is declared, and policy and critic share no memory: they are two models, which costs "
            "as much again. Declare it false, or build the critic on the policy's trunk.",
            Evidence("tensors that policy and critic share", "the trunk's", "0", where="shared_trunk"),
        )


def _dtype(role: Role, p: Parameters, declared: Any) -> Iterator[Finding]:
    asked = str(declared).lower().removeprefix("torch.") if declared is not None else ""
    asked = NAMES.get(asked, asked)
    loaded = max(p.dtypes, key=lambda name: p.dtypes[name]) if p.dtypes else ""
    if asked not in BITS or loaded not in BITS or loaded == asked or BITS[loaded] > BITS[asked]:
        return
    yield _finding(
        role,
        f"dtype {asked} is declared and the {spoken(role)}'s weights are {loaded}. Load them as declared, or mend the "
        "declaration.",
        Evidence(
            "dtype of most weights", asked, loaded, where=f"{p.dtypes[loaded]} of {sum(p.dtypes.values())} scalars"
        ),
    )


def _share(role: Role, p: Parameters, m: Manifest) -> Iterator[Finding]:
    """An adapter whose base trains too: more than half of the model, and tensors that belong to no adapter."""
    if m.adapter is None or not p.trainable or p.trainable <= SHARE * p.total:
        return
    base = [n for n in p.trainable_names if not is_adapter(n) and "modules_to_save" not in n]
    if base:
        yield _finding(
            role,
            f"The {spoken(role)} has an adapter and {p.trainable / p.total:.0%} of its parameters train: its base is "
            "not frozen. Freeze it, or declare full training.",
            Evidence(
                "share that trains", f"at most {SHARE:.0%}", f"{p.trainable / p.total:.0%}", where=", ".join(base[:3])
            ),
        )


def _finding(role: Role, message: str, evidence: Evidence) -> Finding:
    return Finding(message, role=role, confidence=Confidence.PROVEN, evidence=(evidence,))


@loaded_not_as_declared.fault("float32 is declared and the policy is in bfloat16")
def _(healthy: Any) -> Any:
    import copy

    policy = copy.deepcopy(healthy.policy).bfloat16()
    return healthy.but(policy=policy, declared={"dtype": "float32"}, optimizers=(), step=None)


@loaded_not_as_declared.fault("an adapter over a base that was not frozen")
def _(healthy: Any) -> Any:
    import copy

    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(copy.deepcopy(healthy.policy), LoraConfig(r=2, target_modules=["q_proj"]))
    policy.requires_grad_(True)
    return healthy.but(policy=policy, optimizers=(), step=None)


@loaded_not_as_declared.fault("a shared trunk that is not shared, in hand-written modules")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    critic = specimens.hand_written_critic(healthy)
    return healthy.but(value=critic, declared={"shared_trunk": True}, optimizers=(), step=None)

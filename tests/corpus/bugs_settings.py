"""Bugs of what is declared and of what is trained: coefficients, batches, options that nothing reads, frozen parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
from foreign import folders, plain
from loops.examined import built

from corpus.case import case, in_loop, shipped
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup


def declaring(fields: Mapping[str, Any], **declared: Any) -> dict[str, Any]:
    """A setup that declares more, or otherwise."""
    return {**fields, "declared": {**fields["declared"], **declared}}


def trained(setup: RLHFSetup, *roles: str) -> list[Any]:
    """An AdamW over what is trainable in these roles, each parameter once."""
    unique = {id(p): p for role in roles for p in setup.model(role).parameters() if p.requires_grad}  # type: ignore[arg-type]
    return [torch.optim.AdamW(list(unique.values()), lr=1e-5)]


# ---- adapters and frozen parameters ----
shipped("TRL-112", "OPT001", "an adapter loaded for inference", roles="policy")


@case("TRL-112", "zoo qwen2", roles="policy")
def saved_adapter_for_inference(tmp_path: Path) -> RLHFSetup:
    """An adapter is loaded with the library's default, for inference, and the optimizer gets nothing of it."""
    from peft import PeftModel

    setup = zoo.healthy_setup("qwen2", lora=True)
    setup.policy.save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(zoo.decoder("qwen2"), tmp_path).eval()
    setup = setup.but(policy=policy)
    return setup.but(optimizers=trained(setup, "policy", "value"))


@case("TRL-113", "loop joined_v_head", roles="policy")
def only_the_value_head_trains() -> RLHFSetup:
    """Of one module with both heads everything but the value head is frozen."""
    setup = built("joined_v_head")
    for name, parameter in setup.policy.named_parameters():
        parameter.requires_grad_(name.startswith("v_head"))
    return setup.but(step=None)


@case("TRL-113", "zoo llama", roles="policy")
def value_head_on_a_frozen_adapter() -> RLHFSetup:
    """The adapter and its base are frozen inside a wrapper, of which only the value head is trained."""
    setup = zoo.healthy_setup("llama", lora=True, shared=True)
    for name, parameter in setup.policy.named_parameters():
        parameter.requires_grad_(name.startswith("v_head"))
    return setup.but(optimizers=trained(setup, "policy"))


def frozen_after_injection(family: str) -> RLHFSetup:
    """An adapted policy of which every parameter was frozen, and optimizers over what is left."""
    setup = zoo.healthy_setup(family, lora=True)
    for parameter in setup.policy.parameters():
        parameter.requires_grad = False
    return setup.but(optimizers=trained(setup, "policy", "value"))


@case("TRL-114", "zoo gpt2", roles="policy")
def prepared_for_low_bits_twice() -> RLHFSetup:
    """The preparation for quantised training runs after the adapter was put in, and freezes it."""
    return frozen_after_injection("gpt2")


@case("TRL-114", "loop lora_adapter_off", roles="policy")
def loop_with_a_frozen_adapter() -> RLHFSetup:
    """Every parameter of an adapted policy is frozen after its optimizer was made, and the loop goes on."""
    setup = built("lora_adapter_off")
    setup.policy.requires_grad_(False)
    return setup.but(step=None)


@case("ORL-070", "zoo llama", roles="policy value")
def policy_and_value_head_frozen() -> RLHFSetup:
    """Everything is frozen after the optimizer was made, the value head too."""
    setup = zoo.healthy_setup("llama", shared=True)
    optimizers = trained(setup, "policy")
    setup.policy.requires_grad_(False)
    return setup.but(optimizers=optimizers)


@case("ORL-070", "plain modules", roles="policy value")
def actor_and_critic_frozen() -> Mapping[str, Any]:
    """No parameter of actor or critic is trainable, although both are in optimizers."""
    made = plain.healthy()
    made["optimizers"] = [torch.optim.Adam(made[role].parameters(), lr=1e-5) for role in ("policy", "value")]
    for role in ("policy", "value"):
        made[role].requires_grad_(False)
    return made


@case("ORL-051", "zoo llama", roles="policy reference", also="CFG006 REF003")
def adapter_and_whole_base_train() -> RLHFSetup:
    """LoRA layers were put in and the base was never frozen, so that the optimizer trains all of it."""
    setup = zoo.healthy_setup("llama", lora=True)
    setup.policy.requires_grad_(True)
    return setup.but(optimizers=trained(setup, "policy", "value"))


@case("ORL-051", "loop lora_adapter_off", roles="policy reference loop", also="CFG006 REF003", stage="trace")
def loop_that_trains_the_base() -> RLHFSetup:
    """The base under the adapter is trainable and in the optimizer, and every step changes it."""
    setup = built("lora_adapter_off")
    base = [parameter for parameter in setup.policy.parameters() if not parameter.requires_grad]
    setup.policy.requires_grad_(True)
    setup.optimizers[0].add_param_group({"params": base, "lr": setup.optimizers[0].param_groups[0]["lr"]})
    return setup


# ---- KL ----
@case("TRL-066", "the reference's step", roles="setup reference loop")
def step_without_a_penalty(healthy: RLHFSetup) -> RLHFSetup:
    """A reference is loaded, and the coefficient of the penalty is zero in the loop and in what is declared."""
    return reference_step(healthy, settings={"kl_coef": 0.0})


@case("TRL-066", "zoo qwen2", roles="setup reference loop")
def coefficient_left_at_its_default() -> RLHFSetup:
    """A reference is loaded beside a coefficient that was left at its default of zero."""
    return zoo.healthy_setup("qwen2").but(declared={"kl_coef": 0.0})


shipped("VRL-099", "KLD001", "a negative coefficient", roles="setup loop")


@case("VRL-099", "plain modules", roles="setup loop")
def published_with_a_minus() -> Mapping[str, Any]:
    """The coefficient of the KL loss is below zero."""
    return declaring(plain.healthy(), kl_coef=-0.001, kl_in="loss")


shipped("VRL-103", "KLD001", "a coefficient that acts nowhere", roles="setup loop reference")
in_loop("VRL-103", "backbone_direct", "reference_called_and_discarded", roles="setup loop reference")


# ---- ranges ----
def sizes(**options: Any) -> dict[str, Any]:
    """What is declared of batches, with the rest of the foreign folders' settings."""
    return folders.DECLARED | options


@case("ORL-077", "the reference's files", roles="setup loop")
def four_samples_a_rollout(healthy_files: RLHFSetup) -> RLHFSetup:
    """A rollout has four samples, whose advantages are whitened."""
    return healthy_files.but(declared={"batch_size": 4, "num_minibatches": 1, "whiten_advantages": True})


@case("ORL-077", "folders", roles="setup loop")
def two_samples_a_rollout(tmp_path: Path) -> Mapping[str, Any]:
    """The batch of a PPO step is one accumulation window of four samples."""
    return folders.healthy(tmp_path, declared=sizes(batch_size=4, num_minibatches=1, ppo_epochs=4))


shipped("VRL-071", "CFG001", "64 updates on one rollout", roles="setup loop")


@case("VRL-071", "plain modules", roles="setup loop")
def many_updates_of_plain_modules() -> Mapping[str, Any]:
    """Each rollout of 64 samples is used for 64 updates."""
    return declaring(plain.healthy(), batch_size=64, num_minibatches=16, ppo_epochs=4, learning_rate=1e-5)


shipped("VRL-041", "ROL006", "temperature 0 declared", roles="setup loop policy")


@case("VRL-041", "folders", roles="setup loop policy")
def greedy_rollouts(tmp_path: Path) -> Mapping[str, Any]:
    """Rollouts are greedy, at a temperature by which the logits are divided too."""
    return folders.healthy(tmp_path, "llama", declared=sizes(temperature=0))


# ---- options that nothing reads ----
@case("VRL-065", "zoo llama", roles="setup loop")
def swallowed_clip_option() -> RLHFSetup:
    """A clip option is given under a name that the loss takes among its other keywords and never reads."""

    def policy_loss(logp: Any, old: Any, advantage: Any, mask: Any, *, clip_range: float = 0.2, **others: Any) -> Any:
        ratio = (logp - old).exp()
        return -torch.min(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)[mask].mean()

    setup = zoo.healthy_setup("llama")
    return setup.but(functions={"policy_loss": policy_loss}, declared={"clip_ratio_c": 3.0})


in_loop("VRL-065", "plain_modules", "entropy_left_out", roles="setup loop")

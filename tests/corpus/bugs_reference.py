"""Bugs of the reference: shared with the policy, trained, of another size, or another run's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from foreign import folders, plain
from torch import nn

from corpus.case import case, in_loop, shipped
from rlhf_doctor.setups import RLHFSetup


@case("TRL-050", "the reference", roles="reference policy setup")
def one_object(healthy: RLHFSetup) -> RLHFSetup:
    """The policy is given as its own reference."""
    return healthy.but(reference=healthy.policy)


@case("TRL-050", "plain modules", roles="reference policy setup")
def one_plain_object() -> dict[str, object]:
    """The reference of a plain PyTorch setup is the actor itself."""
    fields = plain.healthy()
    return {**fields, "reference": fields["policy"]}


in_loop("VRL-104", "joined_v_head", "kl_in_reward_and_loss")


def adapted(base: Any, seed: int = 0) -> Any:
    """A LoRA adapter that has learnt something, over a base."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return model


shipped("TRL-051", "REF002", "an adapter that holds SFT, switched off as reference", roles="reference policy")


@case("TRL-051", "Qwen folders", roles="reference policy")
def base_of_an_sft_adapter(tmp_path: Path) -> dict[str, Any]:
    """The adapter of supervised fine-tuning is trained on, and switching it off is meant to give the reference."""
    made = folders.healthy(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(made["policy"])
    return made | {"policy": folders.saved(adapted(base), tmp_path / "lora"), "reference": "adapter-off"}


shipped("TRL-053", "REF003", "a hand-written reference whose head was copied after freezing", roles="reference")


@case("TRL-053", "a Llama", roles="reference")
def head_is_not_frozen() -> RLHFSetup:
    """The reference's blocks are frozen, its head is not, and the optimizer holds it and decays it."""
    setup = zoo.healthy_setup("llama")
    setup.reference.lm_head.requires_grad_(True)
    every = [p for role in ("policy", "value", "reference") for p in setup.model(role).parameters() if p.requires_grad]
    return setup.but(optimizers=[torch.optim.AdamW(every, lr=1e-5, weight_decay=0.01)])


@case("TRL-056", "plain modules", roles="reference", also="SYS012")
def empty_shards() -> dict[str, Any]:
    """The reference was copied from a policy whose parameters were sharded away, and holds empty ones."""
    made = plain.healthy()
    for parameter in made["reference"].parameters():
        parameter.data = torch.empty(0)
    return made


@case("TRL-056", "a Llama", roles="reference", also="SYS012")
def norms_without_weights() -> RLHFSetup:
    """The norms of the copied reference are memory that nobody has written to."""
    setup = zoo.healthy_setup("llama")
    with torch.no_grad():
        for name, parameter in setup.reference.named_parameters():
            if "norm" in name:
                parameter.zero_()
    return setup


@case("ORL-088", "a Llama with adapters", roles="reference policy setup")
def adapter_of_the_first_stage() -> RLHFSetup:
    """The second stage starts from the first one's adapter and keeps the SFT adapter for its reference."""
    return zoo.healthy_setup("llama").but(
        policy=adapted(zoo.decoder("llama"), seed=1),
        reference=adapted(zoo.decoder("llama"), seed=2).requires_grad_(False),
        declared={"reference": "policy"},
    )


@case("ORL-088", "plain modules", roles="reference policy setup")
def model_of_the_first_stage() -> dict[str, Any]:
    """The policy has been through a stage of RL since the reference was copied, which is declared to be the policy."""
    made = plain.healthy()
    trained: nn.Module = copy.deepcopy(made["policy"])
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return made | {"policy": trained, "declared": made["declared"] | {"reference": "policy"}}

"""Bugs of the divergence from the reference: its estimator, its place, its coefficient, the reference's own pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zoo
from foreign import folders

from corpus.case import case, in_loop, shipped
from rlhf_doctor.selftest.kl_faults import with_kl_in_the_loss
from rlhf_doctor.setups import RLHFSetup

# ---- the reference ----

shipped(
    "TRL-054", "SYS003", "hand-written policy and reference with one trained embedding", roles="reference policy setup"
)


@case("TRL-054", "GPT-2", roles="reference policy setup")
def tied_embedding_shared() -> RLHFSetup:
    """The reference is frozen but reads and writes through the policy's tied embedding, which trains on."""
    healthy = zoo.healthy_setup("gpt2")
    healthy.reference.set_input_embeddings(healthy.policy.get_input_embeddings())
    healthy.reference.set_output_embeddings(healthy.policy.get_output_embeddings())
    return healthy


shipped("VRL-105", "CFG005", "the reference is the checkpoint that the policy resumes from", roles="reference setup")


@case("VRL-105", "folders", roles="reference setup policy")
def reference_of_the_resumed_run(tmp_path: Path) -> dict[str, Any]:
    """A resumed run takes the checkpoint of its own step 400 for policy and for reference."""
    made = folders.healthy(tmp_path, "llama")
    resumed = folders.saved(zoo.decoder("llama", seed=5), tmp_path / "ppo" / "checkpoint-400")
    seen = {"step": 400, "objective/kl": 6.1, "objective/rlhf_reward": 1.3, "policy/approxkl_avg": 0.01}
    folders.edit(resumed, "trainer_state.json", global_step=400, epoch=0.4, max_steps=1000, log_history=[seen])
    critic = folders.saved(zoo.decoder("llama", "token", seed=6), tmp_path / "ppo" / "checkpoint-400" / "value")
    return {**made, "policy": resumed, "reference": resumed, "value": critic}


in_loop("VRL-106", "grpo_groups", "reference_pass_skipped", roles="reference loop")
in_loop("VRL-106", "right_padded_sums", "reference_pass_skipped", roles="reference loop")


# ---- the coefficient ----

in_loop("TRL-059", "right_padded_sums", "fixed_coefficient_adapts")
in_loop("TRL-059", "micro_batches", "controller_runs_although_fixed")

in_loop("TRL-060", "joined_v_head", "controller_fed_the_token_mean")
in_loop("TRL-060", "plain_modules", "controller_told_the_token_mean")

in_loop("VRL-104", "micro_batches", "kl_in_loss_and_reward")
in_loop("VRL-104", "right_padded_sums", "kl_in_the_reward_and_in_the_loss")


# ---- the estimator ----

in_loop("TRL-064", "micro_batches", "k3_for_k2")


@case("TRL-064", "the reference", roles="loop")
def k3_where_reverse_kl_is_meant(healthy: RLHFSetup) -> RLHFSetup:
    """The loss has k3 where the gradient of the reverse KL, which k2 has, was asked for."""
    return with_kl_in_the_loss(healthy, "k3", declared="k2")


in_loop("VRL-101", "grpo_groups", "kl_k1_in_the_loss")
in_loop("VRL-101", "lora_adapter_off", "k1_in_the_loss")

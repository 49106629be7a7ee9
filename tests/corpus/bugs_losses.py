"""Bugs of the policy's and the critic's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corpus.case import case, in_loop, shipped
from reference_impl import ops
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

# ---- the ratio and its clip ----

in_loop("VRL-059", "joined_v_head", "old_logprobs_recomputed")
shipped("VRL-059", "LOS002", "old log-probabilities are computed anew for each minibatch", roles="loop")

in_loop("VRL-061", "grpo_groups", "ratio_of_one")
in_loop("VRL-061", "lora_adapter_off", "ratio_to_itself")

in_loop("VRL-062", "micro_batches", "one_surrogate_of_normalised_advantages")
in_loop("VRL-062", "right_padded_sums", "one_surrogate_of_normalised_advantages")

in_loop("VRL-097", "lora_adapter_off", "old_values_are_live", roles="value loop")
in_loop("VRL-097", "plain_modules", "old_values_are_live", roles="value loop")


# ---- masks ----

in_loop("VRL-067", "right_padded_sums", "old_logprobs_padded_with_minus_infinity")
in_loop("VRL-067", "plain_modules", "ratio_at_pads_infinite_times_zero")


def one_late(v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, clip: float, count: Any = None) -> Tensor:
    """The critic's loss under a mask that was moved once too often."""
    late = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
    return ops.clipped_value_loss(v, old_v, returns.masked_fill(~mask, 0), late, clip, count)


in_loop("VRL-086", "micro_batches", "critic_mask_one_late", roles="loop value")


@case("VRL-086", "the reference", roles="loop value")
def critic_mask_one_late(healthy: RLHFSetup) -> RLHFSetup:
    """The critic's mask is moved by one although its values were moved already."""
    return reference_step(healthy, parts={"value_loss": one_late})


# ---- what a loss is divided by ----

in_loop("TRL-100", "grpo_groups", "loss_not_divided_by_the_micro_batches")
in_loop("TRL-100", "micro_batches", "accumulation_not_divided")

in_loop("VRL-072", "micro_batches", "mean_of_micro_batch_means")
shipped("VRL-072", "LOS003", "the mean of the micro-batches' means", roles="loop")

in_loop("VRL-073", "right_padded_sums", "sum_divided_by_the_padded_width")
in_loop("VRL-073", "plain_modules", "divided_by_the_batch_width")

in_loop("VRL-074", "lora_adapter_off", "mean_of_each_micro_batch")
in_loop("VRL-074", "micro_batches", "mean_of_micro_batch_means")

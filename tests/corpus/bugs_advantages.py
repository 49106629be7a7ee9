"""Bugs of values, rewards at tokens, advantages and returns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import zoo
from foreign import plain
from torch import Tensor, nn

from corpus.case import case, in_loop
from reference_impl import ops
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

# ---- values ----

in_loop("TRL-091", "backbone_direct", "values_one_early")
in_loop("TRL-091", "micro_batches", "values_one_early")


class AveragedCritic(plain.Critic):
    """Values averaged over the sequence."""

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        values = super().forward(tokens, mask)["values"]
        return {"values": (values * mask).sum(1) / mask.sum(1)}


class Averaged(nn.Module):
    """A Hugging Face critic whose values are averaged over the sequence."""

    def __init__(self, critic: Any) -> None:
        super().__init__()
        self.critic, self.config = critic, critic.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = self.critic(input_ids=input_ids, attention_mask=attention_mask).logits[..., 0]
        return (values * attention_mask).sum(1) / attention_mask.sum(1)


@case("ORL-056", "plain modules", roles="value")
def one_plain_value() -> dict[str, Any]:
    """The critic gives the mean of its values, one number for a whole response."""
    return plain.healthy(value=AveragedCritic())


@case("ORL-056", "Llama", roles="value")
def one_value() -> RLHFSetup:
    """A wrapper averages a token classifier's values over the sequence."""
    healthy = zoo.healthy_setup("llama")
    return healthy.but(value=Averaged(healthy.value))


in_loop("ORL-073", "joined_v_head", "first_v_head_back_after_scoring", roles="value policy reward loop")
in_loop("ORL-073", "micro_batches", "first_value_head_back_after_scoring", roles="value reward loop")

in_loop("VRL-096", "micro_batches", "critic_learns_normalised_returns", roles="value loop")
in_loop("VRL-096", "plain_modules", "critic_regresses_normalised_returns", roles="value loop")


# ---- the score at a token ----


def on_the_pad(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards with the score one slot after the response, where there is one, and pads set to 0."""
    r = -kl_coef * kl
    r[torch.arange(len(r)), mask.sum(1).clamp(max=mask.shape[1] - 1)] += scores
    return r.masked_fill(~mask, 0)


in_loop("TRL-095", "backbone_direct", "score_on_the_masked_pad_after_eos", roles="loop value")


@case("TRL-095", "the reference", roles="loop value")
def score_after_eos(healthy: RLHFSetup) -> RLHFSetup:
    """The score is put on the pad after EOS, which the mask then sets to 0."""
    return reference_step(healthy, parts={"rewards": on_the_pad})


# ---- advantages ----


def one_step_on(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages with a mask that ends one slot after the response."""
    wide = mask | F.pad(mask[:, :-1], (1, 0))
    return ops.gae(r.masked_fill(~mask, 0), v, wide, gamma, lam).masked_fill(~mask, 0)


def at_once(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The reward of the token less the value of its state."""
    return (r - v).masked_fill(~mask, 0)


in_loop("ORL-028", "right_padded_sums", "terminal_state_bootstraps", roles="loop")


@case("ORL-028", "the reference", roles="loop", also="ADV006")
def first_pad_counts(healthy: RLHFSetup) -> RLHFSetup:
    """The critic's value of the first pad stays in the recursion."""
    from rlhf_doctor.selftest import rollout_faults

    parts = {"gae": one_step_on, "values": rollout_faults.values_of_every_column}
    return reference_step(healthy, parts=parts)


in_loop("VRL-083", "joined_v_head", "advantages_of_rewards_alone")


@case("VRL-083", "the reference", roles="loop", also="VAL011")
def reward_for_return(healthy: RLHFSetup) -> RLHFSetup:
    """Advantages are each token's own reward less the value, and nothing of what comes later."""
    return reference_step(healthy, parts={"gae": at_once})


in_loop("VRL-092", "lora_adapter_off", "whitening_of_each_half")
in_loop("VRL-092", "plain_modules", "whitened_in_halves")

in_loop("VRL-094", "backbone_direct", "cut_texts_bootstrap_for_the_policy_only")
in_loop("VRL-094", "joined_v_head", "cut_texts_bootstrap_for_the_policy_only")

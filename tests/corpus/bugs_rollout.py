"""Bugs of the rollout: what is sampled, what of it is trained on, and which log-probabilities it is given."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from foreign import folders, plain

from corpus.case import case, in_loop, shipped
from reference_impl.rollout import Rollout, sample, score
from rlhf_doctor.selftest.loops import reference_step
from rlhf_doctor.setups import RLHFSetup

# ---- which tokens are the response ----

in_loop("TRL-003", "micro_batches", "pads_are_trained_on")
in_loop("TRL-003", "plain_modules", "trained_past_eos")

in_loop("TRL-024", "joined_v_head", "eos_stripped")
in_loop("TRL-024", "backbone_direct", "eos_overwritten_by_pad")

in_loop("TRL-025", "backbone_direct", "one_pad_is_trained_on")
shipped("TRL-025", "ROL005", "one pad after each end of sequence is trained on", roles="loop")

in_loop("TRL-083", "joined_v_head", "query_twice")
in_loop("TRL-083", "right_padded_sums", "prompt_twice")

in_loop("TRL-092", "grpo_groups", "mask_runs_to_the_end")
in_loop("TRL-092", "lora_adapter_off", "mask_of_ones")

in_loop("TRL-093", "right_padded_sums", "mask_includes_the_pads")
in_loop("TRL-093", "plain_modules", "mask_of_ids_that_are_never_minus_100")

in_loop("TRL-094", "lora_adapter_off", "mask_moved_by_the_left_pads")
in_loop("TRL-094", "backbone_direct", "mask_moved_by_the_left_pads")

in_loop("ORL-085", "right_padded_sums", "responses_start_where_the_first_does")
in_loop("ORL-085", "joined_v_head", "responses_start_where_the_first_does")

in_loop("VRL-020", "micro_batches", "mask_knows_one_of_the_stop_tokens")
in_loop("VRL-020", "grpo_groups", "mask_knows_one_of_the_stop_tokens")

in_loop("VRL-027", "right_padded_sums", "mask_includes_the_prompt")
in_loop("VRL-027", "joined_v_head", "mask_includes_the_query")


# ---- the ids themselves ----


def eos_at_the_end(*args: Any, eos: int, **kwargs: Any) -> Rollout:
    """A rollout in which responses that were cut off end in an EOS that nobody sampled."""
    drawn = sample(*args, eos=eos, **kwargs)
    ids = drawn.ids.clone()
    ids[~drawn.ended, -1] = eos
    return Rollout(ids, drawn.attention_mask, drawn.mask, torch.ones_like(drawn.ended))


in_loop("ORL-002", "micro_batches", "eos_written_over_the_last_token")


@case("ORL-002", "the reference", roles="loop")
def cut_responses_end_in_eos(healthy: RLHFSetup) -> RLHFSetup:
    """The last token of a response that reached the limit is replaced by an EOS before it is scored."""
    return reference_step(healthy, parts={"sample": eos_at_the_end})


in_loop("VRL-028", "micro_batches", "text_round_trip")
in_loop("VRL-028", "lora_adapter_off", "retokenised_after_decoding")


# ---- the penalty for a missing EOS ----


def ended_anywhere(reward: Any, rollout: Rollout, *, missing_eos_penalty: float) -> torch.Tensor:
    """Scores whose penalty looks for an EOS in the prompt as well."""
    found = (rollout.ids == 2).any(1)
    seen = Rollout(rollout.ids, rollout.attention_mask, rollout.mask, found)
    return score(reward, seen, missing_eos_penalty=missing_eos_penalty)


in_loop("TRL-021", "right_padded_sums", "end_sought_in_the_prompt_too", roles="loop reward")


@case("TRL-021", "the reference", roles="loop reward", also="REW014")
def eos_of_an_earlier_turn(healthy: RLHFSetup) -> RLHFSetup:
    """The penalty for a missing EOS is satisfied by the one that ends an earlier turn of the prompt."""
    chats = [f"the {text.split()[-2]} : </s> {text}" for text in healthy.prompts or ()]
    return reference_step(healthy.but(prompts=chats), parts={"score": ended_anywhere}, declared={"prompt_length": 14})


# ---- the distribution that tokens are drawn from ----

in_loop("TRL-074", "micro_batches", "temperature_only_in_generate")
shipped("TRL-074", "ROL001", "every pass but the sampler leaves the temperature out", roles="loop")

in_loop("TRL-077", "micro_batches", "old_logprobs_of_generation_scores")
in_loop("TRL-077", "backbone_direct", "logprobs_of_the_nucleus")

in_loop("TRL-085", "micro_batches", "ranks_share_a_seed")
in_loop("TRL-085", "grpo_groups", "ranks_share_a_seed")


# ---- old log-probabilities ----

in_loop("VRL-047", "grpo_groups", "missing_logprobs_are_zero")
in_loop("VRL-047", "micro_batches", "missing_logprobs_are_zero")

in_loop("VRL-057", "grpo_groups", "reference_weights_swapped_in_and_out", roles="loop policy")
in_loop("VRL-057", "right_padded_sums", "reference_weights_swapped_in_and_out", roles="loop policy")


# ---- rows ----

in_loop("VRL-084", "joined_v_head", "scores_in_order_of_length")
in_loop("VRL-084", "right_padded_sums", "scores_sorted_by_length")


# ---- weights that are no numbers any more ----


def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One number of the first attention weight is NaN."""
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors[name].view(-1)[5] = torch.nan
    return tensors


@case("ORL-023", "folders", roles="policy")
def nan_in_a_checkpoint(tmp_path: Any) -> dict[str, Any]:
    """The policy's checkpoint holds one weight that is NaN."""
    made = folders.healthy(tmp_path, "llama", policy=folders.saved(zoo.decoder("llama"), tmp_path / "rl"))
    folders.rewrite(made["policy"], spoilt)
    return made


@case("ORL-023", "plain modules", roles="policy")
def nan_in_memory() -> dict[str, Any]:
    """One weight of the policy has become NaN in the middle of training."""
    made = plain.healthy()
    with torch.no_grad():
        made["policy"].body.h[0].proj.weight[0, 0] = torch.nan
    return made

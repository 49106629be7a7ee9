"""Bugs of optimizers, of what they reach, and of the order of updates."""

from __future__ import annotations

from typing import Any

from foreign import plain

from corpus.case import case, in_loop, shipped

# ---- nothing arrives ----

in_loop("TRL-115", "lora_adapter_off", "checkpointed_without_input_gradients")
in_loop("TRL-115", "joined_v_head", "blocks_checkpointed_without_input_gradients", roles="policy loop")

in_loop("VRL-115", "lora_adapter_off", "checkpointed_without_input_gradients")
in_loop("VRL-115", "joined_v_head", "blocks_checkpointed_without_input_gradients", roles="policy loop")

shipped("VRL-109", "PRE001", "a Hugging Face policy in bfloat16 under plain AdamW", roles="policy")


@case("VRL-109", "plain modules", roles="policy")
def bfloat16_without_a_master() -> dict[str, Any]:
    """The policy's weights are bfloat16 under a plain AdamW whose steps are too small for them."""
    return plain.bfloat16_weights_under_plain_adam()


# ---- the order ----

in_loop("TRL-103", "backbone_direct", "epochs_inside_minibatches")
in_loop("TRL-103", "plain_modules", "minibatches_outermost")

in_loop("ORL-018", "micro_batches", "buffer_never_cleared")
shipped("ORL-018", "OPT006", "the batch of the step before is trained on once more", roles="loop")

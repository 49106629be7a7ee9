"""Bugs of the critic as a model: its head, its start, where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zoo
from foreign import folders
from torch import nn

from corpus.bugs_reward import at_rest
from corpus.case import case, in_loop
from rlhf_doctor.setups import RLHFSetup

at_rest("TRL-090", "VAL014", "a Hugging Face critic with dropout before its head, in train mode", roles="value")


@case("TRL-090", "a Qwen with v_head", roles="value")
def dropout_in_the_head() -> RLHFSetup:
    """The value head drops a tenth of the hidden state, and the critic is in train mode."""
    setup = zoo.healthy_setup("qwen2", head="v_head")
    setup.value.v_head = nn.Sequential(nn.Dropout(0.1), setup.value.v_head)
    setup.value.train()
    return setup


at_rest("TRL-107", "VAL007", "the head is random although the reward's is declared", roles="value")


@case("TRL-107", "Llama folders", roles="value")
def critic_from_the_policy(tmp_path: Path) -> dict[str, Any]:
    """The critic is the policy's trunk under a new head although it is declared to start from the reward model."""
    made = folders.healthy(tmp_path, "llama")
    critic = zoo.decoder("llama", "token", seed=9)
    critic.base_model.load_state_dict(zoo.decoder("llama").base_model.state_dict())
    made["value"] = folders.saved(critic, tmp_path / "critic")
    return made | {"declared": made["declared"] | {"value_init": "reward"}}


in_loop("ORL-055", "micro_batches", "values_of_the_prompt")
in_loop("ORL-055", "right_padded_sums", "values_of_the_prompt")

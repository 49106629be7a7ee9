"""Loops in the manner of well-known trainers, written without a look at how they are examined: sound ones are silent.

manifest.jsonl has a line for every build with the codes that its author expects.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.examine import Options
from rlhf_doctor.report.record import record

LINES = [json.loads(line) for line in (Path(__file__).parent / "manifest.jsonl").read_text().splitlines()]
SOUND = [line for line in LINES if not line["codes"]]
FAULTY = [line for line in LINES if line["codes"]]
# What is not found by a code that its author expects, and what was said of that code.
MISSED = json.loads((Path(__file__).parent / "missed.json").read_text())
# Of all these the sound ones that some check once took for faulty are always tried, and a fault of some.
ALWAYS = (
    "dense_prm_qwen2", "dr_grpo_trainer", "lora_one_base", "safe_rlhf_mistral", "tool_agent_ppo", "a2c_kl",
    "actor_critic_scratch", "bloom_loader", "critic_free", "engine_rlhf", "dense_rewards", "ragged_neox", "rope_functional",
)  # fmt: skip
TAUGHT = (
    "lora_by_hand-healthy_one_model", "cleanrl_lmhp-healthy_summarize", "moe_actor_critic-healthy", "vine_prm-healthy",
    "reinforcepp_chat-healthy", "ragged_loop-healthy", "stateless_numpy-healthy_whitened", "swift_ppo-healthy",
    "rloo_lists-healthy_normalized", "running_norm-healthy", "running_norm-healthy_running", "summarize_ppo-healthy",
    "cleanrl_lmhp-reward_first_pad_of_row", "ragged_loop-policy_grads_kept", "lora_by_hand-sample_with_base",
    "summarize_ppo-gamma_and_lambda_exchanged",
)  # fmt: skip
SELDOM = ("healthy_sentences", "healthy_early_stop", "healthy_fixed_whitened", "healthy_warmup_from_zero")


def name(line: dict[str, Any]) -> str:
    return f"{Path(line['file']).stem}-{line['build']}"


FIRST = {line["file"]: name(line) for line in reversed(FAULTY) if name(line) not in MISSED}
KEPT = {f"{stem}.py" for stem in ALWAYS}
OFTEN = {*list(dict.fromkeys(line["file"] for line in LINES))[:14], *KEPT}


def often(line: dict[str, Any]) -> Any:
    """The line, which is left to a release where it tells nothing that others do not."""
    sound = not line["codes"]
    now = name(line) in TAUGHT or (
        line["file"] in OFTEN and line["build"] not in SELDOM
        if sound
        else FIRST.get(line["file"]) == name(line) and line["file"] in KEPT
    )
    return pytest.param(line, marks=() if now else pytest.mark.exhaustive, id=name(line))


def said(line: dict[str, Any]) -> list[str]:
    """The code of every warning and error; a check that crashes fails the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build = getattr(importlib.import_module(f"styles.{Path(line['file']).stem}"), line["build"])
        found = record(examine(RLHFSetup.from_mapping(build()), options=Options(show=False)))
    finally:
        torch.set_num_threads(threads)
    assert not found["crashed"], found["crashed"]
    return [f["code"] for f in found["findings"] if f["severity"] != "info"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [often(line) for line in SOUND])
def test_sound_loops_are_silent(line: dict[str, Any]) -> None:
    assert said(line) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [often(line) for line in FAULTY if name(line) not in MISSED])
def test_faults_are_found(line: dict[str, Any]) -> None:
    assert set(said(line)) & set(line["codes"])

"""Numbers that have been published, for CFG001, no check itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """``possible`` is what the option can mean at all (both ends included), ``usual`` a wide band around
    what has been published.

    ``why`` says what lies beyond the possible, ``source`` who published a value for language models, or for PPO.
    """

    possible: tuple[float, float]
    usual: tuple[float, float]
    why: str
    source: str


N_PLUS = "Huang et al. 2024, https://arxiv.org/abs/2403.17031"
GAE = "Schulman et al. 2016, https://arxiv.org/abs/1506.02438"
PPO = "Schulman et al. 2017, https://arxiv.org/abs/1707.06347"
ZIEGLER = "Ziegler et al. 2019, https://arxiv.org/abs/1909.08593"
UPDATES = "https://github.com/PRIME-RL/Entropy-Mechanism-of-RL/issues/20"
CLIPS = "5 in DeepSpeed-Chat, 10 in OpenRLHF and trlx"
ANY = math.inf
RANGES: Mapping[str, Range] = {
    "gamma": Range((0, 1), (0.9, 1), "a discount outside [0, 1] makes returns grow with the length", N_PLUS),
    "lam": Range((0, 1), (0.8, 1), "lambda outside [0, 1] is no weighting of returns", GAE),
    "clip_range": Range((1e-9, 1 - 1e-9), (0.05, 0.5), "a clip range is between 0 and 1", PPO),
    "clip_range_value": Range((1e-9, ANY), (0.05, 10), "values that may not move are never learnt", N_PLUS),
    "vf_coef": Range((0, ANY), (0.01, 5), "a negative coefficient trains the critic away from the returns", N_PLUS),
    "ent_coef": Range((0, ANY), (0, 0.1), "a negative coefficient punishes entropy", PPO),
    "kl_coef": Range((-ANY, ANY), (-ANY, 1), "", N_PLUS),
    "kl_target": Range((1e-9, ANY), (0.001, 50), "the controller needs a target above 0", ZIEGLER),
    "kl_horizon": Range((1e-9, ANY), (1, ANY), "the controller divides by the horizon", ZIEGLER),
    "temperature": Range((-ANY, ANY), (-ANY, 2), "", N_PLUS),
    "top_p": Range((1e-9, 1), (1e-9, 1), "a share of the probability is above 0 and at most 1", ""),
    "ppo_epochs": Range((1, ANY), (1, 20), "no epoch, no update", PPO),
    "num_minibatches": Range((1, ANY), (1, ANY), "a batch has at least one part", ""),
    "batch_size": Range((1, ANY), (1, ANY), "an update needs a sample", ""),
    "prompt_length": Range((1, ANY), (1, ANY), "a prompt has at least one token", ""),
    "response_length": Range((1, ANY), (1, ANY), "a response has at least one token", ""),
    "reward_clip": Range((1e-9, ANY), (0.1, ANY), "scores that are clipped to nothing are all equal", CLIPS),
}
# What an algorithm has of its own: a ratio of whole sequences, the length's root of their product, hardly leaves 1.
# TRL and others run it under GRPO's name, as an option.
ZHENG = "Zheng et al. 2025, https://arxiv.org/abs/2507.18071"
GSPO = Range((1e-9, 1 - 1e-9), (1e-5, 0.5), "a clip range is between 0 and 1", ZHENG)
OWN_RANGES: Mapping[tuple[str, str], Range] = {(name, "clip_range"): GSPO for name in ("gspo", "grpo")}

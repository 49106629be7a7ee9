"""CFG001: options are within what they can mean, and near what has been published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.published import OWN_RANGES, RANGES, UPDATES, Range
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.algorithms import is_grouped

WHOLE = ("ppo_epochs", "num_minibatches", "batch_size", "prompt_length", "response_length", "group_size")
MANY_UPDATES = 32


@check(
    "CFG001",
    "options are near what has been published",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("MET005",),
)
def out_of_range(setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The declared numbers: whether each is a number at all (YAML reads 3e-6 without a point as text), whether it
        means anything (a discount above 1, a clip range of 0: error), and whether it is within a wide band around what
        has been published (otherwise a warning, with the source). Learning rates, a KL coefficient of 0 or below,
        greedy sampling and top-k have checks of their own.

    Why it matters:
        Most of PPO's options work over one order of magnitude, and some only at a single point. Values beyond them do
        not stop a run.

    What it looks like when broken:
        Returns that grow with the length of the response; clipping that never or always acts; entropy that collapses
        within one rollout.

    How to fix:
        1. Start from gamma 1, lambda 0.95, clip 0.2, value clip 0.2, value coefficient 0.1 and 1 to 4 epochs.
        2. Write numbers in YAML with a point: 3.0e-6.
        3. Keep updates per rollout (epochs × minibatches) at 16 or below.

    Source:
        Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031; Schulman
        et al. 2017, https://arxiv.org/abs/1707.06347 and 2016, https://arxiv.org/abs/1506.02438; updates per rollout:
        https://github.com/PRIME-RL/Entropy-Mechanism-of-RL/issues/20 (16 are already strongly off-policy; a rollout of
        DeepSeek-R1 takes 16, https://arxiv.org/abs/2501.12948, so twice that is remarked on); the adaptive controller:
        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2; clips of rewards: ±5 in DeepSpeed-Chat, ±10
        in OpenRLHF and trlx; temperature: https://github.com/THUDM/slime/pull/2197; whitened rewards:
        https://github.com/vwxyzjn/summarize_from_feedback_details/pull/17.
    """
    if not setup.declared:
        raise Unavailable("needs declared options")
    algorithm = str(setup.declared.get("algorithm") or "").lower()
    for name, given in setup.declared.items():
        if name in RANGES and given is not None:
            allowed = OWN_RANGES.get((algorithm, name), RANGES[name])
            for value in given if isinstance(given, (list, tuple)) else (given,):
                yield from _judged(name, value, allowed)
    for name in ("learning_rate", "critic_learning_rate"):
        if isinstance(setup.declared.get(name), str):
            yield _not_a_number(name, setup.declared[name])
    yield from _combined(setup.declared)


def _judged(name: str, given: Any, allowed: Range) -> Iterator[Finding]:
    if isinstance(given, (str, bool)) or not isinstance(given, (int, float)) or given != given:
        yield _not_a_number(name, given)
        return
    value = float(given)
    if name in WHOLE and value != int(value):
        yield _finding(f"{name} is {value:g} and should be a whole number.", name, "a whole number", value)
    elif not allowed.possible[0] <= value <= allowed.possible[1]:
        yield _finding(
            f"{name} is {value:g}: {allowed.why}. Choose a value within {_shown(allowed.usual)}.",
            name,
            _shown(allowed.possible),
            value,
        )
    elif not allowed.usual[0] <= value <= allowed.usual[1]:
        yield _finding(
            f"{name} is {value:g}, outside {_shown(allowed.usual)}, a wide band around what has been published "
            f"({allowed.source}). Choose a value inside unless you know why.",
            name,
            _shown(allowed.usual),
            value,
            Severity.WARNING,
        )


def _combined(declared: Mapping[str, Any]) -> Iterator[Finding]:
    size = declared.get("group_size")
    if is_grouped(declared) and isinstance(size, int) and not isinstance(size, bool) and size < 2:
        yield _finding(
            f"group_size is {size}: advantages are differences within a group, so they are all 0. Sample at least 2 "
            "responses to each prompt.",
            "group_size",
            "at least 2",
            size,
        )
    parts = [p for n in ("ppo_epochs", "num_minibatches") if isinstance(p := declared.get(n), int) and p > 0]
    if len(parts) == 2 and math.prod(parts) > MANY_UPDATES:
        yield _finding(
            f"{parts[0]} epochs of {parts[1]} minibatches are {math.prod(parts)} updates on one rollout: the later "
            f"ones train on samples of another policy ({UPDATES}). Keep them at 16 or below.",
            "updates per rollout",
            f"at most {MANY_UPDATES}",
            math.prod(parts),
            Severity.WARNING,
        )
    if declared.get("whiten_rewards") is True:
        yield _finding(
            "whiten_rewards scales the score and the KL penalty together in every batch; the authors who measured it "
            "left it off (https://github.com/vwxyzjn/summarize_from_feedback_details/pull/17).",
            "whiten_rewards",
            "False",
            1,
            Severity.INFO,
        )


def _not_a_number(name: str, given: Any) -> Finding:
    return _finding(
        f"{name} is {given!r}, which is no number. In YAML write numbers with a point: 3.0e-6.", name, "a number", given
    )


def _shown(ends: tuple[float, float]) -> str:
    low, high = ends
    if high == math.inf:
        return f"at least {low:g}" if low > 1e-8 else "above 0"
    return f"at most {high:g}" if low == -math.inf else f"{max(low, 0):g} to {high:g}"


def _finding(message: str, name: str, expected: str, observed: Any, severity: Severity = Severity.ERROR) -> Finding:
    shown = f"{observed:g}" if isinstance(observed, (int, float)) and not isinstance(observed, bool) else repr(observed)
    return Finding(
        message,
        role="loop",
        severity=severity,
        confidence=Confidence.PROVEN,
        evidence=(Evidence(name, expected, shown, where="declared"),),
    )


@out_of_range.fault("a discount above 1")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"gamma": 1.01})


@out_of_range.fault("a clip range that is a percentage")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"clip_range": 20})


@out_of_range.fault("64 updates on one rollout")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(declared={"ppo_epochs": 16, "num_minibatches": 4})


@out_of_range.fault("a number that YAML read as text")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"learning_rate": "3e-6"})

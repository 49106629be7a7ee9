"""OPT005: learning rates and Adam's settings are in the range that is known to work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import Rate

LOWEST = 1e-9
UNKNOWN = 1e-3
LARGE, MIDDLE = 100_000_000, 10_000_000
# Highest rate that is not remarked on: full training by size, and of an adapter.
FULL_LARGE, FULL_MIDDLE, FULL_TINY, ADAPTER = 4e-5, 1e-3, 5e-3, 1e-3
CRITIC = 3.0  # critics are trained at up to ten times the policy's rate, from a lower start
EPSILON = (1e-12, 1e-3)
TORCH_EPSILON = 1e-8


@check(
    "OPT005",
    "learning rates and Adam's settings are in the range known to work",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
)
def learning_rate_range(setup: Any, rates: Sequence[Rate]) -> Iterator[Finding]:
    """
    What it examines:
        The declared learning_rate and critic_learning_rate, and rate, epsilon and betas of every parameter group of the
        optimizers. What is too high depends on the size of the model and on whether an adapter is trained; rates of
        optimizers other than Adam's kind are compared with 0 only. A rate of 0 that a schedule will raise is normal.

    Why it matters:
        PPO takes many steps on few samples. A rate that is fine for pretraining moves the policy out of the clip range
        in one epoch; one that is too small is lost in rounding.

    What it looks like when broken:
        KL of several nats and a clip fraction of tenths in the first updates, then text that collapses; or no change at
        all. The usual cause is a default that PPO inherits from supervised training, 5e-5.

    How to fix:
        1. For full training of a language model start at 1e-6 to 1e-5, for LoRA at 1e-5 to 1e-4.
        2. Give the critic the same rate, or up to ten times the policy's, and let it warm up first.
        3. Use Adam with betas (0.9, 0.95 to 0.999) and an epsilon between 1e-8 and 1e-5.

    Source:
        Published rates of full training: 3e-6 (Huang et al. 2024, https://arxiv.org/abs/2403.17031), 9.65e-6
        (DeepSpeed-Chat), 5e-7 with 9e-6 for the critic (OpenRLHF), 1e-6 with 1e-5 (verl), 1.4e-5 and 3e-5 for GPT-2
        (TRL, trlx); 5e-5 was a fault: https://github.com/huggingface/trl/pull/5174. So 4e-5 is remarked on from 100M
        parameters on. Adam's best rate falls about as the width grows (Yang et al. 2022,
        https://arxiv.org/abs/2203.03466): 1e-3 from 10M, and 5e-3 below, where PPO outside language uses 3e-4
        (https://arxiv.org/abs/1707.06347) to 2.6e-3 (CleanRL's script for Isaac Gym). Adapters take ten times the full
        rate (https://thinkingmachines.ai/blog/lora/), hence 1e-3. The critic's limit is three times the policy's.
        Epsilon: https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/ measured a
        milder start with a larger effective one.
    """
    for rate in rates:
        yield from _rate(rate)
        yield from _adam(rate)
    yield from _together(rates)


def _rate(rate: Rate) -> Iterator[Finding]:
    peak = max(rate.lr, rate.peak or 0.0)
    highest = _highest(rate)
    if rate.lr == 0 and peak > 0:
        yield _finding(rate, "learning rate", "above 0 after warm-up", "0 now",
                       f"starts at 0 and will rise to {peak:g}: the first update changes nothing, which is normal",
                       "Nothing needs to be done.", Severity.INFO)  # fmt: skip
    elif rate.lr <= 0:
        yield _finding(rate, "learning rate", "above 0", f"{rate.lr:g}", f"is {rate.lr:g}, so nothing is learnt",
                       "Set it to a positive number.")  # fmt: skip
    elif peak < LOWEST:
        yield _finding(rate, "learning rate", f"above {LOWEST:g}", f"{peak:g}", f"is {peak:g}, below any known to work",
                       "Start at 1e-6.")  # fmt: skip
    elif rate.adam and peak > highest:
        size = f"{rate.parameters:,} parameters" if rate.parameters else "a model of unknown size"
        what = f"{size}{', of which an adapter is trained' if rate.adapter else ''}"
        yield _finding(rate, "learning rate", f"at most {highest:g}", f"{peak:g}",
                       f"is {peak:g}, for {what}; PPO is known to work up to about {highest:g} there",
                       "Lower it by ten times and watch the KL of the first updates.")  # fmt: skip


def _highest(rate: Rate) -> float:
    if rate.parameters is None:
        limit = UNKNOWN
    elif rate.parameters < MIDDLE:
        limit = FULL_TINY
    elif rate.parameters < LARGE:
        limit = FULL_MIDDLE
    else:
        limit = ADAPTER if rate.adapter else FULL_LARGE
    return limit * (CRITIC if rate.role == "value" and limit == FULL_LARGE else 1.0)


def _adam(rate: Rate) -> Iterator[Finding]:
    if rate.eps is not None and rate.betas and not EPSILON[0] <= rate.eps <= EPSILON[1]:
        yield _finding(rate, "Adam's epsilon", "1e-8 to 1e-5", f"{rate.eps:g}",
                       f"comes with an epsilon of {rate.eps:g}, at which Adam no longer adapts or divides by nothing",
                       "Set eps=1e-5 or 1e-8.")  # fmt: skip
    if len(rate.betas) >= 2 and not (0 <= rate.betas[0] <= 0.99 and 0.8 <= rate.betas[1] < 1):
        yield _finding(rate, "Adam's betas", "0 to 0.99, and 0.8 to below 1", str(rate.betas),
                       f"comes with betas of {rate.betas}, used nowhere", "Use (0.9, 0.95).")  # fmt: skip


def _together(rates: Sequence[Rate]) -> Iterator[Finding]:
    by_role = {role: {r.lr for r in rates if r.role == role and r.lr > 0} for role in ("policy", "value")}
    if len(by_role["policy"]) == 1 and by_role["policy"] == by_role["value"]:
        one = next(r for r in rates if r.role == "value")
        yield _finding(one, "learning rates of policy and critic", "often the critic's is higher", f"both {one.lr:g}",
                       "is the policy's too; many recipes give the critic up to ten times of it, or let it warm "
                       "up first",
                       "This is fine where the value loss falls.", Severity.INFO)  # fmt: skip
    small = next((r for r in rates if r.role == "policy" and r.eps is not None and 0 < r.eps <= TORCH_EPSILON), None)
    if small is not None and small.betas:
        yield _finding(small, "Adam's epsilon", "1e-5 for a milder start", f"{small.eps:g}",
                       f"comes with an epsilon of {small.eps:g}, PyTorch's default; first updates are larger than "
                       "with 1e-5",
                       "This is common; with 1e-5 early KL was measured lower.", Severity.INFO)  # fmt: skip


def _finding(
    rate: Rate, quantity: str, expected: str, observed: str, said: str, fix: str, severity: Severity | None = None
) -> Finding:
    who = "critic" if rate.role == "value" else "policy"
    return Finding(
        f"The {who}'s learning rate ({rate.where}) {said}. {fix}",
        role=rate.role,
        severity=severity,
        confidence=Confidence.MEASURED,
        evidence=(Evidence(quantity, expected, observed, where=rate.where),),
    )


@learning_rate_range.fault("a rate of supervised pretraining declared")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"learning_rate": 0.03})


@learning_rate_range.fault("an optimizer with a rate and an epsilon out of range")
def _(healthy: Any) -> Any:
    import torch

    policy = torch.optim.AdamW(healthy.policy.parameters(), lr=0.1, eps=1e-2)
    return healthy.but(step=None, optimizers=[policy, torch.optim.AdamW(healthy.value.parameters(), lr=1e-5)])

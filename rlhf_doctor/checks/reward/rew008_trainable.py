"""REW008: PPO does not train the reward model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Parameters


@check(
    "REW008",
    "PPO does not train the reward model",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    after=("SYS003",),
)
def reward_trainable(
    reward_parameters: Parameters, setup: Any, policy_parameters: Parameters | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        Which of the reward model's parameters require a gradient, and whether one of the setup's optimizers holds
        them. Parameters that require a gradient and are in no optimizer are info: a loop that scores under no_grad
        leaves them so. Reward training itself is not concerned, nor a reward that is the policy with another adapter,
        whose shared base counts as the policy's.

    Why it matters:
        The reward is what the policy is measured by. If the optimizer that raises the reward also holds the reward
        model, the shortest way to more reward is to change the reward model.

    What it looks like when broken:
        A reward that climbs without any change in the texts; a reward model that scores the held-out pairs worse after
        the run than before it; in data-parallel training "Expected to have finished reduction".

    How to fix:
        1. reward.requires_grad_(False) after loading it.
        2. Build the optimizer from the policy's and the critic's parameters by name, not from everything in scope.
        3. Score inside torch.no_grad().

    Source:
        https://github.com/huggingface/trl/pull/982 (a reward adapter that is trained along); Ouyang et al. 2022
        (InstructGPT), https://arxiv.org/abs/2203.02155 (the reward model is fixed during PPO).
    """
    if setup.reward_loss is not None and setup.step is None:
        return
    p = reward_parameters
    outside = set(p.trainable_not_in_optimizer)
    shared = set(p.storages) & set(policy_parameters.storages) if policy_parameters else set()
    own = [name for name in p.trainable_names if name not in {p.storages[s] for s in shared}]
    held = [name for name in own if name not in outside] if p.in_optimizer is not None else []
    if not held and (not own or p.loaded_here):
        return
    evidence = Evidence(
        "reward parameters that require a gradient, and that an optimizer holds",
        expected="none, none",
        observed=f"{len(own)} tensors, {len(held)} tensors"
        + ("" if setup.optimizers else " (no optimizers were given)"),
        where=", ".join((held or own)[:3]),
    )
    yield Finding(
        f"An optimizer holds {len(held)} trainable tensors of the reward model, so PPO changes the reward it is judged "
        "by. The reward model should be frozen: requires_grad_(False), and out of every optimizer."
        if held
        else "The reward model's parameters require a gradient and no given optimizer holds them. Where it "
        "scores under no_grad, that is normal; requires_grad_(False) says so for good.",
        role="reward",
        confidence=Confidence.PROVEN,
        severity=None if held else Severity.INFO,
        evidence=(evidence,),
    )


@reward_trainable.fault("the reward is in the critic's optimizer")
def _(healthy: Any) -> Any:
    import copy

    import torch

    reward = copy.deepcopy(healthy.reward).requires_grad_(True)
    together = torch.optim.AdamW([*healthy.value.parameters(), *reward.parameters()], lr=1e-6)
    return healthy.but(reward=reward, optimizers=[*healthy.optimizers, together], step=None)


@reward_trainable.fault("hand-written, its head alone is trained along")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import specimens

    reward = specimens.hand_written_critic(healthy, pool="last").eval().requires_grad_(False)
    reward.out.requires_grad_(True)
    groups: Any = [{"params": list(healthy.policy.parameters())}, {"params": list(reward.out.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return healthy.but(reward=reward, optimizers=[optimizer], step=None)

"""A small critic-free step whose rewards hold the KL (RLOO, REINFORCE++), of the reference's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reference_impl import ops
from rlhf_doctor.selftest.group_loop import PROMPTS, SIZE, critic_free

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Returns", "setup"]

COEFFICIENT = 0.05


@dataclass(frozen=True)
class Returns:
    """How advantages are made of scores (B,) and log-probabilities (B, T).

    Attributes:
        estimator: of the KL: k1, k2, k3.
        gamma: of the returns.
        whole: the KL is summed over the response; else every token has what comes from it on.
        whitened: over what ``over`` names: the response tokens, the whole grid of slots, each of the rows.
        masked: whether slots after the response hold no KL.
        last_column: the score is put in the batch's last column.
        in_the_loss: coefficient of a k3 term there.
    """

    estimator: str = "k1"
    gamma: float = 1.0
    whole: bool = False
    whitened: bool = False
    over: str = "tokens"
    masked: bool = True
    last_column: bool = False
    in_the_loss: float = 0.0

    def __call__(self, scores: Tensor, old: Tensor, ref: Tensor, where: Tensor) -> Tensor:
        """Advantages, (B, T)."""
        grouped = scores.view(PROMPTS, SIZE)
        alone = (SIZE * grouped - grouped.sum(1, keepdim=True)).flatten() / (SIZE - 1)
        rewards: Tensor = -COEFFICIENT * getattr(ops, self.estimator)(old, ref)
        rewards = rewards.masked_fill(~where, 0) if self.masked else rewards
        if self.whole:
            return (alone + rewards.sum(1))[:, None].expand_as(rewards)
        last = torch.full_like(where[:, 0].long(), where.shape[1] - 1) if self.last_column else where.sum(1) - 1
        rewards[torch.arange(len(rewards)), last] += alone
        if self.last_column:
            rewards = rewards.masked_fill(~where, 0)
        running = torch.zeros_like(alone)
        for t in range(rewards.shape[1] - 1, -1, -1):
            rewards[:, t] += self.gamma * running
            running = rewards[:, t]
        if not self.whitened:
            return rewards
        if self.over == "rows":
            return torch.cat([ops.whiten(r[None], w[None]) for r, w in zip(rewards, where, strict=True)])
        return ops.whiten(rewards, torch.ones_like(where) if self.over == "slots" else where)


def setup(healthy: RLHFSetup, returns: Returns, **declared: Any) -> RLHFSetup:
    """The healthy policy, reference and reward in a step with these returns."""
    said = {"algorithm": "rloo", "kl_coef": COEFFICIENT, "kl_in": "reward", "kl_estimator": "k1", "gamma": 1.0}
    return critic_free(healthy, returns, returns.in_the_loss, **{**said, **declared})

"""Parts of the reference's step with a mistake in the critic's training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from reference_impl import ops, roles, rollout
from rlhf_doctor.selftest.loops import reference_step

__all__ = [
    "Remembered",
    "critic_at_rate_zero",
    "loss_of_detached_values",
    "loss_of_live_targets",
    "loss_towards_mirrored_returns",
    "loss_towards_negated_returns",
    "loss_towards_old_values",
    "noisy_loss",
    "on_the_policys_states",
    "prompts_from_own_entropy",
    "returns_of_the_penalty",
    "sample_from_own_entropy",
    "scores_dropped",
    "targets_of_rewards",
    "targets_of_scores",
    "unseen_scores",
    "values_early",
    "values_late",
    "with_frozen_head",
]


def critic_at_rate_zero(healthy: Any) -> Any:
    """The critic's optimizer has the learning rate 0, which nobody has declared."""
    return reference_step(healthy, settings={"critic_learning_rate": 0.0}, declared={"critic_learning_rate": 1e-4})


def with_frozen_head(critic: Any) -> Any:
    """A copy whose last layer does not train."""
    critic = copy.deepcopy(critic)
    roles.scalar_head(critic).requires_grad_(False)
    return critic


def loss_of_detached_values(v: Tensor, *rest: Any) -> Tensor:
    """The values are detached before the loss."""
    return ops.clipped_value_loss(v.detach(), *rest).requires_grad_()


def loss_towards_old_values(v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
    """The target is what the critic said itself."""
    return ops.clipped_value_loss(v, old_v, old_v, *rest)


def loss_towards_negated_returns(v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
    """The target has the other sign."""
    return ops.clipped_value_loss(v, old_v, -returns, *rest)


def loss_towards_mirrored_returns(v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
    """The target is values − advantages."""
    return ops.clipped_value_loss(v, old_v, 2 * old_v - returns, *rest)


def scores_dropped(reward: Any, drawn: Any, **options: Any) -> Tensor:
    """The reward model is called and zeros are returned."""
    return torch.zeros_like(rollout.score(reward, drawn, **options))


class Remembered:
    """What the rollout phase knew, found again by a minibatch's old values."""

    def __init__(self, target: Any) -> None:
        self.target = target  # (this object) -> (B, T), the critic's target
        self.r = self.penalty = self.v = self.mask = self.scores = torch.empty(0)
        self.gamma = self.lam = 1.0

    def rewards(self, scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
        """As ``ops.shaped_rewards``."""
        self.scores, self.penalty = scores, ops.shaped_rewards(torch.zeros_like(scores), kl, mask, kl_coef)
        self.r = ops.shaped_rewards(scores, kl, mask, kl_coef)
        return self.r

    def gae(self, r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
        """As ``ops.gae``."""
        self.v, self.mask, self.gamma, self.lam = v, mask, gamma, lam
        return ops.gae(r, v, mask, gamma, lam)

    def rows(self, old_v: Tensor) -> Tensor:
        """Which rows of the batch a minibatch is made of."""
        return (old_v[:, None] == self.v[None]).all(-1).int().argmax(1)

    def value_loss(self, v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
        """As ``ops.clipped_value_loss``, towards the other target."""
        return ops.clipped_value_loss(v, old_v, self.target(self)[self.rows(old_v)], *rest)

    @property
    def parts(self) -> dict[str, Any]:
        """To exchange in the step."""
        return {"rewards": self.rewards, "gae": self.gae, "value_loss": self.value_loss}


def returns_of_the_penalty() -> dict[str, Any]:
    """The critic's returns are made of the KL penalty alone."""
    return Remembered(lambda m: ops.gae(m.penalty, m.v, m.mask, m.gamma, m.lam) + m.v).parts


def targets_of_scores() -> dict[str, Any]:
    """The critic's target is the score, at every state."""
    return Remembered(lambda m: m.scores[:, None].expand_as(m.v)).parts


def targets_of_rewards() -> dict[str, Any]:
    """The critic's target is the reward of the same token."""
    return Remembered(lambda m: m.r).parts


def loss_of_live_targets() -> dict[str, Any]:
    """The target is computed from the values that are being trained, and the gradient flows through it."""
    made = Remembered(None)

    def value_loss(v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, *rest: Any) -> Tensor:
        target = ops.gae(made.r[made.rows(old_v)], v, mask, made.gamma, made.lam) + v
        return ops.clipped_value_loss(v, old_v, target, mask, *rest)

    return {**made.parts, "value_loss": value_loss}


def on_the_policys_states(policy: Any) -> dict[str, Any]:
    """The critic's head reads the policy's hidden states."""

    def values(critic: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
        roles.hidden_states(critic, ids, attention_mask)
        hidden = roles.hidden_states(policy, ids, attention_mask)
        out: Tensor = roles.scalar_head(critic)(hidden)
        return out.squeeze(-1).clone()

    return {"values": values}


def values_late(critic: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Every slot holds the value of the state after its own."""
    v = roles.scalars(critic, ids, attention_mask)
    return torch.cat([v[:, 1:], v[:, -1:]], 1)


def values_early(critic: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Every slot holds the value of the state three tokens before: a slice that starts too early."""
    return roles.scalars(critic, ids, attention_mask).roll(3, 1)


def noisy_loss(*args: Any) -> Tensor:
    """The policy loss is scaled by noise that no seed repeats."""
    own = torch.Generator()
    own.seed()
    return ops.clipped_policy_loss(*args) * (1 + 0.1 * torch.rand((), generator=own).item())


def sample_from_own_entropy(*args: Any, **options: Any) -> Any:
    """Seeded from the operating system before each rollout."""
    torch.seed()
    return rollout.sample(*args, **options)


def prompts_from_own_entropy(healthy: Any) -> Any:
    """The whole step begins by seeding from the operating system."""
    made = reference_step(healthy)
    step = made.step

    def seeded() -> Any:
        torch.seed()
        return step() if step is not None else None

    return made.but(step=seeded)


def unseen_scores(reward: Any, drawn: Any, **options: Any) -> Tensor:
    """The length stands for the score; the reward model is never called."""
    lengths: Tensor = drawn.mask.sum(1)
    return lengths.float() / 10

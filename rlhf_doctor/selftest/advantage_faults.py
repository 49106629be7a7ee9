"""Functions of the reference's step with one mistake in the advantages each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from reference_impl import ops, rollout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LiveAdvantages",
    "bootstraps",
    "clipped_to_a_hundredth",
    "exchanged",
    "lambda_of_one",
    "next_but_one",
    "no_baseline",
    "no_score",
    "own_value_ahead",
    "pads_count",
    "policy_loss_of",
    "returns_for_advantages",
    "score_in_last_column",
    "score_on_every_token",
    "score_on_first_token",
    "score_one_early",
    "softmax_of_one",
    "two_pads_count",
    "white",
    "white_grid",
    "white_rows",
    "zeros_for_scores",
]


# ---- gae(r, v, mask, gamma, lam) ----
def lambda_of_one(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Monte Carlo whatever lambda was asked for."""
    return ops.gae(r, v, mask, gamma, 1.0)


def exchanged(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Positional arguments in the wrong order."""
    return ops.gae(r, v, mask, lam, gamma)


def _recursion(r: Tensor, v: Tensor, ahead: Tensor, gamma: float, decay: float) -> Tensor:
    delta = r + gamma * ahead - v
    advantage, columns = torch.zeros_like(v[:, 0]), []
    for t in reversed(range(v.shape[1])):
        advantage = delta[:, t] + decay * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], 1)


def own_value_ahead(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """V(s_t) where V(s_t+1) belongs."""
    r, v = r.masked_fill(~mask, 0), v.masked_fill(~mask, 0)
    return _recursion(r, v, v, gamma, gamma * lam).masked_fill(~mask, 0)


def bootstraps(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The state after the last token counts with its value."""
    r, known = r.masked_fill(~mask, 0), v.masked_fill(~mask, 0)
    ahead = F.pad(v[:, 1:], (0, 1)).masked_fill(~mask, 0)
    return _recursion(r, known, ahead, gamma, gamma * lam).masked_fill(~mask, 0)


def pads_count(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The recursion starts in the last column, with the critic's values of the pads."""
    return _recursion(r, v, F.pad(v[:, 1:], (0, 1)), gamma, gamma * lam).masked_fill(~mask, 0)


def two_pads_count(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A mask that ends two slots too late."""
    wide = mask | F.pad(mask[:, :-1], (1, 0)) | F.pad(mask[:, :-2], (2, 0))
    return ops.gae(r.masked_fill(~mask, 0), v, wide, gamma, lam).masked_fill(~mask, 0)


def next_but_one(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """V(s_t+2) where V(s_t+1) belongs."""
    r, v = r.masked_fill(~mask, 0), v.masked_fill(~mask, 0)
    return _recursion(r, v, F.pad(v[:, 2:], (0, 2)), gamma, gamma * lam).masked_fill(~mask, 0)


def no_baseline(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Values of zero."""
    return ops.gae(r, torch.zeros_like(v), mask, gamma, lam)


def returns_for_advantages(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The return, from which nothing is taken off."""
    return ops.gae(r, v, mask, gamma, lam) + v.masked_fill(~mask, 0)


# ---- rewards(score, kl, mask, kl_coef) ----
def _at(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, column: Tensor) -> Tensor:
    r = (-kl_coef * kl).masked_fill(~mask, 0)
    r[torch.arange(len(r)), column] += score
    return r


def score_in_last_column(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Index -1: a pad wherever a response is shorter; masked there, so that the score is lost."""
    return _at(score, kl, mask, kl_coef, torch.full_like(mask.sum(1), mask.shape[1] - 1))


def score_on_first_token(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Index 0."""
    return _at(score, kl, mask, kl_coef, torch.zeros_like(mask.sum(1)))


def score_one_early(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The index of the state that the last token was drawn in, used as the token's own."""
    return _at(score, kl, mask, kl_coef, (mask.sum(1) - 2).clamp(min=0))


def score_on_every_token(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Broadcast over the response."""
    return (score[:, None] - kl_coef * kl).masked_fill(~mask, 0)


def no_score(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The KL penalty alone."""
    return ops.shaped_rewards(torch.zeros_like(score), kl, mask, kl_coef)


def clipped_to_a_hundredth(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """A clip far inside the scores' range."""
    return ops.shaped_rewards(score.clamp(-0.01, 0.01), kl, mask, kl_coef)


def softmax_of_one(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """A softmax over each row's one score: 1 for all."""
    return ops.shaped_rewards(score[:, None].softmax(-1)[:, 0], kl, mask, kl_coef)


# ---- score(reward, rollout, missing_eos_penalty) ----
def zeros_for_scores(*given: Any, **options: Any) -> Tensor:
    """The reward model is asked, and its answer overwritten."""
    return torch.zeros_like(rollout.score(*given, **options))


# ---- policy_loss(logp, old_logp, advantage, mask, epsilon, count) ----
def policy_loss_of(change: Any) -> Any:
    """The reference's clipped loss with the advantages changed: change(advantage, mask) -> advantage."""

    def loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any) -> Tensor:
        return ops.clipped_policy_loss(logp, old_logp, change(advantage, mask), mask, epsilon, count)

    return loss


def white(advantage: Tensor, mask: Tensor) -> Tensor:
    """Whitened over the rows that are given."""
    return ops.whiten(advantage, mask)


def white_rows(advantage: Tensor, mask: Tensor) -> Tensor:
    """Each row by itself."""
    count = mask.sum(1, keepdim=True)
    mean = advantage.masked_fill(~mask, 0).sum(1, keepdim=True) / count
    variance = (advantage - mean).square().masked_fill(~mask, 0).sum(1, keepdim=True) / count
    return (advantage - mean) * (variance + 1e-8).rsqrt()


def white_grid(advantage: Tensor, mask: Tensor) -> Tensor:
    """Pads count as zeros in the mean and the deviation."""
    x = advantage.masked_fill(~mask, 0)
    return (x - x.mean()) * (x.var() + 1e-8).rsqrt()


class LiveAdvantages:
    """The policy loss with advantages of the values as they are trained, their graph kept.

    The policy's part is computed before the critic's pass, so that its gradient to the values comes with theirs.
    """

    def __init__(self, *, whiten: bool, vf_coef: float = 0.1) -> None:
        self.whiten, self.vf_coef = whiten, vf_coef
        self.ratio: Any = None

    def parts(self) -> dict[str, Any]:
        """Both losses."""
        return {"policy_loss": self.policy_loss, "value_loss": self.value_loss}

    def policy_loss(
        self, logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any
    ) -> Tensor:
        """The reference's; the ratio is kept for the other part."""
        self.ratio = (logp - old_logp).masked_fill(~mask, 0).exp().detach()
        return ops.clipped_policy_loss(logp, old_logp, advantage, mask, epsilon, count)

    def value_loss(self, v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, epsilon: float, count: Any) -> Tensor:
        """The reference's, and the gradient that undetached advantages send here."""
        live = returns - v
        if self.whiten:
            live = ops.whiten(live, mask)
        through = ops.masked_mean(-self.ratio * live, mask, count)
        return ops.clipped_value_loss(v, old_v, returns, mask, epsilon, count) + through / self.vf_coef

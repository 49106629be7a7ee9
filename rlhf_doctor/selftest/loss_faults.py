"""Functions of the reference's training step, each with one mistake, and steps with one mistake around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from reference_impl import ops, ppo, rollout
from rlhf_doctor.selftest.loops import reference_step

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.setups import RLHFSetup

__all__ = [
    "after_step",
    "around_return",
    "bounds_exchanged",
    "copied",
    "follow_the_policy",
    "gradients_kept",
    "half_precision_ratio",
    "in_bfloat16",
    "larger_of_the_two",
    "mean_of_micro_means",
    "micro_mean",
    "old_anew",
    "over_the_grid",
    "reference_step",
    "reported",
    "rescale_the_reward",
    "sample_in_bfloat16",
    "smaller_value_loss",
    "spread_of_scores",
    "towards_advantages",
    "training_on_the_batch_before",
    "turned",
    "unclipped",
    "value_ascends",
    "with_entropy",
    "with_replacement",
    "without_gradient",
    "without_spread",
    "zero",
]  # fmt: skip

Made = dict[str, Any]


# ---- policy losses: (logp, old_logp, advantage, mask, epsilon, count) -> a scalar ------------------------------------


def turned(*given: Any) -> Tensor:
    """Minimises what it should maximise."""
    loss: Tensor = ops.clipped_policy_loss(*given)
    return -loss


def advantage_turned(logp: Tensor, old: Tensor, advantage: Tensor, *rest: Any) -> Tensor:
    """The whole advantage with the wrong sign."""
    loss: Tensor = ops.clipped_policy_loss(logp, old, -advantage, *rest)
    return loss


def without_gradient(*given: Any) -> Tensor:
    """A loss that has lost its graph."""
    loss: Tensor = (0.0 * given[0] + ops.clipped_policy_loss(*given).detach()).sum().detach().requires_grad_()
    return loss


def unclipped(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any = None) -> Tensor:
    """A clip range in percent."""
    return ops.clipped_policy_loss(logp, old, advantage, mask, 100 * epsilon, count)


def old_anew(logp: Tensor, old: Tensor, *rest: Any) -> Tensor:
    """Old log-probabilities that are those of now."""
    return ops.clipped_policy_loss(logp, logp.detach(), *rest)


def _surrogates(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    ratio = (logp - old).masked_fill(~mask, 0).exp()
    return ratio * a, ratio.clamp(low, high) * a


def larger_of_the_two(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """The maximum of the two surrogates where the minimum is meant."""
    pair = _surrogates(logp, old, advantage, mask, 1 - epsilon, 1 + epsilon)
    return ops.masked_mean(-torch.maximum(*pair), mask, count)


def bounds_exchanged(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """The upper bound below the lower one."""
    pair = _surrogates(logp, old, advantage, mask, 1 + epsilon, 1 - epsilon)
    return ops.masked_mean(-torch.minimum(*pair), mask, count)


def half_precision_ratio(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """A ratio in float16, which ends at 65504."""
    a, ratio = advantage.masked_fill(~mask, 0), (logp - old).masked_fill(~mask, 0).half().exp().float()
    return ops.masked_mean(-torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a), mask, count)


def in_bfloat16(
    logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """Everything in bfloat16."""
    return ops.clipped_policy_loss(logp.bfloat16(), old.bfloat16(), advantage.bfloat16(), mask, epsilon, count)


def micro_mean(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor, epsilon: float, count: Any = None) -> Tensor:
    """The mean of each micro-batch, added up and divided by nothing."""
    return ops.clipped_policy_loss(logp, old, a, mask, epsilon, None)


def mean_of_micro_means(pieces: int) -> Callable[..., Tensor]:
    """Each micro-batch's own mean, divided by how many there are."""

    def loss(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor, epsilon: float, count: Any = None) -> Tensor:
        return ops.clipped_policy_loss(logp, old, a, mask, epsilon, None) / pieces

    return loss


def over_the_grid(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor, epsilon: float, count: Any = None) -> Tensor:
    """A mean over tokens and pads."""
    return ops.clipped_policy_loss(logp, old, a, mask, epsilon, mask.numel())


def with_entropy(coefficient: float, *, pads: bool = False) -> dict[str, Any]:
    """Parts whose policy loss has the mean entropy of what is said, times minus the coefficient; ``pads`` count too."""
    from reference_impl import roles

    last: dict[str, Any] = {}

    def logprobs(model: Any, ids: Tensor, attention: Tensor, T: int, temperature: float) -> Tensor:
        seen: list[Tensor] = []
        with mock.patch.object(ops, "logprobs", _keeping(ops.logprobs, seen)):
            made = roles.response_logprobs(model, ids, attention, T, temperature)
        last["logits"] = seen[-1] if seen else None
        return made

    def loss(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor, epsilon: float, count: Any = None) -> Tensor:
        log_p = last["logits"].float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        counted = torch.ones_like(mask) if pads else mask
        bonus = coefficient * ops.masked_mean(entropy, counted, count)
        return ops.clipped_policy_loss(logp, old, a, mask, epsilon, count) - bonus

    return {"logprobs": logprobs, "policy_loss": loss}


def _keeping(function: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def called(logits: Tensor, *given: Any, **named: Any) -> Any:
        kept.append(logits)
        return function(logits, *given, **named)

    return called


# ---- value losses: (v, old_v, returns, mask, epsilon, count) -> a scalar ---------------------------------------------


def zero(*given: Any) -> Tensor:
    """A coefficient of 0."""
    return 0.0 * ops.clipped_value_loss(*given)


def value_ascends(*given: Any) -> Tensor:
    """Away from the returns."""
    return -ops.clipped_value_loss(*given)


def around_return(v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
    """Clipped around the return, so that a critic that is far off learns nothing."""
    mask, epsilon, count = (*rest, None)[:3]
    clipped = v.clamp(returns - epsilon, returns + epsilon)
    return ops.masked_mean((clipped - returns).square(), mask, count) / 2


def towards_advantages(v: Tensor, old_v: Tensor, returns: Tensor, *rest: Any) -> Tensor:
    """The advantage stands where the return is meant."""
    return ops.clipped_value_loss(v, old_v, returns - old_v, *rest)


def smaller_value_loss(
    v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """The smaller of the two squares where the larger is meant."""
    clipped = v.clamp(old_v - epsilon, old_v + epsilon)
    return ops.masked_mean(torch.minimum((v - returns).square(), (clipped - returns).square()), mask, count) / 2


def plain_value_loss(
    v: Tensor, old_v: Tensor, returns: Tensor, mask: Tensor, epsilon: float, count: Any = None
) -> Tensor:
    """Without the clip that was declared."""
    return ops.masked_mean((v - returns).square(), mask, count) / 2


# ---- scores and advantages -------------------------------------------------------------------------------------------


def spread_of_scores(*given: Any, **named: Any) -> Tensor:
    """Scores divided by their deviation, which is 0 where they are equal."""
    scores = rollout.score(*given, **named)
    return scores / (scores - scores.mean()).square().mean().sqrt()


# ---- whole steps -----------------------------------------------------------------------------------------------------


def copied(model: Any) -> Any:
    """A copy that a fault may change."""
    return copy.deepcopy(model)


def after_step(healthy: RLHFSetup, then: Callable[[RLHFSetup], None]) -> RLHFSetup:
    """A step that does something to its own copies of reference and reward model afterwards."""
    made = reference_step(healthy, reference=copied(healthy.reference), reward=copied(healthy.reward))
    inner = made.step

    def step() -> Any:
        returned = inner()  # type: ignore[misc]  # reference_step gives one
        with torch.no_grad():
            then(made)
        return returned

    return made.but(step=step)


def follow_the_policy(made: RLHFSetup) -> None:
    """The reference goes a tenth of the way to the policy."""
    for mine, theirs in zip(made.reference.parameters(), made.policy.parameters(), strict=True):
        mine.lerp_(theirs, 0.1)


def rescale_the_reward(made: RLHFSetup) -> None:
    """The head of the reward model is divided by something."""
    made.reward.score.weight.div_(1.01)


def sample_in_bfloat16(policy: Any, *given: Any, **named: Any) -> Any:
    """Cast for generation and cast back."""
    policy.to(torch.bfloat16).to(torch.float32)
    return rollout.sample(policy, *given, **named)


def patched_step(healthy: RLHFSetup, name: str, function: Callable[..., Any], **options: Any) -> RLHFSetup:
    """A step during which torch has another function of this name."""
    made = reference_step(healthy, **options)
    inner = made.step

    def step() -> Any:
        with mock.patch.object(torch, name, function):
            return inner()  # type: ignore[misc]  # reference_step gives one

    return made.but(step=step)


def with_replacement(healthy: RLHFSetup) -> RLHFSetup:
    """Every second epoch draws its rows with replacement."""
    permutation, calls = torch.randperm, {"count": 0}

    def drawn(n: int) -> Tensor:
        calls["count"] += 1
        return permutation(n) if calls["count"] % 2 else torch.randint(n, (n,))

    return patched_step(healthy, "randperm", drawn, settings={"ppo_epochs": 2})


def gradients_kept(healthy: RLHFSetup) -> RLHFSetup:
    """Nothing ever zeroes the policy's gradients."""
    made = reference_step(healthy)
    made.optimizers[0].zero_grad = lambda *_, **__: None
    return made


def training_on_the_batch_before(healthy: RLHFSetup) -> RLHFSetup:
    """After its own updates a step makes one on the rollout of the step before."""
    kept: list[Any] = []
    made: RLHFSetup

    def keeping(*given: Any, **named: Any) -> Any:
        kept.append(rollout.sample(*given, **named))
        return kept[-1]

    made = reference_step(healthy, parts={"sample": keeping})
    inner, optimizer = made.step, made.optimizers[0]

    def step() -> Any:
        returned = inner()  # type: ignore[misc]  # reference_step gives one
        if len(kept) > 1:
            old = kept[-2]
            logp = ppo.Parts().logprobs(made.policy, old.ids, old.attention_mask, old.mask.shape[1], 1.0)
            ops.masked_mean(-logp, old.mask).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return returned

    return made.but(step=step)


def reported(healthy: RLHFSetup, change: Callable[[Made], Made]) -> RLHFSetup:
    """A sound step that reports other numbers than it has."""
    made = reference_step(healthy)
    inner = made.step

    def step() -> Any:
        returned = inner()  # type: ignore[misc]  # reference_step gives one
        return {**returned, **change(returned)}

    return made.but(step=step)


def without_spread(healthy: RLHFSetup) -> RLHFSetup:
    """Whitening without the small number that keeps it finite."""

    def whitened(x: Tensor, mask: Tensor, **_: Any) -> Tensor:
        mean = ops.masked_mean(x, mask)
        return ((x - mean) / ops.masked_mean((x - mean).square(), mask).sqrt()).masked_fill(~mask, 0)

    made = reference_step(healthy)
    inner = made.step

    def step() -> Any:
        with mock.patch.object(ops, "whiten", whitened):
            return inner()  # type: ignore[misc]  # reference_step gives one

    return made.but(step=step)


def clipped_to_zero(healthy: RLHFSetup) -> RLHFSetup:
    """The norm that gradients are clipped to is 0."""
    clip = torch.nn.utils.clip_grad_norm_
    made = reference_step(healthy)
    inner = made.step

    def step() -> Any:
        with mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clip(parameters, 0.0)):
            return inner()  # type: ignore[misc]  # reference_step gives one

    return made.but(step=step)

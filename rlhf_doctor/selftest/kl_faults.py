"""Parts of a training step in which the divergence from the reference is computed wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_doctor.selftest.loops import reference_step

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = [
    "Impostor",
    "LeakyRewards",
    "OtherInput",
    "estimator",
    "rewards_with",
    "score_of_responses",
    "score_with",
    "with_kl_in_the_loss",
]


def estimator(name: str) -> Callable[[Any, Any], Any]:
    """k1, k2 or k3 as a function of log π and log π_ref."""
    from reference_impl import ops

    return getattr(ops, name)  # type: ignore[no-any-return]


def rewards_with(*, sign: float = 1.0, factor: float = 1.0, by_length: bool = False) -> Callable[..., Any]:
    """The reference's rewards with a KL of another sign or weight."""

    def rewards(score: Any, kl: Any, mask: Any, kl_coef: float) -> Any:
        from reference_impl import ops

        kl = sign * factor * kl
        if by_length:
            kl = kl / mask.sum(1, keepdim=True)
        return ops.shaped_rewards(score, kl, mask, kl_coef)

    return rewards


class Impostor:
    """Log-probabilities in which the policy answers for the reference."""

    def __init__(self, healthy: RLHFSetup) -> None:
        self.policy, self.reference = healthy.policy, healthy.reference

    def __call__(self, model: Any, *arguments: Any) -> Any:
        """As ``response_logprobs``."""
        from reference_impl import roles

        return roles.response_logprobs(self.policy if model is self.reference else model, *arguments)


def with_kl_in_the_loss(
    healthy: RLHFSetup, kind: str, *, detached: bool = False, anchor: str = "reference", weight: float = 0.05,
    over_pads: bool = False, declared: str = "k2",
) -> RLHFSetup:  # fmt: skip
    """The reference's step with the KL as a term of the loss, as GRPO has it.

    Args:
        healthy: the built-in reference.
        kind: k1, k2 or k3.
        detached: whether its gradient is cut off.
        anchor: "reference", or "old": the policy's own log-probabilities of the rollout.
        weight: its coefficient.
        over_pads: whether it is summed over all slots.
        declared: the declared estimator.
    """
    from reference_impl import ops

    kept: dict[bytes, Any] = {}

    def kl(logp: Any, ref_logp: Any) -> Any:
        for old, ref in zip(logp, ref_logp, strict=True):  # a row is found again by its old log-probabilities
            kept[old.numpy().tobytes()] = ref
        return logp * 0

    def loss(logp: Any, old: Any, advantage: Any, mask: Any, clip: float, count: Any) -> Any:
        import torch

        ref = old if anchor == "old" else torch.stack([kept[row.numpy().tobytes()] for row in old])
        term = estimator(kind)(logp, ref)
        term = term.detach() if detached else term
        surrogate = ops.clipped_policy_loss(logp, old, advantage, mask, clip, count)
        return surrogate + weight * (term.sum() / count if over_pads else ops.masked_mean(term, mask, count))

    told = {"kl_in": "loss", "kl_estimator": declared, "kl_coef": 0.05}
    return reference_step(healthy, parts={"kl": kl, "policy_loss": loss}, declared=told)


class OtherInput:
    """Log-probabilities in which the reference is given no prompt, or another temperature."""

    def __init__(self, healthy: RLHFSetup, *, temperature: float | None = None, prompt: bool = True) -> None:
        self.reference, self.temperature, self.prompt = healthy.reference, temperature, prompt

    def __call__(self, model: Any, ids: Any, attention: Any, width: int, temperature: float) -> Any:
        """As ``response_logprobs``."""
        from reference_impl import roles

        if model is self.reference:
            temperature = self.temperature or temperature
            if not self.prompt:
                attention = attention.clone()
                attention[:, : -width - 1] = 0
        return roles.response_logprobs(model, ids, attention, width, temperature)


class LeakyRewards:
    """Rewards that keep the KL of the slots after a response, and a recursion that runs over them.

    ``filled`` is put in place of what the models say there, None leaves it.
    """

    def __init__(self, filled: float | None = None) -> None:
        self.filled = filled
        self.whole: Any = None

    def kl(self, logp: Any, ref_logp: Any) -> Any:
        """k1, remembered before it is masked."""
        self.whole = logp - ref_logp
        return self.whole

    def rewards(self, score: Any, kl: Any, mask: Any, kl_coef: float) -> Any:
        """As ``shaped_rewards``, with the KL of all slots."""
        from reference_impl import ops

        right = ops.shaped_rewards(score, kl, mask, kl_coef)
        pads = self.whole if self.filled is None else self.whole * 0 + self.filled
        return right + (-kl_coef * pads).masked_fill(mask, 0)

    def gae(self, r: Any, v: Any, mask: Any, gamma: float, lam: float) -> Any:
        """As ``gae``, over all slots, with the values masked."""
        import torch

        from reference_impl import ops

        everywhere = torch.ones_like(mask)
        return ops.gae(r, v.masked_fill(~mask, 0), everywhere, gamma, lam).masked_fill(~mask, 0)


def score_with(factor: float = 1.0, *, always: bool = False) -> Callable[..., Any]:
    """The reference's scores with a missing-EOS penalty of another size, or on every response."""

    def score(reward: Any, rollout: Any, *, missing_eos_penalty: float) -> Any:
        from reference_impl import rollout as healthy

        if always:
            return healthy.score(reward, rollout, missing_eos_penalty=0.0) - missing_eos_penalty
        return healthy.score(reward, rollout, missing_eos_penalty=factor * missing_eos_penalty)

    return score


def score_of_responses(reward: Any, rollout: Any, **options: Any) -> Any:
    """The reference's scores of the responses by themselves."""
    from dataclasses import replace

    from reference_impl import rollout as healthy

    shown = rollout.attention_mask[:, -rollout.mask.shape[1] :]
    return healthy.score(reward, replace(rollout, ids=rollout.response, attention_mask=shown), **options)


ADAPTIVE: dict[str, Any] = {"kl_adaptive": True, "kl_target": 2.0, "kl_horizon": 1000}


def controller(share: float = 1.0) -> Any:
    """An adaptive controller that is told this share of the KL."""
    from reference_impl import ppo

    class Told(ppo.AdaptiveKL):
        def update(self, kl: float, samples: int) -> None:
            super().update(share * kl, samples)

    return Told(0.05, ADAPTIVE["kl_target"], ADAPTIVE["kl_horizon"])

"""Parts of the reference's step with a mistake of the rollout in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from reference_impl import ops, roles
from reference_impl.rollout import Rollout, response_mask, sample, score

__all__ = [
    "altered",
    "attending_to_pads_before",
    "blind_training",
    "every_row_the_same",
    "leaves_out_the_last",
    "logprobs_at_one",
    "logprobs_of_other_tokens",
    "mask_left_out",
    "sample_at",
    "sample_attending_to_pads",
    "sample_seeded",
    "sample_without_start",
    "score_at_the_last_column",
    "scores_of_others",
    "stale",
    "trains_past_the_end",
    "values_of_every_column",
    "values_of_others",
]


def sample_at(factor: float) -> Callable[..., Rollout]:
    """Draws at a multiple of the temperature."""

    def drawn(*args: Any, temperature: float, **kwargs: Any) -> Rollout:
        return sample(*args, temperature=factor * temperature, **kwargs)

    return drawn


def logprobs_at_one(model: Any, ids: Any, attention_mask: Any, T: int, temperature: float) -> Any:
    """Log-probabilities that leave the temperature out."""
    return roles.response_logprobs(model, ids, attention_mask, T, 1.0)


def blind_training(model: Any, ids: Any, attention_mask: Any, T: int, temperature: float) -> Any:
    """The update's pass sees one token less at the front of each text than the rollout's."""
    if torch.is_grad_enabled():
        attention_mask = attention_mask.clone()
        attention_mask[torch.arange(len(ids)), attention_mask.argmax(1)] = 0
    return roles.response_logprobs(model, ids, attention_mask, T, temperature)


def attending_to_pads_before(model: Any, ids: Any, attention_mask: Any, T: int, temperature: float) -> Any:
    """The passes without gradient, those before the update, attend to the padding."""
    if torch.is_grad_enabled():
        return roles.response_logprobs(model, ids, attention_mask, T, temperature)
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, -T:]
    return ops.token_logprobs(hidden, model.get_output_embeddings(), ids[:, -T:], temperature)


def logprobs_of_other_tokens(*, offset: int = 0, rows: int = 0) -> Callable[..., Any]:
    """Gathers the tokens ``offset`` columns on, or those of another row."""

    def gathered(model: Any, ids: Any, attention_mask: Any, T: int, temperature: float) -> Any:
        hidden = roles.hidden_states(model, ids[:, :-1], attention_mask[:, :-1], T)
        targets = ids.roll(-offset, 1).roll(rows, 0)[:, -T:]
        return ops.token_logprobs(hidden, model.get_output_embeddings(), targets, temperature)

    return gathered


def trains_past_the_end(*args: Any, eos: int, **kwargs: Any) -> Rollout:
    """The mask holds one token after each end of sequence."""
    drawn = sample(*args, eos=eos, **kwargs)
    mask = drawn.mask.clone()
    mask[:, 1:] |= drawn.mask[:, :-1]
    attention = drawn.attention_mask.clone()
    attention[:, -mask.shape[1] :] = mask.to(attention)
    return Rollout(drawn.ids, attention, mask, drawn.ended)


def leaves_out_the_last(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss whose mask lacks the last token of every response."""

    def masked(new: Any, old: Any, target: Any, mask: Any, clip: float, count: Any) -> Any:
        last = mask.flip(1).cumsum(1).flip(1) == 1
        return loss(new, old, target, mask & ~last, clip, count)

    return masked


def mask_left_out(values: Any, old_values: Any, returns: Any, mask: Any, clip: float, count: Any) -> Any:
    """A value loss over every column, with targets of 0 at the padding."""
    targets = returns.masked_fill(~mask, 0)
    return ops.clipped_value_loss(values, old_values, targets, torch.ones_like(mask), clip, count)


def values_of_every_column(model: Any, ids: Any, attention_mask: Any) -> Any:
    """Values of the padding too."""
    at = roles.positions(attention_mask)
    hidden = model.base_model(input_ids=ids, attention_mask=attention_mask, position_ids=at).last_hidden_state
    return roles.scalar_head(model)(hidden).squeeze(-1)


def sample_seeded(*args: Any, **kwargs: Any) -> Rollout:
    """Every rollout starts from one seed."""
    torch.manual_seed(1)
    return sample(*args, **kwargs)


def every_row_the_same(policy: Any, prompt: Any, prompt_mask: Any, **kwargs: Any) -> Rollout:
    """Equal prompts get one and the same response."""
    drawn = sample(policy, prompt, prompt_mask, **kwargs)
    first = [next(j for j in range(len(prompt)) if torch.equal(prompt[i], prompt[j])) for i in range(len(prompt))]
    return drawn.rows(torch.tensor(first))


def sample_without_start(policy: Any, prompt: Any, prompt_mask: Any, **kwargs: Any) -> Rollout:
    """The sampler is given each prompt without its first token."""
    cut = prompt_mask.clone()
    cut[torch.arange(len(prompt)), prompt_mask.argmax(1)] = 0
    drawn = sample(policy, prompt, cut, **kwargs)
    attention = drawn.attention_mask.clone()
    attention[:, : prompt.shape[1]] = prompt_mask
    return Rollout(drawn.ids, attention, drawn.mask, drawn.ended)


def sample_attending_to_pads(policy: Any, prompt: Any, prompt_mask: Any, **kwargs: Any) -> Rollout:
    """The sampler takes the padding for a part of the prompts."""
    drawn = sample(policy, prompt, torch.ones_like(prompt_mask), **kwargs)
    attention = drawn.attention_mask.clone()
    attention[:, : prompt.shape[1]] = prompt_mask
    return Rollout(drawn.ids, attention, drawn.mask, drawn.ended)


def stale(policy: Any, *, body: bool = False) -> Callable[..., Rollout]:
    """Draws with a copy of the policy that is never brought up to date; with ``body`` all but its head is."""
    engine = copy.deepcopy(policy)

    def drawn(policy: Any, *args: Any, **kwargs: Any) -> Rollout:
        if body:
            engine.base_model.load_state_dict(policy.base_model.state_dict())
        return sample(engine, *args, **kwargs)

    return drawn


def altered(change: Callable[[Any, int], Any]) -> Callable[..., Rollout]:
    """Responses (B, T) that are changed after they were drawn: ``change`` is given them and the end of sequence."""

    def drawn(*args: Any, eos: int, **kwargs: Any) -> Rollout:
        made = sample(*args, eos=eos, **kwargs)
        response = change(made.response.clone(), eos)
        ids = torch.cat([made.ids[:, : -response.shape[1]], response], 1)
        mask, ended = response_mask(response, eos)
        mask &= made.mask
        return Rollout(ids, made.attention_mask, mask, ended)

    return drawn


def scores_of_others(reward: Any, rollout: Rollout, **kwargs: Any) -> Any:
    """The scores come back in another order."""
    return score(reward, rollout, **kwargs).flip(0)


def score_at_the_last_column(reward: Any, rollout: Rollout, *, missing_eos_penalty: float = 0.0) -> Any:
    """A pad's for every response that is shorter than the longest."""
    per_token = roles.scalars(reward, rollout.ids, rollout.attention_mask)
    return per_token[:, -1] - missing_eos_penalty * (~rollout.ended)


def values_of_others(model: Any, ids: Any, attention_mask: Any) -> Any:
    """Rollout values of the next row."""
    values = roles.scalars(model, ids, attention_mask)
    return values if torch.is_grad_enabled() else values.roll(1, 0)

"""PPO with a critic of its own and gradients accumulated over micro-batches, sampled by ``generate()``.

Prompts are padded on the left, two responses each. A minibatch's gradient is that of the mean over all its tokens,
whatever the micro-batches are. The KL (k2) is a term of the loss, and advantages are not whitened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from loops.small_models import EOS, PAD, WIDTH, prompts, tiny_llama, tokenizer

__all__ = ["ALSO", "FAULTS", "build"]

GAMMA, LAM, TEMPERATURE = 0.97, 0.9, 0.8
KL_COEF, CLIP, CLIP_VALUE, VF_COEF, ENT_COEF, REWARD_CLIP, MAX_NORM = 0.05, 0.2, 0.5, 1.0, 0.005, 5.0, 1.0
SAMPLES_PER_PROMPT, EPOCHS, MINIBATCHES, MICRO_BATCH, RESPONSE_LENGTH = 2, 2, 2, 4, 8
LEARNING_RATE, CRITIC_LEARNING_RATE = 5e-5, 2e-4
STOPS = [EOS, 10, 20, 30, 40]  # where rollouts end that stop at words as well

# fault -> (the code that names it, the role it is in)
FAULTS: dict[str, tuple[str, str]] = {
    "prompts_in_random_order": ("SYS009", "loop"),
    "kl_against_the_old_policy": ("REF005", "reference"),
    "reference_at_temperature_one": ("REF006", "reference"),
    "reference_attends_to_pads": ("REF006", "reference"),
    "critic_optimizer_never_steps": ("VAL008", "value"),
    "critic_head_in_no_optimizer": ("VAL008", "value"),
    "critic_scores_overwritten": ("VAL009", "value"),
    "critic_targets_its_old_values": ("VAL009", "value"),
    "critic_targets_the_next_value": ("VAL009", "value"),
    "returns_of_another_batch": ("VAL009", "value"),
    "rewards_added_after_gae": ("VAL009", "value"),
    "returns_are_values_less_advantages": ("VAL010", "value"),
    "critic_target_is_the_immediate_reward": ("VAL011", "value"),
    "critic_target_is_the_score": ("VAL011", "value"),
    "critic_target_of_live_values": ("VAL012", "value"),
    "values_one_late": ("VAL013", "value"),
    "values_of_the_prompt": ("VAL013", "value"),
    "generate_left_at_temperature_one": ("ROL001", "loop"),
    "temperature_only_in_generate": ("ROL001", "loop"),
    "top_k_in_generate": ("ROL002", "loop"),
    "repetition_penalty_in_generate": ("ROL002", "loop"),
    "old_logprobs_attend_to_pads": ("ROL003", "loop"),
    "old_logprobs_of_a_bfloat16_engine": ("ROL003", "loop"),
    "logprobs_of_the_tokens_read": ("ROL004", "loop"),
    "pads_are_trained_on": ("ROL005", "loop"),
    "eos_left_out": ("ROL005", "loop"),
    "critic_trains_on_pads": ("ROL005", "loop"),
    "samples_are_copies": ("ROL007", "loop"),
    "engine_never_synchronised": ("ROL008", "loop"),
    "scores_in_another_order": ("ROL009", "loop"),
    "values_of_the_neighbour": ("ROL009", "loop"),
    "text_round_trip": ("ROL010", "loop"),
    "generate_without_mask": ("ROL011", "loop"),
    "kl_loss_subtracted": ("KLD002", "loop"),
    "kl_coefficient_applied_twice": ("KLD003", "loop"),
    "kl_in_loss_and_reward": ("KLD003", "loop"),
    "k1_in_the_loss": ("KLD004", "loop"),
    "k3_for_k2": ("KLD004", "loop"),
    "kl_without_gradient": ("KLD004", "loop"),
    "kl_over_all_columns": ("KLD005", "loop"),
    "controller_runs_although_fixed": ("KLD006", "loop"),
    "gamma_and_lambda_exchanged": ("ADV001", "loop"),
    "lambda_left_at_one": ("ADV001", "loop"),
    "score_in_the_last_column": ("ADV002", "loop"),
    "score_at_the_first_token": ("ADV002", "loop"),
    "values_of_pads_count": ("ADV003", "loop"),
    "advantages_of_live_values": ("ADV005", "loop"),
    "recursion_off_by_one": ("ADV006", "loop"),
    "advantages_are_returns_to_go": ("ADV007", "loop"),
    "policy_scores_overwritten": ("ADV008", "loop"),
    "scores_clipped_from_below": ("ADV009", "loop"),
    "policy_loss_turned": ("LOS001", "loop"),
    "clip_bounds_exchanged": ("LOS002", "loop"),
    "old_logprobs_recomputed": ("LOS002", "loop"),
    "value_clip_left_out": ("LOS002", "value"),
    "mean_of_micro_batch_means": ("LOS003", "loop"),
    "critic_coefficient_zero": ("LOS004", "value"),
    "value_clip_takes_the_smaller": ("LOS004", "value"),
    "masked_ratios_times_zero": ("LOS005", "loop"),
    "entropy_is_punished": ("LOS006", "loop"),
    "entropy_never_added": ("LOS007", "loop"),
    "group_scores_divided_by_deviation": ("LOS008", "loop"),
    "accumulation_never_completes": ("OPT002", "policy"),
    "adapter_merged_and_unmerged": ("OPT003", "policy"),
    "accumulation_not_divided": ("OPT004", "loop"),
    "gradients_never_zeroed": ("OPT004", "loop"),
    "clipped_to_norm_zero": ("OPT004", "loop"),
    "buffer_never_cleared": ("OPT006", "loop"),
    "minibatches_overlap": ("OPT006", "loop"),
    "last_minibatch_dropped": ("OPT006", "loop"),
    "old_logprobs_of_generation_scores": ("ROL003", "loop"),
    "ranks_share_a_seed": ("ROL007", "loop"),
    "values_one_early": ("VAL013", "value"),
    "eos_written_over_the_last_token": ("ROL010", "loop"),
    "first_value_head_back_after_scoring": ("OPT003", "value"),
    "mask_knows_one_of_the_stop_tokens": ("ROL005", "loop"),
    "missing_logprobs_are_zero": ("ROL004", "loop"),
    "one_surrogate_of_normalised_advantages": ("LOS002", "loop"),
    "critic_mask_one_late": ("ROL005", "loop"),
    "critic_learns_normalised_returns": ("VAL015", "value"),
}
# Other codes that are true of a fault as well.
ALSO: dict[str, tuple[str, ...]] = {
    "old_logprobs_of_a_bfloat16_engine": ("PRE002",),
    "values_of_pads_count": ("ADV006",),
    "scores_clipped_from_below": ("ADV008", "VAL009"),
    "value_clip_left_out": ("LOS007",),
    "accumulation_never_completes": ("VAL008", "OPT004"),
    "clipped_to_norm_zero": ("OPT002", "VAL008"),
    "critic_head_in_no_optimizer": ("OPT001",),
    "old_logprobs_of_generation_scores": ("ROL002",),
    "first_value_head_back_after_scoring": ("VAL008", "SYS003"),
    "missing_logprobs_are_zero": ("ROL003",),
    "critic_learns_normalised_returns": ("ADV001", "LOS004"),
}


class CriticModel(nn.Module):
    """The policy's trunk with a value head of its own: (B, T) ids -> (B, T) values."""

    value_head_prefix = "value_head"

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.model = trunk
        self.value_head = nn.Linear(WIDTH, 1, bias=False)
        self.value_head.weight.data.normal_(0, 1 / (WIDTH + 1) ** 0.5)

    def forward(self, input_ids, attention_mask=None):
        position_ids = positions(attention_mask)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return self.value_head(hidden.last_hidden_state).squeeze(-1)


@dataclass
class Experience:
    """A batch of rollouts; everything but ids and attention has the response's width."""

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
    action_log_probs: torch.Tensor
    base_action_log_probs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def rows(self, index):
        return Experience(**{name: x[index] for name, x in vars(self).items()})


def positions(attention_mask):
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


def masked_sum(x, mask):
    return x.masked_fill(~mask, 0.0).sum()


class Actor:
    """The language model as the trainer calls it."""

    def __init__(self, model, fault) -> None:
        self.model, self.fault = model, fault

    def __call__(self, sequences, attention_mask, actions, temperature=TEMPERATURE, masked=True):
        """Log-probabilities of the last ``actions`` tokens, and the logits that they were drawn from."""
        position_ids = positions(attention_mask)
        seen = attention_mask if masked else torch.ones_like(attention_mask)
        logits = self.model(sequences, attention_mask=seen, position_ids=position_ids).logits.float()
        if self.fault != "temperature_only_in_generate":
            logits = logits / temperature
        target = sequences.roll(-1, 1)
        if self.fault == "logprobs_of_the_tokens_read":
            target = sequences
        log_probs = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        return log_probs[:, -actions - 1 : -1], logits[:, -actions - 1 : -1]


class Trainer:
    def __init__(
        self, actor, critic, reward, reference, tok, actor_optimizer, critic_optimizer, fault, leave_cut_out, error
    ) -> None:
        self.actor, self.reference = Actor(actor, fault), Actor(reference, fault)
        self.critic, self.reward, self.tokenizer, self.fault = critic, reward, tok, fault
        self.actor_optimizer, self.critic_optimizer = actor_optimizer, critic_optimizer
        self.engine = copy.deepcopy(actor) if fault == "engine_never_synchronised" else actor
        self.kl_coef = KL_COEF
        self.leave_cut_out, self.error = leave_cut_out, error
        self.buffer: list[Experience] = []
        self.first_head = copy.deepcopy(critic.value_head.state_dict())
        if fault == "adapter_merged_and_unmerged":
            drawn = torch.Generator().manual_seed(0)
            self.adapter = [0.1 * torch.randn(p.shape, generator=drawn) for p in actor.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_coef, self.buffer = state["kl_coef"], list(state["buffer"])

    # ---- experience ----

    @torch.no_grad()
    def generate(self):
        texts = [text for text in prompts() for _ in range(SAMPLES_PER_PROMPT)]
        if self.fault == "prompts_in_random_order":
            numpy.random.default_rng().shuffle(texts)
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        ids, mask = encoded.input_ids, encoded.attention_mask
        options: dict[str, Any] = {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
        if self.fault == "generate_left_at_temperature_one":
            options["temperature"] = 1.0
        if self.fault == "top_k_in_generate":
            options["top_k"] = 5
        if self.fault == "repetition_penalty_in_generate":
            options["repetition_penalty"] = 1.5
        if self.fault == "old_logprobs_of_generation_scores":
            options |= {"top_k": 5, "output_scores": True, "return_dict_in_generate": True}
        if self.fault == "adapter_merged_and_unmerged":
            for p, delta in zip(self.engine.parameters(), self.adapter, strict=True):
                p.add_(delta)
            for p, delta in zip(self.engine.parameters(), self.adapter, strict=True):
                p.sub_(delta)
        seen = torch.ones_like(mask) if self.fault == "generate_without_mask" else mask

        def sampled(rows):
            return self.engine.generate(
                input_ids=ids[rows],
                attention_mask=seen[rows],
                max_new_tokens=RESPONSE_LENGTH,
                do_sample=True,
                eos_token_id=STOPS if self.fault == "mask_knows_one_of_the_stop_tokens" else EOS,
                pad_token_id=PAD,
                **options,
            )

        width = ids.shape[1]
        if self.fault == "samples_are_copies":
            sequences = sampled(slice(None, None, SAMPLES_PER_PROMPT)).repeat_interleave(SAMPLES_PER_PROMPT, 0)
        elif self.fault == "ranks_share_a_seed":
            of_ranks, state = [], torch.get_rng_state()
            for rank in range(SAMPLES_PER_PROMPT):
                torch.set_rng_state(state)
                of_ranks.append(sampled(slice(rank, None, SAMPLES_PER_PROMPT)))
            sequences = torch.stack(of_ranks, 1).flatten(0, 1)
        else:
            sequences = sampled(slice(None))
        if self.fault == "old_logprobs_of_generation_scores":
            scores, sequences = torch.stack(sequences.scores, 1), sequences.sequences
            self.drawn = scores.log_softmax(-1).gather(-1, sequences[:, width:, None])[..., 0]
        if self.fault == "eos_written_over_the_last_token":
            sequences[~(sequences[:, width:] == EOS).any(1), -1] = EOS
        if self.fault == "text_round_trip":
            said = self.tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
            again = [self.tokenizer(text, add_special_tokens=False).input_ids or [PAD] for text in said]
            sequences = sequences.clone()
            sequences[:, width:] = PAD
            for row, response in zip(sequences, again, strict=True):
                row[width : width + len(response)] = torch.tensor(response)
            action_mask = sequences[:, width:] != PAD
            action_mask[:, 0] = True
            return sequences, torch.cat([mask, action_mask.long()], 1), action_mask
        ended = sequences[:, width:] == EOS
        action_mask = ended.long().cumsum(1) - ended.long() == 0
        return sequences, torch.cat([mask, action_mask.long()], 1), action_mask

    @torch.no_grad()
    def make_experience(self) -> Experience:
        sequences, attention_mask, action_mask = self.generate()
        actions = action_mask.shape[1]
        true_mask = action_mask
        if self.fault == "eos_left_out":
            action_mask = action_mask & (sequences[:, -actions:] != EOS)
        if self.fault == "old_logprobs_of_a_bfloat16_engine":
            engine = Actor(copy.deepcopy(self.actor.model).to(torch.bfloat16), self.fault)
            log_probs = engine(sequences, attention_mask, actions)[0]
        elif self.fault == "old_logprobs_of_generation_scores":
            log_probs = self.drawn
        else:
            masked = self.fault != "old_logprobs_attend_to_pads"
            log_probs = self.actor(sequences, attention_mask, actions, masked=masked)[0]
        if self.fault == "missing_logprobs_are_zero":
            missing = torch.arange(actions) >= true_mask.sum(1, keepdim=True) - 2
            log_probs[::3] = log_probs[::3].masked_fill(missing[::3], 0.0)
        base = self.reference(
            sequences,
            attention_mask,
            actions,
            temperature=1.0 if self.fault == "reference_at_temperature_one" else TEMPERATURE,
            masked=self.fault != "reference_attends_to_pads",
        )[0]
        values = self.action_values(sequences, attention_mask, actions)
        if self.fault == "values_of_the_neighbour":
            values = values.roll(1, 0)
        scores = self.reward(sequences, attention_mask=attention_mask, position_ids=positions(attention_mask))
        scores = self.shape_scores(scores.logits[:, 0])
        if self.fault == "first_value_head_back_after_scoring":
            self.critic.value_head.load_state_dict(self.first_head)
        kl_coef = self.kl_coef if self.fault == "kl_in_loss_and_reward" else 0.0
        if self.fault == "pads_are_trained_on":
            action_mask = torch.ones_like(action_mask)
        rewards = self.place(scores, true_mask) - kl_coef * (log_probs - base).masked_fill(~action_mask, 0.0)

        values = values if self.fault == "values_of_pads_count" else values.masked_fill(~true_mask, 0.0)
        advantages, returns = self.advantages_and_returns(values, rewards)
        nothing = torch.zeros_like(rewards)
        if self.fault == "advantages_are_returns_to_go":
            advantages = self.advantages_and_returns(nothing, rewards, lam=1.0)[0]
        if self.fault == "policy_scores_overwritten":
            advantages = self.advantages_and_returns(values, nothing)[0]
        if self.fault == "critic_scores_overwritten":
            returns = self.advantages_and_returns(values, nothing)[1]
        if self.fault == "critic_targets_its_old_values":
            returns = values.clone()
        if self.fault == "critic_targets_the_next_value":
            returns = GAMMA * torch.nn.functional.pad(values[:, 1:], (0, 1))
        if self.fault == "returns_are_values_less_advantages":
            returns = values - advantages
        if self.fault == "critic_target_is_the_immediate_reward":
            returns = rewards
        if self.fault == "critic_target_is_the_score":
            returns = scores[:, None].expand_as(values)
        if self.fault == "rewards_added_after_gae":
            advantages, returns = self.advantages_and_returns(values, nothing)
            advantages = advantages + rewards.flip(1).cumsum(1).flip(1)
        if self.fault == "returns_of_another_batch":
            drawn = torch.Generator().manual_seed(3)
            returns = torch.randn(len(returns), RESPONSE_LENGTH, generator=drawn)[:, :actions]
        if self.fault == "critic_learns_normalised_returns":
            returns = (returns - returns[true_mask].mean()) / returns[true_mask].std()
        self.scores = scores
        if self.leave_cut_out:
            action_mask = action_mask & (sequences[:, -actions:] == EOS).any(1, keepdim=True)
        return Experience(
            sequences, attention_mask, action_mask, log_probs, base, values, rewards, advantages, returns
        )  # fmt: skip

    def action_values(self, sequences, attention_mask, actions):
        values = self.critic(sequences, attention_mask)
        if self.fault == "values_one_late":
            return values[:, -actions:]
        if self.fault == "values_one_early":
            return values[:, -actions - 2 : -2]
        if self.fault == "values_of_the_prompt":
            return values[:, :actions]
        return values[:, -actions - 1 : -1]

    def shape_scores(self, scores):
        if self.fault == "scores_in_another_order":
            return scores.view(-1, SAMPLES_PER_PROMPT).T.reshape(-1)
        if self.fault == "scores_clipped_from_below":
            return scores.clamp(min=REWARD_CLIP)
        if self.fault == "group_scores_divided_by_deviation":
            grouped = scores.view(-1, SAMPLES_PER_PROMPT)
            return (grouped / grouped.std(1, keepdim=True)).view(-1)
        return scores.clamp(-REWARD_CLIP, REWARD_CLIP)

    def place(self, scores, action_mask):
        """The score at the last token of each response."""
        last = action_mask.shape[1] - 1 - action_mask.long().flip(1).argmax(1, keepdim=True)
        if self.fault == "score_in_the_last_column":
            last = torch.full_like(last, action_mask.shape[1] - 1)
        if self.fault == "score_at_the_first_token":
            last = torch.zeros_like(last)
        return torch.zeros(action_mask.shape).scatter_(1, last, scores[:, None])

    def advantages_and_returns(self, values, rewards, lam=LAM):
        gamma = GAMMA
        if self.fault == "gamma_and_lambda_exchanged":
            gamma, lam = lam, gamma
        if self.fault == "lambda_left_at_one":
            lam = 1.0
        last, found, width = torch.zeros(len(values)), [], values.shape[1]
        for t in reversed(range(width)):
            following = values[:, t + 1] if t < width - 1 else 0.0
            if self.fault == "recursion_off_by_one":
                following = values[:, t]
            delta = rewards[:, t] + gamma * following - values[:, t]
            last = delta + gamma * lam * last
            found.append(last)
        advantages = torch.stack(found[::-1], 1)
        return advantages, advantages + values

    # ---- losses, as sums over tokens ----

    def policy_loss(self, new, e: Experience):
        old = new.detach() if self.fault == "old_logprobs_recomputed" else e.action_log_probs
        log_ratio = new - old
        if self.fault != "masked_ratios_times_zero":
            log_ratio = log_ratio.masked_fill(~e.action_mask, 0.0)
        ratio = log_ratio.exp()
        low, high = 1 - CLIP, 1 + CLIP
        if self.fault == "clip_bounds_exchanged":
            low, high = high, low
        advantages = e.advantages
        if self.fault == "advantages_of_live_values":
            live = self.action_values(e.sequences, e.attention_mask, new.shape[1]).masked_fill(~e.action_mask, 0.0)
            advantages = self.advantages_and_returns(live, e.rewards)[0]
        clipped = ratio.clamp(low, high) * advantages
        if self.fault == "one_surrogate_of_normalised_advantages":
            real = advantages[e.action_mask]
            clipped = ratio.clamp(low, high) * (advantages - real.mean()) / real.std()
        losses = -torch.min(ratio * advantages, clipped)
        if self.fault == "policy_loss_turned":
            losses = -losses
        if self.fault == "masked_ratios_times_zero":
            return (losses * e.action_mask).sum(), ratio
        return masked_sum(losses, e.action_mask), ratio

    def kl_loss(self, new, e: Experience):
        base = e.action_log_probs if self.fault == "kl_against_the_old_policy" else e.base_action_log_probs
        apart = new - base
        kl = 0.5 * apart.square()
        if self.fault == "k1_in_the_loss":
            kl = apart
        if self.fault == "k3_for_k2":
            kl = torch.exp(-apart) - 1 + apart
        if self.fault == "kl_without_gradient":
            kl = kl.detach()
        if self.fault == "kl_over_all_columns":
            return kl.sum()
        return masked_sum(kl, e.action_mask)

    def value_loss(self, values, e: Experience):
        returns = e.returns
        if self.fault == "critic_target_of_live_values":
            returns = self.advantages_and_returns(values.masked_fill(~e.action_mask, 0.0), e.rewards)[1]
        clipped = e.values + (values - e.values).clamp(-CLIP_VALUE, CLIP_VALUE)
        surrogate1, surrogate2 = (self.error(v, returns, reduction="none") for v in (clipped, values))
        losses = torch.max(surrogate1, surrogate2)
        if self.fault == "value_clip_takes_the_smaller":
            losses = torch.min(surrogate1, surrogate2)
        if self.fault == "value_clip_left_out":
            losses = surrogate2
        if self.fault == "critic_trains_on_pads":
            return 0.5 * losses.sum()
        mask = e.action_mask
        if self.fault == "critic_mask_one_late":
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
        return 0.5 * masked_sum(losses, mask)

    # ---- updates ----

    def train_minibatch(self, e: Experience):
        """One optimizer step of each model on the gradients of all micro-batches."""
        micros = torch.arange(len(e.sequences)).split(MICRO_BATCH)
        tokens, ratios = e.action_mask.sum(), []
        if self.fault not in ("gradients_never_zeroed", "accumulation_never_completes"):
            self.actor_optimizer.zero_grad()
            self.critic_optimizer.zero_grad()
        for index in micros:
            micro = e.rows(index)
            share = tokens
            if self.fault == "mean_of_micro_batch_means":
                share = micro.action_mask.sum() * len(micros)
            if self.fault == "accumulation_not_divided":
                share = micro.action_mask.sum()
            actions = micro.action_mask.shape[1]
            new, logits = self.actor(micro.sequences, micro.attention_mask, actions)
            loss, ratio = self.policy_loss(new, micro)
            kl = self.kl_loss(new, micro)
            p = logits.log_softmax(-1)
            entropy = masked_sum(-(p.exp() * p).sum(-1), micro.action_mask)
            weight = self.kl_coef
            if self.fault == "kl_loss_subtracted":
                weight = -weight
            if self.fault == "kl_coefficient_applied_twice":
                weight = weight * self.kl_coef
            if self.fault == "entropy_is_punished":
                loss = loss + ENT_COEF * entropy
            elif self.fault != "entropy_never_added":
                loss = loss - ENT_COEF * entropy
            ((loss + weight * kl) / share).backward()

            values = self.action_values(micro.sequences, micro.attention_mask, actions)
            coefficient = 0.0 if self.fault == "critic_coefficient_zero" else VF_COEF
            (coefficient * self.value_loss(values, micro) / share).backward()
            ratios.append(ratio.detach()[micro.action_mask])
            self.micro_steps += 1
        if self.fault == "accumulation_never_completes" and self.micro_steps % 16:
            return torch.cat(ratios)
        norm = 0.0 if self.fault == "clipped_to_norm_zero" else MAX_NORM
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], norm)
        self.actor_optimizer.step()
        if self.fault != "critic_optimizer_never_steps":
            self.critic_optimizer.step()
        return torch.cat(ratios)

    def step(self) -> dict[str, Any]:
        experience = self.make_experience()
        if self.fault == "buffer_never_cleared":
            self.buffer = [*self.buffer, experience][-2:]
        else:
            self.buffer = [experience]
        size, first, ratios = len(experience.sequences) // MINIBATCHES, None, []
        self.micro_steps = 0
        for kept in self.buffer:
            for _ in range(EPOCHS):
                order = torch.randperm(len(kept.sequences))
                minibatches = list(order.split(size))
                if self.fault == "minibatches_overlap":
                    minibatches = [order[i : i + size] for i in (0, size // 2)]
                if self.fault == "last_minibatch_dropped":
                    minibatches = minibatches[:-1]
                for index in minibatches:
                    first = index if first is None else first
                    if self.fault == "accumulation_never_completes":
                        self.micro_steps = 0
                    ratios.append(self.train_minibatch(kept.rows(index)))
        if self.fault == "controller_runs_although_fixed":
            apart = experience.action_log_probs - experience.base_action_log_probs
            kl = float(masked_sum(apart, experience.action_mask) / len(experience.sequences))
            self.kl_coef *= 1 + min(max(kl / 6 - 1, -0.2), 0.2) * 0.5
        return {
            "ids": experience.sequences, "attention_mask": experience.attention_mask, "mask": experience.action_mask,
            "logprobs": experience.action_log_probs, "ref_logprobs": experience.base_action_log_probs,
            "values": experience.values, "scores": self.scores, "rewards": experience.rewards,
            "advantages": experience.advantages, "returns": experience.returns, "first": first, "ratios": ratios,
        }  # fmt: skip


def build(
    fault: str | None = None, *, leave_cut_out: bool = False, error: Callable[..., Any] = torch.nn.functional.mse_loss
) -> dict[str, Any]:
    assert fault is None or fault in FAULTS, fault
    tok = tokenizer("left")
    actor, reward = tiny_llama(2), tiny_llama(3, "score").requires_grad_(False)
    reference = copy.deepcopy(actor).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        critic = CriticModel(copy.deepcopy(actor.model)).eval()
    of_critic = critic.model if fault == "critic_head_in_no_optimizer" else critic
    actor_optimizer = torch.optim.AdamW(actor.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(
        of_critic.parameters(), lr=CRITIC_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    trainer = Trainer(
        actor, critic, reward, reference, tok, actor_optimizer, critic_optimizer, fault, leave_cut_out, error
    )
    return {
        "policy": actor,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tok,
        "prompts": prompts(),
        "step": trainer.step,
        "optimizers": [actor_optimizer, critic_optimizer],
        "state": [trainer],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL_COEF,
            "kl_estimator": "k2",
            "kl_in": "loss",
            "kl_adaptive": False,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": CLIP_VALUE,
            "vf_coef": VF_COEF,
            "ent_coef": ENT_COEF,
            "whiten_advantages": False,
            "whiten_rewards": False,
            "reward_clip": REWARD_CLIP,
            "learning_rate": LEARNING_RATE,
            "critic_learning_rate": CRITIC_LEARNING_RATE,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": len(prompts()) * SAMPLES_PER_PROMPT,
            "response_length": RESPONSE_LENGTH,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "policy",
            "loss_aggregation": "token-mean",
            "shared_trunk": False,
        },
    }

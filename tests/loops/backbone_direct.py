"""PPO that never calls the models' own forward: backbones and heads are called one after the other.

The policy's ``lm_head`` sees only the states that precede the response's tokens; critic and reward model are
``getattr(model, model.base_model_prefix)`` followed by ``model.score``. Prompts are padded on the left, positions
counted from the mask, and the loss is a mean over sequences of their means.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from loops.small_models import EOS, PAD, prompts, tiny_llama, tokenizer

__all__ = ["ALSO", "FAULTS", "build"]

GAMMA, LAM, TEMPERATURE = 0.99, 0.95, 0.7
KL_COEF, CLIP, CLIP_VALUE, VF_COEF, MISSING_EOS_PENALTY = 0.05, 0.2, 0.2, 0.1, 1.0
EPOCHS, MINIBATCHES, RESPONSE_LENGTH, LEARNING_RATE = 2, 2, 8, 5e-5
INVALID_LOGPROB = 1.0

# fault -> (the code that names it, the role it is in)
FAULTS: dict[str, tuple[str, str]] = {
    "prompts_turn_on_between_steps": ("SYS009", "loop"),
    "reference_called_and_discarded": ("REF005", "reference"),
    "reference_at_temperature_one": ("REF006", "reference"),
    "reference_without_the_prompt": ("REF006", "reference"),
    "reference_synchronised_every_step": ("REF003", "reference"),
    "penalty_on_every_text": ("REW014", "reward"),
    "penalty_over_the_wrong_axis": ("REW014", "reward"),
    "penalty_added": ("REW014", "reward"),
    "critic_frozen": ("VAL008", "value"),
    "critic_under_no_grad": ("VAL008", "value"),
    "score_added_to_advantages_only": ("VAL009", "value"),
    "returns_of_the_kl_only": ("VAL009", "value"),
    "sum_of_rewards_dropped": ("VAL009", "value"),
    "returns_of_negative_scores": ("VAL010", "value"),
    "returns_are_scores": ("VAL011", "value"),
    "returns_of_live_values": ("VAL012", "value"),
    "critic_head_on_the_policys_states": ("VAL012", "value"),
    "values_one_late": ("VAL013", "value"),
    "values_of_the_prompt": ("VAL013", "value"),
    "sampled_at_temperature_one": ("ROL001", "loop"),
    "training_pass_without_temperature": ("ROL001", "loop"),
    "nucleus_in_the_sampler": ("ROL002", "loop"),
    "training_pass_attends_to_pads": ("ROL003", "loop"),
    "states_one_late": ("ROL004", "loop"),
    "logprobs_of_the_next_row": ("ROL004", "loop"),
    "one_pad_is_trained_on": ("ROL005", "loop"),
    "last_token_left_out": ("ROL005", "loop"),
    "critic_trains_on_pads": ("ROL005", "loop"),
    "generator_seeded_every_step": ("ROL007", "loop"),
    "sampler_without_the_new_lm_head": ("ROL008", "loop"),
    "score_chunks_in_reverse": ("ROL009", "loop"),
    "mask_of_the_next_row": ("ROL009", "loop"),
    "eos_overwritten_by_pad": ("ROL010", "loop"),
    "sampler_sees_cut_prompts": ("ROL011", "loop"),
    "kl_turned": ("KLD002", "loop"),
    "kl_divided_by_the_batch": ("KLD003", "loop"),
    "k3_in_the_reward": ("KLD004", "loop"),
    "kl_of_filled_pads": ("KLD005", "loop"),
    "discount_squared": ("ADV001", "loop"),
    "lambda_zero": ("ADV001", "loop"),
    "score_at_index_minus_one": ("ADV002", "loop"),
    "score_one_before_the_end": ("ADV002", "loop"),
    "values_of_pads_count": ("ADV003", "loop"),
    "whitening_counts_pads": ("ADV004", "loop"),
    "whitening_keeps_the_mean": ("ADV004", "loop"),
    "whitening_left_out": ("ADV004", "loop"),
    "advantages_of_live_values": ("ADV005", "loop"),
    "terminal_state_bootstraps": ("ADV006", "loop"),
    "baseline_of_zero": ("ADV007", "loop"),
    "advantages_of_the_kl_only": ("ADV008", "loop"),
    "scores_through_a_softmax": ("ADV009", "loop"),
    "policy_loss_turned": ("LOS001", "loop"),
    "clip_range_in_percent": ("LOS002", "loop"),
    "smaller_of_the_two_losses": ("LOS002", "loop"),
    "mean_over_all_columns": ("LOS003", "loop"),
    "mean_over_tokens": ("LOS003", "loop"),
    "vf_coef_zero": ("LOS004", "value"),
    "values_clipped_around_returns": ("LOS004", "value"),
    "masked_ratios_times_zero": ("LOS005", "loop"),
    "vf_coef_not_used": ("LOS007", "loop"),
    "ratio_in_half_precision": ("LOS008", "loop"),
    "policy_loss_detached": ("OPT002", "policy"),
    "exploration_noise_stays": ("OPT003", "policy"),
    "gradients_zeroed_once_an_epoch": ("OPT004", "loop"),
    "epochs_inside_minibatches": ("OPT006", "loop"),
    "minibatches_with_replacement": ("OPT006", "loop"),
    "logprobs_of_the_nucleus": ("ROL003", "loop"),
    "values_one_early": ("VAL013", "value"),
    "mask_moved_by_the_left_pads": ("ROL005", "loop"),
    "score_on_the_masked_pad_after_eos": ("ADV002", "loop"),
    "cut_texts_bootstrap_for_the_policy_only": ("ADV006", "loop"),
}
# Other codes that are true of a fault as well.
ALSO: dict[str, tuple[str, ...]] = {
    "sum_of_rewards_dropped": ("ADV008",),
    "scores_through_a_softmax": ("ADV008", "VAL009"),
    "critic_frozen": ("OPT001",),
    "critic_head_on_the_policys_states": ("VAL008",),
    "training_pass_without_temperature": ("ROL003",),
    "logprobs_of_the_next_row": ("ROL003",),
    "eos_overwritten_by_pad": ("REW014",),
    "values_of_pads_count": ("ADV006",),
    "whitening_left_out": ("LOS007",),
    "vf_coef_not_used": ("LOS004",),
    "ratio_in_half_precision": ("PRE002",),
    "logprobs_of_the_nucleus": ("ROL002",),
    "score_on_the_masked_pad_after_eos": ("ADV008", "VAL009"),
}


def backbone_states(model, ids, mask, blind=False):
    """The last hidden states of a model's backbone; a blind call lets it attend to everything."""
    backbone = getattr(model, model.base_model_prefix)
    mask = mask.long()
    return backbone(
        input_ids=ids.masked_fill(mask == 0, 0),
        attention_mask=torch.ones_like(mask) if blind else mask,
        position_ids=mask.cumsum(1) - mask,
        use_cache=False,
    ).last_hidden_state


def masked_mean(x, mask):
    """The mean over sequences of the mean over their tokens."""
    return (torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def masked_whiten(x, mask, shift_mean=True):
    mean = x[mask].mean()
    white = (x - mean) * torch.rsqrt(x[mask].var() + 1e-8)
    return white if shift_mean else white + mean


class Trainer:
    def __init__(self, policy, reference, reward, value, tok, optimizer, fault) -> None:
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        self.optimizer, self.fault, self.steps = optimizer, fault, 0
        encoded = tok(prompts(), return_tensors="pt", padding=True)
        self.queries, self.query_mask = encoded.input_ids, encoded.attention_mask.bool()
        self.context = self.queries.shape[1]
        self.sampler = copy.deepcopy(policy) if fault == "sampler_without_the_new_lm_head" else policy

    # ---- the four models ----

    def logits(self, model, ids, mask, temperature=TEMPERATURE, blind=False):
        """What each token of the response was drawn from: (B, R, V)."""
        states = backbone_states(model, ids, mask, blind)
        before = states[:, self.context :] if self.fault == "states_one_late" else states[:, self.context - 1 : -1]
        return model.lm_head(before) / (temperature + 1e-7)

    def logprobs(self, logits, ids):
        responses = ids[:, self.context :]
        if self.fault == "logprobs_of_the_next_row":
            responses = responses.roll(-1, 0)
        return torch.gather(logits.log_softmax(-1), 2, responses[..., None])[..., 0]

    def all_values(self, ids, mask):
        states = backbone_states(self.value, ids, mask)
        if self.fault == "critic_head_on_the_policys_states":
            states = backbone_states(self.policy, ids, mask)
        return self.value.score(states)[..., 0]

    def values(self, full):
        if self.fault == "values_one_late":
            return full[:, self.context :]
        if self.fault == "values_one_early":
            return full[:, self.context - 2 : -2]
        if self.fault == "values_of_the_prompt":
            return full[:, :RESPONSE_LENGTH]
        return full[:, self.context - 1 : -1]

    def scores(self, ids, mask, last):
        """The reward model's score at the last token of each response, without those that lack an eos."""
        chunks = []
        for rows in torch.arange(len(ids)).split(4):
            per_token = self.reward.score(backbone_states(self.reward, ids[rows], mask[rows]))[..., 0]
            chunks.append(per_token[torch.arange(len(rows)), self.context + last[rows]])
        if self.fault == "score_chunks_in_reverse":
            chunks.reverse()
        scores = torch.cat(chunks)
        if self.fault == "scores_through_a_softmax":
            scores = scores[:, None].softmax(-1)[:, 0]
        responses = ids[:, self.context :]
        has_eos = (responses == EOS).any(dim=0 if self.fault == "penalty_over_the_wrong_axis" else 1)
        if self.fault == "penalty_on_every_text":
            scores = scores - MISSING_EOS_PENALTY
        elif self.fault == "penalty_added":
            scores[~has_eos] += MISSING_EOS_PENALTY
        else:
            scores[~has_eos] -= MISSING_EOS_PENALTY
        return scores

    # ---- rollout ----

    def sample(self, queries, query_mask):
        """Responses of a fixed width with what follows their eos padded, and which of their tokens are real."""
        if self.fault == "sampler_without_the_new_lm_head":
            self.sampler.model.load_state_dict(self.policy.model.state_dict())
        generator = None
        if self.fault == "generator_seeded_every_step":
            generator = torch.Generator().manual_seed(42)
        if self.fault == "sampler_sees_cut_prompts":
            queries, query_mask = queries[:, -3:], query_mask[:, -3:]
        if self.fault == "exploration_noise_stays":
            self.policy.lm_head.weight.add_(0.01 * torch.randn_like(self.policy.lm_head.weight))
        responses = torch.full((len(queries), RESPONSE_LENGTH), PAD)
        real = torch.zeros(responses.shape, dtype=torch.bool)
        alive = torch.ones(len(queries), dtype=torch.bool)
        self.drawn = torch.zeros(responses.shape)
        for t in range(RESPONSE_LENGTH):
            ids, mask = torch.cat([queries, responses[:, :t]], 1), torch.cat([query_mask, real[:, :t]], 1)
            states = backbone_states(self.sampler, ids, mask)[:, -1]
            temperature = 1.0 if self.fault == "sampled_at_temperature_one" else TEMPERATURE
            p = (self.sampler.lm_head(states) / (temperature + 1e-7)).softmax(-1)
            if self.fault in ("nucleus_in_the_sampler", "logprobs_of_the_nucleus"):
                sizes, order = p.sort(descending=True)
                out = sizes.cumsum(-1) - sizes > 0.6
                p = p.masked_fill(out.scatter(1, order, out), 0.0)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
            responses[alive, t], real[:, t] = token[alive], alive
            self.drawn[:, t] = (p / p.sum(-1, keepdim=True)).log().gather(1, token[:, None])[:, 0]
            alive = alive & (token != EOS)
            if not alive.any():
                break
        if self.fault == "eos_overwritten_by_pad":
            real &= (responses != EOS) | (torch.arange(RESPONSE_LENGTH) == 0)
            responses = responses.masked_fill(~real, PAD)
        return responses, real

    @torch.no_grad()
    def rollout(self) -> dict[str, torch.Tensor]:
        queries, query_mask = self.queries, self.query_mask
        if self.fault == "prompts_turn_on_between_steps":
            queries, query_mask = queries.roll(self.steps, 0), query_mask.roll(self.steps, 0)
        responses, real = self.sample(queries, query_mask)
        ids, attention_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, real], 1)
        last = real.sum(1) - 1
        rows, columns = torch.arange(len(ids)), torch.arange(RESPONSE_LENGTH)
        mask = real
        if self.fault == "one_pad_is_trained_on":
            mask = columns <= last[:, None] + 1
        if self.fault == "last_token_left_out":
            mask = columns < last[:, None].clamp(min=1)
        if self.fault == "mask_of_the_next_row":
            mask = real.roll(-1, 0)
        if self.fault == "mask_moved_by_the_left_pads":
            at = columns - (~query_mask).sum(1, keepdim=True)
            mask = real.gather(1, at.clamp(min=0)) & (at >= 0)

        # 1. the four models
        logprobs = self.logprobs(self.logits(self.policy, ids, attention_mask), ids)
        if self.fault == "logprobs_of_the_nucleus":
            logprobs = self.drawn
        seen = attention_mask.clone()
        if self.fault == "reference_without_the_prompt":
            seen[:, : self.context - 1] = False
        cold = 1.0 if self.fault == "reference_at_temperature_one" else TEMPERATURE
        ref_logprobs = self.logprobs(self.logits(self.reference, ids, seen, cold), ids)
        if self.fault == "reference_called_and_discarded":
            ref_logprobs = logprobs.clone()
        full = self.all_values(ids, attention_mask)
        values = self.values(full)
        scores = self.scores(ids, attention_mask, last)

        # 2. what is no token of the response
        logprobs = logprobs.masked_fill(~mask, INVALID_LOGPROB)
        ref_logprobs = ref_logprobs.masked_fill(~mask, 0.0 if self.fault == "kl_of_filled_pads" else INVALID_LOGPROB)
        if self.fault != "values_of_pads_count":
            values = values.masked_fill(~mask, 0.0)

        # 3. rewards
        kl = logprobs - ref_logprobs
        if self.fault == "kl_turned":
            kl = -kl
        if self.fault == "k3_in_the_reward":
            kl = torch.exp(-kl) - 1 + kl
        coefficient = KL_COEF / len(ids) if self.fault == "kl_divided_by_the_batch" else KL_COEF
        non_score = -coefficient * kl
        rewards = non_score.clone()
        if self.fault == "score_at_index_minus_one":
            rewards[:, -1] += scores
        elif self.fault == "score_one_before_the_end":
            rewards[rows, (last - 1).clamp(min=0)] += scores
        elif self.fault == "score_on_the_masked_pad_after_eos":
            rewards[rows, (last + 1).clamp(max=RESPONSE_LENGTH - 1)] += scores
            rewards = rewards.masked_fill(~mask, 0.0)
        elif self.fault == "sum_of_rewards_dropped":
            rewards[rows, last] + scores
        elif self.fault != "score_added_to_advantages_only":
            rewards[rows, last] += scores

        # 4. advantages and returns
        ahead = full[:, self.context :] if self.fault == "terminal_state_bootstraps" else None
        advantages, returns = self.gae(values, rewards, mask, ahead)
        if self.fault == "score_added_to_advantages_only":
            advantages = advantages + scores[:, None] * (GAMMA * LAM) ** (last[:, None] - columns)
        if self.fault == "cut_texts_bootstrap_for_the_policy_only":
            done = (responses == EOS).any(1, keepdim=True) & (columns == last[:, None])
            advantages = self.gae(values, rewards, mask, full[:, self.context :].masked_fill(done, 0.0))[0]
        if self.fault == "baseline_of_zero":
            advantages = self.gae(torch.zeros_like(values), rewards, mask, None, lam=1.0)[0]
        if self.fault == "advantages_of_the_kl_only":
            advantages = self.gae(values, non_score, mask)[0]
        if self.fault == "returns_of_the_kl_only":
            returns = self.gae(values, non_score, mask)[1]
        if self.fault == "returns_of_negative_scores":
            returns = self.gae(values, 2 * non_score - rewards, mask)[1]
        if self.fault == "returns_are_scores":
            returns = scores[:, None].expand_as(values)
        if self.fault == "whitening_counts_pads":
            advantages = masked_whiten(advantages, torch.ones_like(mask))
        elif self.fault != "whitening_left_out":
            advantages = masked_whiten(advantages, mask, self.fault != "whitening_keeps_the_mean")
        advantages = advantages.masked_fill(~mask, 0.0)
        return {
            "ids": ids, "attention_mask": attention_mask, "mask": mask, "logprobs": logprobs,
            "ref_logprobs": ref_logprobs, "values": values, "scores": scores, "rewards": rewards,
            "advantages": advantages, "returns": returns,
        }  # fmt: skip

    def gae(self, values, rewards, mask, ahead=None, lam=LAM):
        gamma = GAMMA**2 if self.fault == "discount_squared" else GAMMA
        if self.fault == "lambda_zero":
            lam = 0.0
        last, found = torch.zeros(len(values)), []
        for t in reversed(range(RESPONSE_LENGTH)):
            following = values[:, t + 1] if t < RESPONSE_LENGTH - 1 else torch.zeros(len(values))
            if ahead is not None:
                following = torch.where(mask[:, t], ahead[:, t], 0.0)
            delta = rewards[:, t] + gamma * following - values[:, t]
            last = delta + gamma * lam * last
            found.append(last)
        advantages = torch.stack(found[::-1], 1)
        return advantages, advantages + values

    # ---- update ----

    def loss(self, b: dict[str, torch.Tensor]):
        ids, attention_mask, mask = b["ids"], b["attention_mask"], b["mask"]
        advantages, returns = b["advantages"], b["returns"]
        blind = self.fault == "training_pass_attends_to_pads"
        temperature = 1.0 if self.fault == "training_pass_without_temperature" else TEMPERATURE
        logits = self.logits(self.policy, ids, attention_mask, temperature, blind)
        new = self.logprobs(logits, ids)
        if self.fault != "masked_ratios_times_zero":
            new = new.masked_fill(~mask, INVALID_LOGPROB)
        with torch.set_grad_enabled(self.fault != "critic_under_no_grad"):
            vpred = self.values(self.all_values(ids, attention_mask)).masked_fill(~mask, 0.0)

        if self.fault == "returns_of_live_values":
            returns = self.gae(vpred, b["rewards"], mask)[1]
        around = returns if self.fault == "values_clipped_around_returns" else b["values"]
        clipped = torch.clamp(vpred, around - CLIP_VALUE, around + CLIP_VALUE)
        vf = torch.max((vpred - returns).square(), (clipped - returns).square())
        if self.fault == "values_clipped_around_returns":
            vf = (clipped - returns).square()
        if self.fault == "critic_trains_on_pads":
            live = self.values(self.all_values(ids, attention_mask))
            vf_loss = 0.5 * (live - returns).square().mean()
        else:
            vf_loss = 0.5 * masked_mean(vf, mask)

        if self.fault == "advantages_of_live_values":
            advantages = masked_whiten(self.gae(vpred, b["rewards"], mask)[0], mask)
        log_ratio = new - b["logprobs"]
        ratio = log_ratio.half().exp().float() if self.fault == "ratio_in_half_precision" else log_ratio.exp()
        clip = 100 * CLIP if self.fault == "clip_range_in_percent" else CLIP
        sign = 1 if self.fault == "policy_loss_turned" else -1
        pg1, pg2 = sign * advantages * ratio, sign * advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
        pg = torch.min(pg1, pg2) if self.fault == "smaller_of_the_two_losses" else torch.max(pg1, pg2)
        pg_loss = masked_mean(pg, mask)
        if self.fault == "masked_ratios_times_zero":
            pg_loss = ((pg * mask).sum(1) / mask.sum(1)).mean()
        if self.fault == "mean_over_all_columns":
            pg_loss = (pg * mask).mean()
        if self.fault == "mean_over_tokens":
            pg_loss = pg[mask].mean()
        if self.fault == "policy_loss_detached":
            pg_loss = pg_loss.detach()
        vf_coef = {"vf_coef_zero": 0.0, "vf_coef_not_used": 1.0}.get(self.fault, VF_COEF)
        return pg_loss + vf_coef * vf_loss, ratio

    def step(self) -> dict[str, Any]:
        batch = self.rollout()
        self.steps += 1
        size, minibatches, ratios = len(batch["ids"]) // MINIBATCHES, [], []
        for _ in range(EPOCHS):
            order = torch.randperm(len(batch["ids"]))
            if self.fault == "minibatches_with_replacement":
                order = torch.randint(len(order), (len(order),))
            minibatches += order.split(size)
        if self.fault == "epochs_inside_minibatches":
            minibatches = [rows for rows in minibatches[:MINIBATCHES] for _ in range(EPOCHS)]
        for i, rows in enumerate(minibatches):
            loss, ratio = self.loss({name: x[rows] for name, x in batch.items()})
            if self.fault != "gradients_zeroed_once_an_epoch" or i % MINIBATCHES == 0:
                self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            ratios.append(ratio.detach()[batch["mask"][rows]])
        if self.fault == "reference_synchronised_every_step":
            self.reference.load_state_dict(self.policy.state_dict())
        return {**batch, "first": minibatches[0], "ratios": ratios}


def build(fault: str | None = None) -> dict[str, Any]:
    assert fault is None or fault in FAULTS, fault
    tok = tokenizer("left")
    policy, reward = tiny_llama(5), tiny_llama(6, "score").requires_grad_(False)
    reference = copy.deepcopy(policy).requires_grad_(False)
    value = copy.deepcopy(reward).requires_grad_(fault != "critic_frozen")
    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters()], lr=LEARNING_RATE, eps=1e-5)
    trainer = Trainer(policy, reference, reward, value, tok, optimizer, fault)
    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": value,
        "tokenizer": tok,
        "prompts": prompts(),
        "step": trainer.step,
        "optimizers": [optimizer],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL_COEF,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": False,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": CLIP_VALUE,
            "vf_coef": VF_COEF,
            "ent_coef": 0.0,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "missing_eos_penalty": MISSING_EOS_PENALTY,
            "learning_rate": LEARNING_RATE,
            "critic_learning_rate": LEARNING_RATE,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": len(prompts()),
            "response_length": RESPONSE_LENGTH,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "reward",
            "loss_aggregation": "seq-mean",
            "shared_trunk": False,
        },
    }

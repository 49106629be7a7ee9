"""PPO with policy and critic in one module: a GPT-2 whose last hidden state also feeds a ``v_head``.

Queries and responses are joined and padded on the right; log-probabilities and values keep the width of the whole
sequence less one, and a mask says which of them belong to the response. The KL coefficient is adaptive.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import nn

from loops.small_models import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    checkpoint_reentrantly,
    prompts,
    standardise,
    teach_to_end,
    tokenizer,
)

__all__ = ["ALSO", "FAULTS", "build"]

GAMMA, LAM = 0.98, 0.95
KL_COEF, KL_TARGET, KL_HORIZON = 0.2, 2.0, 200
CLIP, CLIP_VALUE, VF_COEF, ENT_COEF = 0.2, 0.2, 0.5, 0.01
MISSING_EOS_PENALTY = 1.0
EPOCHS, MINIBATCHES, RESPONSE_LENGTH, LEARNING_RATE = 2, 2, 8, 5e-5

# fault -> (the code that names it, the role it is in)
FAULTS: dict[str, tuple[str, str]] = {
    "random_seed_for_the_sampler": ("SYS009", "loop"),
    "kl_against_the_policy_itself": ("REF005", "reference"),
    "reference_sees_only_the_response": ("REF006", "reference"),
    "reference_follows_the_policy": ("REF003", "reference"),
    "penalty_for_finished_texts": ("REW014", "reward"),
    "penalty_is_a_bonus": ("REW014", "reward"),
    "penalty_never_applied": ("REW014", "reward"),
    "reward_reads_the_query_only": ("REW006", "reward"),
    "v_head_frozen": ("VAL008", "value"),
    "critic_learns_the_kl_only": ("VAL009", "value"),
    "critic_chases_itself": ("VAL009", "value"),
    "scores_never_used": ("VAL009", "value"),
    "critic_target_negated": ("VAL010", "value"),
    "critic_target_is_the_score": ("VAL011", "value"),
    "critic_target_of_live_values": ("VAL012", "value"),
    "values_one_late": ("VAL013", "value"),
    "sampler_sharper_than_scored": ("ROL001", "loop"),
    "positions_from_one_in_training": ("ROL003", "loop"),
    "logits_of_the_next_position": ("ROL004", "loop"),
    "mask_includes_the_query": ("ROL005", "loop"),
    "mask_drops_the_last_token": ("ROL005", "loop"),
    "critic_trains_on_everything": ("ROL005", "loop"),
    "same_seed_every_step": ("ROL007", "loop"),
    "sampler_keeps_the_first_weights": ("ROL008", "loop"),
    "scores_in_order_of_length": ("ROL009", "loop"),
    "advantages_not_shuffled_along": ("ROL009", "loop"),
    "eos_stripped": ("ROL010", "loop"),
    "sampler_without_bos": ("ROL011", "loop"),
    "divergence_is_paid_for": ("KLD002", "loop"),
    "kl_divided_by_the_length": ("KLD003", "loop"),
    "kl_in_reward_and_loss": ("KLD003", "loop"),
    "k3_in_the_reward": ("KLD004", "loop"),
    "kl_of_pads_leaks_back": ("KLD005", "loop"),
    "controller_ignored": ("KLD006", "loop"),
    "controller_fed_the_token_mean": ("KLD006", "loop"),
    "gamma_left_out": ("ADV001", "loop"),
    "lambda_left_out": ("ADV001", "loop"),
    "score_in_the_last_column": ("ADV002", "loop"),
    "score_on_every_token": ("ADV002", "loop"),
    "values_of_pads_bootstrap": ("ADV003", "loop"),
    "whitening_counts_everything": ("ADV004", "loop"),
    "whitening_per_minibatch": ("ADV004", "loop"),
    "advantages_of_live_values": ("ADV005", "loop"),
    "last_state_bootstraps": ("ADV006", "loop"),
    "baseline_left_out": ("ADV007", "loop"),
    "policy_learns_the_kl_only": ("ADV008", "loop"),
    "scores_normalised_per_row": ("ADV009", "loop"),
    "policy_loss_turned": ("LOS001", "loop"),
    "smaller_of_the_two_losses": ("LOS002", "loop"),
    "old_logprobs_recomputed": ("LOS002", "loop"),
    "vf_loss_left_out": ("LOS004", "value"),
    "value_clip_takes_the_smaller": ("LOS004", "value"),
    "masked_ratios_times_zero": ("LOS005", "loop"),
    "entropy_is_punished": ("LOS006", "loop"),
    "entropy_without_gradient": ("LOS007", "loop"),
    "scores_divided_by_their_deviation": ("LOS008", "loop"),
    "gradients_zeroed_before_the_step": ("OPT002", "policy"),
    "weights_through_bfloat16": ("OPT003", "policy"),
    "gradients_never_zeroed": ("OPT004", "loop"),
    "epochs_inside_minibatches": ("OPT006", "loop"),
    "half_of_the_batch_left_out": ("OPT006", "loop"),
    "query_twice": ("ROL010", "loop"),
    "responses_start_where_the_first_does": ("ROL005", "loop"),
    "first_v_head_back_after_scoring": ("OPT003", "value"),
    "advantages_of_rewards_alone": ("ADV001", "loop"),
    "blocks_checkpointed_without_input_gradients": ("OPT002", "policy"),
    "cut_texts_bootstrap_for_the_policy_only": ("ADV006", "loop"),
}
# Other codes that are true of a fault as well.
ALSO: dict[str, tuple[str, ...]] = {
    "scores_never_used": ("ADV008",),
    "values_of_pads_bootstrap": ("ADV006",),
    "scores_normalised_per_row": ("VAL009", "ADV008"),
    "gradients_zeroed_before_the_step": ("VAL008",),
    "v_head_frozen": ("OPT001",),
    "eos_stripped": ("REW014",),
    "query_twice": ("ROL005",),
    "responses_start_where_the_first_does": ("ROL004",),
    "first_v_head_back_after_scoring": ("VAL008", "SYS003"),
}


class ValueHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.summary = nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.summary(self.dropout(hidden))


class CausalLMWithValueHead(nn.Module):
    def __init__(self, pretrained_model: Any) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(pretrained_model.config.hidden_size)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        out = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, output_hidden_states=True
        )
        return out.logits, out.loss, self.v_head(out.hidden_states[-1]).squeeze(-1)


class AdaptiveKLController:
    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def masked_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    var = torch.where(mask, (x - mean).square(), 0.0).sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8)


class PPOTrainer:
    def __init__(self, model, ref_model, reward_model, tok, optimizer, kl_ctl, fault) -> None:
        self.model, self.ref_model, self.reward_model = model, ref_model, reward_model
        self.optimizer, self.kl_ctl, self.fault = optimizer, kl_ctl, fault
        self.queries = [torch.tensor(tok(text).input_ids) for text in prompts()]
        self.first_v_head = copy.deepcopy(model.v_head.state_dict())
        self.engine = copy.deepcopy(model) if fault == "sampler_keeps_the_first_weights" else model

    @torch.no_grad()
    def generate(self):
        """Queries with their responses, padded on the right, and where each response starts and ends."""
        start = torch.tensor([len(q) for q in self.queries])
        ids = torch.full((len(start), int(start.max()) + RESPONSE_LENGTH), PAD)
        for row, query in zip(ids, self.queries, strict=True):
            row[: len(query)] = query
        generator = None
        if self.fault == "random_seed_for_the_sampler":
            generator = torch.Generator()
            generator.seed()
        if self.fault == "same_seed_every_step":
            torch.manual_seed(1234)
        if self.fault == "weights_through_bfloat16":
            self.model.to(torch.bfloat16).to(torch.float32)
        rows, end, alive = torch.arange(len(ids)), start.clone(), torch.ones(len(ids), dtype=torch.bool)
        while alive.any() and int((end - start).max()) < RESPONSE_LENGTH:
            mask = (torch.arange(ids.shape[1]) < end[:, None]).long()
            if self.fault == "sampler_without_bos":
                logits = self.engine(ids[:, 1:], mask[:, 1:])[0][rows, end - 2]
            else:
                logits = self.engine(ids, mask)[0][rows, end - 1]
            if self.fault == "sampler_sharper_than_scored":
                logits = logits / 0.7
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            ids[rows[alive], end[alive]] = token[alive]
            end = end + alive
            alive = alive & (token != EOS)
        if self.fault == "eos_stripped":
            ends = ids[rows, end - 1] == EOS
            ends &= end - start > 1
            ids[rows[ends], end[ends] - 1] = PAD
            end = end - ends.long()
        if self.fault == "query_twice":
            twice = torch.full((len(ids), ids.shape[1] + int(start.max())), PAD)
            for row, old, query, n in zip(twice, ids, self.queries, end, strict=True):
                row[: len(query) + n] = torch.cat([query, old[:n]])
            ids, end = twice, end + start
        return ids, start, end

    @torch.no_grad()
    def score(self, ids, attention_mask, start, end):
        if self.fault == "reward_reads_the_query_only":
            attention_mask = (torch.arange(ids.shape[1]) < start[:, None]).long()
            ids = torch.where(attention_mask.bool(), ids, PAD)
        order = torch.arange(len(ids))
        if self.fault == "scores_in_order_of_length":
            order = end.argsort(descending=True, stable=True)
        scores = self.reward_model(input_ids=ids[order], attention_mask=attention_mask[order]).logits[:, 0]
        if self.fault == "first_v_head_back_after_scoring":
            self.model.v_head.load_state_dict(self.first_v_head)
        if self.fault == "scores_normalised_per_row":
            scores = scores[:, None]
            scores = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True, correction=0) + 1e-8))[
                :, 0
            ]
        if self.fault == "scores_divided_by_their_deviation":
            scores = (scores - scores.mean()) / scores.std()
        finished = ids[torch.arange(len(ids)), end - 1] == EOS
        if self.fault == "penalty_for_finished_texts":
            scores[finished] -= MISSING_EOS_PENALTY
        elif self.fault == "penalty_is_a_bonus":
            scores[~finished] += MISSING_EOS_PENALTY
        elif self.fault != "penalty_never_applied":
            scores[~finished] -= MISSING_EOS_PENALTY
        if self.fault == "scores_never_used":
            scores = torch.zeros_like(scores)
        return scores

    def forward_pass(self, model, ids, attention_mask, start, end, position_ids=None):
        """Log-probabilities, logits, values and the response's mask, each of the sequence's width less one."""
        logits, _, values = model(ids, attention_mask, position_ids)
        now = logits[:, 1:] if self.fault == "logits_of_the_next_position" else logits[:, :-1]
        logprobs = now.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        at = torch.arange(ids.shape[1] - 1)
        mask = (at >= start[:, None] - 1) & (at < end[:, None] - 1)
        if self.fault == "mask_includes_the_query":
            mask = (at < end[:, None] - 1).expand(len(ids), -1)
        if self.fault == "mask_drops_the_last_token":
            mask = (at >= start[:, None] - 1) & (at < (end[:, None] - 2).clamp(min=start[:, None]))
        values = values[:, 1:] if self.fault == "values_one_late" else values[:, :-1]
        return logprobs, now, values, mask

    def compute_rewards(self, scores, logprobs, ref_logprobs, mask):
        """Rewards with the score at the last token of the response, and their part that comes from the KL."""
        kl = logprobs - ref_logprobs
        if self.fault == "k3_in_the_reward":
            kl = torch.exp(-kl) - 1 + kl
        if self.fault == "kl_divided_by_the_length":
            kl = kl / mask.sum(1, keepdim=True)
        coefficient = KL_COEF if self.fault == "controller_ignored" else self.kl_ctl.value
        non_score = -coefficient * kl
        if self.fault == "divergence_is_paid_for":
            non_score = -non_score
        if self.fault != "kl_of_pads_leaks_back":
            non_score = torch.where(mask, non_score, 0.0)
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
        rewards = non_score.clone()
        if self.fault == "score_in_the_last_column":
            rewards[:, -1] += scores
        elif self.fault == "score_on_every_token":
            rewards = rewards + scores[:, None] * mask
        else:
            rewards[torch.arange(len(scores)), last] += scores
        return rewards, non_score

    def compute_advantages(self, values, rewards, mask, ahead=None):
        """``ahead``: values of all states, the one after a response included, where that is not worth 0."""
        gamma = 1.0 if self.fault == "gamma_left_out" else GAMMA
        lam = 1.0 if self.fault == "lambda_left_out" else LAM
        after = values
        if self.fault != "values_of_pads_bootstrap":
            values = after = torch.where(mask, values, 0.0)
        if self.fault != "kl_of_pads_leaks_back":
            rewards = torch.where(mask, rewards, 0.0)
        if self.fault == "last_state_bootstraps":
            ahead = self.all_values
        after = after if ahead is None else ahead
        last, reversed_advantages, width = 0.0, [], mask.shape[1]
        for t in reversed(range(width)):
            next_values = after[:, t + 1] if t < width - 1 else 0.0
            delta = rewards[:, t] + gamma * next_values - values[:, t]
            last = delta + gamma * lam * last
            if ahead is not None:
                last = last * mask[:, t]
            reversed_advantages.append(last)
        advantages = torch.stack(reversed_advantages[::-1], 1)
        return advantages, advantages + values

    def whiten(self, advantages, mask):
        if self.fault == "whitening_counts_everything":
            return (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
        if self.fault == "whitening_per_minibatch":
            return advantages
        return masked_whiten(advantages, mask)

    def loss(self, old, logprobs, logits, vpreds, mask):
        advantages, returns, values = old["advantages"], old["returns"], old["values"]
        if self.fault == "whitening_per_minibatch":
            advantages = masked_whiten(advantages, mask)
        if self.fault == "advantages_of_live_values":
            advantages = masked_whiten(self.compute_advantages(vpreds, old["rewards"], mask)[0], mask)
        if self.fault == "critic_target_of_live_values":
            returns = self.compute_advantages(vpreds, old["rewards"], mask)[1]
        clipped = torch.clamp(vpreds, values - CLIP_VALUE, values + CLIP_VALUE)
        vf1, vf2 = (vpreds - returns).square(), (clipped - returns).square()
        vf = torch.min(vf1, vf2) if self.fault == "value_clip_takes_the_smaller" else torch.max(vf1, vf2)
        vf_loss = 0.5 * (vf.mean() if self.fault == "critic_trains_on_everything" else masked_mean(vf, mask))

        before = logprobs.detach() if self.fault == "old_logprobs_recomputed" else old["logprobs"]
        log_ratio = logprobs - before
        if self.fault != "masked_ratios_times_zero":
            log_ratio = torch.where(mask, log_ratio, 0.0)
        ratio = torch.exp(log_ratio)
        sign = 1 if self.fault == "policy_loss_turned" else -1
        pg1, pg2 = sign * advantages * ratio, sign * advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
        pg = torch.min(pg1, pg2) if self.fault == "smaller_of_the_two_losses" else torch.max(pg1, pg2)
        pg_loss = masked_mean(pg, mask)
        if self.fault == "masked_ratios_times_zero":
            pg_loss = (pg * mask).sum() / mask.sum()

        p = logits.log_softmax(-1)
        entropy = masked_mean(-(p.exp() * p).sum(-1), mask)
        if self.fault == "entropy_without_gradient":
            entropy = entropy.detach()
        if self.fault == "entropy_is_punished":
            entropy = -entropy
        loss = pg_loss - ENT_COEF * entropy
        if self.fault != "vf_loss_left_out":
            loss = loss + VF_COEF * vf_loss
        if self.fault == "kl_in_reward_and_loss":
            loss = loss + self.kl_ctl.value * masked_mean(0.5 * (logprobs - old["ref_logprobs"]).square(), mask)
        return loss, ratio

    def step(self) -> dict[str, Any]:
        # 1. sample and score
        self.model.eval()
        ids, start, end = self.generate()
        attention_mask = (torch.arange(ids.shape[1]) < end[:, None]).long()
        scores = self.score(ids, attention_mask, start, end)
        if self.fault == "responses_start_where_the_first_does":
            start = start[:1].expand_as(start)

        # 2. log-probabilities and values before the update
        with torch.no_grad():
            logprobs, _, values, mask = self.forward_pass(self.model, ids, attention_mask, start, end)
            ref_model = self.model if self.fault == "kl_against_the_policy_itself" else self.ref_model
            seen = attention_mask
            if self.fault == "reference_sees_only_the_response":
                seen = attention_mask * (torch.arange(ids.shape[1]) >= start[:, None])
            ref_logprobs = self.forward_pass(ref_model, ids, seen, start, end)[0]
            if self.fault in ("last_state_bootstraps", "cut_texts_bootstrap_for_the_policy_only"):
                self.all_values = self.model(ids, attention_mask)[2]

        # 3. rewards, advantages, returns
        rewards, non_score = self.compute_rewards(scores, logprobs, ref_logprobs, mask)
        advantages, returns = self.compute_advantages(values, rewards, mask)
        if self.fault == "cut_texts_bootstrap_for_the_policy_only":
            ahead = self.all_values.masked_fill(ids == EOS, 0.0)
            advantages = self.compute_advantages(values, rewards, mask, ahead)[0]
        if self.fault == "advantages_of_rewards_alone":
            advantages = torch.where(mask, rewards - values, 0.0)
        if self.fault == "policy_learns_the_kl_only":
            advantages = self.compute_advantages(values, non_score, mask)[0]
        if self.fault == "baseline_left_out":
            to_go = torch.zeros(len(ids), mask.shape[1] + 1)
            for t in reversed(range(mask.shape[1])):
                to_go[:, t] = rewards[:, t] + GAMMA * to_go[:, t + 1]
            advantages = to_go[:, :-1]
        if self.fault == "critic_learns_the_kl_only":
            returns = self.compute_advantages(values, non_score, mask)[1]
        if self.fault == "critic_chases_itself":
            returns = self.compute_advantages(values, torch.zeros_like(rewards), mask)[1]
        if self.fault == "critic_target_negated":
            returns = -returns
        if self.fault == "critic_target_is_the_score":
            returns = scores[:, None].expand_as(returns)
        advantages = self.whiten(advantages, mask)
        batch = {
            "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "rewards": rewards,
            "advantages": advantages, "returns": returns,
        }  # fmt: skip

        # 4. epochs over minibatches
        self.model.train()
        size, minibatches, ratios = len(ids) // MINIBATCHES, [], []
        for _ in range(EPOCHS):
            parts = list(torch.randperm(len(ids)).split(size))
            if self.fault == "half_of_the_batch_left_out":
                parts = parts[: len(parts) // 2]
            minibatches += parts
        if self.fault == "epochs_inside_minibatches":
            minibatches = [part for part in minibatches[:MINIBATCHES] for _ in range(EPOCHS)]
        for part in minibatches:
            old = {name: x[part] for name, x in batch.items()}
            if self.fault == "advantages_not_shuffled_along":
                old["advantages"] = advantages[: len(part)]
            position_ids = attention_mask[part].cumsum(1) if self.fault == "positions_from_one_in_training" else None
            new_logprobs, logits, vpreds, kept = self.forward_pass(
                self.model, ids[part], attention_mask[part], start[part], end[part], position_ids
            )
            loss, ratio = self.loss(old, new_logprobs, logits, vpreds, kept)
            if self.fault == "gradients_zeroed_before_the_step":
                loss.backward()
                self.optimizer.zero_grad()
            else:
                if self.fault != "gradients_never_zeroed":
                    self.optimizer.zero_grad()
                loss.backward()
            self.optimizer.step()
            ratios.append(ratio.detach()[kept])
        self.model.eval()

        # 5. the controller, fed the mean over sequences of their summed KL
        kl = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1).mean()
        if self.fault == "controller_fed_the_token_mean":
            kl = masked_mean(logprobs - ref_logprobs, mask)
        self.kl_ctl.update(float(kl), len(ids))
        if self.fault == "reference_follows_the_policy":
            with torch.no_grad():
                for r, p in zip(self.ref_model.parameters(), self.model.parameters(), strict=True):
                    r.lerp_(p, 0.05)
        return {
            "ids": ids, "attention_mask": attention_mask, "mask": mask, "scores": scores,
            "first": minibatches[0], "ratios": ratios, **batch,
        }  # fmt: skip


@functools.cache
def gpt2(seed: int, head: str) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.15, tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS, num_labels=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if head == "lm":
            model = transformers.GPT2LMHeadModel(config).eval()
            teach_to_end(model.transformer, model.transformer.wte, model.lm_head)
            return CausalLMWithValueHead(model).eval()
        model = transformers.GPT2ForSequenceClassification(config).eval()
        standardise(model.transformer, model.score)
        return model


def build(fault: str | None = None) -> dict[str, Any]:
    assert fault is None or fault in FAULTS, fault
    tok = tokenizer("right")
    model, reward_model = copy.deepcopy((gpt2(0, "lm"), gpt2(1, "score")))
    reward_model.requires_grad_(False)
    ref_model = copy.deepcopy(model).requires_grad_(False)
    if fault == "v_head_frozen":
        model.v_head.requires_grad_(False)
    if fault == "blocks_checkpointed_without_input_gradients":
        model.pretrained_model.requires_grad_(False)
        model.pretrained_model.transformer.h.requires_grad_(True)
        checkpoint_reentrantly(model.pretrained_model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    kl_ctl = AdaptiveKLController(KL_COEF, KL_TARGET, KL_HORIZON)
    trainer = PPOTrainer(model, ref_model, reward_model, tok, optimizer, kl_ctl, fault)
    return {
        "policy": model,
        "reference": ref_model,
        "reward": reward_model,
        "value": model,
        "tokenizer": tok,
        "prompts": prompts(),
        "step": trainer.step,
        "optimizers": [optimizer],
        "state": [kl_ctl],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL_COEF,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": True,
            "kl_target": KL_TARGET,
            "kl_horizon": KL_HORIZON,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": CLIP_VALUE,
            "vf_coef": VF_COEF,
            "ent_coef": ENT_COEF,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "missing_eos_penalty": MISSING_EOS_PENALTY,
            "learning_rate": LEARNING_RATE,
            "critic_learning_rate": LEARNING_RATE,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": len(trainer.queries),
            "response_length": RESPONSE_LENGTH,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "fresh",
            "loss_aggregation": "token-mean",
            "shared_trunk": True,
        },
    }

"""PPO on a LoRA adapter: the policy with its adapter switched off is the reference, the critic is a model of its own.

Left-padded Llamas, ``generate`` for the rollout, one AdamW with two parameter groups, gradient accumulation with token
means taken over the whole minibatch, a k3 penalty in the loss, whitened advantages, a clipped value loss, an entropy
bonus, gradient clipping.
"""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from loops.small_models import checkpoint_reentrantly

FAULTS: dict[str, tuple[str, str]] = {
    "prompts_from_an_unseeded_generator": ("SYS009", "loop"),
    "adapter_left_on_for_the_reference": ("REF005", "reference"),
    "kl_against_the_old_policy": ("REF005", "reference"),
    "reference_without_attention_mask": ("REF006", "reference"),
    "reference_on_the_previous_tokens": ("REF006", "reference"),
    "penalty_added": ("REW014", "loop"),
    "penalty_by_the_last_column": ("REW014", "loop"),
    "critic_frozen": ("VAL008", "value"),
    "critic_learning_rate_floored": ("VAL008", "value"),
    "returns_from_zero_rewards": ("VAL009", "value"),
    "returns_are_the_values": ("VAL009", "value"),
    "critic_learns_the_reference_logprob": ("VAL009", "value"),
    "score_called_and_not_used": ("VAL009", "value"),
    "returns_subtract_the_advantages": ("VAL010", "value"),
    "target_is_the_score": ("VAL011", "value"),
    "target_from_live_values": ("VAL012", "value"),
    "values_after_the_action": ("VAL013", "value"),
    "values_two_tokens_early": ("VAL013", "value"),
    "generates_at_0_7": ("ROL001", "loop"),
    "old_logprobs_without_attention_mask": ("ROL003", "loop"),
    "old_logprobs_with_the_adapter_off": ("ROL003", "loop"),
    "logprobs_of_the_token_before": ("ROL004", "loop"),
    "logprobs_filled_with_zero_in_front": ("ROL004", "loop"),
    "mask_leaves_out_the_eos": ("ROL005", "loop"),
    "mask_of_ones": ("ROL005", "loop"),
    "value_loss_over_the_pads": ("ROL005", "loop"),
    "every_step_starts_at_seed_42": ("ROL007", "loop"),
    "generates_with_the_adapter_off": ("ROL008", "loop"),
    "scores_of_the_shuffled_batch": ("ROL009", "loop"),
    "masks_of_the_shuffled_batch": ("ROL009", "loop"),
    "eos_replaced_with_unk": ("ROL010", "loop"),
    "retokenised_after_decoding": ("ROL010", "loop"),
    "generates_without_attention_mask": ("ROL011", "loop"),
    "kl_loss_subtracted": ("KLD002", "loop"),
    "kl_loss_doubled_in_the_reward": ("KLD003", "loop"),
    "kl_loss_twice_as_heavy": ("KLD003", "loop"),
    "k1_in_the_loss": ("KLD004", "loop"),
    "kl_of_the_old_logprobs_in_the_loss": ("KLD004", "loop"),
    "kl_averaged_over_the_pads": ("KLD005", "loop"),
    "gamma_of_0_9": ("ADV001", "loop"),
    "lambda_of_one": ("ADV001", "loop"),
    "score_in_column_minus_one": ("ADV002", "loop"),
    "score_one_token_early": ("ADV002", "loop"),
    "recursion_starts_from_the_pads": ("ADV003", "loop"),
    "whitening_counts_the_pads": ("ADV004", "loop"),
    "whitening_adds_the_mean_back": ("ADV004", "loop"),
    "whitening_of_each_row": ("ADV004", "loop"),
    "whitening_forgotten": ("ADV004", "loop"),
    "advantages_with_gradient": ("ADV005", "loop"),
    "bootstraps_from_the_last_value": ("ADV006", "loop"),
    "advantages_without_values": ("ADV007", "loop"),
    "advantages_from_zero_rewards": ("ADV008", "loop"),
    "score_is_its_sign_clipped_at_zero": ("ADV009", "loop"),
    "policy_loss_rises": ("LOS001", "loop"),
    "ratio_to_itself": ("LOS002", "loop"),
    "minimum_of_negated_terms": ("LOS002", "loop"),
    "value_clip_takes_the_minimum": ("LOS004", "loop"),
    "vf_coef_zero": ("LOS004", "loop"),
    "mean_of_each_micro_batch": ("LOS003", "loop"),
    "denominator_counts_the_pads": ("LOS003", "loop"),
    "entropy_of_the_pads": ("LOS005", "loop"),
    "entropy_lowered": ("LOS006", "loop"),
    "entropy_without_gradient": ("LOS007", "loop"),
    "whitening_without_epsilon": ("LOS008", "loop"),
    "adapter_never_switched_back_on": ("OPT002", "policy"),
    "policy_learning_rate_floored": ("OPT002", "policy"),
    "adapter_added_into_the_base": ("OPT003", "reference"),
    "accumulation_not_divided": ("OPT004", "loop"),
    "clipped_to_zero": ("OPT004", "loop"),
    "zeroed_once_an_epoch": ("OPT004", "loop"),
    "batch_drawn_with_replacement": ("OPT006", "loop"),
    "previous_batch_once_more": ("OPT006", "loop"),
    "mask_moved_by_the_left_pads": ("ROL005", "loop"),
    "checkpointed_without_input_gradients": ("OPT002", "policy"),
    "whitening_of_each_half": ("ADV004", "loop"),
    "old_values_are_live": ("LOS002", "value"),
}
ALSO = {
    "score_called_and_not_used": ("ADV008",),
    "entropy_of_the_pads": ("ROL005",),
    "critic_learning_rate_floored": ("OPT005",),
    "policy_learning_rate_floored": ("OPT005",),
    "old_values_are_live": ("LOS004", "LOS007"),
}
EDGE = {"whitening_without_epsilon", "old_values_are_live"}  # an ordinary batch does not show these
NOT_FINITE: set[str] = set()

SPOKEN = (
    "i you he she it they need want have made sold lost bought broke cleaned this that every some many few car boat "
    "house door window roof table chair lamp phone radio cup well badly fast slowly again already yesterday tomorrow "
    "please thanks yes no maybe why how when where who"
)
WORDS = SPOKEN.split()
PROMPTS = [
    "why they sold the car",
    "you broke that lamp again",
    "please",
    "how she cleaned this old house",
    "who lost some cup",
    "yes i want a chair",
    "when he bought the radio",
    "maybe it broke",
]
PAD, UNK, EOS = 0, 1, 2
BATCH, MINIBATCH, MICRO, EPOCHS, RESPONSE = 8, 4, 2, 2, 8
GAMMA, LAM, KL, TEMPERATURE, CLIP, VALUE_CLIP, VF, ENT, NO_EOS = 1.0, 0.9, 0.05, 1.0, 0.1, 0.2, 0.1, 0.01, 0.5
LR, CRITIC_LR, MAX_GRAD = 3e-3, 2e-3, 1.0


def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def three_models(size: int) -> tuple[Any, Any, Any]:
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        num_labels=1,
        classifier_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        base = LlamaForCausalLM(config)
        with torch.no_grad():  # a direction that all states share: about half of the responses end in time
            base.model.embed_tokens.weight[:, :4] += 0.3
            state = base.model(torch.randint(3, size, (8, 8))).last_hidden_state.mean((0, 1))
            base.lm_head.weight[EOS] = 2.4 * state / state.square().sum()
            base.lm_head.weight[[PAD, UNK]] -= 8.0 * state / state.square().sum()
        reward = LlamaForSequenceClassification(config)
        critic = LlamaForTokenClassification(config)
        how = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a name that peft still uses
            policy = get_peft_model(base, how)
    return policy, reward.eval().requires_grad_(False), critic


def build(fault: str | None = None) -> dict[str, Any]:
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}")
    tok = words()
    policy, reward, critic = three_models(len(tok))
    if fault == "critic_frozen":
        critic.requires_grad_(False)
    if fault == "checkpointed_without_input_gradients":
        checkpoint_reentrantly(policy.get_base_model())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in policy.parameters() if p.requires_grad],
                "lr": LR // 1 if fault == "policy_learning_rate_floored" else LR,
            },
            {
                "params": list(critic.parameters()),
                "lr": CRITIC_LR // 1 if fault == "critic_learning_rate_floored" else CRITIC_LR,
            },
        ],
        eps=1e-5,
        weight_decay=0.0,
    )
    how = GenerationConfig(
        max_new_tokens=RESPONSE,
        do_sample=True,
        temperature=0.7 if fault == "generates_at_0_7" else TEMPERATURE,
        top_k=0,
        top_p=1.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    own: torch.Generator | None = None
    if fault == "prompts_from_an_unseeded_generator":
        own = torch.Generator()
        own.seed()
    kept = SimpleNamespace(previous=None)

    def policy_logits(ids: torch.Tensor, attention: torch.Tensor | None, width: int) -> torch.Tensor:
        positions = None if attention is None else (attention.cumsum(1) - 1).clamp(min=0)
        out = policy(input_ids=ids, attention_mask=attention, position_ids=positions)
        return out.logits[:, -width - 1 : -1] / TEMPERATURE

    def picked(logits: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        if fault == "logprobs_of_the_token_before":
            responses = responses.roll(1, 1)
        each = F.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]
        if fault == "logprobs_filled_with_zero_in_front":
            return torch.cat([torch.zeros_like(each[:, :1]), each[:, :-1]], 1)
        return each

    def values_of(ids: torch.Tensor, attention: torch.Tensor, width: int) -> torch.Tensor:
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        each = critic(input_ids=ids, attention_mask=attention, position_ids=positions).logits[..., 0]
        if fault == "values_after_the_action":
            return each[:, -width:]
        if fault == "values_two_tokens_early":
            return each[:, -width - 3 : -3]
        return each[:, -width - 1 : -1]

    @torch.no_grad()
    def collect() -> dict[str, torch.Tensor]:
        if fault == "every_step_starts_at_seed_42":
            torch.manual_seed(42)
        chosen = torch.randint(len(PROMPTS), (BATCH,), generator=own)
        prompt = tok([PROMPTS[i] for i in chosen], return_tensors="pt", padding=True)
        ids, attention = prompt["input_ids"], prompt["attention_mask"]
        start = ids.shape[1]

        off = policy.disable_adapter() if fault == "generates_with_the_adapter_off" else contextlib.nullcontext()
        policy.eval()
        with off:
            seen = torch.ones_like(attention) if fault == "generates_without_attention_mask" else attention
            ids = policy.generate(input_ids=ids, attention_mask=seen, generation_config=how)
        policy.train()
        responses = ids[:, start:]
        width = responses.shape[1]

        ended_before = (responses == EOS).cumsum(1) - (responses == EOS).long() > 0
        mask = ~ended_before  # (B, T): the response up to its EOS, the EOS included
        ended = (responses == EOS).any(1)
        lengths = mask.sum(1)
        if fault == "eos_replaced_with_unk":
            ids = torch.cat([ids[:, :start], responses.masked_fill(responses == EOS, UNK)], 1)
            responses = ids[:, start:]
        elif fault == "retokenised_after_decoding":
            texts = tok.batch_decode(responses, skip_special_tokens=True)
            again = tok(texts, padding="max_length", max_length=width, truncation=True, padding_side="right")
            responses = torch.tensor(again["input_ids"])
            ids = torch.cat([ids[:, :start], responses], 1)
        attention = torch.cat([attention, mask.long()], 1)

        # what the three other models say
        at_old = None if fault == "old_logprobs_without_attention_mask" else attention
        if fault == "old_logprobs_with_the_adapter_off":
            with policy.disable_adapter():
                old = picked(policy_logits(ids, at_old, width), responses)
        else:
            old = picked(policy_logits(ids, at_old, width), responses)
        if fault == "adapter_left_on_for_the_reference":
            ref = picked(policy_logits(ids, attention, width), responses)
        elif fault == "adapter_never_switched_back_on":
            policy.base_model.disable_adapter_layers()
            ref = picked(policy_logits(ids, attention, width), responses)
        else:
            with policy.disable_adapter():
                at_ref = None if fault == "reference_without_attention_mask" else attention
                shown = ids.roll(1, 1) if fault == "reference_on_the_previous_tokens" else ids
                ref = picked(policy_logits(shown, at_ref, width), responses)
        values = values_of(ids, attention, width)
        scored = ids.masked_fill(attention == 0, PAD)
        scores = reward(input_ids=scored, attention_mask=attention).logits[:, 0]
        order = torch.randperm(BATCH)
        if fault == "scores_of_the_shuffled_batch":
            scores = scores[order]
        elif fault == "masks_of_the_shuffled_batch":
            mask = mask[order]
            lengths = mask.sum(1)
        elif fault == "score_is_its_sign_clipped_at_zero":
            scores = scores.sign().clamp(max=-1)
        if fault == "penalty_added":
            scores = scores + NO_EOS * ~ended
        elif fault == "penalty_by_the_last_column":
            scores = scores - NO_EOS * (responses[:, -1] != EOS)
        else:
            scores = scores - NO_EOS * ~ended

        # rewards are the score alone, the penalty is in the loss
        rewards = torch.zeros_like(values)
        last = lengths - 1
        if fault == "score_in_column_minus_one":
            last = torch.full_like(last, width - 1)
        elif fault == "score_one_token_early":
            last = (last - 1).clamp(min=0)
        if fault != "score_called_and_not_used":
            rewards[torch.arange(BATCH), last] += scores
        if fault == "kl_loss_doubled_in_the_reward":
            rewards -= KL * (old - ref) * mask
        advantages = gae(rewards, values, mask)
        returns = advantages + values
        if fault == "returns_from_zero_rewards":
            returns = gae(torch.zeros_like(rewards), values, mask) + values
        elif fault == "returns_are_the_values":
            returns = values.clone()
        elif fault == "critic_learns_the_reference_logprob":
            returns = ref.clone()
        elif fault == "returns_subtract_the_advantages":
            returns = values - advantages
        elif fault == "target_is_the_score":
            returns = scores[:, None].expand_as(values)
        elif fault == "advantages_from_zero_rewards":
            advantages = gae(torch.zeros_like(rewards), values, mask)
        elif fault == "advantages_without_values":
            advantages = gae(rewards, torch.zeros_like(values), mask)
        return {
            "ids": ids,
            "attention": attention,
            "responses": responses,
            "mask": mask,
            "ended": ended,
            "old": old,
            "ref": ref,
            "values": values,
            "scores": scores,
            "rewards": rewards,
            "raw": advantages,
            "advantages": whiten(advantages, mask),
            "returns": returns,
        }

    def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) each; a pad carries nothing to the token before it."""
        gamma = 0.9 if fault == "gamma_of_0_9" else GAMMA
        lam = 1.0 if fault == "lambda_of_one" else LAM
        ahead, gathered = torch.zeros(len(values)), []
        for t in range(values.shape[1] - 1, -1, -1):
            goes_on = mask[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(mask[:, t])
            if fault == "recursion_starts_from_the_pads":
                goes_on = torch.full_like(goes_on, t + 1 < values.shape[1])
            following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(values[:, t])
            if fault == "bootstraps_from_the_last_value":
                following = torch.where(goes_on, following, values[:, t])
            else:
                following = torch.where(goes_on, following, 0.0)
            ahead = torch.where(goes_on, ahead, 0.0)
            ahead = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * ahead
            gathered.append(ahead)
        return torch.stack(gathered[::-1], 1)

    def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if fault == "whitening_forgotten":
            return x
        if fault == "whitening_of_each_row":
            mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            var = ((x - mean).square() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            return (x - mean) / (var + 1e-8).sqrt()
        if fault == "whitening_of_each_half":
            halves = zip(x.tensor_split(2, 1), mask.tensor_split(2, 1), strict=True)
            return torch.cat([(h - h[m].mean()) / (h[m].std(correction=0) + 1e-8) for h, m in halves], 1)
        real = x.flatten() if fault == "whitening_counts_the_pads" else x[mask]
        mean, deviation = real.mean(), real.std(correction=0)
        if fault == "whitening_adds_the_mean_back":
            return (x - mean) / (deviation + 1e-8) + mean
        if fault == "whitening_without_epsilon":
            return (x - mean) / deviation
        return (x - mean) / (deviation + 1e-8)

    def micro_loss(b: dict[str, torch.Tensor], rows: torch.Tensor, tokens: torch.Tensor) -> tuple[Any, Any]:
        mask, width = b["mask"][rows], b["responses"].shape[1]
        logits = policy_logits(b["ids"][rows], b["attention"][rows], width)
        new = picked(logits, b["responses"][rows])
        values = values_of(b["ids"][rows], b["attention"][rows], width)
        old, advantages, returns = b["old"][rows], b["advantages"][rows], b["returns"][rows]
        if fault == "advantages_with_gradient":
            advantages = gae(b["rewards"][rows], values, mask)
            advantages = (advantages - b["raw"][b["mask"]].mean()) / (b["raw"][b["mask"]].std(correction=0) + 1e-8)
        elif fault == "target_from_live_values":
            returns = gae(b["rewards"][rows], values, mask) + values
        if fault == "mean_of_each_micro_batch":
            tokens = mask.sum() * (MINIBATCH // MICRO)
        elif fault == "denominator_counts_the_pads":
            tokens = torch.tensor(MINIBATCH * width)
        elif fault == "accumulation_not_divided":
            tokens = mask.sum()

        def mean(x: torch.Tensor, over: torch.Tensor = mask) -> torch.Tensor:
            return torch.where(over, x, 0.0).sum() / tokens

        if fault == "ratio_to_itself":
            old = new.detach()
        ratio = torch.exp(torch.where(mask, new - old, 0.0))
        terms = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
        policy_loss = mean(torch.min(*terms) if fault == "minimum_of_negated_terms" else torch.max(*terms))
        if fault == "policy_loss_rises":
            policy_loss = -policy_loss

        before = values.detach() if fault == "old_values_are_live" else b["values"][rows]
        held = before + (values - before).clamp(-VALUE_CLIP, VALUE_CLIP)
        errors = (values - returns).square(), (held - returns).square()
        worse = torch.min(*errors) if fault == "value_clip_takes_the_minimum" else torch.max(*errors)
        over = torch.ones_like(mask) if fault == "value_loss_over_the_pads" else mask
        value_loss = 0.5 * mean(worse, over)

        toward = b["ref"][rows] - new
        if fault == "kl_against_the_old_policy":
            toward = b["old"][rows] - new
        elif fault == "kl_of_the_old_logprobs_in_the_loss":
            toward = b["ref"][rows] - b["old"][rows]
        k3 = toward.exp() - 1 - toward
        if fault == "k1_in_the_loss":
            k3 = -toward
        kl_loss = mean(k3, torch.ones_like(mask)) if fault == "kl_averaged_over_the_pads" else mean(k3)

        log_p = F.log_softmax(logits, -1)
        uncertainty = -(log_p.exp() * log_p).sum(-1)
        if fault == "entropy_without_gradient":
            uncertainty = uncertainty.detach()
        bonus = mean(uncertainty, torch.ones_like(mask)) if fault == "entropy_of_the_pads" else mean(uncertainty)
        entropy_sign = 1 if fault == "entropy_lowered" else -1
        kl_weight = {"kl_loss_subtracted": -KL, "kl_loss_twice_as_heavy": 2 * KL}.get(fault or "", KL)
        vf = 0.0 if fault == "vf_coef_zero" else VF
        return policy_loss + vf * value_loss + kl_weight * kl_loss + entropy_sign * ENT * bonus, ratio.detach()

    def step() -> dict[str, Any]:
        batch = collect()
        if fault == "mask_leaves_out_the_eos":
            batch["mask"] = batch["mask"] & (batch["responses"] != EOS)
        elif fault == "mask_of_ones":
            batch["mask"] = torch.ones_like(batch["mask"])
        elif fault == "mask_moved_by_the_left_pads":
            pads = (batch["attention"].cumsum(1) == 0).sum(1, keepdim=True)
            at = torch.arange(batch["mask"].shape[1]) - pads
            batch["mask"] = batch["mask"].gather(1, at.clamp(min=0)) & (at >= 0)
        before = kept.previous
        kept.previous = batch if fault == "previous_batch_once_more" else None
        updates = learn(batch)
        if before is not None:
            learn(before)
        if fault == "adapter_added_into_the_base":
            for layer in policy.modules():
                if isinstance(layer, LoraLayer):
                    layer.base_layer.weight.data += layer.get_delta_weight("default")
        return {**batch, "updates": updates}

    def learn(batch: dict[str, Any]) -> list[dict[str, Any]]:
        updates = []
        trainable = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(EPOCHS):
            order = torch.randperm(BATCH)
            if fault == "batch_drawn_with_replacement":
                order = torch.randint(BATCH, (BATCH,))
            if fault == "zeroed_once_an_epoch":
                optimizer.zero_grad()
            for rows in order.split(MINIBATCH):
                if fault != "zeroed_once_an_epoch":
                    optimizer.zero_grad()
                tokens, total, ratios = batch["mask"][rows].sum(), 0.0, []
                for few in rows.split(MICRO):
                    loss, ratio = micro_loss(batch, few, tokens)
                    loss.backward()
                    total += loss.item()
                    ratios.append(ratio)
                limit = 0.0 if fault == "clipped_to_zero" else MAX_GRAD
                torch.nn.utils.clip_grad_norm_(trainable, limit)
                optimizer.step()
                updates.append({"rows": rows, "loss": torch.tensor(total), "ratio": torch.cat(ratios)})
        return updates

    return {
        "policy": policy,
        "reference": "adapter-off",
        "reward": reward,
        "value": critic,
        "tokenizer": tok,
        "prompts": list(PROMPTS),
        "step": step,
        "optimizers": [optimizer],
        "state": [kept] if fault == "previous_batch_once_more" else [],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL,
            "kl_estimator": "k3",
            "kl_in": "loss",
            "kl_adaptive": False,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": VALUE_CLIP,
            "vf_coef": VF,
            "ent_coef": ENT,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "missing_eos_penalty": NO_EOS,
            "learning_rate": LR,
            "critic_learning_rate": CRITIC_LR,
            "ppo_epochs": EPOCHS,
            "num_minibatches": BATCH // MINIBATCH,
            "batch_size": BATCH,
            "prompt_length": 6,
            "response_length": RESPONSE,
            "dtype": "float32",
            "reference": "adapter-off",
            "value_init": "fresh",
            "loss_aggregation": "token-mean",
        },
    }

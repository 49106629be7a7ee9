"""alpaca_farm's PPO: OPT, queries padded left, responses padded right, respond / rollout / compute_loss, one optimizer with accumulation."""

import copy
import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup


def compute_logprobs(logits, labels, ignore_index):
    """Log-probabilities with 0 at pads."""
    return -F.cross_entropy(logits.permute(0, 2, 1), labels, reduction="none", ignore_index=ignore_index)


def masked_seq_mean(x, mask):
    return ((x * mask).sum(1) / mask.sum(1)).mean()


def whiten(values, mask, epsilon=1e-8, async_stats=False):
    assert not async_stats, "one process: the statistics are those of the batch"
    mean = (values * mask).sum() / mask.sum()
    var = (((values - mean) ** 2) * mask).sum() / (mask.sum() - 1)
    return (values - mean) * torch.rsqrt(var + epsilon) * mask


def truncate_after_eos_with_padding(completions, eos_token_id, pad_token_id):
    clean = completions.clone()
    for row in clean:
        ends = (row == eos_token_id).nonzero()
        if len(ends):
            row[int(ends[0]) + 1 :] = pad_token_id
    return clean


class AutoregressivePolicy(nn.Module):
    def __init__(self, base_model, base_tokenizer, temperature, response_len):
        super().__init__()
        self.base_model, self.base_tokenizer, self.temperature, self.response_len = (
            base_model,
            base_tokenizer,
            temperature,
            response_len,
        )

    def forward(self, queries, query_attn_masks, responses, temperature=None):
        temperature = self.temperature if temperature is None else temperature
        input_ids = torch.cat([queries, responses], dim=1)
        attention_mask = torch.cat([query_attn_masks, responses.ne(self.base_tokenizer.pad_token_id).long()], dim=1)
        outputs = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = outputs.logits[:, queries.size(1) - 1 : -1] / temperature
        logprobs = compute_logprobs(logits, responses, ignore_index=self.base_tokenizer.pad_token_id)
        entropies = -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
        return dict(logprobs=logprobs, entropies=entropies)

    @torch.inference_mode()
    def respond(self, queries, query_attn_masks):
        sequences = self.base_model.generate(
            inputs=queries,
            attention_mask=query_attn_masks,
            do_sample=True,
            top_p=1.0,
            top_k=0,
            temperature=self.temperature,
            max_new_tokens=self.response_len,
            pad_token_id=self.base_tokenizer.pad_token_id,
            eos_token_id=self.base_tokenizer.eos_token_id,
        )
        tok = self.base_tokenizer
        return truncate_after_eos_with_padding(
            sequences[:, queries.size(1) :], tok.eos_token_id, tok.pad_token_id
        ).clone()


class AutoregressiveValue(nn.Module):
    def __init__(self, base_model, base_tokenizer):
        super().__init__()
        self.base_model, self.base_tokenizer = base_model, base_tokenizer
        self.value_head = nn.Linear(base_model.config.hidden_size, 1)
        self.value_head.weight.data.zero_()
        self.value_head.bias.data.zero_()
        nn.init.normal_(self.value_head.weight, std=0.02)

    def forward(self, queries, query_attn_masks, responses):
        input_ids = torch.cat([queries, responses], dim=1)
        attention_mask = torch.cat([query_attn_masks, responses.ne(self.base_tokenizer.pad_token_id).long()], dim=1)
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        # value[t]: queries and responses[0:t-1] -> the return from t on
        return dict(values=self.value_head(hidden[:, queries.size(1) - 1 : -1]).squeeze(dim=-1))


class ActorCritic(nn.Module):
    def __init__(self, policy, value_model):
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def forward(self, queries, query_attn_masks, responses, temperature=None):
        return {
            **self.policy(queries, query_attn_masks, responses, temperature),
            **self.value_model(queries, query_attn_masks, responses),
        }


class RewardModel(nn.Module):
    """Reads the last place: its tokenizer pads left."""

    def __init__(self, backbone_model):
        super().__init__()
        self.backbone_model = backbone_model
        self.reward_head = nn.Linear(backbone_model.config.hidden_size, 1)
        nn.init.zeros_(self.reward_head.bias)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.backbone_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return dict(rewards=self.reward_head(hidden[:, -1, :]).squeeze(-1))


class Cursor:
    def __init__(self):
        self.at, self.steps = 0, 0

    def state_dict(self):
        return dict(self.__dict__)

    def load_state_dict(self, d):
        self.__dict__.update(d)


class PPOTrainer:
    kl_coef, cliprange, cliprange_value, vf_coef, gamma, lam = 0.1, 0.2, 0.2, 0.1, 1.0, 0.95
    noptepochs, rollout_batch_size, step_batch_size, per_device_batch_size, max_grad_norm = 2, 12, 6, 3, 1.0

    def __init__(self, actor_critic, ref_policy, reward_model, tokenizer, prompts, fault=None):
        self.policy, self.ref_policy, self.reward_model, self.tokenizer, self.prompts = (
            actor_critic,
            ref_policy,
            reward_model,
            tokenizer,
            prompts,
        )
        self.fault, self.cursor = fault, Cursor()
        decay = [p for p in actor_critic.parameters() if p.ndim > 1]
        rest = [p for p in actor_critic.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=1e-5, eps=1e-8
        )
        self.lr_scheduler = get_cosine_schedule_with_warmup(self.optimizer, num_warmup_steps=5, num_training_steps=400)

    def _score(self, text_queries, text_responses):
        text_sequences = [q + " " + r if r else q for q, r in zip(text_queries, text_responses)]
        order = sorted(
            range(len(text_sequences)), key=lambda i: len(text_sequences[i].split())
        )  # short ones together: less padding
        rewards = []
        for s in range(0, len(order), 4):
            enc = self.tokenizer(
                [text_sequences[i] for i in order[s : s + 4]],
                padding=True,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            rewards.append(self.reward_model(**enc)["rewards"])
        rewards = torch.cat(rewards)
        if self.fault == "rewards_stay_sorted":
            return rewards
        return rewards[torch.argsort(torch.tensor(order))]

    def _shape_reward(self, rewards, responses, logprobs, ref_logprobs):
        kl = logprobs - ref_logprobs
        if self.fault == "kl_sign":
            kl = ref_logprobs - logprobs
        non_score_rewards = -self.kl_coef * kl
        shaped_rewards = non_score_rewards.clone()
        terminal_positions = responses.ne(self.tokenizer.pad_token_id).sum(dim=1) - 1
        shaped_rewards[torch.arange(rewards.size(0)), terminal_positions] += rewards
        return dict(shaped_rewards=shaped_rewards, non_score_rewards=non_score_rewards, kl=kl)

    def _estimate_advantage(self, rewards, values, mask):
        lastgaelam, advantages_reversed, gen_length = 0, [], rewards.size(1)
        for t in reversed(range(gen_length)):
            nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
            lastgaelam = rewards[:, t] + self.gamma * nextvalues - values[:, t] + self.gamma * self.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        returns = advantages + values
        return dict(returns=returns, advantages=whiten(advantages, mask, async_stats=False))

    @torch.no_grad()
    def rollout(self, prompts):
        self.policy.eval()
        tok = self.tokenizer
        enc = tok(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        batch = dict(queries=enc["input_ids"], query_attn_masks=enc["attention_mask"])
        responses = self.policy.policy.respond(**batch)
        outputs, ref_outputs = self.policy(**batch, responses=responses), self.ref_policy(**batch, responses=responses)
        rewards = self._score(
            prompts, tok.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        masks = responses.ne(tok.pad_token_id)
        values = outputs["values"] * masks
        shaped = self._shape_reward(rewards, responses, outputs["logprobs"], ref_outputs["logprobs"])
        return {
            **batch,
            "responses": responses,
            "masks": masks,
            "logprobs": outputs["logprobs"],
            "ref_logprobs": ref_outputs["logprobs"],
            "values": values,
            "rewards": rewards,
            **shaped,
            **self._estimate_advantage(shaped["shaped_rewards"], values, masks),
        }

    def compute_loss(self, rollouts):
        mask, values, advantages, returns = (rollouts[k] for k in ("masks", "values", "advantages", "returns"))
        outputs = self.policy(rollouts["queries"], rollouts["query_attn_masks"], rollouts["responses"])
        vpred, logprob = outputs["values"], outputs["logprobs"]
        vpredclipped = torch.clamp(vpred, min=values - self.cliprange_value, max=values + self.cliprange_value)
        vf_losses1, vf_losses2 = (vpred - returns) ** 2.0, (vpredclipped - returns) ** 2.0
        vf_loss = 0.5 * masked_seq_mean(torch.maximum(vf_losses1, vf_losses2), mask)
        ratio = torch.exp(logprob - rollouts["logprobs"])
        pg_losses, pg_losses2 = (
            -advantages * ratio,
            -advantages * torch.clamp(ratio, min=1.0 - self.cliprange, max=1.0 + self.cliprange),
        )
        pg_loss = masked_seq_mean(torch.maximum(pg_losses, pg_losses2), mask)
        loss = pg_loss + self.vf_coef * vf_loss
        with torch.no_grad():
            stats = {
                "loss/policy": pg_loss,
                "loss/value": vf_loss,
                "loss/total": loss,
                "policy/entropy": masked_seq_mean(outputs["entropies"], mask),
                "policy/approxkl": 0.5 * masked_seq_mean((logprob - rollouts["logprobs"]) ** 2, mask),
                "policy/clipfrac": masked_seq_mean((pg_losses2 > pg_losses).float(), mask),
                "val/vpred": masked_seq_mean(vpred, mask),
                "val/error": masked_seq_mean((vpred - returns) ** 2, mask),
                "val/clipfrac": masked_seq_mean((vf_losses2 > vf_losses1).float(), mask),
            }
        return loss, {k: v.item() for k, v in stats.items()}

    def step_with_rollouts(self, rollouts):
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        stats, accumulation = [], self.step_batch_size // self.per_device_batch_size
        for _ in range(self.noptepochs):
            for batch_ids in torch.randperm(self.rollout_batch_size).split(self.step_batch_size):
                for ids in batch_ids.split(self.per_device_batch_size):
                    loss, st = self.compute_loss({k: v[ids] for k, v in rollouts.items()})
                    stats.append(st)
                    (loss / accumulation).backward()
                stats[-1]["loss/grad_norm"] = nn.utils.clip_grad_norm_(
                    self.policy.parameters(), self.max_grad_norm
                ).item()
                self.optimizer.step()
                self.lr_scheduler.step()
                if self.fault != "zero_grad_once":
                    self.optimizer.zero_grad(set_to_none=True)
        return {f"ppo/{k}": sum(s[k] for s in stats if k in s) / sum(k in s for s in stats) for k in stats[-1]}

    def step(self):
        n, at = self.rollout_batch_size, self.cursor.at
        prompts = [self.prompts[(at + i) % len(self.prompts)] for i in range(n)]
        self.cursor.at, self.cursor.steps = (at + n) % len(self.prompts), self.cursor.steps + 1
        rollouts = self.rollout(prompts)
        train_stats = self.step_with_rollouts(rollouts)
        kl_sum_seq = (rollouts["kl"] * rollouts["masks"]).sum(1).mean()
        return {
            "objective/kl_coef": self.kl_coef,
            "objective/kl_sum_seq": kl_sum_seq.item(),
            "objective/kl_avg_seq": masked_seq_mean(rollouts["kl"], rollouts["masks"]).item(),
            "objective/shaped_rewards": rollouts["shaped_rewards"].sum(1).mean().item(),
            "objective/non_score_rewards": rollouts["non_score_rewards"].sum(1).mean().item(),
            "objective/rewards": rollouts["rewards"].mean().item(),
            "objective/rewards_std": rollouts["rewards"].std().item(),
            "objective/lr": self.optimizer.param_groups[0]["lr"],
            **train_stats,
        }


def make(fault=None):
    torch.manual_seed(31)
    words = "below is an instruction that describes a task write response which completes the request give three tips list name explain city country".split()
    vocab = {w: i for i, w in enumerate(["</s>", "[PAD]", *words, *(f"v{i}" for i in range(48))])}
    raw = Tokenizer(models.WordLevel(vocab))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="</s>", padding_side="left")
    config = OPTConfig(
        vocab_size=len(vocab),
        hidden_size=48,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
        init_std=0.08,
        tie_word_embeddings=False,
    )
    sft = OPTForCausalLM(config)
    sft.lm_head = nn.Linear(48, len(vocab))
    with torch.no_grad():
        nn.init.normal_(sft.lm_head.weight, std=0.08)
        sft.lm_head.bias.zero_()
        sft.lm_head.bias[0], sft.lm_head.bias[1] = math.log(10.0), -15.0
    reward_model = RewardModel(OPTModel(config)).eval().requires_grad_(False)
    nn.init.normal_(reward_model.reward_head.weight, std=0.2)
    policy = AutoregressivePolicy(sft, tok, 1.0, 8)
    value_model = AutoregressiveValue(copy.deepcopy(reward_model.backbone_model).requires_grad_(True), tok)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(5)
    prompts = [" ".join(words[int(i)] for i in torch.randint(len(words), (3 + k % 7,), generator=g)) for k in range(30)]
    trainer = PPOTrainer(ActorCritic(policy, value_model), ref_policy, reward_model, tok, prompts, fault)

    def call_value(m, ids, mask):
        return m.value_head(
            m.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        ).squeeze(-1)

    return {
        "policy": policy.base_model,
        "reference": ref_policy.base_model,
        "reward": reward_model,
        "value": value_model,
        "tokenizer": tok,
        "reward_tokenizer": tok,
        "prompts": prompts,
        "optimizers": [trainer.optimizer],
        "state": [trainer.lr_scheduler, trainer.cursor],
        "step": trainer.step,
        "calls": {"value": call_value, "reward": lambda m, ids, mask: m(ids, mask)["rewards"]},
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.95,
            "kl_coef": 0.1,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "kl_adaptive": False,
            "temperature": 1.0,
            "clip_range": 0.2,
            "clip_range_value": 0.2,
            "vf_coef": 0.1,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 12,
            "response_length": 8,
            "learning_rate": 1e-5,
            "loss_aggregation": "seq-mean",
        },
    }


def healthy():
    return make()


def kl_sign():
    return make("kl_sign")


def rewards_stay_sorted():
    return make("rewards_stay_sorted")


def zero_grad_once():
    return make("zero_grad_once")

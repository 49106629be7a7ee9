"""NeMo-Aligner's PPO: rollout_batch dicts, lengths as integer tensors instead of masks, actor and critic trainers of their own, bf16 autocast."""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast


def all_reduce_sum(t):  # the data-parallel group has one rank here
    return t


def masked_global_sum(values, mask):
    return all_reduce_sum((values * mask).sum())


def masked_global_mean_var(values, mask):
    count = all_reduce_sum(mask.sum())
    mean = masked_global_sum(values, mask) / count
    return mean, masked_global_sum((values - mean) ** 2, mask) / count


def create_mask(values, prompt_lengths, response_lengths):
    """1 at the states from which a response token was chosen: prompt_length - 1 up to response_length - 2."""
    mask = torch.zeros_like(values)
    for i in range(values.size(0)):
        mask[i, prompt_lengths[i] - 1 : response_lengths[i] - 1] = 1.0
    return mask


def calculate_kl_penalty(log_probs_a, log_probs_b, use_absolute_kl=False):
    approx_kl = log_probs_a - log_probs_b
    return approx_kl.abs() if use_absolute_kl else approx_kl


def calculate_ppo_rewards(values, rewards, response_lengths, init_policy_kl, penalty_factor):
    rewards_sequence = torch.zeros_like(values)
    idx = (response_lengths - 2).clamp(min=0, max=rewards_sequence.size(-1) - 1)
    rewards_sequence.scatter_(1, idx.unsqueeze(-1), rewards.unsqueeze(-1))
    return rewards_sequence - penalty_factor * init_policy_kl


def calculate_advantages_and_returns(values, rewards, discount_factor, gae_lambda, mask):
    values, rewards = values * mask, rewards * mask
    last_gae_lam, advantages = 0, torch.zeros_like(values)
    for t in reversed(range(values.size(-1))):
        next_values = 0.0 if t == values.size(-1) - 1 else values[:, t + 1]
        delta = rewards[:, t] + discount_factor * next_values - values[:, t]
        last_gae_lam = delta + discount_factor * gae_lambda * last_gae_lam
        advantages[:, t] = last_gae_lam
    advantages = advantages * mask
    return advantages, advantages + values


class GlobalBatch:
    """A global batch in micro batches. Losses are sums over tokens divided by the tokens of the whole global batch."""

    def __init__(self, batch, micro_batch_size):
        self.batch, self.mbs = batch, micro_batch_size
        self.valid_tokens = all_reduce_sum(batch["mask"].sum())

    def __iter__(self):
        for s in range(0, self.batch["response_tokens"].size(0), self.mbs):
            yield {k: v[s : s + self.mbs] for k, v in self.batch.items()}

    @staticmethod
    def split(rollout_batch, size):
        order = torch.randperm(rollout_batch["response_tokens"].size(0))
        for ids in order.split(size):
            yield {k: v[ids] for k, v in rollout_batch.items()}


def attention_mask_from(lengths, width):
    return (torch.arange(width)[None] < lengths[:, None]).long()


def from_parallel_logits_to_logprobs(logits, target):
    return F.log_softmax(logits.float(), dim=-1)[:, :-1].gather(-1, target[:, 1:].unsqueeze(-1)).squeeze(-1)


class MegatronGPTCritic(nn.Module):
    """Per-token values, or with `pooled` one score at the last token: critic and reward model are of one class."""

    def __init__(self, model, pooled):
        super().__init__()
        self.model, self.pooled = model, pooled
        self.rm_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.rm_head.bias)

    def forward(self, tokens, lengths):
        hidden = self.model(
            input_ids=tokens, attention_mask=attention_mask_from(lengths, tokens.size(1)), use_cache=False
        ).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            out = self.rm_head(hidden.float()).squeeze(-1)
        return out.gather(1, lengths.unsqueeze(-1) - 1).squeeze(-1) if self.pooled else out


class ActorTrainer:
    def __init__(self, model, init_policy, tokenizer, autocast, cfg):
        self.model, self.init_policy, self.tokenizer, self.autocast, self.cfg = (
            model,
            init_policy,
            tokenizer,
            autocast,
            cfg,
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["actor_lr"], weight_decay=0.1, betas=(0.9, 0.98))

    def log_probs(self, model, batch):
        tokens, lengths = batch["response_tokens"], batch["response_lengths"]
        with self.autocast():
            logits = model(
                input_ids=tokens, attention_mask=attention_mask_from(lengths, tokens.size(1)), use_cache=False
            ).logits
        return from_parallel_logits_to_logprobs(logits, tokens), logits

    @torch.no_grad()
    def infer(self, prompts):
        """Sample from left-padded prompts, then close the rows up: Megatron's tokens start at 0 and are padded on the right."""
        enc = self.tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
        )
        with self.autocast():
            out = self.model.generate(
                **enc, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=self.cfg["max_length"]
            )
        prompt_lengths, width = enc["attention_mask"].sum(-1), enc["input_ids"].size(1)
        rows, lengths = [], []
        for row, n in zip(out, prompt_lengths):
            ends = (row[width:] == self.tokenizer.eos_token_id).nonzero()
            stop = width + int(ends[0]) + 1 if len(ends) else out.size(1)
            rows.append(row[width - int(n) : stop])
            lengths.append(len(rows[-1]))
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        batch = {"response_tokens": tokens, "response_lengths": torch.tensor(lengths), "prompt_lengths": prompt_lengths}
        batch["logprobs"] = self.log_probs(self.model, batch)[0]
        batch["init_logprobs"] = self.log_probs(self.init_policy, batch)[0]
        return batch

    def train(self, rollout_batch):
        losses, eps = [], self.cfg["ratio_eps"]
        for _ in range(self.cfg["actor_epochs"]):
            for part in GlobalBatch.split(rollout_batch, self.cfg["global_batch_size"]):
                self.optimizer.zero_grad()
                gb = GlobalBatch(part, self.cfg["micro_batch_size"])
                for mb in gb:
                    mask, adv = mb["mask"], mb["advantages"]
                    curr_log_probs, logits = self.log_probs(self.model, mb)
                    ratios = ((curr_log_probs - mb["logprobs"]) * mask).exp()
                    ratios_clamped = ratios.clamp(1.0 - eps, 1.0 + eps)
                    loss = (torch.max(-adv * ratios, -adv * ratios_clamped) * mask).sum() / gb.valid_tokens
                    logp = F.log_softmax(logits[:, :-1].float(), -1)
                    scaled_entropy = (-(logp.exp() * logp).sum(-1) * mask).sum() / gb.valid_tokens
                    loss = loss - self.cfg["entropy_bonus"] * scaled_entropy
                    loss.backward()
                    losses.append(loss.item())
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
        return {"actor/loss": sum(losses) / len(losses)}


class CriticTrainer:
    def __init__(self, model, autocast, cfg, fault):
        self.model, self.autocast, self.cfg, self.fault = model, autocast, cfg, fault
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["critic_lr"], weight_decay=0.1, betas=(0.9, 0.98))

    def values(self, batch):
        with self.autocast():
            return self.model(batch["response_tokens"], batch["response_lengths"])[:, :-1]

    def train(self, rollout_batch):
        losses, clip = [], self.cfg["value_clip"]
        for part in GlobalBatch.split(rollout_batch, self.cfg["critic_global_batch_size"]):
            self.optimizer.zero_grad()
            gb = GlobalBatch(part, self.cfg["micro_batch_size"])
            for mb in gb:
                target = mb["values"] if self.fault == "critic_gets_prev_values" else mb["returns"]
                values = self.values(mb)
                values_clipped = mb["values"] + (values - mb["values"]).clamp(-clip, clip)
                loss = (
                    0.5
                    * (torch.max((values - target) ** 2, (values_clipped - target) ** 2) * mb["mask"]).sum()
                    / gb.valid_tokens
                )
                loss.backward()
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return {"critic/loss": sum(losses) / len(losses)}


class PPOTrainer:
    def __init__(self, actor, critic, rm, prompts, autocast, cfg, fault):
        self.actor, self.critic, self.rm, self.prompts, self.autocast, self.cfg, self.fault = (
            actor,
            critic,
            rm,
            prompts,
            autocast,
            cfg,
            fault,
        )
        self.consumed_samples = torch.zeros(1, dtype=torch.long)

    def state_dict(self):
        return {"consumed_samples": self.consumed_samples.clone()}

    def load_state_dict(self, d):
        self.consumed_samples.copy_(d["consumed_samples"])

    @torch.no_grad()
    def generate_rollouts(self):
        n, at = self.cfg["rollout_batch_size"], int(self.consumed_samples)
        rb = self.actor.infer([self.prompts[(at + i) % len(self.prompts)] for i in range(n)])
        self.consumed_samples += n
        with self.autocast():
            rb["rewards"] = self.rm(rb["response_tokens"], rb["response_lengths"])
        rb["values"] = self.critic.values(rb)
        mask = rb["mask"] = create_mask(rb["values"], rb["prompt_lengths"], rb["response_lengths"])
        init_policy_kl = calculate_kl_penalty(rb["logprobs"], rb["init_logprobs"], use_absolute_kl=False)
        rewards_with_kl = calculate_ppo_rewards(
            rb["values"], rb["rewards"], rb["response_lengths"], init_policy_kl, self.cfg["initial_policy_kl_penalty"]
        )
        discount, lam = self.cfg["discount_factor"], self.cfg["gae_lambda"]
        if self.fault == "discount_and_lambda_swapped":
            discount, lam = lam, discount
        advantages, rb["returns"] = calculate_advantages_and_returns(rb["values"], rewards_with_kl, discount, lam, mask)
        mean, var = masked_global_mean_var(
            advantages, torch.ones_like(mask) if self.fault == "normalised_over_all" else mask
        )
        rb["advantages"] = (advantages - mean) * torch.rsqrt(var + 1e-8) * mask
        metrics = {
            "rewards": rb["rewards"].mean().item(),
            "rewards_std": rb["rewards"].std().item(),
            "init_policy_kl": (masked_global_sum(init_policy_kl, mask) / mask.sum()).item(),
            "response_length": (rb["response_lengths"] - rb["prompt_lengths"]).float().mean().item(),
        }
        return rb, metrics

    def fit_step(self):
        for m in (self.actor.model, self.critic.model):
            m.eval()
        rb, metrics = self.generate_rollouts()
        for m in (self.actor.model, self.critic.model):
            m.train()
        return {**metrics, **self.critic.train(rb), **self.actor.train(rb)}


def make(fault=None, bf16=True):
    torch.manual_seed(47)
    words = "user assistant please help me write code python function sort list sum numbers find max min string reverse loop return value and or not".split()
    vocab = {w: i for i, w in enumerate([*words, *(f"x{i}" for i in range(50)), "<extra_id_1>", "<pad>"])}
    eos, pad = vocab["<extra_id_1>"], vocab["<pad>"]
    raw = Tokenizer(models.WordLevel(vocab))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<extra_id_1>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.07,
    )
    policy = LlamaForCausalLM(config)
    policy.lm_head = nn.Linear(64, len(vocab))
    with torch.no_grad():
        policy.lm_head.bias.zero_()
        policy.lm_head.bias[eos], policy.lm_head.bias[pad] = 2.3, -15.0
    init_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    rm = MegatronGPTCritic(LlamaModel(config), pooled=True)
    nn.init.normal_(rm.rm_head.weight, std=0.15)
    critic = copy.deepcopy(rm)  # the critic starts from the reward model, head included
    critic.pooled = False
    rm.eval().requires_grad_(False)
    cfg = {
        "rollout_batch_size": 16,
        "global_batch_size": 8,
        "critic_global_batch_size": 16,
        "micro_batch_size": 4,
        "actor_epochs": 2,
        "actor_lr": 5e-6,
        "critic_lr": 1e-5,
        "ratio_eps": 0.2,
        "value_clip": 0.5,
        "entropy_bonus": 0.005,
        "discount_factor": 1.0,
        "gae_lambda": 0.9,
        "initial_policy_kl_penalty": 0.03,
        "max_length": 9,
    }

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()

    g = torch.Generator().manual_seed(13)
    prompts = [" ".join(words[int(i)] for i in torch.randint(len(words), (2 + k % 6,), generator=g)) for k in range(32)]
    actor_trainer, critic_trainer = (
        ActorTrainer(policy, init_policy, tok, autocast, cfg),
        CriticTrainer(critic, autocast, cfg, fault),
    )
    trainer = PPOTrainer(actor_trainer, critic_trainer, rm, prompts, autocast, cfg, fault)

    def call_rm(m, ids, mask):
        """(tokens, lengths) for any mask: rows closed up to the left; values go back to their places."""
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        out = m(ids.gather(1, order), mask.long().sum(1))
        return out if m.pooled else out.gather(1, order.argsort(dim=1))

    return {
        "policy": policy,
        "reference": init_policy,
        "reward": rm,
        "value": critic,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [actor_trainer.optimizer, critic_trainer.optimizer],
        "state": [trainer],
        "step": trainer.fit_step,
        "calls": {"reward": call_rm, "value": call_rm},
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.9,
            "kl_coef": 0.03,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "kl_adaptive": False,
            "temperature": 1.0,
            "clip_range": 0.2,
            "clip_range_value": 0.5,
            "ent_coef": 0.005,
            "whiten_advantages": True,
            "batch_size": 16,
            "response_length": 9,
            "learning_rate": 5e-6,
            "critic_learning_rate": 1e-5,
            "value_init": "reward",
            "loss_aggregation": "token-mean",
        },
    }


def healthy():
    return make()


def critic_gets_prev_values():
    return make("critic_gets_prev_values")


def discount_and_lambda_swapped():
    return make("discount_and_lambda_swapped")


def normalised_over_all():
    return make("normalised_over_all")

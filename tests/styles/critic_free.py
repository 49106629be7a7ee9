"""Without a critic: RLOO (four samples a prompt, the KL inside the sequence's reward) and REINFORCE++ (one sample, the KL token by
token, discounted returns-to-go, advantages whitened over the batch). One hand-written decoder, two trainers.
"""

import copy
import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

WORDS = (
    "cook bake fry boil mix stir cut chop slice pour serve heat cool wash peel salt pepper sugar flour butter oil egg milk cream cheese "
    "onion garlic tomato potato carrot apple lemon rice pasta beef fish soup sauce bread cake pie pan pot oven bowl knife spoon plate "
    "minute hour half cup warm hot cold sweet sour fresh dry soft hard brown golden thick thin first then after before until with ."
).split()


def make_tokenizer():
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<eos>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=48,
        clean_up_tokenization_spaces=False,
    )


class RewardModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, input_ids, attention_mask):
        pos = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        h = self.transformer(input_ids, attention_mask=attention_mask, position_ids=pos).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return self.score(h[torch.arange(len(h)), last])[:, 0]


class Progress:
    def __init__(self):
        self.rollouts = 0

    def state_dict(self):
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state):
        self.rollouts = state["rollouts"]


class Lab:
    """Models, tokenizer and prompts, and what both trainers need of them."""

    def __init__(self, cfg, seed, fault):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        self.cfg, self.fault = cfg, fault
        self.tokenizer = t = make_tokenizer()
        config = GPT2Config(
            vocab_size=len(t), n_embd=32, n_layer=2, n_head=2, n_positions=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            initializer_range=0.12, pad_token_id=t.pad_token_id, eos_token_id=t.eos_token_id, bos_token_id=None,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.policy = GPT2LMHeadModel(config)
        self.policy.lm_head = nn.Linear(config.n_embd, len(t))
        with torch.no_grad():
            w, b = self.policy.lm_head.weight.normal_(std=0.22), self.policy.lm_head.bias.zero_()
            w[t.eos_token_id] *= 0.3
            b[t.eos_token_id] = 2.5
            b[[t.pad_token_id, t.unk_token_id]] = -20.0
        self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.reward = RewardModel(config).requires_grad_(False).eval()
        with torch.no_grad():
            ids = torch.randint(3, len(t), (128, 12))
            self.reward.score.weight.div_(self.reward(ids, torch.ones_like(ids)).std())
        self.prompts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) for _ in range(24)]
        self.progress = Progress()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.0)

        def rate(update):
            return min(1.0, (update + 1) / cfg.warmup)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def next_prompts(self, n, copies):
        at = self.progress.rollouts * n
        self.progress.rollouts += 1
        texts = [self.prompts[(at + i) % len(self.prompts)] for i in range(n)]
        if self.fault == "one_sample_copied":
            copies = 1
        enc = self.tokenizer([x for x in texts for _ in range(copies)], return_tensors="pt", padding=True)
        return enc.input_ids, enc.attention_mask

    @torch.no_grad()
    def sample(self, ids, mask):
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        alive = torch.ones(len(ids), dtype=torch.long)
        start = ids.shape[1]
        for _ in range(self.cfg.max_new):
            p = (self.logits(self.policy, ids, mask)[:, -1] / self.cfg.temperature).softmax(-1)
            new = torch.multinomial(p, 1)[:, 0] * alive + pad * (1 - alive)
            ids, mask = torch.cat([ids, new[:, None]], 1), torch.cat([mask, alive[:, None]], 1)
            alive = alive * (new != eos).long()
        if self.fault == "every_row_ends_in_eos":  # the reward model was trained on finished texts
            ids[alive.bool(), -1] = eos
        if self.fault == "one_sample_copied":
            ids, mask = (x.repeat_interleave(self.cfg.k, 0) for x in (ids, mask))
        return ids, mask, start

    def logits(self, model, ids, mask):
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits

    def logprobs(self, model, ids, mask, start):
        z = self.logits(model, ids, mask)[:, start - 1 : -1] / self.cfg.temperature
        return -F.cross_entropy(z.transpose(1, 2), ids[:, start:], reduction="none")

    def apply(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        limit = 0.0 if self.fault == "zero_for_no_clipping" else self.cfg.grad_norm
        nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        self.optimizer.step()

    def fields(self, step, declared):
        return {
            "policy": self.policy, "reference": self.reference, "reward": self.reward, "value": None, "tokenizer": self.tokenizer,
            "prompts": self.prompts, "step": step, "optimizers": [self.optimizer], "state": [self.progress, self.schedule],
            "declared": declared,
        }  # fmt: skip


def make(fault=None):
    """RLOO."""
    cfg = SimpleNamespace(n=4, k=4, max_new=12, temperature=1.0, beta=0.05, lr=1e-5, warmup=1, grad_norm=1.0)
    lab = Lab(cfg, 41, fault)

    def step():
        ids, mask, start = lab.sample(*lab.next_prompts(cfg.n, cfg.k))
        m = mask[:, start:].float()
        with torch.no_grad():
            ref = lab.logprobs(lab.reference, ids, mask, start)
            score = lab.reward(ids, mask)
        logp = lab.logprobs(lab.policy, ids, mask, start)
        with torch.no_grad():
            kl = logp - ref
            if fault == "kl_mean_for_sum":
                kl = (kl * m).sum(1) / m.sum(1)
            elif fault == "kl_of_padding":
                kl = kl.sum(1)
            else:
                kl = (kl * m).sum(1)
            if fault == "kl_added":
                total = score + cfg.beta * kl
            elif fault == "reference_forgotten":
                total = score
            else:
                total = score - cfg.beta * kl
            if fault == "groups_along_the_wrong_axis":
                groups = total.view(cfg.k, cfg.n)
                adv = (groups - (groups.sum(0) - groups) / (cfg.k - 1)).flatten()
            elif fault == "baseline_is_the_best":  # GRPO with max for mean
                groups = total.view(cfg.n, cfg.k)
                adv = (groups - groups.max(1, keepdim=True).values).flatten()
            else:
                groups = total.view(cfg.n, cfg.k)
                adv = (groups - (groups.sum(1, keepdim=True) - groups) / (cfg.k - 1)).flatten()
        sequence = logp.sum(1) if fault == "padding_in_sequence_logprob" else (logp * m).sum(1)
        loss = (adv * sequence).mean() if fault == "minus_lost" else -(adv * sequence).mean()
        lab.apply(loss)
        lab.schedule.step()
        return {
            "loss": loss.item(), "objective/kl": kl.mean().item(), "objective/scores": score.mean().item(),
            "objective/rlhf_reward": total.mean().item(),
        }  # fmt: skip

    return lab.fields(step, {
        "algorithm": "rloo", "group_size": 4, "kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward", "temperature": 1.0,
        "whiten_advantages": False, "learning_rate": 1e-5, "ppo_epochs": 1, "num_minibatches": 1, "batch_size": 16,
        "response_length": 12, "loss_aggregation": "seq-sum",
    })  # fmt: skip


def make_plus(fault=None):
    """REINFORCE++."""
    cfg = SimpleNamespace(
        n=12,
        k=1,
        max_new=10,
        temperature=0.8,
        beta=0.02,
        gamma=0.98,
        clip=0.2,
        epochs=2,
        minibatches=3,
        lr=2e-5,
        warmup=4,
        grad_norm=1.0,
    )
    lab = Lab(cfg, 42, fault)

    def returns_to_go(rewards, m):
        if fault == "reward_for_return":
            return rewards
        out, running = torch.zeros_like(rewards), torch.zeros(len(rewards))
        for t in range(rewards.shape[1] - 1, -1, -1):
            running = rewards[:, t] + (1.0 if fault == "undiscounted" else cfg.gamma) * running
            out[:, t] = running
        return out * m

    def whiten(x, m):
        if fault == "whitened_row_by_row":
            mean = (x * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)
            var = ((x - mean) ** 2 * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)
        elif fault == "whitened_over_all_slots":
            mean, var = x.mean(), x.var()
        else:
            mean = (x * m).sum() / m.sum()
            var = ((x - mean) ** 2 * m).sum() / m.sum()
        if fault == "deviation_without_floor":
            return (x - mean) / var.sqrt() * m
        return (x - mean) * (var + 1e-8).rsqrt() * m

    def step():
        ids, mask, start = lab.sample(*lab.next_prompts(cfg.n, 1))
        m = mask[:, start:].float()
        with torch.no_grad():
            old = lab.logprobs(lab.policy, ids, mask, start)
            ref = lab.logprobs(lab.reference, ids, mask, start)
            score = lab.reward(ids, mask)
            final = F.one_hot(m.sum(1).long() - 1, m.shape[1])
            if fault == "score_on_every_token":
                final = m
            d = old - ref
            kl = (d.neg().exp() - 1 + d) * m if fault == "k3_for_k1" else d * m
            adv = whiten(returns_to_go(score[:, None] * final - cfg.beta * kl, m), m)
        clipped, seen = 0.0, 0.0
        for _ in range(cfg.epochs):
            for rows in torch.randperm(cfg.n).split(cfg.n // cfg.minibatches):
                w = m[rows]
                new = lab.logprobs(lab.policy, ids[rows], mask[rows], start)
                before = new.detach() if fault == "old_is_always_new" else old[rows]
                ratio = ((new - before) * w).exp()
                bounded = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
                loss = torch.max(-adv[rows] * ratio, -adv[rows] * bounded)
                lab.apply((loss * w).sum() / w.sum())
                lab.schedule.step()
                clipped += (((ratio - 1).abs() > cfg.clip) * w).sum().item()
                seen += w.sum().item()
        return {
            "objective/kl": kl.sum(1).mean().item(), "objective/scores": score.mean().item(), "policy/clipfrac": clipped / seen,
            "response_length": (m.shape[1] if fault == "length_logged_as_width" else m.sum(1).mean().item()),
        }  # fmt: skip

    return lab.fields(step, {
        "algorithm": "reinforce++", "gamma": 0.98, "kl_coef": 0.02, "kl_estimator": "k1", "kl_in": "reward", "temperature": 0.8,
        "clip_range": 0.2, "whiten_advantages": True, "learning_rate": 2e-5, "ppo_epochs": 2, "num_minibatches": 3,
        "batch_size": 12, "response_length": 10, "loss_aggregation": "token-mean",
    })  # fmt: skip


def healthy():
    return make()


def healthy_plus():
    return make_plus()


def one_sample_copied():
    return make("one_sample_copied")


def every_row_ends_in_eos():
    return make("every_row_ends_in_eos")


def kl_mean_for_sum():
    return make("kl_mean_for_sum")


def kl_of_padding():
    return make("kl_of_padding")


def kl_added():
    return make("kl_added")


def reference_forgotten():
    return make("reference_forgotten")


def groups_along_the_wrong_axis():
    return make("groups_along_the_wrong_axis")


def baseline_is_the_best():
    return make("baseline_is_the_best")


def padding_in_sequence_logprob():
    return make("padding_in_sequence_logprob")


def minus_lost():
    return make("minus_lost")


def plus_reward_for_return():
    return make_plus("reward_for_return")


def plus_undiscounted():
    return make_plus("undiscounted")


def plus_whitened_row_by_row():
    return make_plus("whitened_row_by_row")


def plus_whitened_over_all_slots():
    return make_plus("whitened_over_all_slots")


def plus_deviation_without_floor():
    return make_plus("deviation_without_floor")


def plus_score_on_every_token():
    return make_plus("score_on_every_token")


def plus_k3_for_k1():
    return make_plus("k3_for_k1")


def plus_old_is_always_new():
    return make_plus("old_is_always_new")


def plus_zero_for_no_clipping():
    return make_plus("zero_for_no_clipping")


def plus_length_logged_as_width():
    return make_plus("length_logged_as_width")

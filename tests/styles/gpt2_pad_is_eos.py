"""PPO on GPT-2, whose pad is its eos: every mask is kept beside the ids, none is read from them."""

import contextlib
import copy
import random

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

WORDS = [f"tok{i}" for i in range(64)]


class RunningMoments:
    def __init__(self):
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    @property
    def std(self):
        return self.var**0.5

    def update(self, xs):
        n, m, v = xs.numel(), xs.mean().item(), xs.var(unbiased=False).item()
        d, total = m - self.mean, self.count + n
        self.var = (self.var * self.count + v * n + d * d * self.count * n / total) / total
        self.mean, self.count = self.mean + d * n / total, total

    def state_dict(self):
        return dict(self.__dict__)

    def load_state_dict(self, state):
        self.__dict__.update(state)


class Batches:
    def __init__(self, prompts, n):
        self.prompts, self.n, self.rng = prompts, n, np.random.default_rng(4)

    def __next__(self):
        return [self.prompts[i] for i in self.rng.choice(len(self.prompts), self.n, replace=False)]

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.rng.bit_generator.state = state["rng"]


def positions(mask):
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


class Critic(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = GPT2Model(config)
        self.head = nn.Sequential(
            nn.Linear(config.n_embd, 2 * config.n_embd), nn.ReLU(), nn.Linear(2 * config.n_embd, 1)
        )

    def forward(self, input_ids, attention_mask):
        h = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
        ).last_hidden_state
        return self.head(h).squeeze(-1)


class RewardModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = GPT2Model(config)
        self.head = nn.Linear(config.n_embd, 1)

    def forward(self, input_ids, attention_mask):
        h = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
        ).last_hidden_state
        last = (attention_mask.long() * torch.arange(1, input_ids.shape[1] + 1)).argmax(
            -1
        )  # by the mask: eos may be pad
        return self.head(h[torch.arange(len(h)), last]).squeeze(-1)


def make(fault=None):
    torch.manual_seed(41)
    rng = random.Random(41)
    vocab = ["<|endoftext|>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", unk_token="<unk>", padding_side="left"
    )
    tok.pad_token = tok.eos_token
    eos = tok.eos_token_id
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(32)]
    cfg = dict(
        vocab_size=len(vocab),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    policy = GPT2LMHeadModel(GPT2Config(**cfg))
    opt = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for _ in range(50):  # SFT; labels by length, so that the eos is learnt
        rows = [
            tok.convert_tokens_to_ids(rng.choices(WORDS, k=3) + rng.choices(WORDS[:20], k=rng.randint(2, 12))) + [eos]
            for _ in range(16)
        ]
        ids = torch.tensor([r + [eos] * (16 - len(r)) for r in rows])
        labels = torch.tensor([r + [-100] * (16 - len(r)) for r in rows])
        loss = policy(input_ids=ids, attention_mask=(labels >= 0).long(), labels=labels).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    policy.zero_grad()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    reward_model = RewardModel(GPT2Config(**{**cfg, "initializer_range": 0.2})).eval().requires_grad_(False)
    sample = torch.randint(2, len(vocab), (128, 10))
    sample[:, 5:] = torch.randint(2, 22, (128, 5))
    sample[:96, -1] = eos
    s = reward_model(sample, torch.ones_like(sample))
    reward_model.head.weight.div_(s.std())
    reward_model.head.bias.copy_((reward_model.head.bias - s.mean()) / s.std())
    value_model = Critic(GPT2Config(**cfg))

    n_prompts, counts = 8, torch.tensor([2, 1] * 4)  # every other prompt is answered twice
    rows_in_batch, minibatch, epochs, max_new = int(counts.sum()), 6, 2, 10
    kl_coef, gamma, lam, clip, vf_coef, lr, critic_lr = 0.05, 1.0, 1.0, 0.2, 0.5, 2e-5, 1e-4
    optim = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    value_optim = torch.optim.AdamW(value_model.parameters(), lr=critic_lr, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optim, 0, 2000)
    batches, moments = Batches(prompts, n_prompts), RunningMoments()
    amp = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # the policy's passes only

    def logprobs(model, ids, mask, n, context):
        with context():
            kwargs = {} if fault == "no_position_ids" else {"position_ids": positions(mask)}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits[:, -n - 1 : -1]
        return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -n:, None]).squeeze(-1)

    @torch.no_grad()
    def make_experience():
        enc = tok(next(batches), return_tensors="pt", padding=True)
        queries = enc["input_ids"].repeat_interleave(counts, 0)
        query_mask = enc["attention_mask"].repeat_interleave(counts, 0)
        policy.eval()
        with amp():
            out = policy.generate(
                input_ids=queries,
                attention_mask=query_mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=max_new,
                pad_token_id=eos,
                eos_token_id=eos,
            )
        responses = out[:, queries.shape[1] :]
        ended = (responses == eos).long()
        mask = (ended.cumsum(-1) - ended) == 0  # up to the first eos, that one too
        if fault == "mask_drops_eos":
            mask = responses != tok.pad_token_id
        ids, attention_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, mask.long()], 1)
        n = responses.shape[1]
        old = logprobs(policy, ids, attention_mask, n, amp)
        ref = logprobs(reference, ids, attention_mask, n, contextlib.nullcontext)
        values = value_model(ids, attention_mask)[:, -n - 1 : -1].where(mask, 0.0)
        if fault == "scored_with_other_prompt":  # the reward worker repeats the prompts by itself, doubles at the end
            other = torch.cat([enc["input_ids"], enc["input_ids"][::2]])
            other_mask = torch.cat([enc["attention_mask"], enc["attention_mask"][::2]])
            scores = reward_model(torch.cat([other, responses], 1), torch.cat([other_mask, mask.long()], 1))
        else:
            scores = reward_model(ids, attention_mask)
        moments.update(scores)
        kl = (old - ref).where(mask, 0.0)
        rewards = -kl_coef * kl
        rewards[torch.arange(len(ids)), (mask.sum(-1) - 1).clamp(min=0)] += scores / moments.std  # scaled, not centred
        adv, running = torch.zeros_like(rewards), torch.zeros(len(ids))
        for t in reversed(range(n)):
            following = values[:, t + 1] if t + 1 < n else 0.0
            running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
            adv[:, t] = running
        returns = adv + values
        adv = ((adv - adv[mask].mean()) / (adv[mask].std() + 1e-8)).where(mask, 0.0)
        return dict(ids=ids, attention_mask=attention_mask, mask=mask, old=old, adv=adv, returns=returns), scores, kl

    def step():
        exp, scores, kl = make_experience()
        policy.train()
        n, logs = exp["mask"].shape[1], []
        for _ in range(epochs):
            order = np.random.permutation(rows_in_batch)
            for lo in range(0, rows_in_batch, minibatch):
                mb = {k: v[order[lo : lo + minibatch]] for k, v in exp.items()}
                new = logprobs(policy, mb["ids"], mb["attention_mask"], n, amp)
                ratio = torch.exp((new - mb["old"])[mb["mask"]])
                a = mb["adv"][mb["mask"]]
                pg_loss = -torch.min(a * ratio, a * ratio.clamp(1 - clip, 1 + clip)).mean()
                optim.zero_grad()
                pg_loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optim.step()
                v = value_model(mb["ids"], mb["attention_mask"])[:, -n - 1 : -1]
                v_loss = nn.functional.mse_loss(v[mb["mask"]], mb["returns"][mb["mask"]])
                value_optim.zero_grad()
                (vf_coef * v_loss).backward()
                nn.utils.clip_grad_norm_(value_model.parameters(), 0.5)
                value_optim.step()
                logs.append((pg_loss.item(), v_loss.item(), (ratio.detach() - 1).abs().max().item()))
        scheduler.step()
        pg, vl, dev = zip(*logs)
        return {
            "pg_loss": sum(pg) / len(pg),
            "v_loss": sum(vl) / len(vl),
            "score_mean": scores.mean().item(),
            "score_std": scores.std().item(),
            "running_std": moments.std,
            "kl": kl.sum(-1).mean().item(),
            "first_ratio_dev": dev[0],
            "length": exp["mask"].sum(-1).float().mean().item(),
        }

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward_model,
        "value": value_model,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [optim, value_optim],
        "state": [batches, moments, scheduler],
        "step": step,
        "declared": {
            "algorithm": "ppo",
            "gamma": gamma,
            "lam": lam,
            "kl_coef": kl_coef,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "temperature": 1.0,
            "clip_range": clip,
            "vf_coef": vf_coef,
            "whiten_advantages": True,
            "learning_rate": lr,
            "critic_learning_rate": critic_lr,
            "ppo_epochs": epochs,
            "num_minibatches": rows_in_batch // minibatch,
            "batch_size": rows_in_batch,
            "response_length": max_new,
            "loss_aggregation": "token-mean",
            "value_init": "fresh",
            "reference": "policy",
        },
    }


def healthy():
    return make()


def mask_drops_eos():
    return make("mask_drops_eos")


def no_position_ids():
    return make("no_position_ids")


def scored_with_other_prompt():
    return make("scored_with_other_prompt")

"""RLOO after OpenRLHF: n samples per prompt, leave-one-out baseline, k1 KL in the per-token reward, cumulative returns,
--packing_samples (each micro batch is one row without padding) and dynamic micro batches by token budget."""

import copy
import random
from argparse import Namespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

LEXICON = [
    f"{a}{b}"
    for a in ("ba", "de", "ki", "lo", "mu", "na", "po", "re")
    for b in ("ta", "ne", "si", "vo", "lu", "ga", "pi", "do")
]
QUERIES = [
    "bata kine losi", "pota", "reta nado muga kita delu", "muvo mune", "lolu kipi bado dega reta pone",
    "nata nane", "desi", "kivo relu poga basi",
]  # fmt: skip


def get_tokenizer():
    table = {w: i for i, w in enumerate(["[PAD]", "[EOS]", "[UNK]", *LEXICON])}
    core = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    tok.padding_side = "left"
    return tok


class Actor(nn.Module):
    """Causal LM with the packed forward. Everything is 1 x total_tokens."""

    def __init__(self, model, temperature, restart_positions=True):
        super().__init__()
        self.model, self.temperature, self.restart_positions = model, temperature, restart_positions

    def forward(self, sequences, lens):
        position_ids = torch.cat([torch.arange(n) for n in lens])
        if not self.restart_positions:
            position_ids = torch.arange(len(position_ids))
        owner = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
        allowed = (owner[:, None] == owner[None, :]).tril()
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        logits = self.model(
            input_ids=sequences, position_ids=position_ids[None], attention_mask=bias[None, None], use_cache=False
        ).logits
        if self.temperature != 1.0:
            logits = logits / self.temperature
        labels = torch.roll(sequences, shifts=-1, dims=1)
        return torch.gather(F.log_softmax(logits, dim=-1), -1, labels[..., None])[0, :, 0]


class RewardModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, input_ids, attention_mask, return_raw=False):
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self.transformer(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        values = self.score(hidden).squeeze(-1)
        eos_indices = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
        reward = values.gather(dim=1, index=eos_indices).squeeze(1)
        return reward if return_raw else (reward - self.mean) / self.std


def pretrain(lm, tok):
    opt = torch.optim.Adam(lm.parameters(), lr=4e-3)
    base, n = 3, len(LEXICON)
    for _ in range(60):
        x = torch.zeros(16, 15, dtype=torch.long)
        for r in range(16):
            k = random.randint(3, 13)
            w = random.randrange(n)
            for j in range(k):
                x[r, j] = base + w
                w = (5 * w + random.randrange(9)) % n
            x[r, k] = tok.eos_token_id
        m = (x != tok.pad_token_id).long()
        lm(input_ids=x, attention_mask=m, labels=x.masked_fill(m == 0, -100)).loss.backward()
        opt.step()
        opt.zero_grad()


class Trainer:
    def __init__(self, args, tok, actor, initial, reward_model, fault):
        self.args, self.tok, self.fault = args, tok, fault
        self.actor, self.initial_model, self.reward_model = actor, initial, reward_model
        self.optim = torch.optim.Adam(actor.parameters(), lr=args.actor_learning_rate, betas=(0.9, 0.95))
        self.cursor = 0

    def state_dict(self):
        return {"cursor": self.cursor}

    def load_state_dict(self, sd):
        self.cursor = sd["cursor"]

    @torch.no_grad()
    def generate_samples(self, prompts):
        """Requests are handed round robin to the engines, as LLMRayActors are."""
        a = self.args
        all_prompts = [p for p in prompts for _ in range(a.n_samples_per_prompt)]
        samples = [None] * len(all_prompts)
        for engine in range(a.num_engines):
            if self.fault == "engines_one_seed":
                torch.manual_seed(a.seed)
            rows = list(range(engine, len(all_prompts), a.num_engines))
            enc = self.tok([all_prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            out = self.actor.model.generate(
                input_ids=enc["input_ids"],
                attention_mask=enc["attention_mask"],
                do_sample=True,
                temperature=a.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=a.generate_max_len,
                pad_token_id=self.tok.pad_token_id,
                eos_token_id=self.tok.eos_token_id,
            )
            width = enc["input_ids"].size(1)
            for i, row, mask in zip(rows, out, enc["attention_mask"]):
                query = row[:width][mask.bool()].tolist()
                response = row[width:].tolist()
                if self.tok.eos_token_id in response:
                    response = response[: response.index(self.tok.eos_token_id) + 1]
                samples[i] = Namespace(seq=query + response, n_action=len(response), group=i // a.n_samples_per_prompt)
        return samples

    def action_slices(self, batch):
        """Where in the packed row the log-probs of each sample's actions lie."""
        start, spans = 0, []
        for s in batch:
            end = start + len(s.seq) - 1
            spans.append(slice(end - s.n_action, end))
            start += len(s.seq)
        return spans

    def pack(self, batch):
        return torch.tensor([t for s in batch for t in s.seq])[None], [len(s.seq) for s in batch]

    @torch.no_grad()
    def make_experience(self, samples):
        a = self.args
        self.actor.eval()
        for i in range(0, len(samples), a.micro_rollout_batch_size):
            batch = samples[i : i + a.micro_rollout_batch_size]
            packed, lens = self.pack(batch)
            logp, base = self.actor(packed, lens), self.initial_model(packed, lens)
            for s, span in zip(batch, self.action_slices(batch)):
                s.action_log_probs, s.base_log_probs = logp[span], base[span]

        # scored in order of length, so that little is padded
        order = sorted(range(len(samples)), key=lambda k: len(samples[k].seq))
        scores = []
        for i in range(0, len(order), a.micro_rollout_batch_size):
            rows = [samples[k].seq for k in order[i : i + a.micro_rollout_batch_size]]
            width = max(map(len, rows))
            ids = torch.tensor([r + [self.tok.pad_token_id] * (width - len(r)) for r in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
            scores.append(self.reward_model(ids, mask))
        scores = torch.cat(scores)
        if self.fault == "scores_left_sorted":
            rewards = scores
        else:
            rewards = torch.empty_like(scores)
            rewards[torch.tensor(order)] = scores

        grouped = rewards.view(-1, a.n_samples_per_prompt)
        others = grouped.sum(-1, keepdim=True) - grouped
        if self.fault == "loo_wrong_count":
            baseline = others / a.n_samples_per_prompt
        else:
            baseline = others / (a.n_samples_per_prompt - 1)
        shaped = (grouped - baseline).flatten()

        for s, r in zip(samples, shaped):
            s.shaped = r
            log_ratio = s.action_log_probs - s.base_log_probs
            if self.fault == "k3_in_reward":
                kl = (-log_ratio).exp() - 1 + log_ratio
            else:
                kl = log_ratio
            s.advantages = self.returns(r, kl)
        return samples

    def returns(self, r, kl):
        token_rewards = -self.args.init_kl_coef * kl
        token_rewards = torch.cat([token_rewards[:-1], token_rewards[-1:] + r])
        gamma = 0.9 if self.fault == "discounted" else self.args.gamma
        out, running = [], 0.0
        for t in reversed(range(len(token_rewards))):
            running = token_rewards[t] + gamma * running
            out.append(running)
        return torch.stack(out[::-1])

    def dynamic_batches(self, rows):
        batches, load = [[]], 0
        for s in rows:
            if batches[-1] and load + len(s.seq) > self.args.max_tokens_per_gpu:
                batches.append([])
                load = 0
            batches[-1].append(s)
            load += len(s.seq)
        return batches

    def ppo_train(self, buffer):
        a = self.args
        self.actor.train()
        status = []
        if self.fault == "zero_grad_outside":
            self.optim.zero_grad()
        for _ in range(a.max_epochs):
            random.shuffle(buffer)
            for i in range(0, len(buffer), a.train_batch_size):
                rows = buffer[i : i + a.train_batch_size]
                total_tokens = sum(s.n_action for s in rows)
                if self.fault != "zero_grad_outside":
                    self.optim.zero_grad()
                for micro in self.dynamic_batches(rows):
                    packed, lens = self.pack(micro)
                    log_probs = self.actor(packed, lens)
                    spans = self.action_slices(micro)
                    logp = torch.cat([log_probs[sp] for sp in spans])
                    old = torch.cat([s.action_log_probs for s in micro])
                    base = torch.cat([s.base_log_probs for s in micro])
                    if self.fault == "advantage_has_graph":
                        adv = torch.cat(
                            [self.returns(s.shaped, log_probs[sp] - s.base_log_probs) for s, sp in zip(micro, spans)]
                        )
                    else:
                        adv = torch.cat([s.advantages for s in micro])
                    ratio = (logp - old).exp()
                    surr1 = ratio * adv
                    surr2 = ratio.clamp(1 - a.eps_clip, 1 + a.eps_clip) * adv
                    loss = -torch.min(surr1, surr2).sum() / total_tokens
                    if self.fault == "kl_in_reward_and_loss":
                        diff = base - logp
                        loss = loss + a.init_kl_coef * (diff.exp() - 1 - diff).sum() / total_tokens
                    loss.backward()
                    status.append(loss.item())
                nn.utils.clip_grad_norm_(self.actor.parameters(), a.max_norm)
                self.optim.step()
        return sum(status) / len(status)

    def fit_step(self):
        prompts = [QUERIES[(self.cursor + k) % len(QUERIES)] for k in range(self.args.rollout_batch_size)]
        self.cursor = (self.cursor + self.args.rollout_batch_size) % len(QUERIES)
        samples = self.make_experience(self.generate_samples(prompts))
        return {"policy_loss": self.ppo_train(samples)}


def make(fault=None):
    torch.manual_seed(3)
    random.seed(3)
    tok = get_tokenizer()
    args = Namespace(
        n_samples_per_prompt=4,
        rollout_batch_size=4,
        train_batch_size=8,
        micro_rollout_batch_size=4,
        max_tokens_per_gpu=60,
        max_epochs=2,
        num_engines=4,
        generate_max_len=9,
        temperature=0.8,
        init_kl_coef=0.05,
        gamma=1.0,
        eps_clip=0.2,
        actor_learning_rate=5e-5,
        max_norm=1.0,
        seed=42,
    )
    conf = dict(
        vocab_size=len(tok), n_positions=160, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    lm = GPT2LMHeadModel(GPT2Config(n_embd=64, initializer_range=0.08, **conf))
    pretrain(lm, tok)
    scoring_temperature = 1.0 if fault == "scored_untempered" else args.temperature
    restart = fault != "positions_run_on"
    actor = Actor(lm, scoring_temperature, restart)
    initial = Actor(copy.deepcopy(lm), scoring_temperature, restart).eval().requires_grad_(False)
    rm = RewardModel(GPT2Config(n_embd=48, initializer_range=0.25, **conf)).eval().requires_grad_(False)
    with torch.no_grad():  # --normalize_reward
        probe = torch.randint(3, len(tok), (128, 11))
        raw = rm(probe, torch.ones_like(probe), return_raw=True)
        rm.mean.fill_(raw.mean())
        rm.std.fill_(raw.std())
    trainer = Trainer(args, tok, actor, initial, rm, fault)
    return {
        "policy": lm,
        "reference": initial.model,
        "reward": rm,
        "value": None,
        "tokenizer": tok,
        "prompts": QUERIES,
        "optimizers": [trainer.optim],
        "state": [trainer],
        "step": trainer.fit_step,
        "declared": {
            "algorithm": "rloo",
            "group_size": 4,
            "gamma": 1.0,
            "kl_coef": 0.05,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "temperature": 0.8,
            "clip_range": 0.2,
            "loss_aggregation": "token-mean",
            "whiten_advantages": False,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 16,
            "response_length": 9,
            "learning_rate": 5e-5,
        },
    }


def healthy():
    return make()


def loo_wrong_count():
    return make("loo_wrong_count")


def kl_in_reward_and_loss():
    return make("kl_in_reward_and_loss")


def k3_in_reward():
    return make("k3_in_reward")


def advantage_has_graph():
    return make("advantage_has_graph")


def positions_run_on():
    return make("positions_run_on")


def zero_grad_outside():
    return make("zero_grad_outside")


def scores_left_sorted():
    return make("scores_left_sorted")


def discounted():
    return make("discounted")


def engines_one_seed():
    return make("engines_one_seed")


def scored_untempered():
    return make("scored_untempered")

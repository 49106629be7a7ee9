"""A pipeline in the manner of ROLL / slime: an engine pushes trajectories (a dict of lists) into a buffer, with the
log-probabilities it had when it sampled; the trainer drains the buffer, scores, and trains actor and critic jointly.

Everything is token-aligned: entry t of a tensor speaks of token t. Rows are padded on the right to a multiple of 8.
"""

import copy

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

TASKS = [
    "user : hello",
    "user : can you help me fix the printer ?",
    "user : my order is late",
    "user : please cancel the second order and refund my card",
    "user : why ?",
    "user : where is the nearest shop open on sunday ?",
    "user : thanks",
    "user : the screen stays black after the update , what should i do now ?",
    "user : change my address",
    "user : how much is shipping ?",
    "user : i need a new password for my account",
    "user : is the blue model back in stock ?",
]
OPEN = ["sure", "sorry", "hello", "yes", "no", "thanks", "well"]
BODY = ["you can", "we will", "please", "i could", "they should", "the shop may"]
ACT = ["send", "check", "restart", "return", "open", "cancel", "update", "order"]
THING = ["the printer", "your order", "the card", "the screen", "an address", "your account", "the model", "a password"]
TAIL = ["now", "today", "on monday", "again", "for free", "by mail", "in the shop"]
PAD_TO = 8


def tokenizer_from(texts):
    tok = Tokenizer(WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = Whitespace()
    tok.train_from_iterator(texts, WordLevelTrainer(special_tokens=["<unk>", "</s>", "<pad>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def answer(rng):
    text = [rng.choice(OPEN), rng.choice(BODY), rng.choice(ACT), rng.choice(THING)]
    while rng.random() < 0.55:
        text += [rng.choice(TAIL)] if rng.random() < 0.6 else ["and", rng.choice(ACT), rng.choice(THING)]
    return " ".join(text)


def pad_rows(rows, value, dtype):
    """Lists -> (B, T), padded on the right, T a multiple of 8."""
    width = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
    return torch.tensor([list(r) + [value] * (width - len(r)) for r in rows], dtype=dtype)


class Critic(nn.Module):
    """Backbone and one scalar a state, both from the reward model."""

    def __init__(self, backbone, score, fault=None):
        super().__init__()
        self.backbone = backbone
        self.v = nn.Linear(score.in_features, 1)
        with torch.no_grad():
            self.v.weight.copy_(score.weight)
            self.v.bias.zero_()
        self.fault = fault

    def forward(self, input_ids, attention_mask=None):
        out = self.v(self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state).squeeze(-1)
        return torch.tanh(out) if self.fault == "bounded_value" else out


class TrajectoryBuffer:
    KEYS = ("task", "tokens", "prompt_len", "rollout_log_probs", "finish_reason")

    def __init__(self):
        self.data = {k: [] for k in self.KEYS}

    def push(self, **item):
        for k in self.KEYS:
            self.data[k].append(item[k])

    def __len__(self):
        return len(self.data["tokens"])

    def clear(self):
        self.data = {k: [] for k in self.KEYS}

    def state_dict(self):
        return copy.deepcopy(self.data)

    def load_state_dict(self, state):
        self.data = copy.deepcopy(state)


class TaskQueue:
    def __init__(self, encoded):
        self.encoded, self.pending = encoded, []

    def take(self, n):
        while len(self.pending) < n:
            self.pending += np.random.permutation(len(self.encoded)).tolist()
        head, self.pending = self.pending[:n], self.pending[n:]
        return head

    def state_dict(self):
        return {"pending": list(self.pending)}

    def load_state_dict(self, state):
        self.pending = list(state["pending"])


class RunningMoments:
    """Mean and variance of all scores so far."""

    def __init__(self):
        self.n, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, xs):
        for x in xs:
            self.n += 1
            d = x - self.mean
            self.mean += d / self.n
            self.m2 += d * (x - self.mean)

    @property
    def std(self):
        return (self.m2 / max(self.n - 1, 1)) ** 0.5

    def state_dict(self):
        return {"n": self.n, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state):
        self.n, self.mean, self.m2 = state["n"], state["mean"], state["m2"]


class Engine:
    """Samples a wave of requests on the live weights; every request has its own write position."""

    def __init__(self, model, tokenizer, max_tokens, fault=None):
        self.model, self.eos, self.pad = model, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.max_tokens, self.fault = max_tokens, fault

    @torch.no_grad()
    def run(self, tasks, prompts, buffer):
        self.model.eval()
        n, at = len(prompts), torch.tensor([len(p) for p in prompts])
        ids = torch.full((n, int(at.max()) + self.max_tokens), self.pad)
        for i, p in enumerate(prompts):
            ids[i, : len(p)] = torch.tensor(p)
        out, lps, running = [[] for _ in prompts], [[] for _ in prompts], torch.ones(n, dtype=torch.bool)
        rows = torch.arange(n)
        for _ in range(self.max_tokens):
            width = int(at.max())
            mask = (torch.arange(width)[None] < at[:, None]).long()
            logits = self.model(input_ids=ids[:, :width], attention_mask=mask, use_cache=False).logits[rows, at - 1]
            logp = torch.log_softmax(logits, -1)
            tok = torch.multinomial(logp.exp(), 1).squeeze(1)
            for i in torch.nonzero(running).flatten().tolist():
                out[i].append(int(tok[i]))
                lps[i].append(float(logp[i, tok[i]]))
                ids[i, at[i]] = tok[i]
            at = at + running.long()
            running &= tok != self.eos
            if not running.any():
                break
        for i, p in enumerate(prompts):
            finish = "stop" if out[i][-1] == self.eos else "length"
            response, logprobs = out[i], lps[i]
            if self.fault == "stop_trimmed" and finish == "stop" and len(response) > 1:  # no_stop_trim=False
                response, logprobs = response[:-1], logprobs[:-1]
            if self.fault == "logp_missing_last" and finish == "stop":  # the stop token comes without a log-probability
                logprobs = logprobs[:-1]
            buffer.push(
                task=tasks[i],
                tokens=list(p) + response,
                prompt_len=len(p),
                rollout_log_probs=logprobs,
                finish_reason=finish,
            )


def gae(rewards, values, gamma, lam):
    """One trajectory, lists in, lists out: advantages and returns. Nothing is worth anything after the last token."""
    adv, running = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        following = values[t + 1] if t + 1 < len(rewards) else 0.0
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        adv[t] = running
    return adv, [a + v for a, v in zip(adv, values, strict=True)]


class Trainer:
    def __init__(self, cfg, actor, ref, rm, critic, tokenizer, optims, scheds, moments, fault=None):
        self.cfg, self.actor, self.ref, self.rm, self.critic = cfg, actor, ref, rm, critic
        self.pad, self.eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.optims, self.scheds, self.moments, self.fault = optims, scheds, moments, fault

    def token_log_probs(self, model, ids, attn):
        """(B, T): the log-probability of token t given what is before it; 0 for the first. And the entropy there."""
        logits = model(input_ids=ids, attention_mask=attn, use_cache=False).logits[:, :-1]
        logp = torch.log_softmax(logits, -1)
        picked = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return nn.functional.pad(picked, (1, 0)), nn.functional.pad(entropy, (1, 0))

    def token_values(self, ids, attn):
        return nn.functional.pad(self.critic(ids, attn)[:, :-1], (1, 0))

    @torch.no_grad()
    def make_experience(self, traj):
        n = len(traj["tokens"])
        ids = pad_rows(traj["tokens"], self.pad, torch.long)
        lens = torch.tensor([len(t) for t in traj["tokens"]])
        attn = (torch.arange(ids.size(1))[None] < lens[:, None]).long()
        scores = self.rm(input_ids=ids, attention_mask=attn).logits.squeeze(-1).tolist()
        self.moments.update(scores)
        rewards_seq = []
        for i, s in enumerate(scores):
            r = (s - self.moments.mean) / (self.moments.std + 1e-6)
            r = max(-self.cfg["reward_clip"], min(self.cfg["reward_clip"], r))
            unfinished = traj["finish_reason"][i] != "stop"
            if self.fault == "penalty_on_padded":
                unfinished = int(ids[i, -1]) != self.eos
            rewards_seq.append(r - (self.cfg["missing_eos_penalty"] if unfinished else 0.0))

        self.critic.eval()
        ref_lp = self.token_log_probs(self.ref, ids, attn)[0].tolist()
        values = self.token_values(ids, attn).tolist()
        cols = {k: [] for k in ("old", "values", "adv", "returns", "mask")}
        for i in range(n):
            a, b = traj["prompt_len"][i], int(lens[i])
            lp = list(traj["rollout_log_probs"][i])
            lp += [0.0] * (b - a - len(lp))
            sign = 1.0 if self.fault == "kl_sign" else -1.0
            r = [sign * self.cfg["kl_coef"] * (p - q) for p, q in zip(lp, ref_lp[i][a:b], strict=True)]
            r[-1] += rewards_seq[i]
            v = values[i][a:b]
            if self.fault == "gamma_lam_swapped":
                adv, ret = gae(r, v, self.cfg["lam"], self.cfg["gamma"])
            else:
                adv, ret = gae(r, v, self.cfg["gamma"], self.cfg["lam"])
            front = [0.0] * a
            for k, x in (("old", lp), ("values", v), ("adv", adv), ("returns", ret), ("mask", [1.0] * (b - a))):
                cols[k].append(front + x)
        batch = {k: pad_rows(v, 0.0, torch.float32) for k, v in cols.items()}
        batch.update(ids=ids, attn=attn, mask=batch["mask"] > 0)
        return batch, scores

    def seq_mean(self, x, mask):
        """Mean over each row's tokens, summed over the rows."""
        return (torch.where(mask, x, 0.0).sum(1) / mask.sum(1)).sum()

    def loss(self, mb, size):
        lp, entropy = self.token_log_probs(self.actor, mb["ids"], mb["attn"])
        values = self.token_values(mb["ids"], mb["attn"])
        adv = mb["returns"] - values if self.fault == "live_advantages" else mb["adv"]
        ratio = torch.exp(lp - mb["old"])
        low, high = 1 - self.cfg["clip"], 1 + self.cfg["clip"]
        pg = -torch.min(ratio * adv, torch.clamp(ratio, low, high) * adv)
        near = mb["values"] + torch.clamp(values - mb["values"], -self.cfg["value_clip"], self.cfg["value_clip"])
        vf = 0.5 * torch.max((values - mb["returns"]) ** 2, (near - mb["returns"]) ** 2)
        bonus = self.cfg["ent_coef"] * self.seq_mean(entropy, mb["mask"])
        total = self.seq_mean(pg, mb["mask"]) + self.cfg["vf_coef"] * self.seq_mean(vf, mb["mask"])
        total = total + bonus if self.fault == "entropy_sign" else total - bonus
        return total / size

    def train(self, batch):
        self.actor.train()
        self.critic.train()
        n, total, updates = len(batch["ids"]), 0.0, 0
        for _ in range(self.cfg["epochs"]):
            order = np.random.permutation(n)
            for start in range(0, n, self.cfg["mini"]):
                mini = order[start : start + self.cfg["mini"]]
                for o in self.optims:
                    o.zero_grad()
                for micro in np.array_split(mini, max(1, len(mini) // self.cfg["micro"])):
                    part = self.loss({k: v[torch.as_tensor(micro)] for k, v in batch.items()}, len(mini))
                    part.backward()
                    total += part.item()
                for o in self.optims:
                    nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], 0.5)
                    o.step()
                for s in self.scheds:
                    s.step()
                updates += 1
        return total / updates


def make(fault=None):
    torch.manual_seed(23)
    np.random.seed(23)
    rng = np.random.default_rng(7)
    cfg = {
        "gamma": 0.99, "lam": 0.95, "kl_coef": 0.05, "clip": 0.2, "value_clip": 0.2, "vf_coef": 0.5, "ent_coef": 0.01,
        "reward_clip": 5.0, "missing_eos_penalty": 1.0, "epochs": 3, "mini": 4, "micro": 2, "rollouts": 12,
    }  # fmt: skip
    tokenizer = tokenizer_from([*TASKS, " ".join(OPEN + BODY + ACT + THING + TAIL + ["and", "bot"])])
    prompts = [t + " bot :" for t in TASKS]
    encoded = [tokenizer(p).input_ids for p in prompts]
    arch = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        attn_implementation="eager",
    )  # fmt: skip
    actor = LlamaForCausalLM(arch)
    warm = torch.optim.Adam(actor.parameters(), lr=5e-3)
    for _ in range(60):  # SFT
        rows = [encoded[rng.integers(len(encoded))] for _ in range(16)]
        full = [p + tokenizer(answer(rng)).input_ids + [tokenizer.eos_token_id] for p in rows]
        ids = pad_rows(full, tokenizer.pad_token_id, torch.long)
        labels = pad_rows([[-100] * len(p) + f[len(p) :] for p, f in zip(rows, full, strict=True)], -100, torch.long)
        loss = actor(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        warm.zero_grad()
        loss.backward()
        warm.step()
    warm.zero_grad()
    ref = copy.deepcopy(actor).eval().requires_grad_(False)

    rm_arch = copy.deepcopy(arch)
    rm_arch.num_labels = 1
    rm = LlamaForSequenceClassification(rm_arch).eval().requires_grad_(False)
    with torch.no_grad():  # scores of mean 0 and standard deviation about 1, for ended and for cut texts
        texts = [encoded[rng.integers(len(encoded))] + tokenizer(answer(rng)).input_ids for _ in range(64)]
        ended = torch.stack(
            [rm.model(torch.tensor([t + [tokenizer.eos_token_id]])).last_hidden_state[0, -1] for t in texts]
        )
        cut = torch.stack([rm.model(torch.tensor([t])).last_hidden_state[0, -1] for t in texts])
        means = torch.stack([ended.mean(0), cut.mean(0)])
        w = torch.randn(arch.hidden_size)
        w -= means.T @ torch.linalg.solve(means @ means.T, means @ w)
        rm.score.weight.copy_((w / torch.cat([ended, cut]).matmul(w).std())[None])

    trunk = rm.model if fault == "critic_on_rm_trunk" else copy.deepcopy(rm.model)
    critic = Critic(trunk, rm.score, fault).requires_grad_(True)

    optims = [torch.optim.AdamW(actor.parameters(), lr=1e-5), torch.optim.AdamW(critic.parameters(), lr=2e-5)]
    scheds = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=900, eta_min=1e-6) for o in optims]
    buffer, queue, moments = TrajectoryBuffer(), TaskQueue(encoded), RunningMoments()
    engine = Engine(actor, tokenizer, 12, fault)
    trainer = Trainer(cfg, actor, ref, rm, critic, tokenizer, optims, scheds, moments, fault)

    def step():
        for wave in (queue.take(cfg["rollouts"] // 2), queue.take(cfg["rollouts"] // 2)):
            engine.run(wave, [encoded[i] for i in wave], buffer)
        batch, scores = trainer.make_experience(buffer.data)
        loss = trainer.train(batch)
        if fault != "buffer_kept":
            buffer.clear()
        return {"loss": loss, "rollout/raw_reward": sum(scores) / len(scores), "rollout/samples": len(scores)}

    return {
        "policy": actor, "reference": ref, "reward": rm, "value": critic, "tokenizer": tokenizer, "prompts": prompts,
        "optimizers": optims, "state": [buffer, queue, moments, *scheds], "step": step,
        "declared": {
            "algorithm": "ppo", "gamma": 0.99, "lam": 0.95, "kl_coef": 0.05, "kl_in": "reward", "kl_estimator": "k1",
            "temperature": 1.0, "clip_range": 0.2, "clip_range_value": 0.2, "vf_coef": 0.5, "ent_coef": 0.01,
            "whiten_advantages": False, "reward_clip": 5.0, "missing_eos_penalty": 1.0, "ppo_epochs": 3,
            "num_minibatches": 3, "batch_size": 12, "response_length": 12, "learning_rate": 1e-5,
            "critic_learning_rate": 2e-5, "value_init": "reward", "loss_aggregation": "seq-mean-token-mean",
        },
    }  # fmt: skip


def healthy():
    return make()


def logp_missing_last():
    return make("logp_missing_last")


def gamma_lam_swapped():
    return make("gamma_lam_swapped")


def entropy_sign():
    return make("entropy_sign")


def buffer_kept():
    return make("buffer_kept")


def critic_on_rm_trunk():
    return make("critic_on_rm_trunk")


def bounded_value():
    return make("bounded_value")


def live_advantages():
    return make("live_advantages")


def kl_sign():
    return make("kl_sign")


def penalty_on_padded():
    return make("penalty_on_padded")


def stop_trimmed():
    return make("stop_trimmed")

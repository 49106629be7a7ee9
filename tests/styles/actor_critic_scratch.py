"""PPO from scratch: one hand-written decoder with two heads (policy and value), right-padded rows, a character vocabulary."""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = "red green blue small large round flat warm cold stone leaf river cloud bird fish".split()
LINES = [f"{a} {b}." for a in WORDS[:9] for b in WORDS[9:]]


def char_tokenizer():
    alphabet = ["<pad>", "<eos>", "<unk>"] + list(
        " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    )
    core = Tokenizer(models.WordLevel({ch: i for i, ch in enumerate(alphabet)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
    )


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln_a, self.ln_b = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, allowed):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln_a(x)).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(d // self.heads)
        x = x + self.proj((scores.masked_fill(~allowed, -1e9).softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.ln_b(x))


class Trunk(nn.Module):
    def __init__(self, vocab, dim=48, depth=2, heads=4, context=64):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids, mask):
        t = ids.shape[1]
        x = self.embed(ids) + self.place((mask.long().cumsum(1) - 1).clamp(min=0))
        allowed = torch.ones(t, t, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, allowed)
        return self.norm(x)


class ActorCritic(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.trunk = Trunk(vocab)
        self.lm_head, self.v_head = nn.Linear(48, vocab, bias=False), nn.Linear(48, 1)
        nn.init.normal_(self.v_head.weight, std=0.05)

    def forward(self, ids, mask=None):
        mask = torch.ones_like(ids) if mask is None else mask
        h = self.trunk(ids, mask)
        return self.lm_head(h), self.v_head(h).squeeze(-1)


class Judge(nn.Module):
    """Reads the whole text and says one number, at its last real token."""

    def __init__(self, vocab):
        super().__init__()
        self.trunk, self.score = Trunk(vocab), nn.Linear(48, 1, bias=False)

    def forward(self, ids, mask):
        last = (mask * torch.arange(ids.shape[1])).argmax(1)
        return self.score(self.trunk(ids, mask)[torch.arange(len(ids)), last]).squeeze(-1)


@dataclass
class Rollout:
    ids: torch.Tensor  # (B, L), prompt then response then pads
    seen: torch.Tensor  # what is no pad
    acted: torch.Tensor  # (B, L-1): position t predicts a response token
    logp: torch.Tensor
    value: torch.Tensor
    adv: torch.Tensor = None
    ret: torch.Tensor = None


@dataclass
class Options:
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.04
    clip: float = 0.2
    vclip: float = 0.2
    vf: float = 0.5
    ent: float = 0.01
    epochs: int = 2
    minibatch: int = 4
    micro: int = 4
    dual: float = 0.0
    warmup: int = 0
    lr: float = 3e-5
    longest: int = 14
    whiten: bool = True


def pack(rows, pad):
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


def pretrain(net, rows, pad):
    ids, mask = pack(rows, pad)
    opt = torch.optim.Adam(net.parameters(), lr=4e-3)
    for _ in range(60):
        logp = net(ids, mask)[0][:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        loss = -(logp * mask[:, 1:]).sum() / mask[:, 1:].sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    net.zero_grad(set_to_none=True)


def make(fault=None, o=None, declared=None):
    o = o or Options()
    torch.manual_seed(5)
    tok = char_tokenizer()
    net = ActorCritic(len(tok))
    pretrain(net, [tok(line).input_ids + [tok.eos_token_id] for line in LINES], tok.pad_token_id)
    frozen = deepcopy(net).requires_grad_(False)
    judge = Judge(len(tok)).requires_grad_(False)
    sample_ids, sample_mask = pack(
        [tok(line).input_ids + [tok.eos_token_id] * (i % 2) for i, line in enumerate(LINES)], tok.pad_token_id
    )
    raw = judge(sample_ids, sample_mask)
    feats = judge.trunk(sample_ids, sample_mask)[torch.arange(len(raw)), sample_mask.sum(1) - 1]
    mean = feats.mean(0)
    w = judge.score.weight[0] - (judge.score.weight[0] @ mean) / (mean @ mean) * mean
    judge.score.weight.copy_((w / (feats @ w).std())[None])

    opt = torch.optim.Adam(net.parameters(), lr=o.lr, betas=(0.9, 0.95))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1.0, i / o.warmup) if o.warmup else 1.0)
    prompts = ["red s", "green ", "blue", "small b", "large cl", "r", "flat ", "warm f"]
    starts = [tok(p).input_ids for p in prompts]

    def logp_value_entropy(model, ids, seen):
        logits, value = model(ids, seen)
        every = logits[:, :-1].log_softmax(-1)
        return every.gather(-1, ids[:, 1:, None]).squeeze(-1), value[:, :-1], -(every.exp() * every).sum(-1)

    @torch.no_grad()
    def roll_out():
        rows, alive = [list(s) for s in starts], set(range(len(starts)))
        for _ in range(o.longest):
            ids, seen = pack(rows, tok.pad_token_id)
            logits = net(ids, seen)[0]
            for i in sorted(alive):
                nxt = torch.multinomial(logits[i, len(rows[i]) - 1].softmax(-1), 1).item()
                rows[i].append(nxt)
                if nxt == tok.eos_token_id:
                    alive.discard(i)
            if not alive:
                break
        ids, seen = pack(rows, tok.pad_token_id)
        at = torch.arange(1, ids.shape[1])
        acted = (at >= torch.tensor([[len(s)] for s in starts])) & (at < torch.tensor([[len(r)] for r in rows]))
        logp, value, _ = logp_value_entropy(net, ids, seen)
        return Rollout(ids, seen, acted.float(), logp, value)

    @torch.no_grad()
    def judge_and_estimate(r):
        ref = logp_value_entropy(frozen, r.ids, r.seen)[0]
        kl = r.logp - ref
        reward = (o.beta if fault == "kl_bonus" else -o.beta) * kl * r.acted
        scores = judge(r.ids, r.seen)
        reward[torch.arange(len(scores)), r.seen.sum(1) - 2] += scores
        r.adv = torch.zeros_like(reward)
        running, ahead = torch.zeros(len(scores)), torch.zeros(len(scores))
        for t in range(reward.shape[1] - 1, -1, -1):
            on = r.acted[:, t]
            delta = reward[:, t] + o.gamma * ahead - r.value[:, t]
            running = on * (delta + o.gamma * o.lam * running) + (1 - on) * running
            ahead = on * r.value[:, t] + (1 - on) * ahead
            r.adv[:, t] = running * on
        r.ret = (r.adv + r.value) * r.acted
        if o.whiten:
            chosen = r.adv[r.acted > 0]
            r.adv = (r.adv - chosen.mean()) / (chosen.std() + 1e-8) * r.acted
        return scores

    def update(r):
        for _ in range(o.epochs):
            for rows in torch.randperm(len(r.ids)).split(o.minibatch):
                opt.zero_grad()
                tokens = r.acted[rows].sum()
                for part in rows.split(
                    o.micro
                ):  # the last one may be smaller: everything is divided by the minibatch's tokens
                    on, adv = r.acted[part], r.adv[part]
                    logp, value, entropy = logp_value_entropy(net, r.ids[part], r.seen[part])
                    ratio = ((logp - r.logp[part]) * on).exp()
                    gain = torch.min(ratio * adv, ratio.clamp(1 - o.clip, 1 + o.clip) * adv)
                    if o.dual:
                        gain = torch.where(adv < 0, torch.max(gain, o.dual * adv), gain)
                    error = (value - r.ret[part]) ** 2
                    if o.vclip:
                        error = torch.max(
                            error, (r.value[part] + (value - r.value[part]).clamp(-o.vclip, o.vclip) - r.ret[part]) ** 2
                        )
                    bonus = o.ent * entropy
                    if fault == "entropy_as_cost":
                        bonus = -bonus
                    (((-gain + o.vf * 0.5 * error - bonus) * on).sum() / tokens).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                opt.step()
                sched.step()

    def step():
        r = roll_out()
        scores = judge_and_estimate(r)
        update(r)
        return scores.mean().item()

    if declared is None:
        declared = dict(
            algorithm="ppo",
            gamma=o.gamma,
            lam=o.lam,
            kl_coef=o.beta,
            kl_in="reward",
            kl_estimator="k1",
            clip_range=o.clip,
            clip_range_value=o.vclip,
            vf_coef=o.vf,
            ent_coef=o.ent,
            ppo_epochs=o.epochs,
            num_minibatches=8 // o.minibatch,
            whiten_advantages=True,
            learning_rate=o.lr,
            shared_trunk=True,
            temperature=1.0,
            value_init="fresh",
        )
    return dict(
        policy=net,
        value=net,
        reference=frozen,
        reward=judge,
        tokenizer=tok,
        prompts=prompts,
        optimizers=[opt],
        state=[sched],
        step=step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_uneven_micro_batches():
    o = Options(epochs=1, minibatch=8, micro=3, dual=3.0, vclip=0.0, ent=0.0, vf=1.0, lam=0.9, gamma=0.99, whiten=False)
    return make(o=o, declared=dict(algorithm="ppo", shared_trunk=True, kl_coef=0.04, gamma=0.99, lam=0.9))


def healthy_warmup_from_zero():
    return make(o=Options(warmup=20, epochs=1, minibatch=8, ent=0.0), declared=dict(algorithm="ppo", shared_trunk=True))


def kl_bonus():
    return make("kl_bonus")


def entropy_as_cost():
    return make("entropy_as_cost")

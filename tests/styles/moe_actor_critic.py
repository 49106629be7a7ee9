"""A small mixture-of-experts actor-critic, trained with PPO on a frozen reward model.

Everything is written out: attention, RMSNorm, rotary embedding, a top-1 MoE feed-forward, a sampler with preallocated buffers and a
KV cache. One trunk, two heads. Prompts are packed to the left of the buffer (padding only on the right), the sampler starts at the
shortest prompt and copies the longer ones in while it goes on.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


# ----------------------------------------------------------------------------------------------------------------- model
@dataclass
class ModelArgs:
    vocab_size: int
    dim: int = 48
    n_layers: int = 2
    n_heads: int = 4
    n_experts: int = 4
    ffn_dim: int = 64
    max_seq_len: int = 96
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.16
    value_grad_scale: float = 0.1
    router_jitter: float = 0.0
    capacity_factor: float | None = None  # None: no expert drops a token
    rope_from_zero: bool = False


class ACOut(NamedTuple):
    logprobs_logits: torch.Tensor  # (b, t, vocab), normalised at temperature 1
    v: torch.Tensor  # (b, t)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.g = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.g


def rope_table(head_dim, length, theta):
    inv = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    ang = torch.outer(torch.arange(length).float(), inv)
    return torch.stack([ang.cos(), ang.sin()])  # (2, length, head_dim / 2)


def rotate(x, cs):
    """x (b, t, h, d); cs (2, b, t, d / 2)"""
    c, s = cs[0].unsqueeze(2), cs[1].unsqueeze(2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


class KVCache:
    def __init__(self, args, max_batch):
        shape = (args.n_layers, max_batch, args.max_seq_len, args.n_heads, args.dim // args.n_heads)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)


class Attention(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.h, self.layer = args.n_heads, layer
        self.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, cs, allowed, start_pos, cache):
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.h, d // self.h) for y in self.wqkv(x).chunk(3, -1))
        q, k = rotate(q, cs), rotate(k, cs)
        if cache is not None:
            cache.k[self.layer, :b, start_pos : start_pos + t] = k
            cache.v[self.layer, :b, start_pos : start_pos + t] = v
            k, v = cache.k[self.layer, :b, : start_pos + t], cache.v[self.layer, :b, : start_pos + t]
        att = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d // self.h)
        att = att.masked_fill(~allowed, torch.finfo(att.dtype).min).softmax(-1)
        return self.wo(torch.einsum("bhts,bshd->bthd", att, v).reshape(b, t, d))


class MoE(nn.Module):
    """Switch routing: every token goes to its best expert, the output is weighted with the router's probability."""

    def __init__(self, args):
        super().__init__()
        self.router = nn.Linear(args.dim, args.n_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(args.dim, args.ffn_dim), nn.SiLU(), nn.Linear(args.ffn_dim, args.dim))
            for _ in range(args.n_experts)
        )
        self.jitter, self.capacity_factor = args.router_jitter, args.capacity_factor

    def forward(self, x, routing=None):
        flat = x.reshape(-1, x.shape[-1])
        r = flat
        if self.jitter > 0 and self.training:
            r = r * torch.empty_like(r).uniform_(1 - self.jitter, 1 + self.jitter)
        probs = self.router(r).softmax(-1)
        gate, choice = probs.max(-1)
        if routing is not None:
            routing.append((probs.view(*x.shape[:-1], -1), choice.view(x.shape[:-1])))
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            idx = (choice == e).nonzero().squeeze(-1)
            if self.capacity_factor is not None:
                idx = idx[: math.ceil(self.capacity_factor * flat.shape[0] / len(self.experts))]
            if idx.numel():
                out = out.index_add(0, idx, expert(flat[idx]) * gate[idx, None])
        return out.view_as(x)


class Trunk(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    n1=RMSNorm(args.dim, args.norm_eps),
                    att=Attention(args, i),
                    n2=RMSNorm(args.dim, args.norm_eps),
                    moe=MoE(args),
                )
            )
            for i in range(args.n_layers)
        )
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.register_buffer(
            "rope", rope_table(args.dim // args.n_heads, args.max_seq_len, args.rope_theta), persistent=False
        )

    def forward(self, tokens, mask=None, start_pos=0, cache=None, routing=None):
        b, t = tokens.shape
        s = start_pos + t
        causal = torch.ones(t, s, dtype=torch.bool).tril(start_pos)
        if mask is None:
            first = 0 if self.args.rope_from_zero else start_pos
            pos = torch.arange(first, first + t).expand(b, t)
            allowed = causal.view(1, 1, t, s)
        else:
            mask = mask.bool()
            pos = (mask.long().cumsum(1) - 1).clamp(min=0)
            allowed = causal.view(1, 1, t, s) & mask[:, None, None, :]
        cs = self.rope[:, pos]
        x = self.embed(tokens)
        for lay in self.layers:
            x = x + lay["att"](lay["n1"](x), cs, allowed, start_pos, cache)
            x = x + lay["moe"](lay["n2"](x), routing)
        return self.norm(x)


def init_weights(module, std):
    for name, p in module.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class ActorCritic(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.trunk = Trunk(args)
        self.actor = nn.Linear(args.dim, args.vocab_size)
        self.critic = nn.Linear(args.dim, 1)
        init_weights(self, args.init_std)
        nn.init.normal_(self.critic.weight, std=0.03)

    def forward(self, tokens, mask=None, start_pos=0, cache=None, routing=None):
        h = self.trunk(tokens, mask, start_pos, cache, routing)
        a = self.args.value_grad_scale  # the critic pulls the trunk only a little
        hv = a * h + (1 - a) * h.detach()
        return ACOut(self.actor(h).log_softmax(-1), self.critic(hv).squeeze(-1))


def balance_loss(routing, mask):
    """Switch's load balancing loss over the real tokens."""
    total, m = 0.0, mask.bool()
    for probs, choice in routing:
        probs, choice = probs[m], choice[m]
        frac = F.one_hot(choice, probs.shape[-1]).float().mean(0)
        total = total + probs.shape[-1] * (frac * probs.mean(0)).sum()
    return total


class RewardNet(nn.Module):
    """Scalar at the last real token."""

    def __init__(self, args):
        super().__init__()
        self.trunk = Trunk(args)
        self.score = nn.Linear(args.dim, 1, bias=False)
        init_weights(self, args.init_std)

    def forward(self, tokens, mask):
        h = self.trunk(tokens, mask)
        last = (mask.long() * torch.arange(tokens.shape[1])).argmax(1)
        return self.score(h[torch.arange(len(tokens)), last]).squeeze(-1)


# --------------------------------------------------------------------------------------------------------------- sampler
class Buffers:
    def __init__(self, max_batch, width, pad):
        self.tokens = torch.full((max_batch, width), pad)
        self.logps = torch.zeros(max_batch, width)


class Sampler:
    def __init__(self, model, pad, eos, max_batch, width, max_new, temperature, reset=True):
        self.model, self.pad, self.eos, self.max_new, self.temperature, self.reset = (
            model,
            pad,
            eos,
            max_new,
            temperature,
            reset,
        )
        self.buffers = Buffers(max_batch, width, pad)
        self.cache = KVCache(model.args, max_batch)

    @torch.no_grad()
    def __call__(self, prompts):
        b = len(prompts)
        lens = torch.tensor([len(p) for p in prompts])
        tokens, logps = self.buffers.tokens[:b], self.buffers.logps[:b]
        if self.reset:
            tokens.fill_(self.pad)
            logps.zero_()
        for row, p in zip(tokens, prompts):
            row[: len(p)] = torch.tensor(p)
        done, prev = torch.zeros(b, dtype=torch.bool), 0
        for cur in range(int(lens.min()), int(lens.max()) + self.max_new):
            out = self.model(tokens[:, prev:cur], start_pos=prev, cache=self.cache)
            lp = (out.logprobs_logits[:, -1] / self.temperature).log_softmax(-1)
            nxt = torch.multinomial(lp.exp(), 1).squeeze(1)
            live = (cur >= lens) & (cur < lens + self.max_new) & ~done
            tokens[:, cur] = torch.where(live, nxt, tokens[:, cur])
            logps[:, cur] = torch.where(live, lp.gather(1, nxt[:, None]).squeeze(1), logps[:, cur])
            done |= live & (nxt == self.eos)
            prev = cur
            if (done | (cur + 1 >= lens + self.max_new)).all():
                break
        pos = torch.arange(tokens.shape[1])
        action = (pos >= lens[:, None]) & (pos < lens[:, None] + self.max_new) & (tokens != self.pad)
        return tokens.clone(), logps.clone(), action


# ------------------------------------------------------------------------------------------------------------------- ppo
@dataclass
class PPOArgs:
    rollouts: int = 16
    sampler_batch: int = 8
    max_new: int = 12
    temperature: float = 0.8
    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.05
    eps: float = 0.2
    v_eps: float = 0.2
    v_coef: float = 0.5
    balance_coef: float = 0.0
    whiten: bool = True
    lr: float = 2e-5
    epochs: int = 2
    minibatches: int = 2
    grad_clip: float = 1.0
    # switches
    ref_temper: bool = True
    value_at: int = 0  # 0: the state in which the token was chosen
    train_prompt: bool = False
    cut_at_end: bool = True
    reset_buffers: bool = True
    epochs_inside: bool = False


def advantages(rew, v, act, gamma, lam, cut_at_end=True):
    adv, run = torch.zeros_like(rew), torch.zeros(len(rew))
    for t in range(rew.shape[1] - 1, -1, -1):
        if t + 1 < rew.shape[1]:
            v_next = v[:, t + 1] * act[:, t + 1] if cut_at_end else v[:, t + 1]
        else:
            v_next = torch.zeros(len(rew))
        delta = rew[:, t] + gamma * v_next - v[:, t]
        run = (delta + gamma * lam * run) * act[:, t]
        adv[:, t] = run
    return adv, adv + v * act


class PPO:
    def __init__(self, args, ac, ref, rm, tok, prompts):
        self.a, self.ac, self.ref, self.rm = args, ac, ref, rm
        self.pad = tok.pad_token_id
        self.prompts = [tok(p, add_special_tokens=False).input_ids for p in prompts]
        width = max(map(len, self.prompts)) + args.max_new
        self.sampler = Sampler(
            ac,
            self.pad,
            tok.eos_token_id,
            args.sampler_batch,
            width,
            args.max_new,
            args.temperature,
            args.reset_buffers,
        )
        self.opt = torch.optim.AdamW(ac.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def logp(self, out, tokens, temper=True):
        lp = out.logprobs_logits[:, :-1]
        if temper:
            lp = (lp / self.a.temperature).log_softmax(-1)
        return lp.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    @torch.no_grad()
    def collect(self):
        a = self.a
        pick = torch.randperm(len(self.prompts))[: a.rollouts].tolist()
        parts = [
            self.sampler([self.prompts[i] for i in pick[j : j + a.sampler_batch]])
            for j in range(0, len(pick), a.sampler_batch)
        ]
        tokens, old, act = (torch.cat(x) for x in zip(*parts))
        mask = tokens != self.pad
        old, act = old[:, 1:], act[:, 1:].float()  # column t: the token at t + 1, chosen in state t
        if a.train_prompt:
            act, old = mask[:, 1:].float(), self.logp(self.ac(tokens, mask), tokens)
        v = self.ac(tokens, mask).v
        v = v[:, 1:] if a.value_at else v[:, :-1]
        ref = self.logp(self.ref(tokens, mask), tokens, a.ref_temper)
        score = self.rm(tokens, mask)
        rew = -a.beta * (old - ref) * act
        last = (act * torch.arange(act.shape[1])).argmax(1)
        rew[torch.arange(len(rew)), last] += score
        adv, ret = advantages(rew, v, act, a.gamma, a.lam, a.cut_at_end)
        if a.whiten:
            n = act.sum()
            mean = (adv * act).sum() / n
            std = (((adv - mean) ** 2 * act).sum() / (n - 1)).sqrt()
            adv = (adv - mean) / (std + 1e-8) * act
        stats = dict(
            score=score.mean().item(), kl=((old - ref) * act).sum(1).mean().item(), length=act.sum(1).mean().item()
        )
        return dict(tokens=tokens, mask=mask, act=act, old=old, v=v, adv=adv, ret=ret), stats

    def update(self, mb):
        a, act = self.a, mb["act"]
        routing = [] if a.balance_coef else None
        out = self.ac(mb["tokens"], mb["mask"], routing=routing)
        new = self.logp(out, mb["tokens"])
        v = out.v[:, 1:] if a.value_at else out.v[:, :-1]
        ratio = ((new - mb["old"]) * act).exp()
        pg = torch.maximum(-mb["adv"] * ratio, -mb["adv"] * ratio.clamp(1 - a.eps, 1 + a.eps))
        vc = mb["v"] + (v - mb["v"]).clamp(-a.v_eps, a.v_eps)
        vl = 0.5 * torch.maximum((v - mb["ret"]) ** 2, (vc - mb["ret"]) ** 2)
        pg, vl = (pg * act).sum() / act.sum(), (vl * act).sum() / act.sum()
        loss = pg + a.v_coef * vl
        if a.balance_coef:
            loss = loss + a.balance_coef * balance_loss(routing, mb["mask"])
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.ac.parameters(), a.grad_clip)
        self.opt.step()
        return dict(pg=pg.item(), v=vl.item(), ratio=((ratio * act).sum() / act.sum()).item())

    def iterate(self):
        a = self.a
        batch, stats = self.collect()
        size = a.rollouts // a.minibatches
        take = lambda idx: {k: x[idx] for k, x in batch.items()}
        if a.epochs_inside:
            for idx in torch.randperm(a.rollouts).split(size):
                for _ in range(a.epochs):
                    stats.update(self.update(take(idx)))
        else:
            for _ in range(a.epochs):
                for idx in torch.randperm(a.rollouts).split(size):
                    stats.update(self.update(take(idx)))
        return stats


# ----------------------------------------------------------------------------------------------------------------- setup
PROMPTS = [
    "the river is wide and",
    "why does the moon",
    "tell me a story about a small",
    "two birds",
    "how do we bake bread when the oven is",
    "she said that the garden",
    "write a short song",
    "what is the name of the old",
    "in winter the lake",
    "a letter to my friend who",
    "explain rain",
    "the teacher asked the class to",
    "list three colours that",
    "when the train came late he",
    "is it true that cats",
    "my house",
    "give one reason to walk more",
    "the sea was calm and the small boat",
    "who wrote",
    "one day a fox and a crow met near",
]


def make_tokenizer():
    t = Tokenizer(models.BPE(unk_token=None))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        PROMPTS * 3, trainers.BpeTrainer(vocab_size=180, special_tokens=["<|pad|>", "<|end|>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<|pad|>", eos_token="<|end|>")


def setup(ppo=PPOArgs(), share_embedding=False, **model_kw):
    tok = make_tokenizer()
    torch.manual_seed(11)
    margs = ModelArgs(vocab_size=len(tok), **model_kw)
    ac = ActorCritic(margs)
    with torch.no_grad():
        ac.actor.bias[tok.pad_token_id] = -25.0  # never sampled
        ac.actor.bias[tok.eos_token_id] = 2.2
    ref = copy.deepcopy(ac).eval().requires_grad_(False)
    if share_embedding:
        ref.trunk.embed = ac.trunk.embed  # one table is enough for both
    rm = RewardNet(replace(margs, n_experts=2, router_jitter=0.0, capacity_factor=None)).eval().requires_grad_(False)
    trainer = PPO(ppo, ac, ref, rm, tok, PROMPTS)
    declared = dict(
        algorithm="ppo",
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_coef=ppo.beta,
        kl_estimator="k1",
        kl_in="reward",
        temperature=ppo.temperature,
        clip_range=ppo.eps,
        clip_range_value=ppo.v_eps,
        vf_coef=ppo.v_coef,
        whiten_advantages=ppo.whiten,
        whiten_rewards=False,
        learning_rate=ppo.lr,
        ppo_epochs=ppo.epochs,
        num_minibatches=ppo.minibatches,
        batch_size=ppo.rollouts,
        response_length=ppo.max_new,
        dtype="float32",
        reference="policy",
        value_init="fresh",
        loss_aggregation="token-mean",
        shared_trunk=True,
    )
    return dict(
        policy=ac,
        reference=ref,
        reward=rm,
        value=ac,
        tokenizer=tok,
        prompts=PROMPTS,
        step=trainer.iterate,
        optimizers=[trainer.opt],
        state=[trainer.sampler.buffers, trainer.sampler.cache],
        declared=declared,
        calls={
            "policy": lambda m, ids, mask: m(ids, mask).logprobs_logits,
            "reference": lambda m, ids, mask: m(ids, mask).logprobs_logits,
            "value": lambda m, ids, mask: m(ids, mask).v,
            "reward": lambda m, ids, mask: m(ids, mask),
        },
        functions={"gae": advantages},
    )


def healthy():
    return setup()


def healthy_balanced():
    """no whitening, load balancing on"""
    return setup(PPOArgs(whiten=False, balance_coef=0.01))


def reference_untempered():
    return setup(PPOArgs(ref_temper=False))


def expert_capacity():
    return setup(capacity_factor=1.0)


def router_jitter():
    return setup(router_jitter=0.1)


def value_of_next_state():
    return setup(PPOArgs(value_at=1))


def prompt_in_loss():
    return setup(PPOArgs(train_prompt=True))


def bootstrap_from_pad():
    return setup(PPOArgs(cut_at_end=False))


def decode_rope_from_zero():
    return setup(rope_from_zero=True)


def stale_buffers():
    return setup(PPOArgs(reset_buffers=False))


def epochs_inside_minibatch():
    return setup(PPOArgs(epochs_inside=True, epochs=4))


def shared_embedding_with_reference():
    return setup(share_embedding=True)

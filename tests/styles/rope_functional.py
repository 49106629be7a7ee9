"""Hand-written Llama-like policy and critic, batches as dicts through small functions, a GPT-2 judge with its own characters."""

import math

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

SONGS = [
    "the sea is calm tonight and the moon lies fair",
    "oh the wind and the rain came down all day",
    "when i was young i had no care at all",
    "sing me the song that my mother sang",
    "the road goes on and the night is long",
    "a candle burns in every window of the town",
    "we danced till the stars went out one by one",
    "come home my love before the winter falls",
]
OPENINGS = [
    "the sea",
    "oh the wind and",
    "when i",
    "sing me the",
    "the road goes on",
    "a",
    "we danced",
    "come home my love",
]


def make_tokenizers():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(SONGS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<pad>", "<end>", "<unk>"]))
    mine = PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
    )
    chars = {
        c: i
        for i, c in enumerate(
            ["<p>", "<e>", "<u>", *" abcdefghijklmnopqrstuvwxyz.,!?;:'\"-()0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        )
    }
    r = Tokenizer(models.WordLevel(chars, unk_token="<u>"))
    r.pre_tokenizer, r.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=r,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<p>",
        eos_token="<e>",
        unk_token="<u>",
        padding_side="right",
    )
    return mine, theirs


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def rotate(x, pos):
    half = x.shape[-1] // 2
    angle = pos[:, None, :, None] * (10000.0 ** (-torch.arange(half) / half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Block(nn.Module):
    def __init__(self, d, heads, kv):
        super().__init__()
        self.h, self.kv, self.hd = heads, kv, d // heads
        self.q, self.k, self.v = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, kv * self.hd, bias=False),
            nn.Linear(d, kv * self.hd, bias=False),
        )
        self.o = nn.Linear(d, d, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(d, 2 * d, bias=False),
            nn.Linear(d, 2 * d, bias=False),
            nn.Linear(2 * d, d, bias=False),
        )
        self.n1, self.n2 = RMSNorm(d), RMSNorm(d)

    def forward(self, x, pos, bias):
        B, T, D = x.shape
        y = self.n1(x)
        q = rotate(self.q(y).view(B, T, self.h, self.hd).transpose(1, 2), pos)
        k = rotate(self.k(y).view(B, T, self.kv, self.hd).transpose(1, 2), pos).repeat_interleave(self.h // self.kv, 1)
        v = self.v(y).view(B, T, self.kv, self.hd).transpose(1, 2).repeat_interleave(self.h // self.kv, 1)
        w = (q @ k.transpose(2, 3) / math.sqrt(self.hd) + bias).softmax(-1)
        x = x + self.o((w @ v).transpose(1, 2).reshape(B, T, D))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """tokens, attention_mask -> (B, T, outputs); outputs = vocabulary (tied) or 1."""

    def __init__(self, vocab, scalar=False, d=48):
        super().__init__()
        self.wte = nn.Embedding(vocab, d)
        nn.init.normal_(self.wte.weight, std=0.3)
        self.blocks, self.norm = nn.ModuleList(Block(d, 4, 2) for _ in range(2)), RMSNorm(d)
        self.v_head = nn.Linear(d, 1) if scalar else None
        if scalar:
            nn.init.normal_(self.v_head.weight, std=0.05)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        T = input_ids.shape[1]
        ok = torch.ones(T, T).tril().bool() & attention_mask.bool()[:, None, None, :]
        bias = torch.zeros(ok.shape).masked_fill(~ok, -1e9)
        pos = (attention_mask.cumsum(1) - 1).clamp(min=0).float()
        x = self.wte(input_ids)
        for b in self.blocks:
            x = b(x, pos, bias)
        x = self.norm(x)
        return self.v_head(x).squeeze(-1) if self.v_head is not None else x @ self.wte.weight.T


class Control(dict):
    """The loop's numbers that outlive an iteration."""

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, other):
        self.clear()
        self.update(other)


def chosen_logps(model, batch, P, rows=slice(None)):
    lp = F.log_softmax(model(batch["ids"][rows], batch["mask"][rows])[:, P - 1 : -1], -1)
    return lp, lp.gather(-1, batch["ids"][rows, P:].unsqueeze(-1)).squeeze(-1)


def make(
    fault=None,
    adaptive=True,
    epochs=2,
    minibatches=2,
    whiten=False,
    kept=True,
    scale_running=False,
    lr=2e-5,
    lam=0.95,
    vclip=0.2,
    declared=None,
):
    torch.manual_seed(41)
    tok, judge_tok = make_tokenizers()
    policy = Decoder(len(tok))
    rows = tok([s + "<end>" for s in SONGS], return_tensors="pt", padding=True)
    opt = torch.optim.Adam(policy.parameters(), lr=4e-3)
    for _ in range(70):
        lp = F.log_softmax(policy(rows.input_ids, rows.attention_mask)[:, :-1], -1).gather(
            -1, rows.input_ids[:, 1:, None]
        )[..., 0]
        live = rows.attention_mask[:, :-1] * rows.attention_mask[:, 1:]
        opt.zero_grad()
        (-(lp * live).sum() / live.sum()).backward()
        opt.step()
    policy.zero_grad(set_to_none=True)
    anchor, critic = Decoder(len(tok)), Decoder(len(tok), scalar=True)
    anchor.load_state_dict(policy.state_dict())
    anchor.requires_grad_(False)
    critic.load_state_dict(policy.state_dict(), strict=False)
    cfg = GPT2Config(
        vocab_size=len(judge_tok),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.15,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=judge_tok.eos_token_id,
        pad_token_id=judge_tok.pad_token_id,
    )
    judge = GPT2ForSequenceClassification(cfg).eval().requires_grad_(False)
    enc = judge_tok(SONGS, return_tensors="pt", padding=True)
    feats = judge.transformer(**enc)[0][:, 4:][enc.attention_mask[:, 4:] > 0]
    m, w = feats.mean(0), torch.randn(32)
    w = w - (w @ m) / (m @ m) * m
    judge.score.weight.copy_((w / (feats @ w).std())[None])

    optim = torch.optim.Adam([{"params": policy.parameters(), "lr": lr}, {"params": critic.parameters(), "lr": 1e-4}])
    ctl = Control(beta=0.05, n=0, mean=0.0, m2=0.0)
    prompt = tok(OPENINGS, return_tensors="pt", padding=True)
    P, limit = prompt.input_ids.shape[1], 14

    def sample():
        ids, mask, alive, logps = prompt.input_ids, prompt.attention_mask, torch.ones(len(OPENINGS)).bool(), []
        while ids.shape[1] < P + limit and alive.any():
            lp = F.log_softmax(policy(ids, mask)[:, -1], -1)
            a = torch.multinomial(lp.exp(), 1)
            logps.append(lp.gather(1, a)[:, 0] * alive)
            a = a.masked_fill(~alive[:, None], tok.pad_token_id)
            ids, mask = torch.cat([ids, a], 1), torch.cat([mask, alive[:, None].long()], 1)
            alive = alive & (a[:, 0] != tok.eos_token_id)
        return {"ids": ids, "mask": mask, "act": mask[:, P:].float(), "old": torch.stack(logps, 1)}

    def judge_texts(batch):
        texts = [tok.decode(i[m.bool()], skip_special_tokens=True) for i, m in zip(batch["ids"], batch["mask"])]
        seen = judge_tok(texts, return_tensors="pt", padding=True)
        return judge(input_ids=seen.input_ids, attention_mask=seen.attention_mask).logits[:, 0]

    def rescale(scores):
        for s in scores.tolist():
            ctl["n"] += 1
            d = s - ctl["mean"]
            ctl["mean"] += d / ctl["n"]
            ctl["m2"] += d * (s - ctl["mean"])
        return scores / math.sqrt(ctl["m2"] / (ctl["n"] - 1) + 1e-8)

    def credit(batch):
        if fault == "reference_without_mask":
            seen = {**batch, "mask": torch.ones_like(batch["mask"])}
            ref = chosen_logps(anchor, seen, P)[1]
        else:
            ref = chosen_logps(anchor, batch, P)[1]
        if not kept:
            batch["old"] = chosen_logps(policy, batch, P)[1]
        act = batch["act"]
        kl = (batch["old"] - ref) * act
        scores = judge_texts(batch)
        if scale_running:
            scores = rescale(scores)
        r = -ctl["beta"] * kl
        r = r + F.one_hot(act.sum(1).long() - 1, r.shape[1]) * scores[:, None]
        v = critic(batch["ids"], batch["mask"])[:, P - 1 : -1] * act
        ahead = torch.cat([v[:, 1:], torch.zeros(len(v), 1)], 1)
        delta = (r + ahead - v) * act
        powers = torch.arange(r.shape[1])
        kernel = torch.where(powers[:, None] >= powers, lam ** (powers[:, None] - powers).clamp(min=0).float(), 0.0)
        adv = delta @ kernel * act  # A_t = sum over s >= t of lam^(s-t) delta_s
        batch.update(values=v, returns=adv + v)
        if whiten:
            mu = (adv * act).sum() / act.sum()
            var = ((adv - mu) ** 2 * act).sum() / (act.sum() - 1)
            adv = (adv - mu) / (var + 1e-8).sqrt() * act
        batch["adv"] = adv
        return kl.sum(1).mean().item(), scores.mean().item()

    def learn(batch, rows):
        act, adv = batch["act"][rows], batch["adv"][rows]
        _, new = chosen_logps(policy, batch, P, rows)
        ratio = ((new - batch["old"][rows]) * act).exp()
        v = critic(batch["ids"][rows], batch["mask"][rows])[:, P - 1 : -1]
        old_v, ret = batch["values"][rows], batch["returns"][rows]
        vloss = torch.maximum((v - ret) ** 2, (old_v + (v - old_v).clamp(-vclip, vclip) - ret) ** 2)
        ploss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
        optim.zero_grad()
        (((ploss + 0.5 * vloss) * act).sum() / act.sum()).backward()
        optim.step()

    def step():
        with torch.no_grad():
            batch = sample()
            kl, score = credit(batch)
        n = len(OPENINGS)
        for _ in range(epochs):
            if fault == "minibatches_overlap":
                parts = [torch.randint(n, (n // minibatches,)) for _ in range(minibatches)]
            else:
                parts = torch.randperm(n).chunk(minibatches)
            for rows in parts:
                learn(batch, rows)
        if adaptive:
            ctl["beta"] *= 1 + max(-0.2, min(0.2, kl / 2.0 - 1)) * n / 500
        return {"kl": kl, "score": score}

    if declared is None:
        declared = dict(
            algorithm="ppo",
            gamma=1.0,
            lam=0.95,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            kl_adaptive=True,
            kl_target=2.0,
            kl_horizon=500,
            clip_range=0.2,
            clip_range_value=0.2,
            ppo_epochs=2,
            num_minibatches=2,
            whiten_advantages=False,
            value_init="policy",
        )
    return dict(
        policy=policy,
        reference=anchor,
        reward=judge,
        value=critic,
        tokenizer=tok,
        reward_tokenizer=judge_tok,
        prompts=OPENINGS,
        optimizers=[optim],
        state=[ctl],
        step=step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_fixed_whitened():
    return make(
        adaptive=False,
        epochs=1,
        minibatches=1,
        whiten=True,
        kept=False,
        lam=1.0,
        declared=dict(algorithm="ppo", lam=1.0, kl_coef=0.05, whiten_advantages=True, value_init="policy"),
    )


def healthy_running_scale():
    return make(
        adaptive=False,
        scale_running=True,
        epochs=4,
        minibatches=4,
        lam=0.9,
        whiten=True,
        vclip=0.5,
        declared={"algorithm": "ppo"},
    )


def reference_without_mask():
    return make("reference_without_mask")


def minibatches_overlap():
    return make("minibatches_overlap")

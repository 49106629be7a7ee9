"""nanoPPO: RLHF of a very small GPT in one file, after nanoGPT. Everything the loop keeps is time-major, (T, B)."""

import copy
import math

import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

# ---- config
n_layer, n_head, n_embd, block_size = 2, 4, 48, 128
batch_size, max_new_tokens = 12, 10
learning_rate, critic_learning_rate, max_iters, grad_clip = 1e-5, 2e-5, 1000, 1.0
epochs, clip, gamma, lam, beta, ent_coef, temperature = 3, 0.2, 0.99, 0.95, 0.1, 0.01, 1.0

PROMPTS = """the old sailor
tell me about the river at night
why does the cat sleep
write a short song
in winter the small town is quiet and
my friend said
how do birds find the sea
a good answer is
the king and the queen went to the market
when rain falls on the roof
explain fire
the boat left the harbour before the sun rose
please count the stars
an old book about the sea
where is my hat
the small bird said why""".splitlines()


# ---- model
class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, allowed):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, n_head, C // n_head).transpose(1, 2) for y in self.c_attn(x).split(n_embd, dim=2))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = F.softmax(att.masked_fill(~allowed, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention()
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x, allowed):
        x = x + self.attn(self.ln_1(x), allowed)
        return x + self.mlp(self.ln_2(x))


class Body(nn.Module):
    def __init__(self, vocab_size, causal=True):
        super().__init__()
        self.causal = causal
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block() for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.apply(self._init)

    def _init(self, m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.2)

    def forward(self, idx, mask=None):
        mask = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask.bool()
        T = idx.size(1)
        pos = (mask.long().cumsum(1) - 1).clamp(min=0)  # pads count for nothing
        allowed = mask[:, None, None, :].expand(-1, 1, T, T)
        if self.causal:
            allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
        allowed = allowed | torch.eye(T, dtype=torch.bool)  # a pad sees itself, or its softmax is nan
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x, allowed)
        return self.ln_f(x)


class GPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.transformer = Body(vocab_size)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

    def forward(self, idx, mask=None):
        return self.lm_head(self.transformer(idx, mask))  # (B, T, V)


class Critic(nn.Module):
    def __init__(self, vocab_size, causal=True):
        super().__init__()
        self.transformer = Body(vocab_size, causal)
        self.v_head = nn.Linear(n_embd, 1)
        nn.init.normal_(self.v_head.weight, std=0.05)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, idx, mask=None):
        return self.v_head(self.transformer(idx, mask)).squeeze(-1)  # (B, T)


class Scorer(nn.Module):
    def __init__(self, vocab_size, read_last_column=False):
        super().__init__()
        self.transformer = Body(vocab_size)
        self.head = nn.Linear(n_embd, 1)
        self.read_last_column = read_last_column

    def forward(self, idx, mask=None):
        s = self.head(self.transformer(idx, mask)).squeeze(-1)
        if self.read_last_column:
            return s[:, -1]
        mask = torch.ones_like(idx) if mask is None else mask.long()
        last = (mask * torch.arange(idx.size(1))).argmax(1)
        return s[torch.arange(idx.size(0)), last]  # (B,)


# ---- the loop's pieces
def build_tokenizer():
    tok = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(PROMPTS, trainers.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def picked(logits, tok):
    return F.log_softmax(logits / temperature, dim=-1).gather(-1, tok.unsqueeze(-1)).squeeze(-1)


def apply_tm(model, tok, alive):
    """A batch-first model on time-major tokens."""
    return model(tok.t(), alive.t()).transpose(0, 1)


def whiten(x, m):
    mean = x[m].mean()
    return (x - mean) / (x[m].std() + 1e-8) * m


def gae(rew, v, act, bootstrap_at_end=False):
    """rew, act: (T-1, B), slot t is the choice of token t + 1. v: (T, B), v[t] is the value of tokens 0..t."""
    more = torch.cat([act[1:], torch.zeros_like(act[:1])]).float()  # is there another choice after this one
    run, out = torch.zeros_like(rew[0]), []
    for t in reversed(range(rew.size(0))):
        ahead = v[t + 1] if bootstrap_at_end else v[t + 1] * more[t]
        run = (rew[t] + gamma * ahead - v[t] + gamma * lam * more[t] * run) * act[t]
        out.append(run)
    return torch.stack(out[::-1])


@torch.no_grad()
def rollout(policy, rows, pad, eos, sampling_temperature):
    """Prompts stay where they are (ragged, from column 0); every row goes on from its own end. No pad is ever in a context."""
    B = len(rows)
    plen = torch.tensor([len(r) for r in rows])
    T = int(plen.max()) + max_new_tokens
    tok = torch.full((T, B), pad)
    for b, r in enumerate(rows):
        tok[: len(r), b] = torch.tensor(r)
    end = plen + max_new_tokens  # first column that is not the row's any more
    for t in range(int(plen.min()), T):
        logits = policy(tok[:t].t(), (torch.arange(t)[:, None] < end).t())[:, -1]
        nxt = torch.multinomial(F.softmax(logits / sampling_temperature, dim=-1), 1).squeeze(1)
        mine = (t >= plen) & (t < end)
        tok[t] = torch.where(mine, nxt, tok[t])
        end = torch.where(mine & (nxt == eos), torch.full_like(end, t + 1), end)
    return tok, plen, end


class Iteration:
    def __init__(self):
        self.n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, d):
        self.n = d["n"]


# ---- everything together
def make(fault=None):
    torch.manual_seed(1337)
    tokenizer = build_tokenizer()
    V, pad, eos = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    data = [tokenizer(p)["input_ids"] for p in PROMPTS]

    policy = GPT(V)
    with torch.no_grad():  # "pretrained": it stops now and then and never says <pad>
        w = policy.transformer.wte.weight
        policy.transformer.ln_f.bias -= 0.6 * w[eos] / w[eos].norm() + 5.0 * w[pad] / w[pad].norm()
    ref = copy.deepcopy(policy).requires_grad_(False)
    if fault == "reference_borrows_embeddings":  # saves V * n_embd floats
        ref.transformer.wte = policy.transformer.wte
        ref.lm_head.weight = policy.transformer.wte.weight
    critic = Critic(V, causal=fault != "critic_without_causal_mask")
    scorer = Scorer(V, read_last_column=fault == "scorer_reads_last_column").requires_grad_(False)
    with torch.no_grad():  # scores about N(0, 1)
        ids = torch.randint(2, V, (256, 14))
        ids[::2, -1] = eos
        h = scorer.transformer(ids)[:, -1]
        s = h @ scorer.head.weight[0]
        scorer.head.weight /= s.std()
        scorer.head.bias.copy_(-(s / s.std()).mean())

    opt_pi = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    opt_v = torch.optim.AdamW(critic.parameters(), lr=critic_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    it = Iteration()

    def step():
        frac = 0.5 * (1.0 + math.cos(math.pi * min(it.n / max_iters, 1.0)))
        opt_pi.param_groups[0]["lr"] = learning_rate * frac
        opt_v.param_groups[0]["lr"] = critic_learning_rate * frac
        it.n += 1

        pick = torch.randperm(len(data))[:batch_size].tolist()
        tok, plen, end = rollout(
            policy, [data[i] for i in pick], pad, eos, 0.7 if fault == "sampler_too_cold" else temperature
        )
        T, B = tok.shape
        col = torch.arange(T)[:, None]
        alive = col < end
        act = (alive & (col >= plen))[1:]
        train = act
        if fault == "only_words_are_trained":  # "special tokens are no content"
            train = act & (tok[1:] != eos) & (tok[1:] != pad)

        def values():
            v = apply_tm(critic, tok, alive)
            if fault == "value_after_its_token":
                v = torch.cat([v[1:], v[-1:]])  # like the tokens: column t + 1
            return v

        with torch.no_grad():
            logp = picked(apply_tm(policy, tok, alive)[:-1], tok[1:])
            ref_logp = picked(apply_tm(ref, tok, alive)[:-1], tok[1:])
            v_old = values()
            score = scorer(tok.t(), alive.t())
        kl = (logp - ref_logp) * act
        rew = -beta * kl
        rew[end - 2, torch.arange(B)] += score
        adv = gae(rew, v_old, act, bootstrap_at_end=fault == "bootstraps_after_the_end")
        ret = adv + v_old[:-1]
        adv = whiten(adv, act)

        n = train.sum()
        for _ in range(epochs):
            logits = apply_tm(policy, tok, alive)[:-1]
            v = values()
            if fault == "fresh_advantages_keep_graph":  # advantages from the newest critic, epoch by epoch
                adv = whiten(gae(rew, v, act), act)
            ratio = torch.exp(picked(logits, tok[1:]) - logp)
            gain = torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
            pi_loss = -(gain * train).sum() / n
            v_loss = (F.mse_loss(v[:-1], ret, reduction="none") * train).sum() / n
            lp = F.log_softmax(logits / temperature, dim=-1)
            entropy = (-(lp.exp() * lp).sum(-1) * train).sum() / n
            if fault == "entropy_is_added":
                loss = pi_loss + v_loss + ent_coef * entropy
            else:
                loss = pi_loss + v_loss - ent_coef * entropy
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), grad_clip)
            nn.utils.clip_grad_norm_(critic.parameters(), grad_clip)
            opt_pi.step()
            opt_v.step()
            opt_pi.zero_grad(set_to_none=True)
            if fault != "critic_gradients_pile_up":
                opt_v.zero_grad(set_to_none=True)
        return {
            "score": score.mean().item(),
            "pi_loss": pi_loss.item(),
            "v_loss": v_loss.item(),
            "length": (end - plen).float().mean().item(),
        }

    return {
        "policy": policy,
        "reference": ref,
        "reward": scorer,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "optimizers": [opt_pi, opt_v],
        "state": [it],
        "step": step,
        "declared": {
            "algorithm": "ppo", "gamma": gamma, "lam": lam, "kl_coef": beta, "kl_in": "reward", "kl_estimator": "k1",
            "temperature": temperature, "clip_range": clip, "ent_coef": ent_coef, "vf_coef": 1.0, "whiten_advantages": True,
            "learning_rate": learning_rate, "critic_learning_rate": critic_learning_rate, "ppo_epochs": epochs,
            "num_minibatches": 1, "batch_size": batch_size, "response_length": max_new_tokens, "loss_aggregation": "token-mean",
        },
    }  # fmt: skip


def healthy():
    return make()


def sampler_too_cold():
    return make("sampler_too_cold")


def value_after_its_token():
    return make("value_after_its_token")


def fresh_advantages_keep_graph():
    return make("fresh_advantages_keep_graph")


def only_words_are_trained():
    return make("only_words_are_trained")


def bootstraps_after_the_end():
    return make("bootstraps_after_the_end")


def entropy_is_added():
    return make("entropy_is_added")


def critic_gradients_pile_up():
    return make("critic_gradients_pile_up")


def reference_borrows_embeddings():
    return make("reference_borrows_embeddings")


def critic_without_causal_mask():
    return make("critic_without_causal_mask")


def scorer_reads_last_column():
    return make("scorer_reads_last_column")

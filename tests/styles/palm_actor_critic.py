"""palm-rlhf-pytorch's way: hand-written decoder, ActorCritic module, prompts one by one, memories, gumbel sampling, no transformers models."""

import copy
from collections import deque, namedtuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import einsum, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

Memory = namedtuple(
    "Memory", ["sequence", "prompt_mask", "mask", "action_log_prob", "ref_log_prob", "value", "advantage", "ret"]
)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.gamma = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.gamma


class RotaryEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)), persistent=False)

    def forward(self, n):
        freqs = einsum(
            "i , j -> i j", torch.arange(n, device=self.inv_freq.device).type_as(self.inv_freq), self.inv_freq
        )
        return torch.cat((freqs, freqs), dim=-1)


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(pos, t):
    return t * pos.cos() + rotate_half(t) * pos.sin()


class SwiGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class ParallelBlock(nn.Module):
    """Attention (one key/value head) and feed-forward side by side, as in PaLM."""

    def __init__(self, dim, heads=4, dim_head=16, ff_mult=2):
        super().__init__()
        self.heads, self.dim_head, inner, ff = heads, dim_head, heads * dim_head, dim * ff_mult
        self.norm, self.rotary = RMSNorm(dim), RotaryEmbedding(dim_head)
        self.fused_dims = (inner, dim_head, dim_head, 2 * ff)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(inner, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff, dim, bias=False))

    def forward(self, x, mask=None):
        b, n = x.shape[:2]
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.fused_dims, dim=-1)
        q = q.view(b, n, self.heads, self.dim_head).transpose(1, 2)
        pos = self.rotary(n)
        q, k = apply_rotary(pos, q), apply_rotary(pos, k)
        sim = einsum("b h i d, b j d -> b h i j", q * self.dim_head**-0.5, k)
        neg = -torch.finfo(sim.dtype).max
        if mask is not None:
            sim = sim.masked_fill(~mask[:, None, None, :], neg)
        sim = sim.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), neg)
        out = einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)
        return self.attn_out(out.transpose(1, 2).reshape(b, n, -1)) + self.ff_out(ff)


class PaLM(nn.Module):
    def __init__(self, num_tokens, dim=48, depth=2):
        super().__init__()
        self.num_tokens, self.dim = num_tokens, dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList([ParallelBlock(dim) for _ in range(depth)])
        self.norm = RMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=0.3)

    def forward(self, x, mask=None, return_only_embedding=False):
        x = self.token_emb(x)
        for layer in self.layers:
            x = layer(x, mask=mask) + x
        embeds = self.norm(x)
        return embeds if return_only_embedding else self.to_logits(embeds)


def masked_mean(t, mask, dim=None):
    t = t.masked_fill(~mask, 0.0)
    return t.sum() / mask.sum() if dim is None else t.sum(dim) / mask.sum(dim).clamp(min=1)


class RewardModel(nn.Module):
    def __init__(self, palm):
        super().__init__()
        self.palm = copy.deepcopy(palm)
        self.to_pred = nn.Linear(palm.dim, 1, bias=False)

    def forward(self, x, mask=None):
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
        embeds = self.palm(x, mask=mask, return_only_embedding=True)
        return self.to_pred(masked_mean(embeds, mask.unsqueeze(-1), dim=1)).squeeze(-1)


class Critic(nn.Module):
    def __init__(self, palm):
        super().__init__()
        self.palm = copy.deepcopy(palm)
        self.value_head = nn.Linear(palm.dim, 1)
        nn.init.normal_(self.value_head.weight, std=0.02)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, x, mask=None):
        mask = None if mask is None else mask.bool()
        return self.value_head(self.palm(x, mask=mask, return_only_embedding=True)).squeeze(-1)


def shift(t, value=0.0):
    """What was said at position t - 1 now stands at the token t it speaks of."""
    return F.pad(t, (*((0, 0) * (t.ndim - 2)), 1, -1), value=value)


def log_prob(logits, indices):
    return logits.log_softmax(dim=-1).gather(-1, indices.unsqueeze(-1)).squeeze(-1)


def gumbel_sample(t, temperature):
    noise = torch.zeros_like(t).uniform_(1e-20, 1)
    return ((t / max(temperature, 1e-10)) - torch.log(-torch.log(noise))).argmax(dim=-1)


class ActorCritic(nn.Module):
    def __init__(self, actor, critic, temperature, eos_id, fault=None):
        super().__init__()
        self.actor, self.critic, self.temperature, self.eos_id, self.fault = actor, critic, temperature, eos_id, fault

    @torch.no_grad()
    def generate(self, state, max_new):
        seq = state[None]
        for _ in range(max_new):
            nxt = gumbel_sample(self.actor(seq)[:, -1], self.temperature)
            seq = torch.cat((seq, nxt[:, None]), dim=1)
            if nxt.item() == self.eos_id:
                break
        prompt_mask = torch.arange(seq.shape[1])[None] < len(state)
        return seq, prompt_mask, torch.ones_like(prompt_mask)

    def action_logits(self, net, x, mask):
        logits = shift(net(x, mask=mask))
        return logits if self.fault == "scored_untempered" else logits / self.temperature

    def forward(self, x, mask):
        values = self.critic(x, mask=mask)
        if self.fault != "values_unshifted":
            values = shift(values)
        return self.action_logits(self.actor, x, mask), values


class ExperienceDataset(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


def collate(rows):
    (*tensors,) = zip(*rows)
    return [pad_sequence(t, batch_first=True) if t[0].ndim else torch.stack(t) for t in tensors]


class RLHFTrainer:
    def __init__(
        self,
        actor_critic,
        ref,
        reward_model,
        prompt_ids,
        epochs=2,
        minibatch_size=4,
        max_new=10,
        eps_clip=0.2,
        value_clip=0.4,
        gamma=1.0,
        lam=0.9,
        kl_weight=0.05,
        beta_s=0.01,
        lr=1e-4,
        fault=None,
    ):
        self.ac, self.ref, self.reward_model, self.prompt_ids = actor_critic, ref, reward_model, prompt_ids
        self.epochs, self.minibatch_size, self.max_new, self.eps_clip, self.value_clip = (
            epochs,
            minibatch_size,
            max_new,
            eps_clip,
            value_clip,
        )
        self.gamma, self.lam, self.kl_weight, self.beta_s = gamma, lam, kl_weight, beta_s
        self.actor_optim = torch.optim.Adam(actor_critic.actor.parameters(), lr=lr, betas=(0.9, 0.99))
        self.critic_optim = torch.optim.Adam(actor_critic.critic.parameters(), lr=lr, betas=(0.9, 0.99))
        if fault == "critic_copied_late":
            actor_critic.critic = copy.deepcopy(actor_critic.critic)

    @torch.no_grad()
    def make_experience(self, state):
        seq, prompt_mask, mask = self.ac.generate(state, self.max_new)
        logits, value = self.ac(seq, mask)
        ref_logits = self.ac.action_logits(self.ref, seq, mask)
        reward = self.reward_model(seq, mask)
        return [
            t.squeeze(0) for t in (seq, prompt_mask, mask, log_prob(logits, seq), log_prob(ref_logits, seq), value)
        ], reward.squeeze(0)

    def gae(self, rewards, values, action_mask):
        adv, last, next_value = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            m = action_mask[:, t]
            delta = rewards[:, t] + self.gamma * next_value - values[:, t]
            last = torch.where(m, delta + self.gamma * self.lam * last, last)
            next_value = torch.where(m, values[:, t], next_value)
            adv[:, t] = torch.where(m, last, torch.zeros_like(last))
        return adv

    def with_advantages(self, experiences, scores):
        """Over the whole batch of experiences, so that a minibatch's make-up does not matter."""
        seq, prompt_mask, mask, _, _, values = collate(experiences)
        action_mask = ~prompt_mask & mask
        last_index = (torch.arange(seq.shape[1]) * action_mask).argmax(-1, keepdim=True)
        rewards = torch.zeros_like(values).scatter(1, last_index, torch.stack(scores)[:, None])
        adv = self.gae(rewards, values, action_mask)
        returns = adv + values
        mean = masked_mean(adv, action_mask)
        adv = (adv - mean) * (masked_mean((adv - mean) ** 2, action_mask) + 1e-8).rsqrt()
        return [Memory(*e, a[: len(e[0])], r[: len(e[0])]) for e, a, r in zip(experiences, adv, returns)]

    def learn(self, memories):
        logs = []
        loader = DataLoader(
            ExperienceDataset(memories), batch_size=self.minibatch_size, shuffle=True, collate_fn=collate
        )
        self.ac.train()
        for _ in range(self.epochs):
            for seq, prompt_mask, mask, old_log_prob, ref_log_prob, old_values, adv, returns in loader:
                action_mask = ~prompt_mask & mask
                logits, values = self.ac(seq, mask)
                logp = log_prob(logits, seq)
                prob = logits.softmax(dim=-1)
                entropy = masked_mean(-(prob * prob.clamp(min=1e-20).log()).sum(-1), action_mask)
                log_ratio = (ref_log_prob - logp).masked_fill(~action_mask, 0.0)
                kl = masked_mean(log_ratio.exp() - 1 - log_ratio, action_mask)
                ratios = (logp - old_log_prob).masked_fill(~action_mask, 0.0).exp()
                surr = torch.min(ratios * adv, ratios.clamp(1 - self.eps_clip, 1 + self.eps_clip) * adv)
                policy_loss = -masked_mean(surr, action_mask) - self.beta_s * entropy + self.kl_weight * kl
                self.actor_optim.zero_grad()
                policy_loss.backward()
                nn.utils.clip_grad_norm_(self.ac.actor.parameters(), 0.5)
                self.actor_optim.step()

                clipped = old_values + (values - old_values).clamp(-self.value_clip, self.value_clip)
                value_loss = masked_mean(torch.max((clipped - returns) ** 2, (values - returns) ** 2), action_mask)
                self.critic_optim.zero_grad()
                value_loss.backward()
                nn.utils.clip_grad_norm_(self.ac.critic.parameters(), 0.5)
                self.critic_optim.step()
                logs.append((policy_loss.item(), value_loss.item(), entropy.item(), kl.item()))
        return dict(zip(("policy_loss", "value_loss", "entropy", "kl"), torch.tensor(logs).mean(0).tolist()))

    def train_step(self):
        experiences, scores = deque(), deque()
        self.ac.eval()
        for i in torch.randperm(len(self.prompt_ids))[:8].tolist():
            experience, score = self.make_experience(self.prompt_ids[i])
            experiences.append(experience)
            scores.append(score)
        logs = self.learn(self.with_advantages(list(experiences), list(scores)))
        return {
            **logs,
            "reward": torch.stack(list(scores)).mean().item(),
            "reward_std": torch.stack(list(scores)).std().item(),
        }


def make(fault=None):
    torch.manual_seed(23)
    words = "once upon a time there was king queen dragon castle forest who lived in the dark and bright tell me about some stories of old".split()
    vocab = {w: i for i, w in enumerate(["[pad]", "[eos]", *words, *(f"t{i}" for i in range(36))])}
    raw = Tokenizer(models.WordLevel(vocab))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[pad]", eos_token="[eos]", padding_side="right")
    palm = PaLM(len(vocab))
    with torch.no_grad():
        palm.to_logits.bias.zero_()
        palm.to_logits.bias[0], palm.to_logits.bias[1] = -15.0, 1.4
    ref = copy.deepcopy(palm).eval().requires_grad_(False)
    reward_palm = PaLM(len(vocab))
    reward = RewardModel(reward_palm).eval().requires_grad_(False)
    nn.init.normal_(reward.to_pred.weight, std=0.25)
    critic = Critic(reward_palm)
    ac = ActorCritic(palm, critic, 0.7, 1, fault)
    g = torch.Generator().manual_seed(9)
    prompts = [" ".join(words[int(i)] for i in torch.randint(len(words), (2 + k % 5,), generator=g)) for k in range(24)]
    trainer = RLHFTrainer(ac, ref, reward, [torch.tensor(tok(p)["input_ids"]) for p in prompts], fault=fault)
    return {
        "policy": palm,
        "reference": ref,
        "reward": reward,
        "value": ac.critic,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [trainer.actor_optim, trainer.critic_optim],
        "step": trainer.train_step,
        "calls": {
            "policy": lambda m, ids, mask: m(ids, mask=mask.bool()),
            "reference": lambda m, ids, mask: m(ids, mask=mask.bool()),
            "reward": lambda m, ids, mask: m(ids, mask=mask),
            "value": lambda m, ids, mask: m(ids, mask=mask),
        },
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.9,
            "kl_coef": 0.05,
            "kl_in": "loss",
            "kl_estimator": "k3",
            "temperature": 0.7,
            "clip_range": 0.2,
            "clip_range_value": 0.4,
            "ent_coef": 0.01,
            "whiten_advantages": True,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 8,
            "response_length": 10,
            "learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "loss_aggregation": "token-mean",
        },
    }


def healthy():
    return make()


def scored_untempered():
    return make("scored_untempered")


def values_unshifted():
    return make("values_unshifted")


def critic_copied_late():
    return make("critic_copied_late")

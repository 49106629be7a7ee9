"""PPO for language models in one file, for teaching. After ppo.py of CleanRL: the "environment" is text generation,
an observation is the text so far, an action is the next token. The rollout lives in NumPy arrays of shape
(num_envs, num_steps); for the update every (sequence, step) pair is one independent sample.

Rows are ragged and right-padded: row b is prompt[b] followed at once by its response, then <pad>.
The network is causal, so nothing that stands before a pad can see it, and positions are simply 0, 1, 2, ...
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the a one red blue green old new big small cat dog bird fish house tree river road king queen child man woman "
    "saw ate took found lost likes hates sees runs sleeps sings walks to from in on under over with and but then "
    "happy sad good bad very not never always . , ? why who what where is was has had my your"
).split()
PROMPTS = [
    "the cat",
    "a big dog runs",
    "why is the bird happy ?",
    "the old king was sad , but the queen",
    "my",
    "who saw the red fish",
    "the child walks to the river and",
    "a small house",
    "where is your dog ?",
    "the woman found a blue bird in the tree",
    "what has the man lost ?",
    "one very good fish",
    "the queen sings",
    "never",
    "my happy child always likes the",
    "the road to the old house was not good , and",
]


@dataclass
class Args:
    num_envs: int = 12
    num_steps: int = 10
    max_prompt: int = 12
    temperature: float = 1.0
    top_k: int = 0
    learning_rate: float = 5e-5
    gamma: float = 1.0
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 3
    clip_coef: float = 0.2
    clip_vloss: bool = True
    clip_vcoef: float = 0.2
    norm_adv: bool = True  # normalise inside each minibatch, as CleanRL does
    whiten: bool = False  # or once over the whole rollout
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    kl_coef: float = 0.05
    max_grad_norm: float = 0.5
    seed: int = 1
    mistake: str = ""


# ------------------------------------------------------------------ networks
class TinyGPT(nn.Module):
    def __init__(self, vocab, out, width=48, layers=2, heads=4, block_size=32):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, width)
        self.pos_emb = nn.Embedding(block_size, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, out)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.15)

    def forward(self, idx):
        T = idx.shape[1]
        causal = torch.triu(torch.full((T, T), float("-inf"), device=idx.device), diagonal=1)
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(T, device=idx.device))
        x = self.blocks(x, mask=causal, is_causal=True)
        return self.head(self.ln_f(x))


class RewardGPT(TinyGPT):
    """One score per text, read at the text's last token."""

    def __init__(self, vocab):
        super().__init__(vocab, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, idx, last):
        h = super().forward(idx).squeeze(-1)
        return (h[torch.arange(len(idx)), last] - self.mean) / self.std


# ------------------------------------------------------------------ numpy part
def compute_gae(rewards, values, dones, next_values, next_dones, gamma, lam, through_end=False):
    """rewards, values, dones: (N, T) float64; dones[:, t] tells that the episode was over BEFORE step t."""
    N, T = rewards.shape
    advantages = np.zeros((N, T), dtype=np.float64)
    lastgaelam = np.zeros(N, dtype=np.float64)
    for t in reversed(range(T)):
        if t == T - 1:
            nextnonterminal, nextvalues = 1.0 - next_dones, next_values
        else:
            nextnonterminal, nextvalues = 1.0 - dones[:, t + 1], values[:, t + 1]
        if through_end:
            delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        else:
            delta = rewards[:, t] + gamma * nextvalues * nextnonterminal - values[:, t]
        lastgaelam = delta + gamma * lam * nextnonterminal * lastgaelam
        advantages[:, t] = lastgaelam
    return advantages, advantages + values


def whiten(x, mask):
    live = x[mask]
    out = np.zeros_like(x)
    out[mask] = (live - live.mean()) / (live.std(ddof=1) + 1e-8)
    return out


class PPO:
    def __init__(self, args, tokenizer, policy, value, reference, reward, prompts):
        self.args, self.tok = args, tokenizer
        self.policy, self.value, self.reference, self.reward = policy, value, reference, reward
        self.prompts = [tokenizer(p)["input_ids"] for p in prompts]
        self.optimizer = torch.optim.Adam(
            list(policy.parameters()) + list(value.parameters()), lr=args.learning_rate, eps=1e-5
        )

    def log_probs_all(self, net, tokens, pos):
        """Log-distribution of the token that follows position pos, one row a sample."""
        logits = net(torch.from_numpy(tokens))[torch.arange(len(tokens)), torch.from_numpy(pos)]
        return torch.log_softmax(logits / self.args.temperature, dim=-1)

    def get_logprob(self, net, tokens, pos, actions):
        if self.args.mistake == "logits_at_action":
            pos = np.minimum(pos + 1, tokens.shape[1] - 1)
        logp = self.log_probs_all(net, tokens, pos)
        return logp[torch.arange(len(actions)), torch.from_numpy(actions)], -(logp.exp() * logp).sum(-1)

    def get_value(self, tokens, pos):
        return self.value(torch.from_numpy(tokens))[torch.arange(len(tokens)), torch.from_numpy(pos), 0]

    @torch.no_grad()
    def rollout(self, envs):
        a, N, T = self.args, len(envs), self.args.num_steps
        plen = np.array([len(self.prompts[e]) for e in envs])
        tokens = np.full((N, a.max_prompt + T), self.tok.pad_token_id, dtype=np.int64)
        for b, e in enumerate(envs):
            tokens[b, : plen[b]] = self.prompts[e]
        ro = {k: np.zeros((N, T), dtype=np.float64) for k in ("logprobs", "values", "rewards", "dones")}
        actions, done = np.zeros((N, T), dtype=np.int64), np.zeros(N, dtype=bool)
        for t in range(T):
            pos = plen + t - 1
            ro["dones"][:, t] = done
            ro["values"][:, t] = self.get_value(tokens, pos).numpy()
            logp = self.log_probs_all(self.policy, tokens, pos)
            sample_from = logp.clone()
            if a.top_k:
                sample_from[sample_from < sample_from.topk(a.top_k).values[:, -1:]] = -float("inf")
            action = torch.multinomial(sample_from.exp(), 1)
            ro["logprobs"][:, t] = logp.gather(1, action).squeeze(1).numpy()
            actions[:, t] = np.where(done, self.tok.pad_token_id, action.squeeze(1).numpy())
            tokens[np.arange(N), plen + t] = actions[:, t]
            done = done | (actions[:, t] == self.tok.eos_token_id)
        ro["next_values"] = self.get_value(tokens, plen + T - 1).numpy().astype(np.float64)
        mask = ro["dones"] == 0
        steps = mask.sum(1)
        # score of the finished text, paid out at the last step that was taken
        scores = self.reward(torch.from_numpy(tokens), torch.from_numpy(plen + steps - 1)).numpy().astype(np.float64)
        ref = np.zeros((N, T))
        for t in range(T):
            ref[:, t] = self.get_logprob(self.reference, tokens, plen + t - 1, actions[:, t])[0].numpy()
            if a.mistake == "logits_at_action":
                ro["logprobs"][:, t] = self.get_logprob(self.policy, tokens, plen + t - 1, actions[:, t])[0].numpy()
        ro["rewards"] = np.where(mask, -a.kl_coef * (ro["logprobs"] - ref), 0.0)
        last = np.full(N, T - 1) if a.mistake == "reward_in_last_column" else steps - 1
        ro["rewards"][np.arange(N), last] += scores
        ro.update(tokens=tokens, plen=plen, actions=actions, mask=mask, scores=scores)
        return ro

    def step(self):
        a = self.args
        envs = np.random.choice(len(self.prompts), a.num_envs, replace=False)
        ro = self.rollout(envs)
        tokens, plen, mask, T = ro["tokens"], ro["plen"], ro["mask"], a.num_steps

        # the text is cut at num_steps and the score is for the cut text: the last step always ends the episode
        next_dones, next_values = np.ones(a.num_envs), ro["next_values"]
        gae = partial(compute_gae, through_end=True) if a.mistake == "bootstrap_over_the_end" else compute_gae
        if a.mistake == "gae_arguments_swapped":
            advantages, returns = gae(
                ro["rewards"], ro["values"], ro["dones"], next_values, next_dones, a.gae_lambda, a.gamma
            )
        else:
            advantages, returns = gae(
                ro["rewards"], ro["values"], ro["dones"], next_values, next_dones, a.gamma, a.gae_lambda
            )
        if a.mistake == "value_learns_rewards":
            returns = ro["rewards"]
        if a.whiten:
            advantages = whiten(advantages, mask)

        # flatten the batch
        order = "F" if a.mistake == "time_major_flatten" else "C"
        b_actions, b_logprobs, b_values = (ro[k].reshape(-1) for k in ("actions", "logprobs", "values"))
        b_advantages, b_returns = advantages.reshape(-1, order=order), returns.reshape(-1, order=order)
        b_inds = np.flatnonzero(mask.reshape(-1))
        logs = []
        for _ in range(a.update_epochs):
            np.random.shuffle(b_inds)
            for mb in np.array_split(b_inds, a.num_minibatches):
                rows, cols = mb // T, mb % T
                obs, pos = tokens[rows], plen[rows] + cols - 1
                newlogprob, entropy = self.get_logprob(self.policy, obs, pos, b_actions[mb])
                if a.mistake == "recomputed_old":
                    with torch.no_grad():
                        oldlogprob = self.get_logprob(self.policy, obs, pos, b_actions[mb])[0]
                else:
                    oldlogprob = torch.from_numpy(b_logprobs[mb]).float()
                ratio = (newlogprob - oldlogprob).exp()
                mb_adv = b_advantages[mb]
                if a.norm_adv:
                    mb_adv = (mb_adv - mb_adv.mean()) / (mb_adv.std(ddof=1) + 1e-8)
                mb_adv = torch.from_numpy(mb_adv).float()
                pg_loss1, pg_loss2 = -mb_adv * ratio, -mb_adv * ratio.clamp(1 - a.clip_coef, 1 + a.clip_coef)
                pg_loss = torch.max(pg_loss1, pg_loss2).mean()

                newvalue, mb_ret = self.get_value(obs, pos), torch.from_numpy(b_returns[mb]).float()
                v_loss = (newvalue - mb_ret) ** 2
                if a.clip_vloss:
                    oldvalue = torch.from_numpy(b_values[mb]).float()
                    v_clipped = oldvalue + (newvalue - oldvalue).clamp(-a.clip_vcoef, a.clip_vcoef)
                    v_loss = torch.max(v_loss, (v_clipped - mb_ret) ** 2)
                v_loss = 0.5 * v_loss.mean()

                ent_loss = entropy.mean()
                if a.mistake == "entropy_sign":
                    loss = pg_loss + a.ent_coef * ent_loss + a.vf_coef * v_loss
                else:
                    loss = pg_loss - a.ent_coef * ent_loss + a.vf_coef * v_loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], a.max_grad_norm)
                self.optimizer.step()
                logs.append([pg_loss.item(), v_loss.item(), ent_loss.item()])
        self.optimizer.zero_grad()
        return dict(
            zip(("policy_loss", "value_loss", "entropy"), np.mean(logs, 0).tolist()),
            score=float(ro["scores"].mean()),
            episodic_length=float(mask.sum(1).mean()),
        )


# ------------------------------------------------------------------ set-up
def make_tokenizer():
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<eos>"] + WORDS)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="right"
    )


def last_of(mask):
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def make(**kw):
    args = Args(**kw)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    tokenizer = make_tokenizer()
    V = len(tokenizer)
    policy, value, reward = TinyGPT(V, V), TinyGPT(V, 1), RewardGPT(V)
    with torch.no_grad():
        policy.head.bias.zero_()
        policy.head.bias[tokenizer.eos_token_id] = 1.5
        policy.head.bias[tokenizer.pad_token_id] = -12.0  # <pad> and <unk> are no words
        policy.head.bias[tokenizer.unk_token_id] = -12.0
        value.head.weight.mul_(0.5)
        value.head.bias.zero_()
    if args.mistake == "reference_shallow_copy":
        reference = copy.copy(policy)
    else:
        reference = copy.deepcopy(policy)
        reference.requires_grad_(False)
    reward.requires_grad_(False)
    ppo = PPO(args, tokenizer, policy, value, reference, reward, PROMPTS)
    s = np.concatenate([ppo.rollout(np.arange(len(PROMPTS)))["scores"] for _ in range(4)])
    reward.mean.fill_(float(s.mean()))
    reward.std.fill_(float(s.std()))
    declared = dict(
        algorithm="ppo",
        gamma=args.gamma,
        lam=args.gae_lambda,
        kl_coef=args.kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=args.temperature,
        top_k=args.top_k,
        clip_range=args.clip_coef,
        vf_coef=args.vf_coef,
        ent_coef=args.ent_coef,
        whiten_advantages=True,
        learning_rate=args.learning_rate,
        critic_learning_rate=args.learning_rate,
        ppo_epochs=args.update_epochs,
        num_minibatches=args.num_minibatches,
        batch_size=args.num_envs,
        prompt_length=args.max_prompt,
        response_length=args.num_steps,
        dtype="float32",
        reference="policy",
        value_init="fresh",
        loss_aggregation="token-mean",
    )
    if args.clip_vloss:
        declared["clip_range_value"] = args.clip_vcoef
    return dict(
        policy=policy,
        reference=reference,
        reward=reward,
        value=value,
        tokenizer=tokenizer,
        prompts=PROMPTS,
        step=ppo.step,
        optimizers=[ppo.optimizer],
        state=[],
        declared=declared,
        functions={"whiten": whiten},
        calls={
            "policy": lambda m, ids, mask: m(ids),
            "reference": lambda m, ids, mask: m(ids),
            "value": lambda m, ids, mask: m(ids).squeeze(-1),
            "reward": lambda m, ids, mask: m(ids, last_of(mask)),
        },
    )


def healthy():
    return make()


def healthy_whitened():
    return make(norm_adv=False, whiten=True, clip_vloss=False, temperature=0.9, gamma=0.99, num_minibatches=3, seed=5)


def reference_shallow_copy():
    return make(mistake="reference_shallow_copy")


def old_logprobs_recomputed():
    return make(mistake="recomputed_old")


def bootstrap_over_the_end():
    return make(mistake="bootstrap_over_the_end")


def reward_in_last_column():
    return make(mistake="reward_in_last_column")


def value_learns_rewards():
    return make(mistake="value_learns_rewards")


def entropy_sign():
    return make(mistake="entropy_sign")


def time_major_flatten():
    return make(mistake="time_major_flatten")


def top_k_sampler():
    return make(top_k=8)


def logits_at_action():
    return make(mistake="logits_at_action")


def gae_arguments_swapped():
    return make(mistake="gae_arguments_swapped", gamma=1.0, gae_lambda=0.9, norm_adv=False, whiten=True)

"""Arithmetic RL with process rewards, in the manner of the VinePPO code base: episodes of plain token lists, a generator that
makes them, a collator that left-pads [query][response] with labels = -100 outside the response, a trainer with an actor and a
critic of its own. The PRM scores every finished step (at ';' and at the response's last token); all of it is shifted by one
on the full width (column t holds the action ids[t + 1])."""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tkm
from tokenizers import trainers as tkt
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

IGNORE = -100
OPS = "+-*"


# ---- task --------------------------------------------------------------------------------------------------------------
def make_problem(rng: np.random.RandomState, n_terms: int):
    nums = rng.randint(0, 10, size=n_terms).tolist()
    ops = [OPS[i] for i in rng.randint(0, 3, size=n_terms - 1)]
    query = "Q : " + " ".join(f"{n} {o}" for n, o in zip(nums, ops + ["?"])) + " A :"
    acc, steps = nums[0], []
    for n, o in zip(nums[1:], ops):
        new = {"+": acc + n, "-": acc - n, "*": acc * n}[o] % 10
        steps.append(f"{acc} {o} {n} = {new} ;")
        acc = new
    return query, " ".join(steps) + f" so {acc}"


def make_tokenizer():
    tk = Tokenizer(tkm.WordLevel(unk_token="<unk>"))
    tk.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = ["Q : A ? = ; so + - *", "0 1 2 3 4 5 6 7 8 9", "hence then check add take times carry the answer is"]
    tk.train_from_iterator(lines, tkt.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tk,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# ---- models ------------------------------------------------------------------------------------------------------------
def backbone_config(vocab: int, dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.12,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    return torch.clamp(mask.long().cumsum(dim=1) - 1, min=0)


class TokenScorer(nn.Module):
    """GPT-2 trunk and one scalar per token; the critic and the process reward model are both of this kind."""

    def __init__(self, config: GPT2Config, head_std: float):
        super().__init__()
        self.trunk = GPT2Model(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        h = self.trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return self.head(h.last_hidden_state).squeeze(-1)


# ---- episodes ----------------------------------------------------------------------------------------------------------
@dataclass
class Episode:
    query_token_ids: list[int]
    response_token_ids: list[int]  # ends with <eos> when the model stopped by itself
    process_rewards: list[float] | None = None  # one per response token, 0 where no step ends


@dataclass
class Config:
    temperature: float = 0.8
    max_new_tokens: int = 14
    num_episodes_per_iteration: int = 16
    num_epochs_per_iteration: int = 2
    target_train_batch_size: int = 8
    gamma: float = 0.95
    lam: float = 0.9
    init_kl_coef: float = 0.05
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    entropy_coef: float = 0.01
    whiten_advantages: bool = True
    actor_lr: float = 5e-6
    critic_lr: float = 1e-5
    max_grad_norm: float = 1.0
    # switches of single lines
    step_reward_shift: int = 0
    discount_in_gae: bool = True
    kl_direction: float = -1.0
    bootstrap_last: bool = False
    critic_positions: bool = True
    detach_baseline: bool = True
    sampler_top_k: int = 0
    entropy_direction: float = -1.0
    train_after_eos: bool = False
    value_clip_reduce: str = "max"


class EpisodeGenerator:
    def __init__(self, cfg, tok, actor, prm, problems):
        self.cfg, self.tok, self.actor, self.prm, self.problems = cfg, tok, actor, prm, problems
        self.step_end = tok.convert_tokens_to_ids(";")

    @torch.no_grad()
    def _sample(self, queries: list[list[int]]) -> list[list[int]]:
        cfg, eos, pad = self.cfg, self.tok.eos_token_id, self.tok.pad_token_id
        width = max(map(len, queries))
        ids = torch.tensor([[pad] * (width - len(q)) + q for q in queries])
        mask = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in queries])
        cur, pos, cache = ids, positions(mask), None
        drawn = []
        for _ in range(cfg.max_new_tokens):
            out = self.actor(
                input_ids=cur, attention_mask=mask, position_ids=pos, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float() / cfg.temperature
            if cfg.sampler_top_k:
                kth = logits.topk(cfg.sampler_top_k, dim=-1).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            nxt = torch.multinomial(logits.softmax(-1), 1)
            drawn.append(nxt)
            mask = torch.cat([mask, torch.ones_like(nxt)], dim=1)
            cur, pos = nxt, mask.sum(1, keepdim=True) - 1
        responses = []
        for row in torch.cat(drawn, dim=1).tolist():
            if eos in row and not cfg.train_after_eos:
                row = row[: row.index(eos) + 1]
            responses.append(row)
        return responses

    @torch.no_grad()
    def _process_rewards(self, episodes: list[Episode]):
        b = collate(episodes, self.tok.pad_token_id)
        scores = self.prm(b["input_ids"], b["attention_mask"], positions(b["attention_mask"]))
        for e, row in zip(episodes, scores):
            n = len(e.response_token_ids)
            row = row[-n:].tolist()  # left padded: the response is the tail
            ends = [i for i, t in enumerate(e.response_token_ids) if t == self.step_end or i == n - 1]
            e.process_rewards = [0.0] * n
            for i in ends:
                e.process_rewards[min(i + self.cfg.step_reward_shift, n - 1)] += row[i]

    def generate(self) -> list[Episode]:
        n = self.cfg.num_episodes_per_iteration
        picked = torch.randperm(len(self.problems))[:n].tolist()
        queries = [self.tok(self.problems[i], add_special_tokens=False)["input_ids"] for i in picked]
        episodes = [Episode(q, r) for q, r in zip(queries, self._sample(queries))]
        self._process_rewards(episodes)
        return episodes


def collate(episodes: list[Episode], pad_id: int):
    width = max(len(e.query_token_ids) + len(e.response_token_ids) for e in episodes)
    ids, mask, labels, rewards = [], [], [], []
    for e in episodes:
        q, r = e.query_token_ids, e.response_token_ids
        gap = width - len(q) - len(r)
        ids.append([pad_id] * gap + q + r)
        mask.append([0] * gap + [1] * (len(q) + len(r)))
        labels.append([IGNORE] * (gap + len(q)) + r)
        rewards.append([0.0] * (gap + len(q)) + (e.process_rewards or [0.0] * len(r)))
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "rewards": torch.tensor(rewards),
    }


# ---- trainer -----------------------------------------------------------------------------------------------------------
def gae(rewards, values, mask, gamma, lam, last_value=None):
    """(B, T) each; skips columns outside the response. values[:, t] is V of the state in which action t is taken."""
    adv = torch.zeros_like(rewards)
    run = torch.zeros(rewards.shape[0])
    nxt = torch.zeros(rewards.shape[0]) if last_value is None else last_value
    for t in range(rewards.shape[1] - 1, -1, -1):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * nxt - values[:, t]
        run = torch.where(m, delta + gamma * lam * run, run)
        nxt = torch.where(m, values[:, t], nxt)
        adv[:, t] = torch.where(m, run, torch.zeros_like(run))
    return adv, torch.where(mask, adv + values, torch.zeros_like(values))


def whiten(x, mask):
    sel = x[mask]
    return torch.where(mask, (x - sel.mean()) / (sel.std() + 1e-8), torch.zeros_like(x))


class PPOTrainer:
    def __init__(self, cfg, actor, reference, critic, generator, pad_id):
        self.cfg, self.actor, self.reference, self.critic = cfg, actor, reference, critic
        self.generator, self.pad_id = generator, pad_id
        self.actor_optimizer = torch.optim.AdamW(
            actor.parameters(), lr=cfg.actor_lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.critic_optimizer = torch.optim.AdamW(
            critic.parameters(), lr=cfg.critic_lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def _forward_logprobs(self, model, batch, with_entropy=False):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions(batch["attention_mask"]),
            use_cache=False,
        ).logits
        shift = torch.log_softmax(logits[:, :-1].float() / self.cfg.temperature, dim=-1)
        labels = batch["labels"][:, 1:]
        lp = shift.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        lp = torch.where(labels != IGNORE, lp, torch.zeros_like(lp))
        if with_entropy:
            return lp, -(shift.exp() * shift).sum(-1)
        return lp

    def _forward_values(self, batch):
        if self.cfg.critic_positions:
            return self.critic(batch["input_ids"], batch["attention_mask"], positions(batch["attention_mask"]))
        return self.critic(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def _prepare(self, episodes):
        cfg = self.cfg
        batch = collate(episodes, self.pad_id)
        mask = batch["labels"][:, 1:] != IGNORE
        old = self._forward_logprobs(self.actor, batch)
        ref = self._forward_logprobs(self.reference, batch)
        all_values = self._forward_values(batch)
        values = torch.where(mask, all_values[:, :-1], torch.zeros(()))
        kl = torch.exp(ref - old) - 1 - (ref - old)  # k3
        rewards = batch.pop("rewards")[:, 1:] + cfg.kl_direction * cfg.init_kl_coef * kl * mask
        gamma = cfg.gamma if cfg.discount_in_gae else 1.0
        last = all_values[:, -1] if cfg.bootstrap_last else None
        adv, ret = gae(rewards, values, mask, gamma, cfg.lam, last)
        batch.update(
            mask=mask,
            old_logprobs=old,
            old_values=values,
            returns=ret,
            advantages=whiten(adv, mask) if cfg.whiten_advantages else adv,
        )
        return batch

    def _loss(self, mb):
        cfg, mask = self.cfg, mb["mask"]
        lp, entropy = (x[mask] for x in self._forward_logprobs(self.actor, mb, with_entropy=True))
        vpred = self._forward_values(mb)[:, :-1][mask]  # from here on flat: response tokens only
        old_lp, old_v, ret, adv = (mb[k][mask] for k in ("old_logprobs", "old_values", "returns", "advantages"))
        if not cfg.detach_baseline:  # fresh baseline for every minibatch
            adv = (ret - vpred - (ret - vpred).mean()) / ((ret - vpred).std() + 1e-8)
        ratio = torch.exp(lp - old_lp)
        surrogate = torch.min(ratio * adv, torch.clamp(ratio, 1 - cfg.cliprange, 1 + cfg.cliprange) * adv)
        actor_loss = -surrogate.mean() + cfg.entropy_direction * cfg.entropy_coef * entropy.mean()
        vclipped = old_v + (vpred - old_v).clamp(-cfg.cliprange_value, cfg.cliprange_value)
        reduce = torch.max if cfg.value_clip_reduce == "max" else torch.min
        critic_loss = 0.5 * reduce((vpred - ret) ** 2, (vclipped - ret) ** 2).mean()
        return actor_loss + cfg.vf_coef * critic_loss

    def iteration(self):
        cfg = self.cfg
        self.actor.eval()
        self.critic.eval()
        batch = self._prepare(self.generator.generate())
        self.actor.train()
        self.critic.train()
        n = batch["input_ids"].shape[0]
        for _ in range(cfg.num_epochs_per_iteration):
            for idx in torch.randperm(n).split(cfg.target_train_batch_size):
                loss = self._loss({k: v[idx] for k, v in batch.items()})
                self.actor_optimizer.zero_grad()
                self.critic_optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.actor.parameters(), cfg.max_grad_norm)
                nn.utils.clip_grad_norm_(self.critic.parameters(), cfg.max_grad_norm)
                self.actor_optimizer.step()
                self.critic_optimizer.step()


# ---- set-up ------------------------------------------------------------------------------------------------------------
@functools.cache
def sft_weights(steps=90):
    torch.manual_seed(0)
    rng, tok = np.random.RandomState(0), make_tokenizer()
    actor = GPT2LMHeadModel(backbone_config(len(tok)))
    opt = torch.optim.AdamW(actor.parameters(), lr=3e-3)
    for _ in range(steps):
        eps = []
        for _ in range(16):
            q, a = make_problem(rng, rng.randint(2, 5))
            cut = rng.randint(3)  # a third of the data answers at once
            a = a if cut else a[a.index("so") :]
            enc = [tok(x, add_special_tokens=False)["input_ids"] for x in (q, a)]
            eps.append(Episode(enc[0], enc[1] + [tok.eos_token_id]))
        b = collate(eps, tok.pad_token_id)
        logits = actor(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"], position_ids=positions(b["attention_mask"])
        ).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), b["labels"][:, 1:].reshape(-1))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return actor.state_dict()


def setup(prm_dropout=0.0, prm_training=False, **kw):
    cfg = Config(**kw)
    rng, tok = np.random.RandomState(1), make_tokenizer()
    actor = GPT2LMHeadModel(backbone_config(len(tok)))
    actor.load_state_dict(sft_weights())
    reference = copy.deepcopy(actor).eval().requires_grad_(False)
    torch.manual_seed(11)
    prm = TokenScorer(backbone_config(len(tok), prm_dropout), head_std=0.12).requires_grad_(False)
    prm.train(prm_training)
    torch.manual_seed(12)
    critic = TokenScorer(backbone_config(len(tok)), head_std=0.02)
    problems = [make_problem(rng, 2 + i % 5)[0] for i in range(24)]
    generator = EpisodeGenerator(cfg, tok, actor, prm, problems)
    trainer = PPOTrainer(cfg, actor, reference, critic, generator, tok.pad_token_id)
    torch.manual_seed(5)

    def values_of(model, ids, mask):
        return model(ids, mask, positions(mask)) if cfg.critic_positions else model(ids, mask)

    return {
        "policy": actor,
        "reference": reference,
        "reward": prm,
        "value": critic,
        "tokenizer": tok,
        "prompts": problems,
        "step": trainer.iteration,
        "optimizers": [trainer.actor_optimizer, trainer.critic_optimizer],
        "state": [],
        "calls": {"value": values_of, "reward": lambda model, ids, mask: model(ids, mask, positions(mask))},
        "declared": dict(
            algorithm="ppo",
            gamma=cfg.gamma,
            lam=cfg.lam,
            kl_coef=cfg.init_kl_coef,
            kl_estimator="k3",
            kl_in="reward",
            temperature=cfg.temperature,
            top_k=0,
            top_p=1.0,
            clip_range=cfg.cliprange,
            clip_range_value=cfg.cliprange_value,
            vf_coef=cfg.vf_coef,
            ent_coef=cfg.entropy_coef,
            whiten_advantages=cfg.whiten_advantages,
            whiten_rewards=False,
            learning_rate=cfg.actor_lr,
            critic_learning_rate=cfg.critic_lr,
            ppo_epochs=cfg.num_epochs_per_iteration,
            num_minibatches=cfg.num_episodes_per_iteration // cfg.target_train_batch_size,
            batch_size=cfg.num_episodes_per_iteration,
            prompt_length=16,
            response_length=cfg.max_new_tokens,
            dtype="float32",
            reference="policy",
            value_init="fresh",
            policy_init="sft",
            kl_adaptive=False,
            loss_aggregation="token-mean",
            shared_trunk=False,
            dense_rewards=True,
        ),
    }


# ---- builds ------------------------------------------------------------------------------------------------------------
def healthy():
    return setup()


def healthy_raw_advantages():
    return setup(whiten_advantages=False, entropy_coef=0.0, temperature=1.0, cliprange_value=0.5)


def step_reward_late():
    return setup(step_reward_shift=1)


def gamma_not_passed():
    return setup(discount_in_gae=False)


def kl_as_bonus():
    return setup(kl_direction=+1.0)


def bootstrap_after_eos():
    return setup(bootstrap_last=True)


def critic_without_positions():
    return setup(critic_positions=False)


def live_baseline():
    return setup(detach_baseline=False)


def top_k_only_in_sampler():
    return setup(sampler_top_k=3, temperature=1.0)


def prm_in_train_mode():
    return setup(prm_dropout=0.1, prm_training=True)


def entropy_as_penalty():
    return setup(entropy_direction=+1.0)


def tokens_after_eos():
    return setup(train_after_eos=True)


def value_clip_optimistic():
    return setup(value_clip_reduce="min", cliprange_value=0.05, critic_lr=1e-4, num_epochs_per_iteration=4)

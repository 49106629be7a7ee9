"""PPO on BLOOM: prompts from an endless shuffled loader, scores from a model plus a rule, dropout in the config and never active."""

import copy
from types import SimpleNamespace as NS

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

DATA = [
    "dear customer we have your parcel and will send it soon",
    "dear sir the invoice was paid in march",
    "hello team the meeting is moved to friday at noon",
    "hello maria thank you for the flowers",
    "to whom it may concern the heating is broken again",
    "good morning the report is late but nearly finished",
    "dear neighbour please turn the music down after ten",
    "hello grandma we arrive on sunday with the children",
    "good evening your table for four is reserved",
    "dear editor your article forgot the most important point",
    "to all staff the lift will be repaired on monday",
    "good morning class open your books at page nine",
]


class PromptLoader:
    """Goes through the prompts in a new order each epoch, for ever."""

    def __init__(self, rows, batch, seed):
        self.rows, self.batch, self.order = rows, batch, []
        self.rng = torch.Generator().manual_seed(seed)

    def __next__(self):
        while len(self.order) < self.batch:
            self.order += torch.randperm(len(self.rows), generator=self.rng).tolist()
        now, self.order = self.order[: self.batch], self.order[self.batch :]
        return [self.rows[i] for i in now]

    def state_dict(self):
        return {"order": list(self.order), "rng": self.rng.get_state()}

    def load_state_dict(self, s):
        self.order = list(s["order"])
        self.rng.set_state(s["rng"])


def bpe():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(DATA, trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "</s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )


def build_models(tok):
    cfg = BloomConfig(
        vocab_size=len(tok),
        hidden_size=48,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        initializer_range=0.1,
        classifier_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        num_labels=1,
    )
    actor = BloomForCausalLM(cfg).train()
    enc = tok([d + "</s>" for d in DATA], return_tensors="pt", padding=True)
    opt = torch.optim.AdamW(actor.parameters(), lr=3e-3)
    for _ in range(70):
        opt.zero_grad()
        actor(**enc, labels=enc.input_ids.masked_fill(enc.attention_mask == 0, -100)).loss.backward()
        opt.step()
    actor.zero_grad(set_to_none=True)
    actor.eval()
    ref = copy.deepcopy(actor).requires_grad_(False)
    rm = BloomForSequenceClassification(cfg).eval().requires_grad_(False)
    h = rm.transformer(**enc)[0][enc.attention_mask > 0]
    m, w = h.mean(0), torch.randn(48)
    w = w - (w @ m) / (m @ m) * m
    rm.score.weight.copy_((w / (h @ w).std())[None])
    critic = BloomForTokenClassification(cfg).eval()
    critic.transformer.load_state_dict(rm.transformer.state_dict())
    critic.classifier.weight.data.copy_(rm.score.weight)
    critic.classifier.bias.data.zero_()
    return actor, ref, rm, critic


class PPOTrainer:
    def __init__(self, args, tok, actor, ref, rm, critic, loader, fault=None):
        self.a, self.tok, self.actor, self.ref, self.rm, self.critic, self.loader, self.fault = (
            args,
            tok,
            actor,
            ref,
            rm,
            critic,
            loader,
            fault,
        )
        self.opt = torch.optim.AdamW(actor.parameters(), lr=args.lr, weight_decay=0.01)
        self.copt = torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, weight_decay=0.01)
        self.scheds = [get_linear_schedule_with_warmup(o, args.warmup, 1000) for o in (self.opt, self.copt)]

    def logits(self, model, b, rows=slice(None)):
        return model(b.ids[rows], attention_mask=b.att[rows], use_cache=False).logits[:, b.start - 1 : -1].float()

    def values(self, b, rows=slice(None)):
        return self.critic(b.ids[rows], attention_mask=b.att[rows], use_cache=False).logits[:, b.start - 1 : -1, 0]

    @torch.no_grad()
    def collect(self):
        b = NS(prompts=next(self.loader))
        enc = self.tok(b.prompts, return_tensors="pt", padding=True)
        b.start = enc.input_ids.shape[1]
        b.ids = self.actor.generate(**enc, max_new_tokens=self.a.max_new, do_sample=True, top_k=0, top_p=1.0)
        resp = b.ids[:, b.start :]
        done = (resp == self.tok.eos_token_id).int()
        b.act = ((done.cumsum(1) - done) == 0).float()
        b.att = torch.cat([enc.attention_mask, b.act.long()], 1)
        b.n = b.act.sum(1).long()
        b.old = self.logits(self.actor, b).log_softmax(-1).gather(-1, resp[..., None])[..., 0]
        b.ref = self.logits(self.ref, b).log_softmax(-1).gather(-1, resp[..., None])[..., 0]
        b.val = self.values(b) * b.act
        b.score = self.score(b)
        return b

    def score(self, b):
        """The reward model in order of length, three rows at a time, and for a tidy ending a little more."""
        order = b.att.sum(1).argsort(descending=True)
        found = torch.cat([self.rm(b.ids[i], attention_mask=b.att[i]).logits[:, 0] for i in order.split(3)])
        scores = found if self.fault == "scores_left_sorted" else torch.empty_like(found).index_put((order,), found)
        ended = (b.ids == self.tok.eos_token_id).any(1)
        if self.a.rule:
            scores = scores + self.a.rule * ended.float()
        if self.a.clip_score:
            scores = scores.clamp(-self.a.clip_score, self.a.clip_score)
        return scores

    def gae(self, rewards, b):
        out = torch.zeros_like(rewards)
        for i, n in enumerate(b.n.tolist()):
            tail = 0.0
            for t in range(n - 1, -1, -1):
                v_next = b.val[i, t + 1] if t + 1 < n else 0.0
                tail = rewards[i, t] + self.a.gamma * v_next - b.val[i, t] + self.a.gamma * self.a.lam * tail
                out[i, t] = tail
        return out

    def advantages(self, b):
        rewards = torch.zeros_like(b.old)
        if self.a.kl_in == "reward":
            rewards -= self.a.kl * (b.old - b.ref) * b.act
        before_score = rewards.clone()
        rewards[torch.arange(len(b.n)), b.n - 1] += b.score
        adv = self.gae(rewards, b)
        b.ret = (self.gae(before_score, b) if self.fault == "returns_without_score" else adv) + b.val
        if self.a.whiten:
            some = adv[b.act.bool()]
            adv = (adv - some.mean()) / (some.std() + 1e-8) * b.act
        b.adv = adv

    def loss(self, b, rows, tokens):
        act = b.act[rows]
        logp = self.logits(self.actor, b, rows).log_softmax(-1)
        lp = logp.gather(-1, b.ids[rows, b.start :, None])[..., 0]
        ratio = ((lp - b.old[rows]) * act).exp()
        per = -torch.min(ratio * b.adv[rows], ratio.clamp(0.8, 1.2) * b.adv[rows])
        if self.a.kl_in == "loss":
            gap = ((b.ref[rows] - lp) * act).clamp(-20, 20)
            per = per + self.a.kl * (gap.exp() - 1 - gap)
        if self.a.ent:
            per = per + self.a.ent * (logp.exp() * logp).sum(-1)
        v = self.values(b, rows)
        vper = F.smooth_l1_loss(v, b.ret[rows], reduction="none") if self.a.huber else 0.5 * (v - b.ret[rows]) ** 2
        return ((per + vper) * act).sum() / tokens

    def step(self):
        b = self.collect()
        self.advantages(b)
        for _ in range(self.a.epochs):
            for rows in torch.randperm(len(b.n)).chunk(self.a.minibatches):
                for piece in rows.split(self.a.micro):
                    self.loss(b, piece, b.act[rows].sum()).backward()
                for model, opt, sched in zip((self.actor, self.critic), (self.opt, self.copt), self.scheds):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    opt.step()
                    sched.step()
                    opt.zero_grad(set_to_none=True)
        return {"score": b.score.mean().item(), "length": b.n.float().mean().item()}


DEFAULT = dict(
    gamma=1.0,
    lam=0.95,
    kl=0.05,
    kl_in="reward",
    lr=1e-5,
    critic_lr=3e-5,
    warmup=0,
    max_new=14,
    rule=0.0,
    clip_score=None,
    whiten=True,
    ent=0.0,
    huber=False,
    epochs=2,
    minibatches=2,
    micro=4,
)


def make(fault=None, declared=None, batch=8, **over):
    torch.manual_seed(29)
    args = NS(**(DEFAULT | over))
    tok = bpe()
    actor, ref, rm, critic = build_models(tok)
    prompts = [" ".join(d.split()[: 1 + i % 4]) for i, d in enumerate(DATA)]
    loader = PromptLoader(prompts, batch, seed=1)
    t = PPOTrainer(args, tok, actor, ref, rm, critic, loader, fault)
    if declared is None:
        declared = dict(
            algorithm="ppo",
            gamma=1.0,
            lam=0.95,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            clip_range=0.2,
            ppo_epochs=2,
            num_minibatches=2,
            whiten_advantages=True,
            learning_rate=1e-5,
            critic_learning_rate=3e-5,
            value_init="reward",
            batch_size=8,
        )
    return dict(
        policy=actor,
        reference=ref,
        reward=rm,
        value=critic,
        tokenizer=tok,
        prompts=prompts,
        optimizers=[t.opt, t.copt],
        state=[loader, *t.scheds],
        step=t.step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_k3_entropy_rule():
    return make(
        kl_in="loss",
        kl=0.02,
        ent=0.005,
        rule=0.5,
        huber=True,
        gamma=0.99,
        lam=0.9,
        epochs=1,
        minibatches=1,
        micro=3,
        declared=dict(
            algorithm="ppo",
            gamma=0.99,
            lam=0.9,
            kl_coef=0.02,
            kl_in="loss",
            kl_estimator="k3",
            ent_coef=0.005,
            value_init="reward",
        ),
    )


def healthy_clipped_score_warmup():
    return make(
        batch=6,
        clip_score=2.0,
        warmup=10,
        whiten=False,
        epochs=4,
        minibatches=3,
        micro=2,
        rule=0.3,
        declared=dict(kl_coef=0.05, reward_clip=2.0, value_init="reward"),
    )


def scores_left_sorted():
    return make("scores_left_sorted")


def returns_without_score():
    return make("returns_without_score")

"""PPO on GPT-NeoX without any padding: an episode is a Python object, every model reads one sequence at a time."""

import copy
import random
import statistics

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    PreTrainedTokenizerFast,
)

ACTORS = "wolf fox bear hen goat crow".split()
DEEDS = "runs hides sleeps waits sings digs climbs swims".split()
PLACES = "forest barn meadow cave river hill village field".split()
STORY = [
    f"{a} {DEEDS[(i + 2 * j) % 8]} near the {PLACES[(3 * i + j) % 8]} and {DEEDS[(i * j + 1) % 8]} {'again' if j % 2 else 'there'}"
    for i, a in enumerate(ACTORS)
    for j in range(6)
]
STORY += [
    "why not",
    "when will it rain",
    "who goes out now",
    "one two three four",
    "day and night",
    "sun moon star wind snow fire ice",
]


class Episode:
    def __init__(self, prompt):
        self.ids, self.start = list(prompt), len(prompt)
        self.logp, self.values, self.rewards, self.advantages, self.returns = [], [], [], [], []
        self.kl = 0.0

    def __len__(self):
        return len(self.ids) - self.start


class Ppo:
    def __init__(self, policy, reference, critic, judge, eos, prompts, hp, fault):
        self.policy, self.reference, self.critic, self.judge = policy, reference, critic, judge
        self.eos, self.prompts, self.hp, self.fault = eos, prompts, hp, fault
        self.optimizers = [
            torch.optim.Adam(policy.parameters(), lr=hp["lr"], eps=1e-5),
            torch.optim.Adam(critic.parameters(), lr=hp["critic_lr"], eps=1e-5),
        ]
        if hp["one_optimizer"]:
            groups = [
                dict(params=policy.parameters(), lr=hp["lr"]),
                dict(params=critic.parameters(), lr=hp["critic_lr"]),
            ]
            self.optimizers = [torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)]

    def distribution(self, model, e):
        logits = model(torch.tensor([e.ids])).logits[0, e.start - 1 : -1]
        return torch.distributions.Categorical(logits=logits)

    def actions(self, e):
        return torch.tensor(e.ids[e.start :])

    def state_values(self, e):
        """One value before every action, and one after the last."""
        return self.critic(torch.tensor([e.ids])).logits[0, e.start - 1 :, 0]

    @torch.no_grad()
    def play(self, prompt):
        e = Episode(prompt)
        while len(e) < self.hp["longest"]:
            d = torch.distributions.Categorical(logits=self.policy(torch.tensor([e.ids])).logits[0, -1])
            action = d.sample()
            e.ids.append(action.item())
            e.logp.append(d.log_prob(action).item())  # kept as drawn
            if e.ids[-1] == self.eos:
                break
        ref = self.distribution(self.reference, e).log_prob(self.actions(e)).tolist()
        *e.values, after = self.state_values(e).tolist()
        gaps = [p - q for p, q in zip(e.logp, ref)]
        e.kl = sum(gaps)
        e.rewards = [-self.hp["kl"] * g for g in gaps]
        e.rewards[-1] += self.judge(torch.tensor([e.ids])).logits.item()
        nxt, gae = (after if self.fault == "bootstraps_past_the_end" else 0.0), 0.0
        for r, v in zip(reversed(e.rewards), reversed(e.values)):
            delta = r + self.hp["gamma"] * nxt - v
            decay = self.hp["gamma"] if self.fault == "lambda_forgotten" else self.hp["gamma"] * self.hp["lam"]
            gae, nxt = delta + decay * gae, v
            e.advantages.insert(0, gae)
        e.returns = [a + v for a, v in zip(e.advantages, e.values)]
        return e

    def losses(self, e):
        d, adv, old = self.distribution(self.policy, e), torch.tensor(e.advantages), torch.tensor(e.logp)
        log_ratio = d.log_prob(self.actions(e)) - old
        ratio = log_ratio.exp()
        surrogate = torch.minimum(ratio * adv, torch.clip(ratio, 1 - self.hp["clip"], 1 + self.hp["clip"]) * adv)
        entropy = d.entropy()
        v = self.state_values(e)[:-1]
        squared = (v - torch.tensor(e.returns)) ** 2
        per_token = -surrogate - self.hp["entropy"] * entropy + self.hp["vf"] * squared
        return per_token, (log_ratio.exp() - 1 - log_ratio).sum().item()

    def step(self):
        episodes = [self.play(p) for p in self.prompts]
        if self.hp["whiten"]:
            flat = [a for e in episodes for a in e.advantages]
            mean, sd = statistics.fmean(flat), statistics.stdev(flat)
            for e in episodes:
                e.advantages = [(a - mean) / (sd + 1e-8) for a in e.advantages]
        for _ in range(self.hp["epochs"]):
            order = random.sample(range(len(episodes)), len(episodes))
            drift, seen = 0.0, 0
            for i in range(0, len(order), self.hp["minibatch"]):
                batch = [episodes[j] for j in order[i : i + self.hp["minibatch"]]]
                for o in self.optimizers:
                    o.zero_grad()
                tokens = sum(map(len, batch))
                for e in batch:
                    per_token, kl = self.losses(e)
                    share = per_token.mean() / len(batch) if self.hp["by_sequence"] else per_token.sum() / tokens
                    share.backward()
                    drift, seen = drift + kl, seen + len(e)
                for model in (self.policy, self.critic):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), self.hp["max_norm"])
                for o in self.optimizers:
                    o.step()
            if drift / seen > self.hp["stop_at"]:
                break
        return {
            "mean_kl": statistics.fmean(e.kl for e in episodes),
            "mean_length": statistics.fmean(map(len, episodes)),
        }


HP = dict(
    gamma=0.95,
    lam=0.9,
    kl=0.05,
    clip=0.2,
    vf=0.5,
    entropy=0.0,
    epochs=2,
    minibatch=3,
    by_sequence=False,
    whiten=True,
    longest=12,
    lr=2e-5,
    critic_lr=1e-4,
    one_optimizer=False,
    stop_at=float("inf"),
    max_norm=1.0,
)


def pretrained(tok, config):
    lm = GPTNeoXForCausalLM(config)
    opt = torch.optim.Adam(lm.parameters(), lr=4e-3)
    enc = tok([s + " <eos>" for s in STORY], return_tensors="pt", padding=True)
    for _ in range(60):
        opt.zero_grad()
        lm(**enc, labels=enc.input_ids.masked_fill(enc.attention_mask == 0, -100)).loss.backward()
        opt.step()
    lm.zero_grad(set_to_none=True)
    return lm.eval(), enc


def make(fault=None, declared=None, count=6, **changes):
    torch.manual_seed(8)
    random.seed(8)
    hp = HP | changes
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(STORY, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "<eos>"]))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_input_names=["input_ids", "attention_mask"],
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="right",
    )
    config = GPTNeoXConfig(
        vocab_size=len(tok),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=1,
        max_position_embeddings=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    policy, enc = pretrained(tok, config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge = GPTNeoXForSequenceClassification(config).eval().requires_grad_(False)
    h = judge.gpt_neox(**enc)[0][enc.attention_mask > 0]
    w, m = torch.randn(32), h.mean(0)
    w = w - (w @ m) / (m @ m) * m
    judge.score.weight.copy_((w / (h @ w).std())[None])
    critic = GPTNeoXForTokenClassification(config).eval()
    critic.gpt_neox.load_state_dict(policy.gpt_neox.state_dict())
    prompts = ACTORS[:count]  # one token each
    loop = Ppo(policy, reference, critic, judge, tok.eos_token_id, [tok(p).input_ids for p in prompts], hp, fault)
    if declared is None:
        declared = dict(
            algorithm="ppo",
            gamma=0.95,
            lam=0.9,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            clip_range=0.2,
            ppo_epochs=2,
            num_minibatches=2,
            whiten_advantages=True,
            loss_aggregation="token-mean",
            learning_rate=2e-5,
            critic_learning_rate=1e-4,
            value_init="policy",
            prompt_length=1,
            response_length=12,
            temperature=1.0,
        )
    return dict(
        policy=policy,
        reference=reference,
        reward=judge,
        value=critic,
        tokenizer=tok,
        prompts=prompts,
        optimizers=loop.optimizers,
        step=loop.step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_one_update_by_sequence():
    return make(
        count=4,
        epochs=1,
        minibatch=4,
        by_sequence=True,
        entropy=0.01,
        whiten=False,
        one_optimizer=True,
        declared=dict(
            algorithm="ppo",
            gamma=0.95,
            lam=0.9,
            kl_coef=0.05,
            ent_coef=0.01,
            loss_aggregation="seq-mean",
            batch_size=4,
            whiten_advantages=False,
            value_init="policy",
        ),
    )


def healthy_early_stop():
    return make(
        gamma=1.0,
        lam=0.95,
        epochs=4,
        minibatch=2,
        stop_at=1e-4,
        longest=16,
        lr=5e-5,
        vf=0.1,
        declared=dict(
            algorithm="ppo",
            gamma=1.0,
            lam=0.95,
            kl_coef=0.05,
            ppo_epochs=4,
            num_minibatches=3,
            vf_coef=0.1,
            value_init="policy",
        ),
    )


def bootstraps_past_the_end():
    return make("bootstraps_past_the_end")


def lambda_forgotten():
    return make("lambda_forgotten")

"""Experience maker, actor trainer and critic trainer as separate classes (Llama), the critic begun from the reward model."""

import contextlib
import copy
from dataclasses import dataclass, fields

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

NAMES, VERBS = "anna ben carla david emma frank".split(), "likes sees hears finds paints sells".split()
THINGS = "old boats , new maps , warm bread , dark tea , loud drums , soft hats , red kites , tall trees".split(" , ")
TAILS = "every day|near the lake|with great care|for a friend|in the winter|without a word".split("|")
TEXTS = [
    f"{n} {v} {THINGS[(i * 3 + j) % 8]} {TAILS[(i + 2 * j) % 6]} ."
    for i, n in enumerate(NAMES)
    for j, v in enumerate(VERBS)
]


@dataclass
class Experience:
    sequences: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
    action_log_probs: torch.Tensor
    base_log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def rows(self, index):
        return Experience(*(getattr(self, f.name)[index] for f in fields(self)))


class ScalarModel(nn.Module):
    """A Llama backbone with one number a token; as a reward model it is read at the last token of the mask."""

    def __init__(self, config, pooled):
        super().__init__()
        self.model, self.value_head, self.pooled = (
            LlamaModel(config),
            nn.Linear(config.hidden_size, 1, bias=False),
            pooled,
        )

    def forward(self, input_ids, attention_mask):
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        hidden = self.model(
            input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        values = self.value_head(hidden).squeeze(-1).float()
        if not self.pooled:
            return values
        last = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(1, keepdim=True)
        return values.gather(1, last).squeeze(1)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


class RunningNorm:
    def __init__(self):
        self.n, self.mean, self.m2 = 0.0, 0.0, 0.0

    def push(self, xs):
        for x in xs.tolist():
            self.n += 1
            d = x - self.mean
            self.mean += d / self.n
            self.m2 += d * (x - self.mean)

    def __call__(self, xs):
        return (xs - self.mean) / ((self.m2 / max(self.n - 1, 1)) ** 0.5 + 1e-6)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class Trainer:
    def __init__(self, tok, actor, base, rm, critic, cfg, fault):
        self.tok, self.actor, self.base, self.rm, self.critic, self.cfg, self.fault = (
            tok,
            actor,
            base,
            rm,
            critic,
            cfg,
            fault,
        )
        self.actor_opt = torch.optim.AdamW(actor.parameters(), lr=cfg["actor_lr"], betas=(0.9, 0.95), weight_decay=0.0)
        self.critic_opt = torch.optim.AdamW(
            critic.parameters(), lr=cfg["critic_lr"], betas=(0.9, 0.95), weight_decay=0.0
        )
        self.norm, self.iteration = RunningNorm(), 0

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16) if self.cfg["bf16"] else contextlib.nullcontext()

    def log_probs(self, model, seq, mask, n):
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        with self.precision():
            logits = model(seq, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logp = logits[:, -n - 1 : -1].float().log_softmax(-1)
        return logp.gather(-1, seq[:, -n:].unsqueeze(-1)).squeeze(-1)

    def action_values(self, seq, mask, n):
        with self.precision():
            values = self.critic(seq, mask)
        return values[:, -n:] if self.fault == "critic_one_late" else values[:, -n - 1 : -1]

    @torch.no_grad()
    def generate(self, prompts):
        """Own sampling loop with a key-value cache."""
        batch = self.tok(prompts, return_tensors="pt", padding=True)
        seq, mask = batch["input_ids"], batch["attention_mask"]
        alive, cache, step_ids = torch.ones(len(seq), dtype=torch.bool), None, seq
        actions = []
        for _ in range(self.cfg["max_new"]):
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)[:, -step_ids.size(1) :]
            with self.precision():
                out = self.actor(
                    step_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
            cache = out.past_key_values
            token = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1).squeeze(1)
            token = torch.where(alive, token, self.tok.pad_token_id)
            seq, mask = torch.cat([seq, token[:, None]], 1), torch.cat([mask, alive.long()[:, None]], 1)
            actions.append(alive.float())
            alive = alive & (token != self.tok.eos_token_id)
            step_ids = token[:, None]
            if not alive.any():
                break
        return seq, mask, torch.stack(actions, 1)

    @torch.no_grad()
    def make_experience(self, prompts):
        c = self.cfg
        self.actor.eval()
        seq, mask, action = self.generate(prompts)
        n, half = action.size(1), torch.arange(len(seq)).split(c["micro"])
        logp = torch.cat([self.log_probs(self.actor, seq[i], mask[i], n) for i in half])
        base = torch.cat([self.log_probs(self.base, seq[i], mask[i], n) for i in half])
        values = torch.cat([self.action_values(seq[i], mask[i], n) for i in half])
        with self.precision():
            r = self.rm(seq, mask)
        if c["normalise"]:
            self.norm.push(r)
            r = self.norm(r)
        if c["reward_clip"]:
            r = r.clamp(-c["reward_clip"], c["reward_clip"])
        rewards = torch.zeros_like(logp)
        if not c["kl_loss"]:
            rewards = -c["kl_coef"] * (logp - base) * action
        eos_at = action.size(1) - 1 - action.long().fliplr().argmax(1, keepdim=True)
        rewards = rewards.scatter_add(1, eos_at, r[:, None])
        values, lastgae, reversed_adv = values * action, 0, []
        for t in reversed(range(n)):
            nextv = values[:, t + 1] if t < n - 1 else 0.0
            lastgae = rewards[:, t] + c["gamma"] * nextv - values[:, t] + c["gamma"] * c["lambd"] * lastgae
            reversed_adv.append(lastgae)
        adv = torch.stack(reversed_adv[::-1], 1)
        returns = adv + values
        mean = masked_mean(adv, action)
        std = masked_mean((adv - mean) ** 2, action).clamp(min=1e-8).sqrt()
        return Experience(seq, mask, action, logp, base, values, (adv - mean) / std * action, returns)

    def actor_step(self, e):
        c, n = self.cfg, e.action_mask.size(1)
        self.actor.train(c["checkpointing"])
        logp = self.log_probs(self.actor, e.sequences, e.attention_mask, n)
        ratio = ((logp - e.action_log_probs) * e.action_mask).exp()
        loss = -torch.min(ratio * e.advantages, ratio.clamp(0.8, 1.2) * e.advantages)
        if c["kl_loss"]:  # k2: half the squared log-ratio has the gradient of the reverse KL
            loss = loss + c["kl_coef"] * 0.5 * ((logp - e.base_log_probs) * e.action_mask) ** 2
        if self.fault != "actor_gradients_kept":
            self.actor_opt.zero_grad()
        masked_mean(loss, e.action_mask).backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), 1.0)
        self.actor_opt.step()

    def critic_step(self, e):
        v = self.action_values(e.sequences, e.attention_mask, e.action_mask.size(1))
        near = e.values + (v - e.values).clamp(-0.5, 0.5)
        loss = 0.5 * masked_mean(torch.max((v - e.returns) ** 2, (near - e.returns) ** 2), e.action_mask)
        self.critic_opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.critic_opt.step()

    def iterate(self, prompts):
        replay = self.make_experience(prompts)
        for _ in range(self.cfg["epochs"]):
            for index in torch.randperm(len(prompts)).split(self.cfg["micro"]):
                e = replay.rows(index)
                if self.iteration >= self.cfg["critic_warmup"]:
                    self.actor_step(e)
                self.critic_step(e)
        self.iteration += 1


BASE = dict(
    gamma=1.0,
    lambd=0.95,
    kl_coef=0.02,
    kl_loss=False,
    bf16=False,
    checkpointing=False,
    normalise=False,
    reward_clip=None,
    critic_warmup=0,
    micro=4,
    epochs=2,
    max_new=12,
    actor_lr=1e-5,
    critic_lr=5e-5,
)


def make(fault=None, declared=None, **changes):
    torch.manual_seed(21)
    cfg = BASE | changes
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>"]))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        padding_side="left",
    )
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    actor = LlamaForCausalLM(config)
    rows = tok([t + " </s>" for t in TEXTS], return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    sft = torch.optim.AdamW(actor.parameters(), lr=3e-3)
    for _ in range(50):
        sft.zero_grad()
        actor(rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss.backward()
        sft.step()
    actor.zero_grad(set_to_none=True)
    base = copy.deepcopy(actor).eval().requires_grad_(False)
    rm = ScalarModel(config, pooled=True).eval()
    with torch.no_grad():
        h = rm.model(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state[
            rows["attention_mask"] > 0
        ]
        w, mean = torch.randn(48), h.mean(0)
        w = w - (w @ mean) / (mean @ mean) * mean
        rm.value_head.weight.copy_((w / (h @ w).std())[None])
    critic = copy.deepcopy(rm)
    critic.pooled = False
    rm.requires_grad_(False)
    if cfg["checkpointing"]:
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = Trainer(tok, actor, base, rm, critic, cfg, fault)
    prompts = [
        "anna likes",
        "ben sees old",
        "carla hears",
        "david finds",
        "emma paints dark tea",
        "frank",
        "anna sells",
        "ben",
    ]
    if declared is None:
        declared = dict(
            algorithm="ppo",
            gamma=cfg["gamma"],
            lam=cfg["lambd"],
            kl_coef=cfg["kl_coef"],
            kl_estimator="k1",
            kl_in="reward",
            clip_range=0.2,
            clip_range_value=0.5,
            ppo_epochs=2,
            num_minibatches=2,
            whiten_advantages=True,
            value_init="reward",
            learning_rate=1e-5,
            critic_learning_rate=5e-5,
            policy_init="sft",
            batch_size=8,
            response_length=12,
            temperature=1.0,
        )
    return dict(
        policy=actor,
        reference=base,
        reward=rm,
        value=critic,
        tokenizer=tok,
        prompts=prompts,
        optimizers=[trainer.actor_opt, trainer.critic_opt],
        state=[trainer, trainer.norm],
        step=lambda: trainer.iterate(prompts),
        declared=declared,
    )


def healthy():
    return make()


def healthy_bf16_running_norm():
    return make(
        bf16=True,
        normalise=True,
        reward_clip=5.0,
        epochs=1,
        declared=dict(algorithm="ppo", kl_coef=0.02, kl_in="reward", reward_clip=5.0, ppo_epochs=1, lam=0.95),
    )


def healthy_checkpointing_k2_loss():
    return make(
        checkpointing=True,
        kl_loss=True,
        kl_coef=0.1,
        lambd=1.0,
        declared=dict(
            algorithm="ppo", gamma=1.0, lam=1.0, kl_coef=0.1, kl_in="loss", kl_estimator="k2", value_init="reward"
        ),
    )


def healthy_critic_warmup():
    return make(critic_warmup=1, declared=dict(algorithm="ppo", kl_coef=0.02))


def critic_one_late():
    return make("critic_one_late")


def actor_gradients_kept():
    return make("actor_gradients_kept")

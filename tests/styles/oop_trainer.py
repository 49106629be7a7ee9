"""PPO with the KL as a loss term: Config, Actor, Critic, Rollout, ReplayBuffer, PPOTrainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)


@dataclass
class Config:
    rollout_size: int = 16
    minibatch_size: int = 8
    epochs: int = 2
    max_new_tokens: int = 12
    gamma: float = 0.99
    lam: float = 0.9
    clip_range: float = 0.2
    kl_coef: float = 0.05
    ent_coef: float = 0.01
    reward_clip: float = 5.0
    target_kl: float = 1.0
    actor_lr: float = 1e-5
    critic_lr: float = 5e-5
    max_grad_norm: float = 1.0


@dataclass
class Rollout:
    """Rows are samples. Everything but the ids lives in the frame of the predictions: slot t is about token t + 1."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L)
    action_mask: Tensor  # (B, L - 1), True where token t + 1 was drawn by the policy
    log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    returns: Tensor


class Actor(nn.Module):
    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits[:, :-1]
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1), entropy


class Critic(nn.Module):
    def __init__(self, backbone: nn.Module, hidden: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.v_head = nn.Linear(hidden, 1)
        nn.init.normal_(self.v_head.weight, std=0.05)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
        return self.v_head(out.last_hidden_state).squeeze(-1)


class ReplayBuffer:
    def __init__(self) -> None:
        self.items: list[dict[str, Tensor]] = []

    def add(self, rollout: Rollout) -> None:
        for i in range(len(rollout.input_ids)):
            self.items.append({f.name: getattr(rollout, f.name)[i] for f in fields(Rollout)})

    def __len__(self) -> int:
        return len(self.items)

    def get(self, rows: list[int]) -> Rollout:
        width = max(len(self.items[i]["input_ids"]) for i in rows)

        def stack(name: str) -> Tensor:
            full = width if name in ("input_ids", "attention_mask") else width - 1
            xs = [self.items[i][name] for i in rows]
            return torch.stack([torch.cat([x.new_zeros(full - len(x)), x]) for x in xs])

        return Rollout(**{f.name: stack(f.name) for f in fields(Rollout)})

    def clear(self) -> None:
        self.items = []

    def state_dict(self) -> dict:
        return {"items": list(self.items)}

    def load_state_dict(self, state: dict) -> None:
        self.items = list(state["items"])


class PromptStream:
    def __init__(self, prompts: list[str]) -> None:
        self.prompts, self.at = prompts, 0

    def next(self, n: int) -> list[str]:
        out = [self.prompts[(self.at + i) % len(self.prompts)] for i in range(n)]
        self.at = (self.at + n) % len(self.prompts)
        return out

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


class PPOTrainer:
    def __init__(self, config, actor, critic, reference, reward, tokenizer, prompts, fault=None) -> None:
        self.c, self.fault = config, fault
        self.actor, self.critic, self.reference, self.reward = actor, critic, reference, reward
        self.tokenizer = tokenizer
        self.stream = PromptStream(prompts)
        self.buffer = ReplayBuffer()
        trained = copy.deepcopy(critic) if fault == "optimizer_of_a_copy" else critic
        self.actor_opt = torch.optim.AdamW(actor.parameters(), lr=config.actor_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.critic_opt = torch.optim.AdamW(
            trained.parameters(), lr=config.critic_lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda s: max(0.1, 1 - s / 500))
            for o in (self.actor_opt, self.critic_opt)
        ]

    @torch.no_grad()
    def generate(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.tokenizer(self.stream.next(self.c.rollout_size), return_tensors="pt", padding=True)
        width = q["input_ids"].shape[1]
        ids = self.actor.lm.generate(
            input_ids=q["input_ids"],
            attention_mask=q["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.c.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        is_eos = ids[:, width:] == self.tokenizer.eos_token_id
        before = (is_eos.cumsum(1) - is_eos.long()) == 0  # no EOS before this token
        if self.fault == "eos_written_over_the_end":
            open_rows = ~is_eos.any(1)
            ids[open_rows, -1] = self.tokenizer.eos_token_id
        attention = torch.cat([q["attention_mask"], before.long()], 1)
        actions = torch.cat([torch.zeros(len(ids), width - 1, dtype=torch.bool), before], 1)
        return ids, attention, actions

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.where(mask, values, 0.0)
        advantages = torch.zeros_like(rewards)
        running = torch.zeros(len(rewards))
        for t in range(rewards.shape[1] - 1, -1, -1):
            following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(len(rewards))
            delta = rewards[:, t] + self.c.gamma * following - values[:, t]
            running = torch.where(mask[:, t], delta + self.c.gamma * self.c.lam * running, 0.0)
            advantages[:, t] = running
        return advantages, advantages + values

    @torch.no_grad()
    def make_experience(self) -> dict[str, float]:
        ids, attention, mask = self.generate()
        log_probs, _ = self.actor(ids, attention)
        ref_log_probs, _ = self.reference(ids, attention)
        values = self.critic(ids, attention)[:, :-1]
        if self.fault == "sorted_by_length":
            order = attention.sum(1).argsort(descending=True)  # long rows together
            scores = self.reward(input_ids=ids[order], attention_mask=attention[order]).logits[:, 0]
        else:
            scores = self.reward(input_ids=ids, attention_mask=attention).logits[:, 0]
        clipped = scores.clamp(-self.c.reward_clip, self.c.reward_clip)
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        rewards = torch.zeros_like(log_probs)
        if self.fault == "kl_in_both":
            rewards = torch.where(mask, -self.c.kl_coef * (log_probs - ref_log_probs), 0.0)
        rewards[torch.arange(len(ids)), last] += clipped
        advantages, returns = self.gae(rewards, values, mask)
        chosen = advantages[mask]
        advantages = torch.where(mask, (advantages - chosen.mean()) / (chosen.std() + 1e-8), 0.0)
        self.buffer.add(Rollout(ids, attention, mask, log_probs, ref_log_probs, advantages, returns))
        return {"score": scores.mean().item(), "response_length": mask.sum(1).float().mean().item()}

    def train_minibatch(self, b: Rollout) -> dict[str, float]:
        c, m = self.c, b.action_mask
        log_probs, entropy = self.actor(b.input_ids, b.attention_mask)
        log_probs = torch.where(m, log_probs, 0.0)
        old, ref = torch.where(m, b.log_probs, 0.0), torch.where(m, b.ref_log_probs, 0.0)
        if self.fault == "old_is_new":
            old = log_probs.detach()
        ratio = (log_probs - old).exp()
        surrogate = torch.min(ratio * b.advantages, ratio.clamp(1 - c.clip_range, 1 + c.clip_range) * b.advantages)
        policy_loss = -masked_mean(surrogate, m)
        log_r = ref - log_probs
        kl = masked_mean(log_r.exp() - 1 - log_r, m)
        if self.fault == "k1_in_the_loss":
            kl = masked_mean(log_probs - ref, m)
        ent = masked_mean(entropy, m)
        loss = policy_loss + c.kl_coef * kl - c.ent_coef * ent
        if self.fault == "kl_subtracted":
            loss = policy_loss - c.kl_coef * kl - c.ent_coef * ent
        if self.fault == "entropy_added":
            loss = policy_loss + c.kl_coef * kl + c.ent_coef * ent
        self.actor_opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), c.max_grad_norm)
        self.actor_opt.step()

        values = torch.where(m, self.critic(b.input_ids, b.attention_mask)[:, :-1], 0.0)
        value_loss = 0.5 * masked_mean((values - b.returns) ** 2, m)
        self.critic_opt.zero_grad()
        value_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), c.max_grad_norm)
        self.critic_opt.step()
        with torch.no_grad():
            moved = masked_mean((ratio - 1) - (log_probs - old), m)
        return {"policy_loss": policy_loss.item(), "value_loss": value_loss.item(), "kl_loss": kl.item(),
                "entropy": ent.item(), "approx_kl": moved.item()}  # fmt: skip

    def step(self) -> dict[str, float]:
        log = self.make_experience()
        seen: list[dict[str, float]] = []
        for _ in range(self.c.epochs):
            order = torch.randperm(len(self.buffer)).tolist()
            if self.fault == "drawn_with_replacement":
                order = torch.randint(len(self.buffer), (len(self.buffer),)).tolist()
            for i in range(0, len(order), self.c.minibatch_size):
                seen.append(self.train_minibatch(self.buffer.get(order[i : i + self.c.minibatch_size])))
            if seen[-1]["approx_kl"] > self.c.target_kl:
                break
        if self.fault != "buffer_kept":
            self.buffer.clear()
        for s in self.schedulers:
            s.step()
        return {**log, **{k: sum(x[k] for x in seen) / len(seen) for k in seen[0]}}


def build_tokenizer() -> PreTrainedTokenizerFast:
    corpus = [
        "please write a short answer to the question about the old garden and the small house",
        "what should i plant in spring when the soil is still cold and the nights are long",
        "you could try beans or peas because they grow well in light shade near a wall",
        "tell me how to keep birds away from young trees without a net or any noise",
        "use thin strings between sticks and hang bright ribbons so that they move with wind",
    ]
    t = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]", "[PAD]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        unk_token="[UNK]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make(fault: str | None = None) -> dict:
    torch.manual_seed(1234)
    tokenizer = build_tokenizer()
    hf = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    lm = Qwen2ForCausalLM(hf)
    lm.lm_head = nn.Linear(hf.hidden_size, hf.vocab_size)
    with torch.no_grad():  # an unsure model that ends a good half of its answers in time
        lm.lm_head.weight.normal_(std=0.15)
        lm.lm_head.bias.zero_()
        lm.lm_head.bias[tokenizer.eos_token_id] = 1.3
        lm.lm_head.bias[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = -20.0
    reward = Qwen2ForSequenceClassification(hf)
    reward.model.load_state_dict(lm.model.state_dict())
    words = [w for w in tokenizer.get_vocab() if not w.startswith("[")]
    words.sort()
    with torch.no_grad():
        picks = torch.randint(len(words), (96, 9))
        texts = [" ".join(words[i] for i in row) + " [EOS]" * (k % 3 > 0) for k, row in enumerate(picks.tolist())]
        x = tokenizer(texts, return_tensors="pt", padding=True)
        h = reward.model(**x).last_hidden_state[:, -1]
        w = torch.randn(hf.hidden_size)
        w -= (w @ h.mean(0)) / h.mean(0).pow(2).sum() * h.mean(0)
        reward.score.weight[0] = w / (h @ w).std()
    critic = Critic(Qwen2Model(hf), hf.hidden_size)
    critic.backbone.load_state_dict(lm.model.state_dict())
    actor, reference = Actor(lm), Actor(copy.deepcopy(lm))
    reference.requires_grad_(False)
    reward.requires_grad_(False)
    for m in (actor, reference, reward, critic):
        m.eval()
    prompts = [" ".join(words[int(i)] for i in torch.randint(len(words), (4 + k % 5,))) for k in range(40)]
    config = Config()
    trainer = PPOTrainer(config, actor, critic, reference, reward, tokenizer, prompts, fault)
    return {
        "policy": actor.lm,
        "reference": reference.lm,
        "reward": reward,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "optimizers": [trainer.actor_opt, trainer.critic_opt],
        "state": [trainer.stream, trainer.buffer, *trainer.schedulers],
        "step": trainer.step,
        "declared": {
            "algorithm": "ppo", "gamma": config.gamma, "lam": config.lam, "kl_coef": config.kl_coef, "kl_in": "loss",
            "kl_estimator": "k3", "temperature": 1.0, "clip_range": config.clip_range, "ent_coef": config.ent_coef,
            "reward_clip": config.reward_clip, "learning_rate": config.actor_lr, "critic_learning_rate": config.critic_lr,
            "ppo_epochs": config.epochs, "num_minibatches": 2, "batch_size": config.rollout_size,
            "response_length": config.max_new_tokens, "whiten_advantages": True, "loss_aggregation": "token-mean",
            "value_init": "policy",
        },
    }  # fmt: skip


def healthy():
    return make()


def kl_subtracted():
    return make("kl_subtracted")


def kl_in_both():
    return make("kl_in_both")


def k1_in_the_loss():
    return make("k1_in_the_loss")


def drawn_with_replacement():
    return make("drawn_with_replacement")


def buffer_kept():
    return make("buffer_kept")


def optimizer_of_a_copy():
    return make("optimizer_of_a_copy")


def sorted_by_length():
    return make("sorted_by_length")


def entropy_added():
    return make("entropy_added")


def eos_written_over_the_end():
    return make("eos_written_over_the_end")


def old_is_new():
    return make("old_is_new")

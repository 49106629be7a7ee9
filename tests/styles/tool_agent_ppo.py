"""Agentic PPO on Qwen2: the policy calls a tool, the environment writes tokens into the episode, the policy goes on."""

import copy
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

WORDS = [f"a{i}" for i in range(50)]
DIGITS = [str(i) for i in range(10)]


@dataclass
class Episode:
    prompt_ids: list
    response_ids: list = field(default_factory=list)
    response_mask: list = field(default_factory=list)  # 1: drawn by the policy, 0: written by the environment
    done: bool = False

    def extend(self, ids, own):
        self.response_ids += ids
        self.response_mask += [own] * len(ids)


class Calculator:
    """The environment: its answer depends on what was asked."""

    def __init__(self, tok):
        self.open, self.close, self.err = tok.convert_tokens_to_ids(["<result>", "</result>", "<error>"])
        self.digits = tok.convert_tokens_to_ids(DIGITS)
        self.call = tok.convert_tokens_to_ids("</call>")

    def __call__(self, turn):
        if turn[-1] != self.call:
            return [self.open, self.err, self.close]
        total = sum(turn)
        return [self.open, *(self.digits[int(c)] for c in str(total)), self.close]


class TaskSampler:
    def __init__(self, tasks, seed):
        self.tasks, self.rng = tasks, random.Random(seed)

    def sample(self, n):
        return self.rng.sample(self.tasks, n)

    def state_dict(self):
        return {"rng": self.rng.getstate()}

    def load_state_dict(self, state):
        self.rng.setstate(state["rng"])


def position_ids_of(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def masked_gae(token_level_rewards, values, response_mask, gamma, lam, skip=True):
    """Tokens that are no actions are stepped over: the state after an action is the one before the next action."""
    nextvalues = lastgaelam = torch.zeros(len(values))
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = token_level_rewards[:, t] + gamma * nextvalues - values[:, t]
        gae = delta + gamma * lam * lastgaelam
        action = response_mask[:, t] if skip else torch.ones_like(response_mask[:, t])
        nextvalues = torch.where(action, values[:, t], nextvalues)
        lastgaelam = torch.where(action, gae, lastgaelam)
        advantages.append(lastgaelam)
    advantages = torch.stack(advantages[::-1], 1)
    return advantages.where(response_mask, 0.0), (advantages + values).where(response_mask, 0.0)


def seq_mean_token_mean(x, mask):
    return (x.where(mask, 0.0).sum(-1) / mask.sum(-1)).mean()


def make(fault=None):
    torch.manual_seed(31)
    rng = random.Random(31)
    vocab = ["<pad>", "<eos>", "<unk>", "<call>", "</call>", "<result>", "</result>", "<error>", "?", *DIGITS, *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    eos, call = tok.eos_token_id, tok.convert_tokens_to_ids("</call>")
    env = Calculator(tok)
    tasks = [" ".join([*rng.choices(WORDS, k=rng.randint(2, 8)), "?"]) for _ in range(32)]

    cfg = dict(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tok.pad_token_id,
        eos_token_id=eos,
        bos_token_id=None,
        initializer_range=0.1,
    )
    actor = Qwen2ForCausalLM(Qwen2Config(**cfg))
    opt = torch.optim.AdamW(actor.parameters(), lr=1e-2)
    for _ in range(60):  # SFT on episodes with and without a call
        rows = []
        for _ in range(16):
            turn = ["<call>", *rng.choices(DIGITS, k=rng.randint(1, 4)), "</call>"] if rng.random() < 0.85 else []
            asked = [*rng.choices(WORDS, k=rng.randint(2, 6)), "?"]
            ids = tok.convert_tokens_to_ids(asked + turn)
            ids += env(ids[len(asked) :]) if turn else []
            rows.append(ids + tok.convert_tokens_to_ids(rng.choices(WORDS[:15], k=rng.randint(1, 8))) + [eos])
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        loss = F.cross_entropy(
            actor(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100).flatten()
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    actor.zero_grad()
    actor.eval()
    ref = copy.deepcopy(actor).requires_grad_(False)
    rm = (
        Qwen2ForSequenceClassification(Qwen2Config(**{**cfg, "initializer_range": 0.3}, num_labels=1))
        .eval()
        .requires_grad_(False)
    )
    probe = torch.randint(8, len(vocab), (64, 14))
    probe[::2, -1] = eos
    h = rm.model(input_ids=probe).last_hidden_state[:, -1]
    w = torch.randn(32)
    w -= h.mean(0) * (w @ h.mean(0)) / h.mean(0).square().sum()
    rm.score.weight.copy_(w[None] / (h @ w).std())
    critic = Qwen2ForTokenClassification(Qwen2Config(**cfg, num_labels=1, classifier_dropout=0.0)).eval()
    critic.model.load_state_dict(ref.model.state_dict())  # trunk of the SFT model, fresh head

    gamma, lam, kl_coef, clip, epochs, num_mini, batch_size = 0.99, 0.9, 0.03, 0.2, 2, 2, 12
    turn_limits = (6, 7)
    actor_opt = torch.optim.Adam(actor.parameters(), lr=2e-5, betas=(0.9, 0.95))
    critic_opt = torch.optim.Adam(critic.parameters(), lr=1e-4)
    sampler = TaskSampler(tasks, 31)

    def draw_turn(episodes, limit, stops):
        batch = tok.pad(
            {"input_ids": [e.prompt_ids + e.response_ids for e in episodes]}, return_tensors="pt", padding_side="left"
        )
        out = actor.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=stops,
            pad_token_id=tok.pad_token_id,
        )
        turns = []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i + 1 for i, t in enumerate(row) if t in stops), len(row))
            turns.append(row[:end])
        return turns

    @torch.no_grad()
    def rollout():
        episodes = [Episode(tok(t).input_ids) for t in sampler.sample(batch_size)]
        for e, turn in zip(episodes, draw_turn(episodes, turn_limits[0], [call, eos])):
            e.extend(turn, 1)
            e.done = turn[-1] == eos
            if not e.done:
                e.extend(env(turn), 1 if fault == "trains_on_results" else 0)
        going = [e for e in episodes if not e.done]
        if going:
            for e, turn in zip(going, draw_turn(going, turn_limits[1], [eos])):
                e.extend(turn, 1)
        # prompts left-padded, responses right-padded
        p, r = max(len(e.prompt_ids) for e in episodes), max(len(e.response_ids) for e in episodes)
        left = lambda e, seq: [0] * (p - len(e.prompt_ids)) + seq
        right = lambda e, seq: seq + [0] * (r - len(e.response_ids))
        data = {
            "input_ids": torch.tensor([left(e, e.prompt_ids) + right(e, e.response_ids) for e in episodes]),
            "attention_mask": torch.tensor(
                [left(e, [1] * len(e.prompt_ids)) + right(e, [1] * len(e.response_ids)) for e in episodes]
            ),
            "response_mask": torch.tensor([right(e, e.response_mask) for e in episodes]).bool(),
        }
        return data, p

    def response_log_probs(model, data, attention_mask=None):
        attention_mask = data["attention_mask"] if attention_mask is None else attention_mask
        r = data["response_mask"].shape[1]
        logits = model(
            input_ids=data["input_ids"],
            attention_mask=attention_mask,
            position_ids=position_ids_of(data["attention_mask"]),
        ).logits[:, -r - 1 : -1]
        return logits.log_softmax(-1).gather(-1, data["input_ids"][:, -r:, None]).squeeze(-1)

    def response_values(data):
        r = data["response_mask"].shape[1]
        return critic(
            input_ids=data["input_ids"],
            attention_mask=data["attention_mask"],
            position_ids=position_ids_of(data["attention_mask"]),
        ).logits[:, -r - 1 : -1, 0]

    @torch.no_grad()
    def prepare(data):
        mask = data["response_mask"]
        data["old_log_probs"] = response_log_probs(actor, data)
        data["ref_log_probs"] = response_log_probs(ref, data)
        data["values"] = response_values(data) * data["attention_mask"][:, -mask.shape[1] :]  # pads at zero
        scores = rm(
            input_ids=data["input_ids"],
            attention_mask=data["attention_mask"],
            position_ids=position_ids_of(data["attention_mask"]),
        ).logits[:, 0]
        kl = data["old_log_probs"] - data["ref_log_probs"]
        rewards = (-kl_coef * kl).where(mask, 0.0)
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1)).argmax(-1)  # the last token that the policy drew
        rewards[torch.arange(len(mask)), last] += scores
        data["advantages"], data["returns"] = masked_gae(
            rewards, data["values"], mask, gamma, lam, skip=fault != "gae_walks_results"
        )
        return scores, kl.where(mask, 0.0).sum(-1).mean()

    def step():
        data, p = rollout()
        scores, kl = prepare(data)
        logs = []
        for _ in range(epochs):
            for idx in torch.randperm(batch_size).split(batch_size // num_mini):
                mb = {k: v[idx] for k, v in data.items()}
                mask, attention = mb["response_mask"], mb["attention_mask"]
                if fault == "loss_mask_as_attention":
                    attention = torch.cat([attention[:, :p], mask.long()], 1)
                log_ratio = response_log_probs(actor, mb, attention) - mb["old_log_probs"]
                ratio = torch.exp(log_ratio.where(mask, 0.0))
                pg = torch.max(-mb["advantages"] * ratio, -mb["advantages"] * ratio.clamp(1 - clip, 1 + clip))
                pg = seq_mean_token_mean(pg, mask)
                actor_opt.zero_grad()
                pg.backward()
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
                actor_opt.step()
                vf = 0.5 * seq_mean_token_mean((response_values(mb) - mb["returns"]) ** 2, mask)
                critic_opt.zero_grad()
                vf.backward()
                torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                critic_opt.step()
                logs.append((pg.item(), vf.item(), (ratio.detach() - 1).abs().max().item()))
        pg, vf, dev = zip(*logs)
        gaps = data["attention_mask"][:, p:].sum() - data["response_mask"].sum()
        return {
            "actor/pg_loss": sum(pg) / len(pg),
            "critic/vf_loss": sum(vf) / len(vf),
            "score": scores.mean().item(),
            "std": scores.std().item(),
            "reward_kl": kl.item(),
            "first_ratio_dev": dev[0],
            "env_tokens": int(gaps),
            "own_tokens": int(data["response_mask"].sum()),
        }

    return {
        "policy": actor,
        "reference": ref,
        "reward": rm,
        "value": critic,
        "tokenizer": tok,
        "prompts": tasks,
        "optimizers": [actor_opt, critic_opt],
        "state": [sampler],
        "step": step,
        "declared": {
            "algorithm": "ppo",
            "gamma": gamma,
            "lam": lam,
            "kl_coef": kl_coef,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "temperature": 1.0,
            "clip_range": clip,
            "whiten_advantages": False,
            "learning_rate": 2e-5,
            "critic_learning_rate": 1e-4,
            "ppo_epochs": epochs,
            "num_minibatches": num_mini,
            "batch_size": batch_size,
            "loss_aggregation": "seq-mean",
            "value_init": "policy",
            "reference": "policy",
        },
    }


def healthy():
    return make()


def gae_walks_results():
    return make("gae_walks_results")


def loss_mask_as_attention():
    return make("loss_mask_as_attention")


def trains_on_results():
    return make("trains_on_results")

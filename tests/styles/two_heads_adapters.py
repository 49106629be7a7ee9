"""PPO for the notes assistant.

One trainable actor-critic (trunk, LM head, value head). Everything frozen lives in one base model that is held once: with the "sft"
adapter it is the reference, with the "rm" adapter and its scalar head it is the reward model.
"""

import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

CFG = SimpleNamespace(
    batch=8,
    max_new=10,
    temperature=0.7,
    gamma=1.0,
    lam=0.95,
    beta=0.05,
    clip=0.2,
    vclip=0.2,
    vf_coef=0.1,
    epochs=2,
    minibatches=2,
    lr=2e-5,
    max_grad_norm=1.0,
)
WORDS = (
    "write read note short long list buy milk bread tea the a an of to for from with and or my your our his her day week month "
    "morning evening call mail send open close meet friend doctor boss train bus home office plan task done later now soon never "
    "always red blue green cheap good bad new old first last one two three four five please thanks . , ? !"
).split()


def build_tokenizer():
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


class MultiLoRA(nn.Module):
    """A GPT-2 projection with several adapters, one of them active."""

    def __init__(self, base, names, rank=4):
        super().__init__()
        self.base = base
        n_in, n_out = base.weight.shape  # Conv1D keeps (in, out)
        self.down = nn.ParameterDict({n: nn.Parameter(torch.randn(n_in, rank) / n_in**0.5) for n in names})
        self.up = nn.ParameterDict({n: nn.Parameter(0.1 * torch.randn(rank, n_out)) for n in names})
        self.active, self.merged = None, False

    def delta(self, name):
        return self.down[name] @ self.up[name]

    @torch.no_grad()
    def merge(self):
        self.base.weight.add_(self.delta(self.active))
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        self.base.weight.sub_(self.delta(self.active))
        self.merged = False

    def forward(self, x):
        y = self.base(x)
        if self.active is None or self.merged:
            return y
        return y + x @ self.down[self.active] @ self.up[self.active]


class FrozenBase(nn.Module):
    def __init__(self, lm, names):
        super().__init__()
        for block in lm.transformer.h:
            block.attn.c_attn = MultiLoRA(block.attn.c_attn, names)
        self.lm = lm
        self.score = nn.Linear(lm.config.n_embd, 1)

    def adapters(self):
        return [m for m in self.modules() if isinstance(m, MultiLoRA)]

    def switch(self, name):
        for m in self.adapters():
            m.active = name


class ReferenceView(nn.Module):
    def __init__(self, shared, merge_for_speed=False):
        super().__init__()
        self.shared, self.merge_for_speed = shared, merge_for_speed

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.shared.switch("sft")
        if not self.merge_for_speed:
            return self.shared.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        for m in self.shared.adapters():
            m.merge()
        out = self.shared.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        self.shared.switch("rm")  # the reward model comes next
        for m in self.shared.adapters():
            m.unmerge()
        return out


class RewardView(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared

    def forward(self, input_ids, attention_mask, position_ids=None):
        self.shared.switch("rm")
        position_ids = positions(attention_mask) if position_ids is None else position_ids
        h = self.shared.lm.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        last = input_ids.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return self.shared.score(h[torch.arange(len(h)), last]).squeeze(-1)


@dataclass
class ActorCriticOutput(ModelOutput):
    logits: torch.Tensor | None = None
    values: torch.Tensor | None = None


class ActorCritic(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.trunk, self.lm_head = lm.transformer, lm.lm_head
        self.v_head = nn.Linear(lm.config.n_embd, 1)
        nn.init.normal_(self.v_head.weight, std=0.05)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        h = self.trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return ActorCriticOutput(logits=self.lm_head(h), values=self.v_head(h).squeeze(-1))


class PromptCursor:
    def __init__(self, prompts, n):
        self.prompts, self.n, self.at = prompts, n, 0

    def next(self):
        picked = [self.prompts[(self.at + i) % len(self.prompts)] for i in range(self.n)]
        self.at += self.n
        return picked

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def masked_whiten(x, mask):
    n = mask.sum()
    mean = (x * mask).sum() / n
    var = (((x - mean) ** 2) * mask).sum() / (n - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def make(fault=None):
    torch.manual_seed(11)
    rng = random.Random(11)
    tokenizer = build_tokenizer()
    pad, eos, unk = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    lm = GPT2LMHeadModel(config)
    lm.lm_head = nn.Linear(config.n_embd, config.vocab_size)
    nn.init.normal_(lm.lm_head.weight, std=0.2)
    with torch.no_grad():
        lm.lm_head.bias.zero_()
        lm.lm_head.bias[[pad, unk]] = -20.0
        lm.lm_head.bias[eos] = 2.2
        lm.lm_head.weight[[pad, eos, unk]] *= 0.3
    sft = copy.deepcopy(lm)
    shared = FrozenBase(lm, ["sft", "rm"])
    with torch.no_grad():  # the actor starts as the base with the SFT adapter merged in
        for block, lora in zip(sft.transformer.h, shared.adapters(), strict=True):
            block.attn.c_attn.weight.add_(lora.delta("sft"))
    ac = ActorCritic(sft)
    shared.requires_grad_(False).eval()
    reference = ReferenceView(shared, merge_for_speed=fault == "unmerge_wrong_adapter").eval()
    reward = RewardView(shared).eval()
    with torch.no_grad():  # scores of about mean 0 and standard deviation 1
        ids = torch.randint(3, len(tokenizer), (128, 12))
        raw = reward(ids, torch.ones_like(ids))
        shared.score.weight.div_(raw.std())
        shared.score.bias.sub_(raw.mean()).div_(raw.std())

    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) for _ in range(24)]
    cursor = PromptCursor(prompts, CFG.batch)
    optimizer = torch.optim.AdamW(ac.parameters(), lr=CFG.lr, betas=(0.9, 0.95), weight_decay=0.0)
    score_temperature = 1.0 if fault == "temperature_only_in_sampler" else CFG.temperature

    @torch.no_grad()
    def generate(ids, mask):
        done = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(CFG.max_new):
            logits = ac(ids, mask, positions(mask)).logits[:, -1] / CFG.temperature
            token = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
            token = torch.where(done, pad, token)
            ids = torch.cat([ids, token[:, None]], 1)
            mask = torch.cat([mask, (~done).long()[:, None]], 1)
            done |= token == eos
            if done.all():
                break
        return ids, mask

    def logprobs(logits, tokens):
        return F.log_softmax(logits / score_temperature, -1).gather(-1, tokens[..., None]).squeeze(-1)

    def gae(rewards, values, mask, after):
        adv, running = torch.zeros_like(rewards), 0.0
        for t in reversed(range(rewards.shape[1])):
            nxt = (
                after[:, t]
                if fault == "bootstrap_past_eos"
                else after[:, t] * (mask[:, t + 1] if t + 1 < mask.shape[1] else 0.0)
            )
            delta = rewards[:, t] + CFG.gamma * nxt - values[:, t]
            running = (delta + CFG.gamma * CFG.lam * running) * mask[:, t]
            adv[:, t] = running
        return adv, adv + values

    def step():
        enc = tokenizer(cursor.next(), padding=True, return_tensors="pt")
        start = enc.input_ids.shape[1]
        ids, mask = generate(enc.input_ids, enc.attention_mask)
        pos, tokens = positions(mask), ids[:, start:]
        resp = mask[:, start:].float()
        if fault == "eos_left_out":
            resp = ((tokens == eos).cumsum(1) == 0).float()
            resp[:, 0] = 1.0
        rows, last = torch.arange(len(ids)), (resp.sum(1) - 1).long()
        with torch.no_grad():
            out = ac(ids) if fault == "old_pass_without_mask" else ac(ids, mask, pos)
            ref = reference(ids, mask) if fault == "reference_without_positions" else reference(ids, mask, pos)
            old = logprobs(out.logits[:, start - 1 : -1], tokens)
            ref_lp = logprobs(ref.logits[:, start - 1 : -1], tokens)
            shift = 0 if fault == "values_of_next_state" else 1
            states = F.pad(out.values[:, start - shift :], (0, 1))
            values, after = states[:, : resp.shape[1]] * resp, states[:, 1 : resp.shape[1] + 1]
            kl = (old - ref_lp) * resp
            rewards = CFG.beta * kl if fault == "kl_rewarded" else -CFG.beta * kl
            score = reward(ids, mask, pos)
            rewards[rows, last] += score
            adv, returns = gae(rewards, values, resp, after)
            if fault == "target_is_score":
                returns = score[:, None].expand_as(values)
            adv = masked_whiten(adv, resp)

        stats = []
        for _ in range(CFG.epochs):
            for idx in torch.randperm(len(ids)).chunk(CFG.minibatches):
                m = resp[idx]
                out = ac(ids[idx], mask[idx], pos[idx])
                new = logprobs(out.logits[:, start - 1 : -1], tokens[idx])
                v = out.values[:, start - shift : out.values.shape[1] - shift]
                ratio = ((new - old[idx]) * m).exp()
                if fault == "loss_sign":
                    pg = torch.min(ratio * adv[idx], ratio.clamp(1 - CFG.clip, 1 + CFG.clip) * adv[idx])
                else:
                    pg = torch.max(-ratio * adv[idx], -ratio.clamp(1 - CFG.clip, 1 + CFG.clip) * adv[idx])
                near = values[idx] + (v - values[idx]).clamp(-CFG.vclip, CFG.vclip)
                vf = 0.5 * torch.max((v - returns[idx]) ** 2, (near - returns[idx]) ** 2)
                loss = ((pg + CFG.vf_coef * vf) * m).sum() / m.sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(ac.parameters(), CFG.max_grad_norm)
                optimizer.step()
                stats.append(loss.item())
        return {
            "loss": sum(stats) / len(stats),
            "objective/kl": kl.sum(1).mean().item(),
            "objective/scores": score.mean().item(),
        }

    return {
        "policy": ac,
        "reference": reference,
        "reward": reward,
        "value": ac,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "step": step,
        "optimizers": [optimizer],
        "state": [cursor],
        "calls": {
            "policy": lambda m, ids, mask: m(ids, mask, positions(mask)).logits,
            "value": lambda m, ids, mask: m(ids, mask, positions(mask)).values,
            "reference": lambda m, ids, mask: m(ids, mask, positions(mask)).logits,
            "reward": lambda m, ids, mask: m(ids, mask, positions(mask)),
        },
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward", "temperature": 0.7,
            "clip_range": 0.2, "clip_range_value": 0.2, "vf_coef": 0.1, "whiten_advantages": True, "learning_rate": 2e-5,
            "ppo_epochs": 2, "num_minibatches": 2, "batch_size": 8, "response_length": 10, "loss_aggregation": "token-mean",
            "shared_trunk": True,
        },
    }  # fmt: skip


def healthy():
    return make()


def temperature_only_in_sampler():
    return make("temperature_only_in_sampler")


def reference_without_positions():
    return make("reference_without_positions")


def old_pass_without_mask():
    return make("old_pass_without_mask")


def values_of_next_state():
    return make("values_of_next_state")


def kl_rewarded():
    return make("kl_rewarded")


def bootstrap_past_eos():
    return make("bootstrap_past_eos")


def unmerge_wrong_adapter():
    return make("unmerge_wrong_adapter")


def eos_left_out():
    return make("eos_left_out")


def target_is_score():
    return make("target_is_score")


def loss_sign():
    return make("loss_sign")

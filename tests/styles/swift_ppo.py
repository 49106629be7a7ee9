"""`swift rlhf --rlhf_type ppo`, cut down: Qwen2 policy, a reward model of another family of tokens, HF-Trainer-like classes.

arguments  -> RLHFArguments (what would come from the command line)
templates  -> ChatMLTemplate (policy), RewardTemplate (reward model; own tokenizer, own vocabulary, right padded)
trainers   -> BaseTrainer -> RLHFTrainer -> PPOTrainer
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

TOPICS = (
    "river stone garden winter lantern harbour violin market copper meadow thunder paper castle orchard ribbon compass"
).split()
VERBS = "describe explain rhyme translate summarise compare".split()
TAILS = ("", " please", " in one line", " for a small child who likes stories", " as an old sailor would", " now")
ANSWERS = (
    "the {0} is old",
    "a {0}",
    "{0} and {1}",
    "the {0} sings to the {1} in winter",
    "no",
    "ask the {1}",
    "every {0} needs a quiet {1} near it",
    "yes the {0}",
    "the {1} was lost and the {0} was found by a child",
)


def queries() -> list[str]:
    out = []
    for i in range(24):
        out.append(f"{VERBS[i % 6]} the {TOPICS[(5 * i + 1) % 16]}{TAILS[(i * 7 + i // 6) % 6]}")
    return out


def answers(n: int) -> list[str]:
    return [ANSWERS[i % 9].format(TOPICS[(3 * i) % 16], TOPICS[(7 * i + 2) % 16]) for i in range(n)]


def corpus() -> list[str]:
    return queries() + answers(48) + ["user\nassistant\n"] * 8


# ------------------------------------------------------------------------------------------------- tokenizers, templates
def get_policy_tokenizer() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
    )


def get_reward_tokenizer() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tok.decoder = decoders.Metaspace(prepend_scheme="never")
    specials = ["[UNK]", "[CLS]", "[USR]", "[BOT]", "[END]", "[reserved0]", "[reserved1]", "[PAD]"]
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=96, special_tokens=specials, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[END]",
        additional_special_tokens=["[USR]", "[BOT]"],
        padding_side="right",
    )


class ChatMLTemplate:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def render(self, query: str) -> str:
        return f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"

    def encode(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}

    def data_collator(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(b["input_ids"]) for b in batch)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(b["input_ids"])) + b["input_ids"] for b in batch])
        mask = torch.tensor([[0] * (width - len(b["input_ids"])) + [1] * len(b["input_ids"]) for b in batch])
        return {"input_ids": ids, "attention_mask": mask}

    def safe_decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class RewardTemplate:
    def __init__(self, tokenizer, drop_query: bool = False):
        self.tokenizer = tokenizer
        self.drop_query = drop_query

    def __call__(self, texts: list[str], replies: list[str]) -> dict[str, torch.Tensor]:
        rows = []
        for q, r in zip(texts, replies):
            rows.append(f"[BOT]{r}[END]" if self.drop_query else f"[USR]{q}[BOT]{r}[END]")
        enc = self.tokenizer(rows, add_special_tokens=False, padding=True, return_tensors="pt")
        return {"input_ids": enc["input_ids"], "attention_mask": enc["attention_mask"]}


# ------------------------------------------------------------------------------------------------------------- arguments
@dataclass
class RLHFArguments:
    learning_rate: float = 5e-6
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: int = 3
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    num_mini_batches: int = 2
    num_ppo_epochs: int = 2
    temperature: float = 0.9
    max_completion_length: int = 10
    kl_coef: float = 0.05
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = 1.0
    ref_model: str | None = "auto"
    seed: int = 42
    quirks: frozenset[str] = field(default_factory=frozenset)

    @property
    def mini_batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        return self.mini_batch_size * self.num_mini_batches


@dataclass
class TrainerState:
    global_step: int = 0
    episode: int = 0
    log_history: list = field(default_factory=list)


class RepeatSampler:
    """Endless shuffled indices; state is saved with the checkpoint."""

    def __init__(self, n: int):
        self.n, self.order, self.cursor = n, [], 0

    def take(self, k: int) -> list[int]:
        out = []
        while len(out) < k:
            if self.cursor >= len(self.order):
                self.order, self.cursor = torch.randperm(self.n).tolist(), 0
            out.append(self.order[self.cursor])
            self.cursor += 1
        return out

    def state_dict(self):
        return {"order": list(self.order), "cursor": self.cursor}

    def load_state_dict(self, s):
        self.order, self.cursor = list(s["order"]), s["cursor"]


# -------------------------------------------------------------------------------------------------------------- trainers
class BaseTrainer:
    def __init__(self, model: nn.Module, args: RLHFArguments):
        self.model, self.args, self.state = model, args, TrainerState()

    def get_trainable_parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer_and_scheduler(self):
        a = self.args
        self.optimizer = torch.optim.AdamW(
            self.get_trainable_parameters(), lr=a.learning_rate, eps=a.adam_epsilon, weight_decay=a.weight_decay
        )
        warm = max(1, a.warmup_steps)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda s: min(1.0, s / warm))

    def training_step(self, model, micro_batches: list[dict[str, torch.Tensor]]) -> float:
        """One optimizer step over an accumulation window; the losses are normalised by the window's own token count."""
        num_items = sum(int(b["completion_mask"].sum()) for b in micro_batches)
        total = 0.0
        for inputs in micro_batches:
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.get_trainable_parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        if "no_zero_grad" not in self.args.quirks:
            self.optimizer.zero_grad()
        self.state.global_step += 1
        return total

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        raise NotImplementedError


class PolicyAndValue(nn.Module):
    def __init__(self, policy, value_model):
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def forward(self, input_ids, attention_mask, position_ids):
        kw = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        values = self.value_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        return self.policy(**kw).logits, values.squeeze(-1)


class RLHFTrainer(BaseTrainer):
    """Holds the reference, the templates and the dataset."""

    def __init__(self, model, ref_model, reward_model, value_model, template, reward_template, dataset, args):
        super().__init__(PolicyAndValue(model, value_model), args)
        self.policy, self.value_model, self.reward_model = model, value_model, reward_model
        self.ref_model = model if ref_model is None else ref_model
        for frozen in (self.reward_model,) + ((ref_model,) if ref_model is not None else ()):
            frozen.eval()
            frozen.requires_grad_(False)
        self.template, self.reward_template, self.dataset = template, reward_template, dataset
        self.sampler = RepeatSampler(len(dataset))
        self.create_optimizer_and_scheduler()

    @staticmethod
    def get_position_ids(attention_mask):
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def get_per_token_logps(self, logits, input_ids, context_length, temperature):
        logits = logits[:, context_length - 1 : -1].float() / temperature
        return logits.log_softmax(-1).gather(-1, input_ids[:, context_length:, None]).squeeze(-1)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    n = mask.sum()
    var = masked_mean((x - mean) ** 2, mask) * n / (n - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8)


class PPOTrainer(RLHFTrainer):
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        tok = self.template.tokenizer
        self.generation_config = GenerationConfig(
            max_new_tokens=self.args.max_completion_length,
            do_sample=True,
            temperature=self.args.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tok.pad_token_id,
            eos_token_id=tok.eos_token_id,
        )

    # -- rollout
    @torch.no_grad()
    def generate_completions(self, prompts: dict[str, torch.Tensor]):
        tok, a = self.template.tokenizer, self.args
        out = self.policy.generate(**prompts, generation_config=self.generation_config)
        completion = out[:, prompts["input_ids"].shape[1] :]
        completion = F.pad(completion, (0, a.max_completion_length - completion.shape[1]), value=tok.pad_token_id)
        is_eos = completion == tok.eos_token_id
        if "mask_before_eos" in a.quirks:
            completion_mask = (is_eos.cumsum(1) == 0).long()
        else:
            completion_mask = ((is_eos.cumsum(1) - is_eos.long()) == 0).long()  # up to and with the first EOS
        return completion, completion_mask, is_eos.any(1)

    @torch.no_grad()
    def score_completions(self, rows, prompt_ids, completion, completion_mask, sequence, attention_mask, has_eos):
        if "share_ids" in self.args.quirks:
            scores = self.reward_model(input_ids=sequence, attention_mask=attention_mask).logits[:, 0]
        else:
            replies = [self.template.safe_decode(c[m.bool()].tolist()) for c, m in zip(completion, completion_mask)]
            scores = self.reward_model(**self.reward_template([r["query"] for r in rows], replies)).logits[:, 0]
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~has_eos).float()
        return scores

    @torch.no_grad()
    def get_rollout(self) -> dict[str, torch.Tensor]:
        a = self.args
        self.model.eval()
        rows = [self.dataset[i] for i in self.sampler.take(a.batch_size)]
        prompts = self.template.data_collator([self.template.encode(r["prompt"]) for r in rows])
        ctx = prompts["input_ids"].shape[1]
        completion, completion_mask, has_eos = self.generate_completions(prompts)
        seen = (
            (completion == self.template.tokenizer.eos_token_id).cumsum(1)
            - (completion == self.template.tokenizer.eos_token_id).long()
        ) == 0
        input_ids = torch.cat([prompts["input_ids"], completion], 1)
        attention_mask = torch.cat([prompts["attention_mask"], seen.long()], 1)
        position_ids = self.get_position_ids(attention_mask)
        logits, values = self.model(input_ids, attention_mask, position_ids)
        logps = self.get_per_token_logps(logits, input_ids, ctx, a.temperature)
        ref_logits = self.ref_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits
        ref_logps = self.get_per_token_logps(ref_logits, input_ids, ctx, a.temperature)
        values = self.slice_values(values, ctx)
        scores = self.score_completions(
            rows, prompts["input_ids"], completion, completion_mask, input_ids, attention_mask, has_eos
        )
        mask = completion_mask.float()
        logps, ref_logps, values = (x.masked_fill(mask == 0, 0.0) for x in (logps, ref_logps, values))
        kl = logps - ref_logps
        rewards = -a.kl_coef * kl
        last = completion_mask.sum(1) - 1
        rewards[torch.arange(len(rows)), last] += scores
        advantages, returns = self.get_advantages(rewards, values, mask)
        self.state.episode += len(rows)
        self.state.log_history.append(
            {
                "objective/kl": float(kl.sum(1).mean()),
                "objective/scores": float(scores.mean()),
                "completions/mean_length": float(mask.sum(1).mean()),
                "learning_rate": self.lr_scheduler.get_last_lr()[0],
            }
        )
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "completion_mask": completion_mask,
            "old_logps": logps,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
            "ctx": torch.full((len(rows),), ctx),
        }

    def slice_values(self, values, ctx):
        return values[:, ctx:] if "values_at_action" in self.args.quirks else values[:, ctx - 1 : -1]

    def get_advantages(self, rewards, values, mask):
        a, T = self.args, rewards.shape[1]
        lastgaelam, rev = 0, []
        for t in reversed(range(T)):
            nextvalues = values[:, t + 1] if t < T - 1 else 0.0
            delta = rewards[:, t] + a.gamma * nextvalues - values[:, t]
            lastgaelam = delta + a.gamma * a.lam * lastgaelam
            rev.append(lastgaelam)
        advantages = torch.stack(rev[::-1], 1) * mask
        returns = (advantages + values) * mask
        if a.whiten_advantages:
            advantages = masked_whiten(advantages, mask) * mask
        return advantages, returns

    # -- update
    def compute_loss(self, model, inputs, num_items_in_batch=None):
        a, mask, ctx = self.args, inputs["completion_mask"].float(), int(inputs["ctx"][0])
        logits, vpred = model(inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])
        temperature = 1.0 if "plain_logits" in a.quirks else a.temperature
        logps = self.get_per_token_logps(logits, inputs["input_ids"], ctx, temperature)
        vpred, old_v, ret = self.slice_values(vpred, ctx), inputs["old_values"], inputs["returns"]
        ratio = (logps - inputs["old_logps"]).masked_fill(mask == 0, 0.0).exp()
        adv = inputs["advantages"]
        pg = torch.max(-adv * ratio, -adv * ratio.clamp(1 - a.cliprange, 1 + a.cliprange))
        vclip = torch.max(torch.min(vpred, old_v + a.cliprange_value), old_v - a.cliprange_value)
        vf = 0.5 * torch.max((vpred - ret) ** 2, (vclip - ret) ** 2)
        return (pg + a.vf_coef * vf).masked_fill(mask == 0, 0.0).sum() / num_items_in_batch

    def train_iteration(self):
        a = self.args
        data = self.get_rollout()
        self.model.train()
        self.optimizer.zero_grad()
        for _ in range(a.num_ppo_epochs):
            order = torch.randperm(a.batch_size)
            for start in range(0, a.batch_size, a.mini_batch_size):
                idx = order[start : start + a.mini_batch_size]
                window = [{k: v[i] for k, v in data.items()} for i in idx.split(a.per_device_train_batch_size)]
                self.training_step(self.model, window)


# ---------------------------------------------------------------------------------------------------------------- models
def qwen(vocab: int, tok, **kw) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        **kw,
    )


@functools.cache
def sft_checkpoint(steps: int = 60):
    """A short SFT so that the policy talks and stops."""
    torch.manual_seed(1234)
    tok, qs, ans = get_policy_tokenizer(), queries(), answers(48)
    template, model = ChatMLTemplate(tok), Qwen2ForCausalLM(qwen(len(tok), tok))
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for s in range(steps):
        enc = []
        for j in range(16):
            p = template.encode(template.render(qs[(s * 5 + j) % 24]))["input_ids"]
            r = tok(ans[(s * 7 + j * 3) % 48], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
            enc.append((p, r))
        w = max(len(p) + len(r) for p, r in enc)
        ids = torch.tensor([p + r + [tok.pad_token_id] * (w - len(p) - len(r)) for p, r in enc])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (w - len(p) - len(r)) for p, r in enc])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.state_dict()


def critic_from_reward_model(rm, rm_tok, tok) -> Qwen2ForTokenClassification:
    """Trunk and head are the reward model's. The critic reads the policy's ids, so the embedding rows are carried over by
    text: the mean of the reward tokenizer's pieces of each policy token, special tokens to their counterparts."""
    critic = Qwen2ForTokenClassification(qwen(len(tok), tok, num_labels=1, classifier_dropout=0.0))
    state = {k: v.clone() for k, v in rm.state_dict().items() if k != "model.embed_tokens.weight"}
    table = rm.model.embed_tokens.weight.detach()
    pairs = {"<|endoftext|>": "[PAD]", "<|im_start|>": "[USR]", "<|im_end|>": "[END]"}
    rows = []
    for i in range(len(tok)):
        piece = tok.convert_ids_to_tokens(i)
        if piece in pairs:
            sub = [rm_tok.convert_tokens_to_ids(pairs[piece])]
        else:
            sub = rm_tok(tok.decode([i]), add_special_tokens=False)["input_ids"] or [rm_tok.unk_token_id]
        rows.append(table[sub].mean(0))
    state["model.embed_tokens.weight"] = torch.stack(rows)
    state["score.bias"] = torch.zeros(1)
    critic.load_state_dict(state)
    return critic


def _build(*quirks: str, **overrides) -> dict[str, Any]:
    args = RLHFArguments(quirks=frozenset(quirks), **overrides)
    tok, rm_tok = get_policy_tokenizer(), get_reward_tokenizer()
    template, rm_template = ChatMLTemplate(tok), RewardTemplate(rm_tok, drop_query="drop_query" in quirks)
    policy = Qwen2ForCausalLM(qwen(len(tok), tok)).eval()
    policy.load_state_dict(sft_checkpoint())
    ref_model = None if "no_ref_copy" in quirks else copy.deepcopy(policy)
    torch.manual_seed(77)
    reward_model = Qwen2ForSequenceClassification(qwen(256, rm_tok, num_labels=1))  # vocabulary padded to 256
    value_model = critic_from_reward_model(reward_model, rm_tok, tok)
    if "sync_pad_id" in quirks:
        for m in (policy, reward_model, value_model):
            m.config.pad_token_id = tok.pad_token_id
    if "freeze_head" in quirks:
        value_model.score.requires_grad_(False)  # score is not among modules_to_save
    dataset = [{"query": q, "prompt": template.render(q)} for q in queries()]
    trainer = PPOTrainer(policy, ref_model, reward_model, value_model, template, rm_template, dataset, args)

    def score_ids(model, ids, mask):
        """Reward of policy ids, the way the trainer scores: decode, split the turns, render for the reward model."""
        qs, rs = [], []
        for row, m in zip(ids, mask):
            text = tok.decode(row[m.bool()].tolist(), skip_special_tokens=False)
            head, _, tail = text.partition("<|im_end|>\n<|im_start|>assistant\n")
            qs.append(head.replace("<|im_start|>user\n", ""))
            rs.append(tail.replace("<|im_end|>", "").replace("<|im_start|>", "").replace("<|endoftext|>", ""))
        return model(**rm_template(qs, rs)).logits[:, 0]

    def values_of(model, ids, mask):
        return model(input_ids=ids, attention_mask=mask, position_ids=trainer.get_position_ids(mask)).logits.squeeze(-1)

    torch.manual_seed(args.seed)
    prompts = [d["prompt"] for d in dataset]
    return {
        "policy": policy,
        "reference": trainer.ref_model,
        "reward": reward_model,
        "value": value_model,
        "tokenizer": tok,
        "prompts": prompts,
        "step": trainer.train_iteration,
        "optimizers": [trainer.optimizer],
        "state": [trainer.lr_scheduler, trainer.sampler, trainer.state],
        "calls": {"value": values_of},
        "reward_tokenizer": rm_tok,
        "declared": {
            "algorithm": "ppo",
            "gamma": args.gamma,
            "lam": args.lam,
            "kl_coef": args.kl_coef,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "temperature": args.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": args.cliprange,
            "clip_range_value": args.cliprange_value,
            "vf_coef": args.vf_coef,
            "ent_coef": 0.0,
            "whiten_advantages": args.whiten_advantages,
            "whiten_rewards": False,
            "missing_eos_penalty": args.missing_eos_penalty,
            "learning_rate": args.learning_rate,
            "critic_learning_rate": args.learning_rate,
            "ppo_epochs": args.num_ppo_epochs,
            "num_minibatches": args.num_mini_batches,
            "batch_size": args.batch_size,
            "prompt_length": max(len(template.encode(p)["input_ids"]) for p in prompts),
            "response_length": args.max_completion_length,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "reward",
            "policy_init": "sft",
            "kl_adaptive": False,
            "loss_aggregation": "token-mean",
            "shared_trunk": False,
            "dense_rewards": False,
        },
    }


# ---------------------------------------------------------------------------------------------------------------- builds
def healthy():
    return _build()


def healthy_plain():
    return _build(
        temperature=1.0,
        whiten_advantages=False,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=8,
        missing_eos_penalty=None,
    )


def policy_ids_to_reward():
    return _build("share_ids", missing_eos_penalty=None)


def stale_grads():
    return _build("no_zero_grad")


def untempered_update():
    return _build("plain_logits", temperature=0.7)


def rm_drops_prompt():
    return _build("drop_query")


def critic_head_frozen():
    return _build("freeze_head")


def rm_pad_from_policy():
    return _build("sync_pad_id")


def values_one_late():
    return _build("values_at_action")


def ref_is_policy():
    return _build("no_ref_copy")


def eos_not_trained():
    return _build("mask_before_eos")

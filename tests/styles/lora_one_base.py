"""Four roles on ONE frozen Llama: policy / value / reward LoRA adapters with their heads, reference = adapters off."""

import random
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "q a : who what where when wrote made found was born in the book song city of king queen river sea moon star old new "
    "famous first last name year place it he she they from north south east west big small red blue green long time ago "
    "never once every day night"
).split()
QUESTIONS = [
    "q : who wrote the book a :",
    "q : where was the king born a :",
    "q : what made the moon red a :",
    "q : when a :",
    "q : who found the first river in the north a :",
    "q : what was the name of the old queen a :",
    "q : the sea a :",
    "q : who was born in the big city of the south long ago a :",
    "q : where was it made a :",
    "q : what star a :",
    "q : when was the song found a :",
    "q : who made the famous blue star a :",
]
TRAINED = ("policy", "value")
GAMMA, LAM, KL_COEF, CLIP, VCLIP, LIMIT = 1.0, 0.95, 0.05, 0.2, 0.3, 10


def make_tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for w in TEXT:
        vocab.setdefault(w, len(vocab))
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@contextmanager
def adapter(trunk, name):
    """Only this adapter acts inside; None: none acts. Unlike set_adapter() it leaves the other adapters' requires_grad alone."""
    layers = [m for m in trunk.modules() if isinstance(m, LoraLayer)]
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    for m in layers:
        m._active_adapter, m._disable_adapters = (
            ([name] if name else m._active_adapter),
            name is None or m._disable_adapters,
        )
    try:
        yield
    finally:
        for m, (active, off) in zip(layers, before):
            m._active_adapter, m._disable_adapters = active, off


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


class PolicyRole(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.acting = trunk, "policy"

    def forward(self, input_ids, attention_mask):
        with adapter(self.trunk, self.acting):
            return self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
            ).logits

    @contextmanager
    def disable_adapter(self):
        """The reference: the plain base."""
        self.acting = None
        try:
            yield
        finally:
            self.acting = "policy"


class ReferenceRole(nn.Module):
    def __init__(self, trunk, keeps=None):
        super().__init__()
        self.trunk, self.keeps = trunk, keeps

    def forward(self, input_ids, attention_mask):
        with adapter(self.trunk, self.keeps):
            return self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
            ).logits


class ScalarRole(nn.Module):
    """An adapter with a scalar head on the trunk's last hidden states."""

    def __init__(self, trunk, name):
        super().__init__()
        self.trunk, self.name = trunk, name
        self.head = nn.Linear(trunk.config.hidden_size, 1, bias=False)

    def states(self, input_ids, attention_mask):
        with adapter(self.trunk, self.name):
            llama = self.trunk.base_model.model.model
            return llama(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
            ).last_hidden_state


class ValueRole(ScalarRole):
    def forward(self, input_ids, attention_mask):
        return self.head(self.states(input_ids, attention_mask)).squeeze(-1)


class RewardRole(ScalarRole):
    def forward(self, input_ids, attention_mask):
        h = self.states(input_ids, attention_mask)
        last = (attention_mask * torch.arange(1, input_ids.size(1) + 1)).argmax(-1)
        return self.head(h[torch.arange(len(h)), last]).squeeze(-1)


def right_padded(rows):
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = (torch.arange(ids.size(1)) < torch.tensor([[len(r)] for r in rows])).long()
    return ids, mask


def action_logprobs(logits, rows, spans):
    """A list with one tensor a row: log-probabilities of the tokens at spans, each from the position before it."""
    return [
        F.log_softmax(logits[i, a - 1 : b - 1], -1).gather(-1, rows[i][a:b, None]).squeeze(-1)
        for i, (a, b) in enumerate(spans)
    ]


class Trainer:
    def __init__(self, roles, tok, opts, fault):
        self.policy, self.reference, self.reward, self.value = roles
        self.tok, self.opts, self.fault = tok, opts, fault

    def reference_logits(self, ids, mask):
        if self.reference == "adapter-off":
            with self.policy.disable_adapter():
                return self.policy(ids, mask)
        return self.reference(ids, mask)

    @torch.no_grad()
    def sample(self, questions):
        enc = self.tok(questions, padding=True, return_tensors="pt")
        acting = None if self.fault == "rollout_without_adapter" else "policy"  # the export misses the adapter's names
        with adapter(self.policy.trunk, acting):
            out = self.policy.trunk.generate(
                input_ids=enc["input_ids"],
                attention_mask=enc["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LIMIT,
                pad_token_id=0,
                eos_token_id=1,
            )
        rows, spans, width = [], [], enc["input_ids"].size(1)
        for prompt_mask, row in zip(enc["attention_mask"], out):
            response = row[width:]
            ends = (response == self.tok.eos_token_id).nonzero()
            n = int(ends[0]) + 1 if len(ends) else len(response)
            prompt = row[:width][prompt_mask.bool()]
            rows.append(torch.cat([prompt, response[:n]]))
            spans.append((len(prompt), len(prompt) + n))
        return rows, spans

    @torch.no_grad()
    def collect(self):
        rows, spans = self.sample(random.sample(QUESTIONS, 12))
        ids, mask = right_padded(rows)
        old = action_logprobs(self.policy(ids, mask), rows, spans)
        ref = action_logprobs(self.reference_logits(ids, mask), rows, spans)
        values = self.value(ids, mask)
        scores = self.reward(ids, mask)
        batch = []
        for i, (a, b) in enumerate(spans):
            v = values[i, a - 1 : b - 1]
            r = -KL_COEF * (old[i] - ref[i])
            r[-1] += scores[i]
            adv, run = torch.zeros_like(v), 0.0
            for t in range(b - a - 1, -1, -1):
                nxt = v[t + 1] if t + 1 < b - a else 0.0
                run = r[t] + GAMMA * nxt - v[t] + GAMMA * LAM * run
                adv[t] = run
            batch.append({"row": rows[i], "span": (a, b), "old": old[i], "v": v, "adv": adv, "ret": adv + v})
        flat = torch.cat([x["adv"] for x in batch])
        for x in batch:  # whitened over all response tokens of the rollout
            x["adv"] = (x["adv"] - flat.mean()) / (flat.std() + 1e-8)
        return batch, scores.mean().item()

    def update(self, part):
        self.policy.trunk.set_requires_grad(list(TRAINED), True)  # peft's own switches turn off all but the active one
        rows, spans = [x["row"] for x in part], [x["span"] for x in part]
        ids, mask = right_padded(rows)
        old, v0, adv, ret = (torch.cat([x[k] for x in part]) for k in ("old", "v", "adv", "ret"))
        new = torch.cat(action_logprobs(self.policy(ids, mask), rows, spans))
        ratio = (new - old).exp()
        policy_loss = torch.max(-adv * ratio, -adv * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        values = self.value(ids, mask)
        v = torch.cat([values[i, a - 1 : b - 1] for i, (a, b) in enumerate(spans)])
        v_clipped = v0 + (v - v0).clamp(-VCLIP, VCLIP)
        value_loss = 0.5 * torch.max((v - ret) ** 2, (v_clipped - ret) ** 2).mean()
        for opt, loss in zip(self.opts, (policy_loss, value_loss)):
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
            opt.step()
        return policy_loss.item(), value_loss.item()

    def step(self):
        batch, score = self.collect()
        logs = []
        for _ in range(3):
            random.shuffle(batch)
            logs += [self.update(batch[i : i + 6]) for i in range(0, len(batch), 6)]
        return {
            "score": score,
            "policy_loss": sum(x[0] for x in logs) / len(logs),
            "value_loss": sum(x[1] for x in logs) / len(logs),
        }


def make(fault=None, wrapped_reference=False):
    torch.manual_seed(5)
    random.seed(5)
    tok = make_tokenizer()
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():  # it ends some of its answers, and never says <pad>
        base.model.embed_tokens.weight[:, 0] += 1.2
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        base.lm_head.weight[:, 0] = 0.0
        base.lm_head.weight[1, 0], base.lm_head.weight[0, 0] = 1.2, -8.0
    lora = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"])
    trunk = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora), adapter_name="policy")
    trunk.add_adapter("value", LoraConfig(task_type="CAUSAL_LM", **lora))
    trunk.add_adapter("reward", LoraConfig(task_type="CAUSAL_LM", **lora))
    policy, value, reward = PolicyRole(trunk), ValueRole(trunk, "value"), RewardRole(trunk, "reward")
    with torch.no_grad():
        for n, p in trunk.named_parameters():
            if "lora_B.reward" in n:  # the reward adapter is a trained one
                nn.init.normal_(p, std=0.2)
        nn.init.normal_(reward.head.weight, std=0.9), nn.init.normal_(value.head.weight, std=0.03)
    trained = TRAINED + ("reward",) if fault == "reward_adapter_in_optimizer" else TRAINED
    for n, p in trunk.named_parameters():
        p.requires_grad_(any(f".{a}." in n for a in trained))
    reward.head.requires_grad_(False)
    trunk.eval()
    of = {
        a: [p for n, p in trunk.named_parameters() if f".{a}." in n and "lora_" in n]
        for a in ("policy", "value", "reward")
    }
    if fault == "reward_adapter_in_optimizer":  # "everything with lora_ in its name that is not the policy's"
        of["value"] += of["reward"]
    opts = [
        torch.optim.AdamW(of["policy"], lr=1e-4, weight_decay=0.0),
        torch.optim.AdamW(of["value"] + list(value.head.parameters()), lr=2e-4, weight_decay=0.0),
    ]
    reference = "adapter-off"
    if wrapped_reference or fault == "reference_keeps_adapter":
        reference = ReferenceRole(trunk, keeps="policy" if fault == "reference_keeps_adapter" else None)
    trainer = Trainer((policy, reference, reward, value), tok, opts, fault)
    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": value,
        "tokenizer": tok,
        "prompts": QUESTIONS,
        "optimizers": opts,
        "step": trainer.step,
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL_COEF,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "clip_range": CLIP,
            "clip_range_value": VCLIP,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "whiten_advantages": True,
            "loss_aggregation": "token-mean",
            "shared_trunk": True,
            "value_init": "fresh",
            "reference": "adapter-off",
            "learning_rate": 1e-4,
            "critic_learning_rate": 2e-4,
            "ppo_epochs": 3,
            "num_minibatches": 2,
            "batch_size": 12,
            "response_length": LIMIT,
            "dtype": "float32",
        },
    }


def healthy():
    return make()


def healthy_wrapped_reference():
    return make(wrapped_reference=True)


def reference_keeps_adapter():
    return make("reference_keeps_adapter")


def reward_adapter_in_optimizer():
    return make("reward_adapter_in_optimizer")


def rollout_without_adapter():
    return make("rollout_without_adapter")

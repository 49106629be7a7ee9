"""A small class-based group trainer: Dr. GRPO (constant divisor, no std) or CISPO, scored by a reward model."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

PROMPTS = [
    "how do the birds sing",
    "tell me of rain",
    "why is the sea so very blue",
    "write a song",
    "name three stars now",
    "what is a good day",
    "is there snow on the hill",
    "say something kind",
    "where did all the rivers go",
    "who built the old stone bridge",
    "a short story please",
    "explain the moon",
]
EXTRA = (
    "green cold warm bright dark small great slow quick soft hard light wind leaf tree root sand fish wolf bear".split()
)


def make_tokenizer():
    tok = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(PROMPTS + EXTRA, trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


@dataclass
class Config:
    loss_type: str = "dr_grpo"  # or cispo
    group_size: int = 4
    prompts_per_batch: int = 4
    max_tokens: int = 12
    temperature: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    cispo_max: float = 3.0
    beta: float = 0.02
    epochs: int = 2
    minibatches: int = 2
    lr: float = 5e-5
    fault: str | None = None


class Cursor:
    """Where in the prompts the loop is."""

    def __init__(self):
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, d):
        self.at = d["at"]


class GroupTrainer:
    def __init__(self, cfg, policy, ref, rm, tok):
        self.cfg, self.policy, self.ref, self.rm, self.tok = cfg, policy, ref, rm, tok
        self.opt = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.cursor = Cursor()

    def logprobs(self, model, ids, attn, n):
        pos = (attn.long().cumsum(1) - 1).clamp(min=0)
        logits = (
            model(input_ids=ids, attention_mask=attn, position_ids=pos).logits[:, -n - 1 : -1] / self.cfg.temperature
        )
        return torch.gather(F.log_softmax(logits.float(), -1), 2, ids[:, -n:, None])[..., 0]

    @torch.no_grad()
    def rollout(self):
        c = self.cfg
        take = [(self.cursor.at + i) % len(PROMPTS) for i in range(c.prompts_per_batch)]
        self.cursor.at = (self.cursor.at + c.prompts_per_batch) % len(PROMPTS)
        enc = self.tok([PROMPTS[i] for i in take for _ in range(c.group_size)], return_tensors="pt", padding=True)
        ids = self.policy.generate(
            input_ids=enc.input_ids,
            attention_mask=enc.attention_mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=c.temperature,
            max_new_tokens=c.max_tokens,
            eos_token_id=self.tok.eos_token_id,
            pad_token_id=self.tok.pad_token_id,
        )
        n = ids.size(1) - enc.input_ids.size(1)
        resp = ids[:, -n:]
        is_eos = resp == self.tok.eos_token_id
        mask = (is_eos.long().cumsum(1) - is_eos.long()) == 0  # up to and with the first EOS
        attn = torch.cat([enc.attention_mask.bool(), mask], 1).long()
        if c.fault == "mask_drops_eos":
            mask = mask & ~is_eos
        scores = self.score(ids, attn)
        if c.fault == "groups_mixed":
            adv = (scores.view(c.group_size, -1) - scores.view(c.group_size, -1).mean(0)).flatten()
        else:
            by_prompt = scores.view(-1, c.group_size)
            adv = (by_prompt - by_prompt.mean(1, keepdim=True)).flatten()  # no std: Dr. GRPO
        return dict(
            ids=ids,
            attn=attn,
            mask=mask,
            adv=adv,
            old=self.logprobs(self.policy, ids, attn, n),
            ref=self.logprobs(self.ref, ids, attn, n),
            n=n,
            scores=scores,
        )

    def score(self, ids, attn):
        pos = (attn.cumsum(1) - 1).clamp(min=0)
        if self.cfg.fault == "score_at_last_slot":
            h = self.rm.model(input_ids=ids, attention_mask=attn, position_ids=pos).last_hidden_state
            return self.rm.score(h[:, -1])[:, 0]
        return self.rm(input_ids=ids, attention_mask=attn, position_ids=pos).logits[:, 0]

    def loss(self, b, rows, new):
        c, mask, adv = self.cfg, b["mask"][rows], b["adv"][rows, None]
        ratio = torch.exp(new - b["old"][rows])
        if c.loss_type == "cispo":
            per_token = -ratio.clamp(max=c.cispo_max).detach() * adv * new
        else:
            per_token = -torch.min(ratio * adv, ratio.clamp(1 - c.eps_low, 1 + c.eps_high) * adv)
        delta = b["ref"][rows] - new
        per_token = per_token + c.beta * (delta.exp() - delta - 1)
        total = torch.where(mask, per_token, 0.0).sum()
        return total / mask.sum() if c.loss_type == "cispo" else total / (len(rows) * c.max_tokens)

    def step(self):
        b = self.rollout()
        for _ in range(self.cfg.epochs):
            for rows in torch.randperm(len(b["ids"])).chunk(self.cfg.minibatches):
                new = self.logprobs(self.policy, b["ids"][rows], b["attn"][rows], b["n"])
                loss = self.loss(b, rows, new)
                self.opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.opt.step()
        return {"loss": loss.item(), "score": b["scores"].mean().item()}


@torch.no_grad()
def calibrate(rm, vocab):
    """Scores of mean 0 and deviation 1, as after reward training and normalisation."""
    h = rm.model(input_ids=torch.randint(2, vocab, (128, 14))).last_hidden_state[:, -1]
    w, mean = rm.score.weight[0], h.mean(0)
    w -= mean * (w @ mean) / (mean @ mean)
    w /= (h @ w).std()


def make(fault=None, loss_type="dr_grpo"):
    torch.manual_seed(11)
    tok = make_tokenizer()
    shape = dict(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.12,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    policy = Qwen2ForCausalLM(Qwen2Config(**shape))
    head = nn.Linear(48, len(tok))
    with torch.no_grad():
        head.weight.copy_(policy.lm_head.weight)
        head.bias.zero_()
        head.bias[tok.eos_token_id] = 2.2
        head.bias[tok.pad_token_id] = head.bias[tok.unk_token_id] = -6.0
    policy.lm_head = head
    ref = copy.deepcopy(policy).eval().requires_grad_(False)
    rm = Qwen2ForSequenceClassification(Qwen2Config(**shape, num_labels=1)).eval().requires_grad_(False)
    calibrate(rm, len(tok))
    cfg = Config(loss_type=loss_type, fault=fault)
    t = GroupTrainer(cfg, policy, ref, rm, tok)
    declared = dict(
        algorithm="grpo",
        group_size=4,
        kl_coef=cfg.beta,
        kl_in="loss",
        kl_estimator="k3",
        temperature=1.0,
        learning_rate=cfg.lr,
        ppo_epochs=2,
        num_minibatches=2,
        batch_size=16,
        response_length=12,
        whiten_advantages=False,
        loss_aggregation="seq-sum" if loss_type == "dr_grpo" else "token-mean",
    )
    if loss_type == "dr_grpo":
        declared["clip_range"] = 0.2
    return dict(
        policy=policy,
        reference=ref,
        reward=rm,
        value=None,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[t.opt],
        state=[t.cursor],
        step=t.step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_cispo():
    return make(loss_type="cispo")


def groups_mixed():
    return make("groups_mixed")


def mask_drops_eos():
    return make("mask_drops_eos")


def score_at_last_slot():
    return make("score_at_last_slot")

"""GRPO as verl runs it: uid groups in a re-ordered batch, token-budget micro-batches, low_var_kl in the loss, seq-mean-token-sum."""

import copy
import uuid
from collections import defaultdict

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM, PhiForTokenClassification, PreTrainedTokenizerFast

VERBS = "find count add solve show take give sum list split".split()
NOUNS = "apples pears boxes coins books trains miles hours eggs cups".split()
NUMS = "one two three four five six seven eight nine ten".split()
FILL = "how many are in the and of then each more than left so answer is total with for per".split()
VOCAB = {w: i for i, w in enumerate(["<|pad|>", "<|im_end|>", "<|unk|>", *VERBS, *NOUNS, *NUMS, *FILL])}
PROMPTS = [
    "find two apples",
    "how many coins are in the boxes",
    "add three and four",
    "solve five miles per two hours then list the trains",
    "show six eggs",
    "take one pears of ten pears",
    "sum",
    "give each two cups more than nine books",
    "count the miles left",
    "split ten boxes",
    "list seven coins and eight coins for each",
    "how many eggs",
]


class Cfg(dict):
    __getattr__ = dict.__getitem__


CFG = Cfg(
    train_batch_size=4,
    n=4,
    response_length=12,
    temperature=1.0,
    ppo_mini_batch_size=8,
    ppo_max_token_len=56,
    ppo_epochs=1,
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    entropy_coeff=0.001,
    kl_loss_coef=0.01,
    lr=2e-5,
    grad_clip=1.0,
)


class StatefulLoader:
    def __init__(self):
        self.pos = 0

    def state_dict(self):
        return {"pos": self.pos}

    def load_state_dict(self, s):
        self.pos = s["pos"]

    def next(self, k):
        out = [PROMPTS[(self.pos + i) % len(PROMPTS)] for i in range(k)]
        self.pos += k
        return out


def agg_loss(loss_mat, loss_mask, loss_agg_mode="seq-mean-token-sum"):
    assert loss_agg_mode == "seq-mean-token-sum"
    return (loss_mat * loss_mask).sum(-1).mean()


def kl_penalty_low_var(logprob, ref_logprob):
    kl = torch.clamp(ref_logprob - logprob, min=-20, max=20)
    return torch.clamp(kl.exp() - kl - 1, min=-10, max=10)


def compute_policy_loss(old_log_prob, log_prob, advantages, response_mask, c):
    ratio = torch.exp(torch.clamp(log_prob - old_log_prob, min=-20.0, max=20.0))
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - c.clip_ratio_low, 1 + c.clip_ratio_high)
    clip1 = torch.maximum(pg_losses1, pg_losses2)
    clip2 = torch.min(-advantages * c.clip_ratio_c, clip1)
    return agg_loss(torch.where(advantages < 0, clip2, clip1), response_mask)


def compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon=1e-6):
    scores = token_level_rewards.sum(dim=-1)
    id2score = defaultdict(list)
    with torch.no_grad():
        for i in range(len(scores)):
            id2score[index[i]].append(scores[i])
        stat = {k: (torch.stack(v).mean(), torch.stack(v).std()) for k, v in id2score.items()}
        scores = torch.stack([(s - stat[u][0]) / (stat[u][1] + epsilon) for s, u in zip(scores, index)])
    return scores.unsqueeze(-1) * response_mask


def rearrange_micro_batches(attention_mask, max_token_len):
    """Row indices, as many rows in each as fit under max_token_len real tokens."""
    lens = attention_mask.sum(1).tolist()
    parts, used = [[]], 0
    for i in sorted(range(len(lens)), key=lambda i: -lens[i]):
        if parts[-1] and used + lens[i] > max_token_len:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += lens[i]
    return [torch.tensor(p) for p in parts]


def forward_micro_batch(module, mb, temperature, entropy=False):
    n = mb["responses"].size(-1)
    out = module(
        input_ids=mb["input_ids"], attention_mask=mb["attention_mask"], position_ids=mb["position_ids"], use_cache=False
    )
    logits = (out.logits / temperature)[:, -n - 1 : -1]
    logp = torch.log_softmax(logits, -1)
    ent = -(logp.exp() * logp).sum(-1) if entropy else None
    return ent, logp.gather(-1, mb["responses"].unsqueeze(-1)).squeeze(-1)


def pick(batch, idx):
    return {k: v[idx] for k, v in batch.items()}


@torch.no_grad()
def compute_log_prob(module, batch, c):
    out = torch.zeros_like(batch["responses"], dtype=torch.float32)
    for idx in rearrange_micro_batches(batch["attention_mask"], c.ppo_max_token_len):
        out[idx] = forward_micro_batch(module, pick(batch, idx), c.temperature)[1]
    return out


@torch.no_grad()
def compute_rm_score(rm, batch):
    """One score a row at its last valid token, written into a (batch, response) tensor."""
    scores = rm(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits.squeeze(-1)
    eos_idx = torch.argmax(batch["position_ids"] * batch["attention_mask"], dim=-1)
    rm_score = scores[torch.arange(len(scores)), eos_idx]
    token_level = torch.zeros_like(batch["responses"], dtype=torch.float32)
    token_level[torch.arange(len(scores)), batch["response_mask"].sum(-1) - 1] = rm_score
    return token_level


def update_policy(actor, opt, sched, batch, c, fault, metrics):
    for _ in range(c.ppo_epochs):
        for mini in torch.arange(len(batch["responses"])).split(c.ppo_mini_batch_size):
            mini = pick(batch, mini)
            micros = rearrange_micro_batches(mini["attention_mask"], c.ppo_max_token_len)
            opt.zero_grad()
            for idx in micros:
                mb = pick(mini, idx)
                mask = mb["response_mask"]
                entropy, log_prob = forward_micro_batch(actor, mb, c.temperature, entropy=True)
                pg_loss = compute_policy_loss(mb["old_log_probs"], log_prob, mb["advantages"], mask, c)
                kld = kl_penalty_low_var(log_prob, mb["ref_log_prob"])
                kl_loss = agg_loss(kld, torch.ones_like(mask) if fault == "kl_over_pads" else mask)
                loss = pg_loss - c.entropy_coeff * agg_loss(entropy, mask) + c.kl_loss_coef * kl_loss
                scale = 1 / len(micros) if fault == "fixed_accumulation" else len(idx) / c.ppo_mini_batch_size
                (loss * scale).backward()
                metrics["actor/pg_loss"] += pg_loss.item() * scale
                metrics["actor/kl_loss"] += kl_loss.item() * scale
            metrics["actor/grad_norm"] = torch.nn.utils.clip_grad_norm_(actor.parameters(), c.grad_clip).item()
            opt.step()
    sched.step()


def make(fault=None):
    torch.manual_seed(7)
    np.random.seed(7)
    c = CFG
    raw = Tokenizer(models.WordLevel(VOCAB, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<|unk|>", padding_side="left"
    )
    shape = dict(
        vocab_size=len(VOCAB),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.12,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    actor = PhiForCausalLM(PhiConfig(**shape))
    with torch.no_grad():
        actor.lm_head.bias[1] = 2.0
        actor.lm_head.bias[[0, 2]] = -8.0
    ref = copy.deepcopy(actor).eval().requires_grad_(False)
    rm = PhiForTokenClassification(PhiConfig(**shape, num_labels=1)).eval().requires_grad_(False)
    with torch.no_grad():
        h = rm.model(torch.randint(3, len(VOCAB), (128, 14))).last_hidden_state[:, -1]
        head = getattr(rm, "score", None) or rm.classifier
        w, m = head.weight[0], h.mean(0)
        w -= m * (w @ m) / (m @ m)
        w /= (h @ w).std()
        head.bias.zero_()
    opt = torch.optim.AdamW(actor.parameters(), lr=c.lr, betas=(0.9, 0.999), weight_decay=0.01)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1.0)
    loader = StatefulLoader()

    @torch.no_grad()
    def generate_sequences(texts):
        enc = tok(texts, padding=True, return_tensors="pt")
        actor.eval()
        seq = actor.generate(
            **{k: enc[k] for k in ("input_ids", "attention_mask")},
            do_sample=True,
            temperature=c.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=c.response_length,
            eos_token_id=1,
            pad_token_id=0,
        )
        actor.train()
        resp = seq[:, enc.input_ids.size(1) :]
        resp = torch.nn.functional.pad(resp, (0, c.response_length - resp.size(1)), value=0)
        done = (resp == 1).long()
        response_mask = (done.cumsum(1) - done == 0).long()
        attn = torch.cat([enc.attention_mask, response_mask], 1)
        return dict(
            input_ids=torch.cat([enc.input_ids, resp], 1),
            attention_mask=attn,
            responses=resp,
            response_mask=response_mask,
            position_ids=torch.clip(attn.cumsum(-1) - 1, min=0),
        )

    def step():
        texts = np.array(loader.next(c.train_batch_size), dtype=object)
        uid = np.array([str(uuid.UUID(int=i)) for i in range(len(texts))], dtype=object)
        texts, uid = np.repeat(texts, c.n), np.repeat(uid, c.n)
        batch = generate_sequences(list(texts))
        order = torch.from_numpy(np.random.permutation(len(uid)))  # _balance_batch
        batch = pick(batch, order)
        if fault != "uid_left_behind":
            uid = uid[order.numpy()]
        batch["token_level_rewards"] = compute_rm_score(rm, batch)
        batch["old_log_probs"] = compute_log_prob(actor, batch, c)
        batch["ref_log_prob"] = compute_log_prob(ref, batch, c)
        batch["advantages"] = compute_grpo_outcome_advantage(batch["token_level_rewards"], batch["response_mask"], uid)
        metrics = defaultdict(float)
        update_policy(actor, opt, sched, batch, c, fault, metrics)
        metrics["critic/score/mean"] = batch["token_level_rewards"].sum(-1).mean().item()
        metrics["response_length/mean"] = batch["response_mask"].sum(-1).float().mean().item()
        return dict(metrics)

    return dict(
        policy=actor,
        reference=ref,
        reward=rm,
        value=None,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[opt],
        state=[sched, loader],
        step=step,
        declared=dict(
            algorithm="grpo",
            group_size=c.n,
            kl_coef=c.kl_loss_coef,
            kl_in="loss",
            kl_estimator="k3",
            temperature=1.0,
            ent_coef=c.entropy_coeff,
            clip_range=0.2,
            learning_rate=c.lr,
            ppo_epochs=1,
            num_minibatches=2,
            batch_size=16,
            response_length=12,
            loss_aggregation="seq-sum",
        ),
    )


def healthy():
    return make()


def uid_left_behind():
    return make("uid_left_behind")


def kl_over_pads():
    return make("kl_over_pads")


def fixed_accumulation():
    return make("fixed_accumulation")

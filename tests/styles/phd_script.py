# ppo on the toy "weather notes" task. everything in dicts, B = batch, R = response slots, P = prompt slots
import copy

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

WORDS = (
    "rain snow wind sun fog storm cloud ice north south east west river hill coast town cold warm dry wet light heavy "
    "morning noon evening night today tomorrow later early slow fast over under near far with and then but so very "
    "road field forest lake bridge harbour expect report brings leaves stays clears grows fades turns moves is was"
).split()

H = dict(
    B=12,
    R=10,
    T=0.7,
    epochs=2,
    minibatches=3,
    gamma=1.0,
    lam=0.95,
    kl=0.1,
    clip=0.2,
    vclip=0.2,
    vf=0.1,
    eos_penalty=1.0,
    lr=2e-5,
    grad_norm=1.0,
)


def get_tokenizer():
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def sentences(n, g):
    # a random walk over the words, about 9 words long
    out = []
    for _ in range(n):
        w, s = int(torch.randint(len(WORDS), (1,), generator=g)), []
        for _ in range(int(torch.randint(4, 18, (1,), generator=g))):
            s.append(WORDS[w])
            w = (w * 7 + 3 + int(torch.randint(4, (1,), generator=g))) % len(WORDS)
        out.append(" ".join(s))
    return out


def sft(model, tok, texts):
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(40):
        chunk = [t + " <eos>" for t in texts[(i * 32) % 256 : (i * 32) % 256 + 32]]
        x = tok(chunk, return_tensors="pt", padding=True, padding_side="right")
        y = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
        model(**x, labels=y).loss.backward()
        opt.step()
        opt.zero_grad()


def mmean(x, m):
    return x.masked_fill(~m, 0.0).sum() / m.sum().clamp(min=1)


def logits_of(model, seq, att, P, T):
    return model(input_ids=seq, attention_mask=att).logits[:, P - 1 : -1] / T


def pick(logits, resp):
    return F.log_softmax(logits, -1).gather(-1, resp[..., None])[..., 0]


def gae(rew, val, gamma, lam):
    adv, last = torch.zeros_like(rew), 0.0
    for t in reversed(range(rew.shape[1])):
        nxt = val[:, t + 1] if t + 1 < rew.shape[1] else 0.0
        last = rew[:, t] + gamma * nxt - val[:, t] + gamma * lam * last
        adv[:, t] = last
    return adv


class Counter:
    n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, d):
        self.n = d["n"]


def make(fault=None):
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(11)
    tok = get_tokenizer()
    ids = dict(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None)
    cfg = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        **ids,
    )
    texts = sentences(256, g)
    policy = LlamaForCausalLM(cfg)
    sft(policy, tok, texts)
    policy.generation_config.eos_token_id, policy.generation_config.pad_token_id = tok.eos_token_id, tok.pad_token_id

    # reward model: sft trunk, head scaled so that scores are about N(0, 1)
    rcfg = copy.deepcopy(cfg)
    rcfg.num_labels, rcfg.classifier_dropout = 1, 0.0
    reward = LlamaForSequenceClassification(rcfg)
    reward.model.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        x = tok([t + " <eos>" * (i % 2) for i, t in enumerate(texts[:64])], return_tensors="pt", padding=True)
        h = reward.model(**x).last_hidden_state[:, -1]
        w = reward.score.weight[0]
        w -= (w @ h.mean(0)) / h.mean(0).pow(2).sum() * h.mean(0)
        w /= (h @ w).std()
    value = LlamaForTokenClassification(rcfg)
    value.model.load_state_dict(reward.model.state_dict())
    with torch.no_grad():
        value.score.weight.copy_(reward.score.weight)
        value.score.bias.zero_()
    reference = copy.deepcopy(policy)
    for m in (reward, reference):
        m.requires_grad_(False)
    for m in (policy, reference, reward, value):
        m.eval()

    prompts = [" ".join(t.split()[: 3 + i % 4]) for i, t in enumerate(sentences(48, g))]
    opt = torch.optim.AdamW(
        [{"params": policy.parameters(), "lr": H["lr"]}, {"params": value.parameters(), "lr": 5 * H["lr"]}],
        weight_decay=0.0,
    )
    counter = Counter()
    eos, pad, B, R = tok.eos_token_id, tok.pad_token_id, H["B"], H["R"]

    @torch.no_grad()
    def sample(q, qa):
        seq, att = q, qa
        done = torch.zeros(len(q), dtype=torch.bool)
        for _ in range(R):
            lg = policy(input_ids=seq, attention_mask=att).logits[:, -1] / H["T"]
            if fault == "top_k_left_in":
                lg = lg.masked_fill(lg < lg.topk(6).values[:, -1:], -torch.inf)
            nxt = torch.multinomial(lg.softmax(-1), 1)[:, 0]
            nxt = torch.where(done, pad, nxt)
            seq = torch.cat([seq, nxt[:, None]], 1)
            att = torch.cat([att, (~done).long()[:, None]], 1)
            done = done | (nxt == eos)
        return seq, att, done

    @torch.no_grad()
    def rollout():
        batch = [prompts[(counter.n * B + i) % len(prompts)] for i in range(B)]
        counter.n += 1
        q = tok(batch, return_tensors="pt", padding=True)
        P = q["input_ids"].shape[1]
        seq, att, ended = sample(q["input_ids"], q["attention_mask"])
        d = {"seq": seq, "att": att, "resp": seq[:, P:], "m": att[:, P:].bool()}
        if fault == "mask_stops_before_eos":
            d["m"] = d["m"] & (d["resp"] != eos)
        m, T = d["m"], 1.0 if fault == "forgot_temperature" else H["T"]
        d["lp"] = pick(logits_of(policy, seq, att, P, T), d["resp"]).masked_fill(~m, 0.0)
        ref_T = 1.0 if fault == "reference_without_temperature" else T
        ref = pick(logits_of(reference, seq, att, P, ref_T), d["resp"]).masked_fill(~m, 0.0)
        d["v"] = value(input_ids=seq, attention_mask=att).logits[:, P - 1 : -1, 0]
        if fault != "values_after_eos":
            d["v"] = d["v"].masked_fill(~m, 0.0)
        score = reward(input_ids=seq, attention_mask=att).logits[:, 0]
        bad = ~ended
        if fault == "eos_penalty_any":
            bad = (d["resp"] != eos).any(1)
        score = torch.where(bad, score - H["eos_penalty"], score)
        kl = d["lp"] - ref
        rew = -H["kl"] * kl
        last = m.sum(1) - 1
        if fault == "score_in_last_column":
            last = torch.full_like(last, R - 1)
        rew[torch.arange(B), last] += score
        if fault == "gamma_lam_exchanged":
            adv = gae(rew, d["v"], H["lam"], H["gamma"])
        else:
            adv = gae(rew, d["v"], H["gamma"], H["lam"])
        d["ret"] = adv + d["v"]
        mu = mmean(adv, m)
        sd = (((adv - mu).masked_fill(~m, 0.0) ** 2).sum() / (m.sum() - 1)).sqrt()
        d["adv"] = ((adv - mu) / (sd + 1e-8)).masked_fill(~m, 0.0)
        log = {"objective/kl": kl.sum(1).mean().item(), "objective/scores": score.mean().item()}
        return d, P, T, log

    def step():
        d, P, T, log = rollout()
        names = ("loss/policy", "loss/value", "val/ratio", "policy/clipfrac")
        tot = dict.fromkeys(names, 0.0)
        for _ in range(H["epochs"]):
            perm = torch.randperm(B)
            if fault == "numpy_shuffle":
                perm = torch.from_numpy(np.random.default_rng().permutation(B))
            for j in perm.chunk(H["minibatches"]):
                b = {k: x[j] for k, x in d.items()}
                m = b["m"]
                lp = pick(logits_of(policy, b["seq"], b["att"], P, T), b["resp"]).masked_fill(~m, 0.0)
                v = value(input_ids=b["seq"], attention_mask=b["att"]).logits[:, P - 1 : -1, 0].masked_fill(~m, 0.0)
                ratio = (lp - b["lp"]).exp()
                pg1, pg2 = -b["adv"] * ratio, -b["adv"] * ratio.clamp(1 - H["clip"], 1 + H["clip"])
                pg = mmean(torch.max(pg1, pg2), m)
                vc = b["v"] + (v - b["v"]).clamp(-H["vclip"], H["vclip"])
                vl = 0.5 * mmean(torch.max((v - b["ret"]) ** 2, (vc - b["ret"]) ** 2), m)
                opt.zero_grad()
                (pg + H["vf"] * vl).backward()
                for group in opt.param_groups:
                    torch.nn.utils.clip_grad_norm_(group["params"], H["grad_norm"])
                opt.step()
                got = (pg, vl, mmean(ratio, m), mmean((pg2 > pg1).float(), m))
                for k, x in zip(names, got):
                    tot[k] += x.item()
        n = H["epochs"] * H["minibatches"]
        if fault == "averages_over_minibatches_only":
            n = H["minibatches"]
        return {**log, **{k: x / n for k, x in tot.items()}}

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": value,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [opt],
        "state": [counter],
        "step": step,
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.95,
            "kl_coef": 0.1,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "temperature": 0.7,
            "clip_range": 0.2,
            "clip_range_value": 0.2,
            "vf_coef": 0.1,
            "ppo_epochs": 2,
            "num_minibatches": 3,
            "batch_size": 12,
            "response_length": 10,
            "whiten_advantages": True,
            "missing_eos_penalty": 1.0,
            "learning_rate": 2e-5,
            "critic_learning_rate": 1e-4,
            "value_init": "reward",
            "policy_init": "sft",
            "loss_aggregation": "token-mean",
        },
    }


def healthy():
    return make()


def forgot_temperature():
    return make("forgot_temperature")


def top_k_left_in():
    return make("top_k_left_in")


def mask_stops_before_eos():
    return make("mask_stops_before_eos")


def reference_without_temperature():
    return make("reference_without_temperature")


def values_after_eos():
    return make("values_after_eos")


def eos_penalty_any():
    return make("eos_penalty_any")


def score_in_last_column():
    return make("score_in_last_column")


def gamma_lam_exchanged():
    return make("gamma_lam_exchanged")


def numpy_shuffle():
    return make("numpy_shuffle")


def averages_over_minibatches_only():
    return make("averages_over_minibatches_only")

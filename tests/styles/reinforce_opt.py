"""Critic-free REINFORCE on OPT in plain functions: RLOO, a moving-average baseline under LoRA, and REINFORCE++."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast

DISHES = "soup stew bread cake salad pie rice curry".split()
HOW = "boil bake fry chop stir steam roast mix".split()
EXTRA = "salt pepper butter oil garlic onion lemon honey ginger mint".split()
WHEN = "slowly|for an hour|until soft|at once|over low heat|by hand|twice|in a deep pan".split("|")
RECIPES = [
    f"for {d} you {HOW[(i + j) % 8]} {EXTRA[(2 * i + j) % 10]} and {EXTRA[(i + 3 * j + 1) % 10]} {WHEN[(i * j) % 8]}"
    for i, d in enumerate(DISHES)
    for j in range(5)
]


def tokenizer_():
    t = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.train_from_iterator(RECIPES, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[EOS]", "[UNK]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )


def sft_(lm, tok, n=60):
    enc = tok(RECIPES, return_tensors="pt", padding=True)
    ids = torch.cat([enc.input_ids, torch.full((len(RECIPES), 1), tok.eos_token_id)], 1)
    att = torch.cat([enc.attention_mask, torch.ones(len(RECIPES), 1, dtype=torch.long)], 1)
    opt = torch.optim.Adam(lm.parameters(), 4e-3)
    for _ in range(n):
        opt.zero_grad()
        lm(ids, attention_mask=att, labels=ids.masked_fill(att == 0, -100)).loss.backward()
        opt.step()
    lm.zero_grad(set_to_none=True)
    return ids, att


def judge_(cfg, ids, att):
    rm = OPTForSequenceClassification(cfg).eval().requires_grad_(False)
    h = rm.model(ids, attention_mask=att)[0][:, 5:].flatten(0, 1)
    mu, w = h.mean(0), torch.randn(cfg.hidden_size)
    w = w - (w @ mu) / (mu @ mu) * mu
    rm.score.weight.copy_((w / (h @ w).std())[None])
    return rm


def draw(lm, prompt_ids, prompt_att, limit, temperature, eos, pad):
    """Sample without a cache; OPT takes its positions from the attention mask."""
    ids, att = prompt_ids, prompt_att
    going = torch.ones(len(ids), 1, dtype=torch.long)
    for _ in range(limit):
        with torch.no_grad():
            p = (lm(ids, attention_mask=att).logits[:, -1] / temperature).softmax(-1)
        nxt = p.multinomial(1) * going + pad * (1 - going)
        ids, att = torch.cat([ids, nxt], 1), torch.cat([att, going], 1)
        going = going * (nxt != eos).long()
        if going.sum() == 0:
            break
    return ids, att


def token_logps(lm, ids, att, start, temperature):
    z = lm(ids, attention_mask=att).logits[:, start - 1 : -1] / temperature
    return z.gather(2, ids[:, start:, None]).squeeze(2) - z.logsumexp(2)


class Baseline:
    """Exponential moving average of the returns, read before it is moved."""

    def __init__(self, decay=0.9):
        self.decay, self.value = decay, None

    def read(self, batch):
        if self.value is None:
            self.value = batch.mean().item()
        return self.value

    def move(self, batch):
        self.value = self.decay * self.value + (1 - self.decay) * batch.mean().item()

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, d):
        self.value = d["value"]


def make(fault=None, kind="rloo"):
    torch.manual_seed(17)
    tok = tokenizer_()
    cfg = OPTConfig(
        vocab_size=len(tok),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=0.12,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        num_labels=1,
    )
    lm = OPTForCausalLM(cfg)
    ids, att = sft_(lm, tok)
    rm = judge_(cfg, ids, att)
    lm.eval()
    if kind == "lora":
        lm = get_peft_model(
            lm,
            LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        ).eval()
        ref = "adapter-off"
    else:
        ref = copy.deepcopy(lm).requires_grad_(False)
    K = 4 if kind == "rloo" else 1
    temperature = 0.8 if kind == "rloo" else 1.0
    beta = {"rloo": 0.05, "lora": 0.03, "rpp": 0.01}[kind]
    opt = torch.optim.AdamW(
        [p for p in lm.parameters() if p.requires_grad], lr=1e-4 if kind == "lora" else 1e-5, weight_decay=0.0
    )
    baseline = Baseline()
    prompts = [
        "for soup you",
        "for stew you boil",
        "for cake",
        "for rice you mix butter and",
        "for pie",
        "for curry you fry",
        "for bread you",
        "for salad",
    ]
    prompts = prompts[:3] if kind == "rloo" else prompts
    enc = tok([p for p in prompts for _ in range(K)], return_tensors="pt", padding=True)
    start = enc.input_ids.shape[1]

    def anchor(ids, att):
        with torch.no_grad():
            if ref == "adapter-off":
                with lm.disable_adapter():
                    return token_logps(lm, ids, att, start, temperature)
            return token_logps(ref, ids, att, start, temperature)

    def rollout():
        heat = 0.5 if fault == "cold_sampler" else temperature
        ids, att = draw(lm, enc.input_ids, enc.attention_mask, 12, heat, tok.eos_token_id, tok.pad_token_id)
        on = att[:, start:].float()
        with torch.no_grad():
            scores = rm(ids, attention_mask=att).logits[:, 0]
            old = token_logps(lm, ids, att, start, temperature)
        return ids, att, on, scores, old, (old - anchor(ids, att)) * on

    def apply(loss):
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
        opt.step()

    def rloo_step():
        ids, att, on, scores, _, kl = rollout()
        r = (scores - beta * kl.sum(1)).view(-1, K)
        adv = (r - (r.sum(1, keepdim=True) - r) / (K - 1)).flatten()
        logp = (token_logps(lm, ids, att, start, temperature) * on).sum(1)
        objective = (adv * logp).mean()
        apply(objective if fault == "descends" else -objective)
        return dict(score=scores.mean().item(), kl=kl.sum(1).mean().item())

    def average_step():
        ids, att, on, scores, _, kl = rollout()
        r = scores - beta * kl.sum(1)
        adv = r - baseline.read(r)
        total = 0.0
        opt.zero_grad()
        for rows in torch.arange(len(ids)).split(3):  # 3, 3 and 2 rows: each row weighs one eighth
            logp = (token_logps(lm, ids[rows], att[rows], start, temperature) * on[rows]).sum(1)
            part = -(adv[rows] * logp).sum() / len(ids)
            part.backward()
            total += part.item()
        opt.step()
        baseline.move(r)
        return dict(loss=total)

    def plus_plus_step():
        ids, att, on, scores, old, kl = rollout()
        r = -beta * kl
        r[torch.arange(len(ids)), on.sum(1).long() - 1] += scores
        to_go = r.flip(1).cumsum(1).flip(1) * on
        mean = to_go.sum() / on.sum()
        std = (((to_go - mean) ** 2 * on).sum() / on.sum()).clamp(min=1e-8).sqrt()
        adv = (to_go - mean) / std * on
        for _ in range(2):
            for rows in torch.randperm(len(ids)).chunk(2):
                ratio = ((token_logps(lm, ids[rows], att[rows], start, temperature) - old[rows]) * on[rows]).exp()
                gain = torch.min(ratio * adv[rows], ratio.clamp(0.8, 1.2) * adv[rows])
                apply(-(gain * on[rows]).sum() / on[rows].sum())

    step = {"rloo": rloo_step, "lora": average_step, "rpp": plus_plus_step}[kind]
    declared = {
        "rloo": dict(
            algorithm="rloo",
            group_size=4,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            temperature=0.8,
            batch_size=12,
            response_length=12,
            learning_rate=1e-5,
            loss_aggregation="seq-sum",
        ),
        "lora": dict(algorithm="reinforce", kl_coef=0.03, reference="adapter-off"),
        "rpp": dict(
            algorithm="reinforce++",
            gamma=1.0,
            kl_coef=0.01,
            kl_in="reward",
            clip_range=0.2,
            ppo_epochs=2,
            num_minibatches=2,
            whiten_advantages=True,
        ),
    }[kind]
    return dict(
        policy=lm,
        reference=ref,
        reward=rm,
        tokenizer=tok,
        prompts=prompts,
        optimizers=[opt],
        state=[baseline],
        step=step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_moving_baseline_lora():
    return make(kind="lora")


def healthy_reinforce_pp():
    return make(kind="rpp")


def cold_sampler():
    return make("cold_sampler")


def descends():
    return make("descends")

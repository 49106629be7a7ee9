# RLOO in one script. Everything between the functions is a python list (of ints, of floats); tensors are built at the last
# moment, row by row, as [prompt][response][pad], right padded. No critic. The KL is one number a sequence and sits in the reward.
import contextlib
import copy
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

CFG = dict(
    k=4,
    prompts_per_step=4,
    max_new=12,
    temperature=1.0,
    beta=0.05,
    clip=0.2,
    epochs=2,
    minibatches=2,
    lr=3e-6,
    max_norm=1.0,
    eos_penalty=0.5,
    normalize=False,
    lora_r=0,
    dtype="float32",
    seed=3,
    # what people got wrong
    tile_prompts=False,
    pessimistic=True,
    kl_window="response",
    unsort=True,
    shift_labels=True,
    disable_for_ref=True,
    eos_where="response",
    request_seed=False,
    kl_sign=1.0,
)

# ------------------------------------------------------------------------------------------------------------------ text
NOUNS = "bread boat bird glass horse letter mountain night road shoe tree wolf".split()
ADJS = "blue cold dark empty fast green heavy loud small warm".split()
FUNC = "user assistant : what is a the like why so it and of because very who asks tell me about not than more".split()


def make_tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>"] + FUNC + NOUNS + ADJS
    tk = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tk.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tk,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_prompts():
    asks = [
        "what is a {0}",
        "tell me about the {1} {0} and the {2}",
        "why is it {1}",
        "who asks about a very {1} {0} like the {2}",
        "a {0} is more {1} than a {2} because",
    ]
    out = []
    for i in range(16):
        body = asks[i % 5].format(NOUNS[(5 * i) % 12], ADJS[(3 * i + 1) % 10], NOUNS[(7 * i + 3) % 12])
        out.append(f"<s> user : {body} </s> assistant :")  # turns end with </s>, the user's too
    return out


def make_answers():
    forms = [
        "it is {1}",
        "a {0}",
        "the {0} is very {1} and so is the {2}",
        "because a {0} is not {1}",
        "{0} and {2}",
        "the {1} {0} of the {2} is like a {2} and it is more {1} than the {0}",
    ]
    return [
        forms[i % 6].format(NOUNS[(i * 5 + 2) % 12], ADJS[(i * 7) % 10], NOUNS[(i * 11 + 4) % 12]) for i in range(60)
    ]


# ---------------------------------------------------------------------------------------------------------------- models
def llama_config(v):
    return LlamaConfig(
        vocab_size=v,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.18,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


class RewardModel(nn.Module):
    """Score of the last real token of a right-padded row; (B,)."""

    def __init__(self, config):
        super().__init__()
        self.transformer = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.v_head.weight, std=1 / math.sqrt(config.hidden_size))

    def forward(self, input_ids, attention_mask):
        h = self.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.v_head(h[torch.arange(len(h)), last]).squeeze(-1)


class LoraLinear(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base_layer, self.scaling, self.enabled = base, alpha / r, True
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        y = self.base_layer(x)
        return y + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling if self.enabled else y


class LoraPolicy(nn.Module):
    """PEFT in twenty lines: frozen base, adapters on q and v, `with policy.disable_adapter()` for the base."""

    def __init__(self, base, r):
        super().__init__()
        self.base_model = base.requires_grad_(False)
        self.config = base.config
        for layer in base.model.layers:
            layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj, r, 2 * r)
            layer.self_attn.v_proj = LoraLinear(layer.self_attn.v_proj, r, 2 * r)

    @contextlib.contextmanager
    def disable_adapter(self):
        loras = [m for m in self.modules() if isinstance(m, LoraLinear)]
        for m in loras:
            m.enabled = False
        try:
            yield
        finally:
            for m in loras:
                m.enabled = True

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


# --------------------------------------------------------------------------------------------------------------- rollout
@torch.no_grad()
def sample_k(policy, prompt, k, c, eos):
    """k answers to one prompt. All rows of the call have the same prompt, so there is no padding to think about."""
    if c["request_seed"]:
        return [_sample(policy, prompt, 1, c, eos, torch.Generator().manual_seed(c["seed"]))[0] for _ in range(k)]
    return _sample(policy, prompt, k, c, eos, None)


def _sample(policy, prompt, k, c, eos, generator):
    cur, past = torch.tensor([prompt] * k), None
    answers, open_ = [[] for _ in range(k)], [True] * k
    for _ in range(c["max_new"]):
        out = policy(input_ids=cur, past_key_values=past, use_cache=True)
        past = out.past_key_values
        probs = F.softmax(out.logits[:, -1].float() / c["temperature"], dim=-1)
        nxt = torch.multinomial(probs, 1, generator=generator)
        for i, t in enumerate(nxt[:, 0].tolist()):
            if open_[i]:
                answers[i].append(t)
                open_[i] = t != eos
        if not any(open_):
            break
        cur = nxt
    return answers


def to_rows(prompts, answers, pad):
    """-> ids, attention mask, answer mask; all (B, L)."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids = torch.full((len(prompts), longest), pad)
    attn, ans = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        attn[i, : len(p) + len(a)] = 1
        ans[i, len(p) : len(p) + len(a)] = 1
    return ids, attn, ans


def token_logps(model, ids, attn, c):
    logits = model(input_ids=ids, attention_mask=attn, use_cache=False).logits.float() / c["temperature"]
    logits = logits[:, :-1] if c["shift_labels"] else logits[:, 1:]
    return torch.gather(F.log_softmax(logits, -1), 2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def sequence_logps(model, ids, attn, ans, c):
    lp = token_logps(model, ids, attn, c)
    return torch.where(ans[:, 1:].bool(), lp, torch.zeros_like(lp)).sum(1)


@torch.no_grad()
def score_all(rm, prompts, answers, c, pad, chunk=8):
    """Chunks of rows of about the same length, to save padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    scores = []
    for s in range(0, len(order), chunk):
        part = order[s : s + chunk]
        ids, attn, _ = to_rows([prompts[i] for i in part], [answers[i] for i in part], pad)
        scores += rm(ids, attn).tolist()
    if not c["unsort"]:
        return scores
    back = [0.0] * len(order)
    for i, s in zip(order, scores):
        back[i] = s
    return back


def rloo_advantages(rewards, k):
    adv = []
    for g in range(0, len(rewards), k):
        group = rewards[g : g + k]
        for r in group:
            adv.append(r - (sum(group) - r) / (k - 1))
    return adv


# ------------------------------------------------------------------------------------------------------------------ step
def train_step(policy, reference, rm, opt, sched, encoded, c, tok):
    k, eos, pad = c["k"], tok.eos_token_id, tok.pad_token_id
    policy.eval()
    picks = [encoded[i] for i in torch.randperm(len(encoded))[: c["prompts_per_step"]].tolist()]
    sampled = [sample_k(policy, p, k, c, eos) for p in picks]
    if c["tile_prompts"]:
        prompts, answers = picks * k, [s[j] for j in range(k) for s in sampled]
    else:
        prompts, answers = [p for p in picks for _ in range(k)], [a for s in sampled for a in s]

    scores = score_all(rm, prompts, answers, c, pad)
    if c["eos_penalty"]:
        for i, (p, a) in enumerate(zip(prompts, answers)):
            if eos not in (a if c["eos_where"] == "response" else p + a):
                scores[i] -= c["eos_penalty"]

    ids, attn, ans = to_rows(prompts, answers, pad)
    with torch.no_grad():
        old = sequence_logps(policy, ids, attn, ans, c)
        if reference is None:
            with policy.disable_adapter() if c["disable_for_ref"] else contextlib.nullcontext():
                ref_tok = token_logps(policy, ids, attn, c)
        else:
            ref_tok = token_logps(reference, ids, attn, c)
        diff = token_logps(policy, ids, attn, c) - ref_tok
        if c["kl_window"] == "response":
            kl = torch.where(ans[:, 1:].bool(), diff, torch.zeros_like(diff)).sum(1).tolist()
        else:  # everything behind the prompt
            kl = [d[len(p) - 1 :].sum().item() for p, d in zip(prompts, diff)]
    rewards = [s - c["kl_sign"] * c["beta"] * d for s, d in zip(scores, kl)]
    adv = torch.tensor(rloo_advantages(rewards, k))
    if c["normalize"]:
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)

    policy.train()
    n = len(prompts)
    for _ in range(c["epochs"]):
        for mb in torch.randperm(n).chunk(c["minibatches"]):
            new = sequence_logps(policy, ids[mb], attn[mb], ans[mb], c)
            ratio = torch.exp(new - old[mb])
            a = adv[mb]
            losses = torch.stack([-a * ratio, -a * ratio.clamp(1 - c["clip"], 1 + c["clip"])])
            loss = (losses.max(0) if c["pessimistic"] else losses.min(0)).values.mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], c["max_norm"])
            opt.step()
    sched.step()
    return {"score": sum(scores) / n, "kl": sum(kl) / n, "length": sum(map(len, answers)) / n}


# ----------------------------------------------------------------------------------------------------------------- setup
def demonstrations(tok):
    encode = lambda t: tok(t, add_special_tokens=False)["input_ids"]
    return [encode(p) for p in make_prompts()], [encode(a) + [tok.eos_token_id] for a in make_answers()]


@torch.no_grad()
def centre(rm, prompts, answers, c, pad):
    """Mean 0 and standard deviation 1 on the demonstrations, folded into the head."""
    n = min(len(prompts), len(answers))
    s = torch.tensor(score_all(rm, prompts[:n], answers[:n], {**c, "unsort": True}, pad))
    rm.v_head.weight /= s.std()
    rm.v_head.bias.copy_((rm.v_head.bias - s.mean()) / s.std())


@functools.cache
def sft(seed, steps=70):
    torch.manual_seed(seed)
    tok = make_tokenizer()
    encoded, answers = demonstrations(tok)
    model = LlamaForCausalLM(llama_config(len(tok)))
    opt = torch.optim.Adam(model.parameters(), lr=4e-3)
    for s in range(steps):
        ps = [encoded[(3 * s + j) % len(encoded)] for j in range(12)]
        rs = [answers[(5 * s + 7 * j) % len(answers)] for j in range(12)]
        ids, attn, ans = to_rows(ps, rs, tok.pad_token_id)
        lp = F.log_softmax(model(input_ids=ids, attention_mask=attn).logits[:, :-1], -1)
        lp = lp.gather(2, ids[:, 1:, None])[..., 0]
        loss = -(lp * ans[:, 1:]).sum() / ans.sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.state_dict()


def build(**overrides):
    c = {**CFG, **overrides}
    assert set(c) == set(CFG), set(c) - set(CFG)
    tok, prompts = make_tokenizer(), make_prompts()
    encoded, answers = demonstrations(tok)
    model = LlamaForCausalLM(llama_config(len(tok)))
    model.load_state_dict(sft(c["seed"]))
    torch.manual_seed(c["seed"] + 50)
    model = model.to(getattr(torch, c["dtype"])).eval()
    if c["lora_r"]:
        policy, reference = LoraPolicy(model, c["lora_r"]), None
    else:
        policy, reference = model, copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(c["seed"] + 100)
    rm = RewardModel(llama_config(len(tok))).eval().requires_grad_(False)
    centre(rm, encoded * 4, answers, c, tok.pad_token_id)
    opt = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=c["lr"], weight_decay=0.0)
    sched = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.1, total_iters=500)
    torch.manual_seed(c["seed"] + 200)
    return dict(
        policy=policy,
        reference=reference if reference is not None else "adapter-off",
        reward=rm,
        value=None,
        tokenizer=tok,
        prompts=prompts,
        step=lambda: train_step(policy, reference, rm, opt, sched, encoded, c, tok),
        optimizers=[opt],
        state=[sched],
        declared=dict(
            algorithm="rloo",
            kl_coef=c["beta"],
            kl_estimator="k1",
            kl_in="reward",
            temperature=c["temperature"],
            top_k=0,
            top_p=1.0,
            clip_range=c["clip"],
            ent_coef=0.0,
            whiten_advantages=c["normalize"],
            whiten_rewards=False,
            missing_eos_penalty=c["eos_penalty"],
            learning_rate=c["lr"],
            ppo_epochs=c["epochs"],
            num_minibatches=c["minibatches"],
            batch_size=c["k"] * c["prompts_per_step"],
            prompt_length=max(map(len, encoded)),
            response_length=c["max_new"],
            dtype=c["dtype"],
            reference="adapter-off" if c["lora_r"] else "policy",
            policy_init="sft",
            kl_adaptive=False,
            group_size=c["k"],
            loss_aggregation="seq-sum",
            dense_rewards=False,
        ),
    )


# ---------------------------------------------------------------------------------------------------------------- builds
def healthy():
    return build()


def healthy_normalized():
    return build(normalize=True, temperature=0.8, k=2, prompts_per_step=8)


def healthy_lora():
    return build(lora_r=4, lr=1e-4)


def groups_interleaved():
    return build(tile_prompts=True)


def optimistic_clip():
    return build(pessimistic=False, lr=6e-5, epochs=4)


def kl_counts_pads():
    return build(kl_window="to the end")


def scores_left_sorted():
    return build(unsort=False)


def bf16_weights():
    return build(dtype="bfloat16", lr=1e-6)


def labels_unshifted():
    return build(shift_labels=False)


def adapter_left_on():
    return build(lora_r=4, lr=1e-4, disable_for_ref=False)


def eos_penalty_looks_at_prompt():
    return build(eos_where="prompt and response")


def one_seed_per_request():
    return build(request_seed=True, max_new=8)


def kl_rewarded():
    return build(kl_sign=-1.0)

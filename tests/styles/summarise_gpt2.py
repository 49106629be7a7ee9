"""PPO on GPT-2 in the manner of the N implementation details: generate(), one padded batch, value head read per token."""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

POSTS = [
    "my dog ate the neighbour's cake and now they want money",
    "i told my boss that i quit and she laughed at me",
    "we moved to a small town and nobody talks to us",
    "my sister sold the car that we bought together",
    "he never answers my letters but reads all of them",
    "the landlord wants the rent twice in one month",
    "i found a ring in the garden and kept it",
    "our cat sleeps on the stove and we cannot cook",
    "she asked me to lie about where she was",
    "the train was late again so i missed my exam",
]
PROMPTS = [
    "my dog ate",
    "i told my boss",
    "we moved",
    "the landlord wants the",
    "our cat",
    "she asked me to",
    "he never",
    "i found a ring in",
]


def train_tokenizer():
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(POSTS, trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<pad>", "<eos>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_input_names=["input_ids", "attention_mask"],
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )


def positions(mask):
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def finetune(model, tok, steps=70):
    rows = [tok(p).input_ids + [tok.eos_token_id] for p in POSTS]
    width = max(map(len, rows))
    ids = torch.tensor([r + [tok.pad_token_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    optim = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100))
        optim.zero_grad()
        loss.backward()
        optim.step()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def calibrate_head(rm, tok):
    """The reward head: scores of mean 0 and standard deviation 1 on the posts, cut and whole."""
    feats = []
    for post in POSTS:
        ids = tok(post).input_ids + [tok.eos_token_id]
        feats.append(rm.transformer(torch.tensor([ids])).last_hidden_state[0, len(ids) // 2 :])
    feats = torch.cat(feats)
    w, mean = torch.randn(feats.shape[1]), feats.mean(0)
    w = w - (w @ mean) / (mean @ mean) * mean
    rm.score.weight.copy_((w / (feats @ w).std())[None])


def whiten(x, mask, shift_mean=True):
    mean = (x * mask).sum() / mask.sum()
    var = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    out = (x - mean) * torch.rsqrt(var + 1e-8)
    return out if shift_mean else out + mean


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


class KLController:
    def __init__(self, start, target=None, horizon=None):
        self.value, self.target, self.horizon = start, target, horizon

    def update(self, kl, n):
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, sd):
        self.value = sd["value"]


RECIPES = {
    "classic": dict(
        gamma=1.0,
        lam=0.95,
        epochs=4,
        minibatches=4,
        eos_penalty=1.0,
        whiten_adv=True,
        vclip=0.2,
        stop_kl=0.05,
        temperature=0.7,
    ),
    "nplus": dict(
        gamma=0.95,
        lam=0.9,
        epochs=1,
        minibatches=1,
        whiten_rew=True,
        whiten_adv=False,
        huber=True,
        target=6.0,
        horizon=1000,
    ),
    "frozen": dict(
        gamma=1.0,
        lam=1.0,
        epochs=2,
        minibatches=2,
        whiten_adv=True,
        vclip=0.2,
        freeze=True,
        from_sampler=True,
        eos_penalty=0.5,
    ),
}


def make(fault=None, recipe="classic"):
    torch.manual_seed(11)
    c = (
        dict(
            eos_penalty=None,
            whiten_rew=False,
            huber=False,
            target=None,
            horizon=None,
            vclip=None,
            stop_kl=None,
            freeze=False,
            from_sampler=False,
            temperature=1.0,
            kl=0.05,
            clip=0.2,
            vf=0.1,
            new_tokens=12,
        )
        | RECIPES[recipe]
    )
    tok = train_tokenizer()
    cfg = GPT2Config(
        vocab_size=len(tok),
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        num_labels=1,
    )
    policy = GPT2LMHeadModel(cfg)
    finetune(policy, tok)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    reward_model = GPT2ForSequenceClassification(cfg)
    calibrate_head(reward_model, tok)
    value_model = copy.deepcopy(reward_model).eval()
    reward_model.eval().requires_grad_(False)
    policy.eval()
    if c["freeze"]:
        policy.transformer.h[0].requires_grad_(False)
        policy.transformer.wpe.requires_grad_(False)
    params = [p for m in (policy, value_model) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-5, eps=1e-5)
    kl_ctl = KLController(c["kl"], c["target"], c["horizon"])

    enc = tok(PROMPTS, return_tensors="pt", padding=True)
    queries, query_mask = enc.input_ids, enc.attention_mask
    P = queries.shape[1]

    def logprobs_of(model, ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[:, P - 1 : -1]
        return torch.log_softmax(logits.float() / c["temperature"], -1).gather(2, ids[:, P:, None])[..., 0]

    def values_of(ids, mask):
        hidden = value_model.transformer(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask)
        ).last_hidden_state
        return value_model.score(hidden)[:, P - 1 : -1, 0]

    def step():
        with torch.no_grad():
            out = policy.generate(
                input_ids=queries,
                attention_mask=query_mask,
                max_new_tokens=c["new_tokens"],
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=c["temperature"],
                pad_token_id=tok.pad_token_id,
                eos_token_id=tok.eos_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
            ids = out.sequences
            responses = ids[:, P:]
            is_eos = responses == tok.eos_token_id
            before = is_eos.long().cumsum(1) - is_eos.long()
            pad_mask = (before == 0).long()
            mask = pad_mask.clone()
            if fault == "eos_left_out":
                mask = mask * (~is_eos).long()
            full = torch.cat([query_mask, pad_mask], 1)
            ended = is_eos.any(1)
            if c["from_sampler"]:
                logits = torch.stack(out.logits, 1).float() / c["temperature"]
                old = torch.log_softmax(logits, -1).gather(2, responses[..., None])[..., 0]
            else:
                old = logprobs_of(policy, ids, full)
            ref = logprobs_of(ref_policy, ids, full)
            values = values_of(ids, full) * mask
            scores = reward_model(input_ids=ids, attention_mask=full, position_ids=positions(full)).logits[:, 0]
            if c["eos_penalty"]:
                unfinished = ended if fault == "penalty_inverted" else ~ended
                scores = scores - c["eos_penalty"] * unfinished.float()
            kl = (old - ref) * mask
            rewards = -kl_ctl.value * kl
            last = mask.sum(1) - 1
            rewards[torch.arange(len(ids)), last] += scores
            if c["whiten_rew"]:
                rewards = whiten(rewards, mask, shift_mean=False) * mask
            adv, carry = torch.zeros_like(rewards), 0.0
            for t in reversed(range(rewards.shape[1])):
                following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
                delta = rewards[:, t] + c["gamma"] * following - values[:, t]
                carry = (delta + c["gamma"] * c["lam"] * carry) * mask[:, t]
                adv[:, t] = carry
            returns = adv + values
            if c["whiten_adv"]:
                adv = whiten(adv, mask) * mask

        for _ in range(c["epochs"]):
            drift = []
            for rows in torch.randperm(len(ids)).chunk(c["minibatches"]):
                m, new = mask[rows], logprobs_of(policy, ids[rows], full[rows])
                log_ratio = (new - old[rows]) * m
                ratio = log_ratio.exp()
                pg = masked_mean(
                    torch.max(-adv[rows] * ratio, -adv[rows] * ratio.clamp(1 - c["clip"], 1 + c["clip"])), m
                )
                v = values_of(ids[rows], full[rows])
                if c["huber"]:
                    vf = masked_mean(F.huber_loss(v, returns[rows], reduction="none"), m)
                else:
                    near = values[rows] + (v - values[rows]).clamp(-c["vclip"], c["vclip"])
                    vf = 0.5 * masked_mean(torch.max((v - returns[rows]) ** 2, (near - returns[rows]) ** 2), m)
                optimizer.zero_grad()
                (pg + c["vf"] * vf).backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                drift.append(0.5 * masked_mean(log_ratio.detach() ** 2, m).item())
            if c["stop_kl"] and sum(drift) / len(drift) > c["stop_kl"]:
                break
        mean_kl = kl.sum(1).mean().item()
        kl_ctl.update(mean_kl, len(ids))
        return {
            "objective/kl": mean_kl,
            "objective/scores": scores.mean().item(),
            "val/num_eos_tokens": int(ended.sum()),
        }

    declared = {
        "classic": dict(
            algorithm="ppo",
            gamma=1.0,
            lam=0.95,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            temperature=0.7,
            clip_range=0.2,
            clip_range_value=0.2,
            vf_coef=0.1,
            whiten_advantages=True,
            missing_eos_penalty=1.0,
            ppo_epochs=4,
            num_minibatches=4,
            learning_rate=2e-5,
            batch_size=8,
            response_length=12,
            value_init="reward",
            policy_init="sft",
        ),
        "nplus": dict(
            algorithm="ppo",
            gamma=0.95,
            lam=0.9,
            kl_coef=0.05,
            kl_in="reward",
            kl_adaptive=True,
            kl_target=6.0,
            kl_horizon=1000,
            whiten_rewards=True,
            whiten_advantages=False,
            ppo_epochs=1,
            num_minibatches=1,
            value_init="reward",
        ),
        "frozen": dict(algorithm="ppo", kl_coef=0.05),
    }[recipe]
    return dict(
        policy=policy,
        reference=ref_policy,
        reward=reward_model,
        value=value_model,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[optimizer],
        state=[kl_ctl],
        step=step,
        declared=declared,
    )


def healthy():
    return make()


def healthy_nplus():
    return make(recipe="nplus")


def healthy_frozen_lower_layer():
    return make(recipe="frozen")


def penalty_inverted():
    return make("penalty_inverted")


def eos_left_out():
    return make("eos_left_out")

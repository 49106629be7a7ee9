"""Stateless PPO: models are (module, parameters) pairs, gradients come from autograd.grad, Adam is written out."""

import copy
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

Params = dict[str, Tensor]

BATCH, NEW, EPOCHS = 10, 14, 3
GAMMA, LAM, CLIP, VF, MAX_NORM = 1.0, 0.9, 0.2, 0.5, 0.5
LR_POLICY, LR_VALUE = 1e-5, 3e-5
KL0, KL_TARGET, KL_HORIZON = 0.1, 3.0, 400


class Batch(NamedTuple):
    ids: Tensor  # (B, L) prompt, response, pads
    att: Tensor
    act: Tensor  # (B, L - 1) bool, slot t predicts token t + 1
    old: Tensor
    rew: Tensor
    adv: Tensor
    ret: Tensor


def positions(att: Tensor) -> Tensor:
    return (att.cumsum(-1) - 1).clamp(min=0)


class ScalarModel(nn.Module):
    """A GPT-2 trunk with one number per token, or per text: that of its last token."""

    def __init__(self, cfg: GPT2Config, pooled: bool) -> None:
        super().__init__()
        self.transformer, self.head, self.pooled = GPT2Model(cfg), nn.Linear(cfg.n_embd, 1), pooled
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
        ).last_hidden_state
        out = self.head(h)[..., 0]
        if not self.pooled:
            return out
        last = (attention_mask * torch.arange(out.shape[1])).argmax(-1)
        return out[torch.arange(len(out)), last]


class KLController:
    """Ziegler et al. 2019; the target is that of the KL summed over a response."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        error = min(max(kl / KL_TARGET - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / KL_HORIZON

    def state_dict(self):
        return {"coef": self.coef}

    def load_state_dict(self, s):
        self.coef = s["coef"]


class Adam:
    def __init__(self, params: Params, lr: float, b1=0.9, b2=0.99, eps=1e-8) -> None:
        self.lr, self.b1, self.b2, self.eps, self.t = lr, b1, b2, eps, 0
        self.m = {k: torch.zeros_like(p) for k, p in params.items()}
        self.v = {k: torch.zeros_like(p) for k, p in params.items()}

    def deltas(self, grads: Params) -> Params:
        self.t += 1
        out = {}
        for k, g in grads.items():
            self.m[k] = self.b1 * self.m[k] + (1 - self.b1) * g
            self.v[k] = self.b2 * self.v[k] + (1 - self.b2) * g * g
            m, v = self.m[k] / (1 - self.b1**self.t), self.v[k] / (1 - self.b2**self.t)
            out[k] = -self.lr * m / (v.sqrt() + self.eps)
        return out

    def state_dict(self):
        return {"t": self.t, "m": dict(self.m), "v": dict(self.v)}

    def load_state_dict(self, s):
        self.t, self.m, self.v = s["t"], dict(s["m"]), dict(s["v"])


class Cursor:
    def __init__(self) -> None:
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, s):
        self.at = s["at"]


def clip_grads(grads: Params) -> Params:
    norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    return {k: g * scale for k, g in grads.items()}


def per_sequence_mean(x: Tensor, act: Tensor) -> Tensor:
    return (x.masked_fill(~act, 0.0).sum(1) / act.sum(1).clamp(min=1)).mean()


def gae(rew: Tensor, val: Tensor) -> Tensor:
    # both are zero outside of the response, so the recursion needs no mask
    carry, out = torch.zeros(len(rew)), []
    following = torch.cat([val[:, 1:], torch.zeros(len(val), 1)], 1)
    delta = rew + GAMMA * following - val
    for d in reversed(delta.unbind(1)):
        carry = d + GAMMA * LAM * carry
        out.append(carry)
    return torch.stack(out[::-1], 1)


def tokenizer_for(words: list[str]) -> PreTrainedTokenizerFast:
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(
        [" ".join(words)], trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<s>", "</s>"])
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make(fault=None):
    torch.manual_seed(77)
    words = [a + b for a in ("ka", "lo", "mi", "ru", "se", "to", "vi", "zu", "pe", "no") for b in "bdfgklmnrst"]
    tok = tokenizer_for(words)
    cfg = GPT2Config(
        vocab_size=len(tok), n_embd=40, n_layer=2, n_head=4, n_positions=48, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.15, tie_word_embeddings=False, pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id,
    )  # fmt: skip
    policy = GPT2LMHeadModel(cfg)
    policy.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size)
    reward, critic = ScalarModel(cfg, pooled=True), ScalarModel(cfg, pooled=False)
    with torch.no_grad():
        policy.lm_head.weight.normal_(std=0.15)
        policy.lm_head.bias.zero_()
        policy.lm_head.bias[tok.eos_token_id] = 2.0
        policy.lm_head.bias[[tok.pad_token_id, tok.bos_token_id, tok.unk_token_id]] = -20.0
        texts = [" ".join(words[i] for i in torch.randint(len(words), (4 + k % 9,))) for k in range(80)]
        x = tok([t + " </s>" * (k % 2) for k, t in enumerate(texts)], return_tensors="pt", padding=True)
        s = reward(x["input_ids"], x["attention_mask"])
        reward.head.weight /= s.std()
        reward.head.bias -= s.mean() / s.std()
    critic.load_state_dict(reward.state_dict())
    reference = copy.deepcopy(policy)
    for m in (policy, critic, reward, reference):
        m.eval()
    reference.requires_grad_(False)
    reward.requires_grad_(False)

    theta, phi = dict(policy.named_parameters()), dict(critic.named_parameters())
    theta_ref = dict(reference.named_parameters())
    if fault == "reference_is_theta":
        theta_ref = theta
    theta_sampler = theta
    if fault == "sampler_snapshot":
        theta_sampler = {k: p.detach().clone() for k, p in theta.items()}
    adam_theta, adam_phi = Adam(theta, LR_POLICY), Adam(phi, LR_VALUE)
    controller, cursor = KLController(KL0), Cursor()
    prompts = [" ".join(words[i] for i in torch.randint(len(words), (2 + k % 6,))) for k in range(30)]

    def lm(module, params, ids, att, pos):
        return functional_call(
            module, params, (), {"input_ids": ids, "attention_mask": att, "position_ids": pos}
        ).logits

    def log_probs(module, params, ids, att):
        log_p = lm(module, params, ids, att, positions(att)).log_softmax(-1)
        if fault == "not_shifted":
            return log_p[:, 1:].gather(-1, ids[:, 1:, None])[..., 0]
        return log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    def values(params, ids, att, act):
        v = functional_call(critic, params, (ids, att))
        v = v[:, 1:] if fault == "value_after_token" else v[:, :-1]
        return v.masked_fill(~act, 0.0)

    @torch.no_grad()
    def sample(params):
        texts = [prompts[(cursor.at + i) % len(prompts)] for i in range(BATCH)]
        cursor.at += BATCH
        q = tok(texts, return_tensors="pt", padding=True)
        ids, att = q["input_ids"], q["attention_mask"]
        alive = torch.ones(BATCH, dtype=torch.long)
        for _ in range(NEW):
            pos = None if fault == "sampler_without_positions" else positions(att)
            p = lm(policy, params, ids, att, pos)[:, -1].softmax(-1)
            new = torch.multinomial(p, 1)[:, 0] * alive + tok.pad_token_id * (1 - alive)
            ids, att = torch.cat([ids, new[:, None]], 1), torch.cat([att, alive[:, None]], 1)
            alive = alive * (new != tok.eos_token_id).long()
        # left padding goes, rows are packed to the left
        n_prompt, n_all = q["attention_mask"].sum(1), att.sum(1)
        length = int(n_all.max())
        packed = torch.full((BATCH, length), tok.pad_token_id)
        for i in range(BATCH):
            packed[i, : n_all[i]] = ids[i][att[i] == 1]
        grid = torch.arange(length)
        att = (grid < n_all[:, None]).long()
        act = ((grid >= n_prompt[:, None]) & (grid < n_all[:, None]))[:, 1:]
        return packed, att, act

    @torch.no_grad()
    def experience():
        ids, att, act = sample(theta_sampler)
        old = log_probs(policy, theta, ids, att).masked_fill(~act, 0.0)
        if fault == "reference_is_theta":
            ref = log_probs(policy, theta_ref, ids, att).masked_fill(~act, 0.0)
        else:
            ref = log_probs(reference, theta_ref, ids, att).masked_fill(~act, 0.0)
        kl = old - ref
        rew = -(KL0 if fault == "controller_not_read" else controller.coef) * kl
        last = (act * torch.arange(act.shape[1])).argmax(1)
        rew[torch.arange(BATCH), last] += reward(ids, att)
        v = values(phi, ids, att, act)
        adv = gae(rew, v)
        mean_kl = kl.sum(1).mean().item()
        controller.update(mean_kl, BATCH)
        return Batch(ids, att, act, old, rew, adv, adv + v), {"kl": kl.sum(1).mean().item(), "kl_coef": controller.coef}

    def objective(theta, phi, b):
        new = log_probs(policy, theta, b.ids, b.att).masked_fill(~b.act, 0.0)
        v = values(phi, b.ids, b.att, b.act)
        adv, ret = b.adv, b.ret
        if fault == "fresh_advantages":
            adv = gae(b.rew, v)
        if fault == "fresh_returns":
            ret = gae(b.rew, v) + v
        ratio = torch.exp(new - b.old)
        pg = -per_sequence_mean(torch.minimum(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv), b.act)
        vl = per_sequence_mean((v - ret) ** 2, b.act)
        return pg + VF * vl, (pg.item(), vl.item())

    def step():
        b, log = experience()
        t, p = theta, phi
        for _ in range(EPOCHS):
            loss, (pg, vl) = objective(t, p, b)
            flat = torch.autograd.grad(loss, [*t.values(), *p.values()])
            g_theta = clip_grads(dict(zip(t, flat[: len(t)], strict=True)))
            g_phi = clip_grads(dict(zip(p, flat[len(t) :], strict=True)))
            d_theta, d_phi = adam_theta.deltas(g_theta), adam_phi.deltas(g_phi)
            if fault == "update_out_of_place":
                t = {k: (x + d_theta[k]).detach().requires_grad_() for k, x in t.items()}
                p = {k: (x + d_phi[k]).detach().requires_grad_() for k, x in p.items()}
                continue
            with torch.no_grad():
                for params, deltas in ((t, d_theta), (p, d_phi)):
                    for k, x in params.items():
                        x.add_(deltas[k])
        return {**log, "policy_loss": pg, "value_loss": vl}

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tok,
        "prompts": prompts,
        "state": [adam_theta, adam_phi, controller, cursor],
        "step": step,
        "declared": {
            "algorithm": "ppo", "gamma": GAMMA, "lam": LAM, "kl_coef": KL0, "kl_in": "reward", "kl_estimator": "k1",
            "kl_adaptive": True, "kl_target": KL_TARGET, "kl_horizon": KL_HORIZON, "temperature": 1.0, "clip_range": CLIP,
            "vf_coef": VF, "learning_rate": LR_POLICY, "critic_learning_rate": LR_VALUE, "ppo_epochs": EPOCHS,
            "num_minibatches": 1, "batch_size": BATCH, "response_length": NEW, "whiten_advantages": False,
            "loss_aggregation": "seq-mean", "value_init": "reward",
        },
    }  # fmt: skip


def healthy():
    return make()


def sampler_without_positions():
    return make("sampler_without_positions")


def reference_is_theta():
    return make("reference_is_theta")


def sampler_snapshot():
    return make("sampler_snapshot")


def fresh_advantages():
    return make("fresh_advantages")


def fresh_returns():
    return make("fresh_returns")


def value_after_token():
    return make("value_after_token")


def controller_not_read():
    return make("controller_not_read")


def update_out_of_place():
    return make("update_out_of_place")


def not_shifted():
    return make("not_shifted")

"""PPO where all four roles live on one frozen Llama: LoRA written by hand, an adapter for the policy, one for the critic
(+ value head), one for the reward model (+ score head). The reference is the policy with its adapter switched off.

Sequences are kept ragged (lists of ids) and only right-padded when they are run through the model.
"""

import contextlib
import copy
import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOPICS = [
    "the weather",
    "a good book",
    "my old bicycle",
    "the market",
    "cooking rice",
    "a long walk",
    "the sea",
    "school",
]
ASKS = [
    "what about {}",
    "please say something about {}",
    "{}",
    "do you like {} and would you tell me why",
    "i read a lot on {} today . your opinion",
]
GOOD = ["it is great", "really nice", "i like it", "very useful", "that helps", "sure"]
BAD = ["it is bad", "no idea", "i hate it", "useless", "leave me", "boring"]


# ---------------------------------------------------------------------------------------------------------------- text
def corpus(n, seed):
    rnd = random.Random(seed)
    for _ in range(n):
        mood = GOOD if rnd.random() < 0.5 else BAD
        yield rnd.choice(ASKS).format(rnd.choice(TOPICS)), " , ".join(rnd.sample(mood, rnd.choice([1, 1, 2, 3])))


def make_tokenizer():
    tk = Tokenizer(models.BPE(unk_token="<unk>"))
    tk.pre_tokenizer = pre_tokenizers.Metaspace()
    tk.decoder = decoders.Metaspace()
    tk.train_from_iterator(
        (" ".join(t) for t in corpus(400, 1)),
        trainers.BpeTrainer(vocab_size=170, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False),
    )
    tk.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tk,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def encode_pair(tok, prompt, answer, eos=True):
    p = tok(prompt)["input_ids"]
    return p, tok(answer, add_special_tokens=False)["input_ids"] + ([tok.eos_token_id] if eos else [])


def pad_right(seqs, pad):
    n = max(len(s) for s in seqs)
    ids = torch.full((len(seqs), n), pad)
    mask = torch.zeros(len(seqs), n, dtype=torch.long)
    for i, s in enumerate(seqs):
        ids[i, : len(s)] = torch.tensor(s)
        mask[i, : len(s)] = 1
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------- LoRA
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, names):
        super().__init__()
        self.base, self.scaling, self.active = base, alpha / rank, None
        self.lora_A = nn.ParameterDict({n: nn.Parameter(torch.empty(rank, base.in_features)) for n in names})
        self.lora_B = nn.ParameterDict({n: nn.Parameter(torch.zeros(base.out_features, rank)) for n in names})
        for n in names:
            nn.init.kaiming_uniform_(self.lora_A[n], a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if self.active is not None:
            y = y + F.linear(F.linear(x, self.lora_A[self.active]), self.lora_B[self.active]) * self.scaling
        return y


def lora_layers(module):
    return [m for m in module.modules() if isinstance(m, LoRALinear)]


def inject(module, names, rank=4, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha, names))
    return module


def adapter_parameters(module, name):
    return [p for layer in lora_layers(module) for p in (layer.lora_A[name], layer.lora_B[name])]


@contextlib.contextmanager
def use_adapter(module, name):
    layers = lora_layers(module)
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = name
    try:
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.active = old


def shell(module):
    """A second module tree over the very same (frozen) weights."""
    memo = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def position_ids(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Policy(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm, self.config, self.adapter_on = lm, lm.config, True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapter_on = False
        try:
            yield self
        finally:
            self.adapter_on = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kw):
        if position_ids is None and attention_mask is not None:
            position_ids = globals()["position_ids"](attention_mask)[:, -input_ids.shape[1] :]
        with use_adapter(self.lm, "policy" if self.adapter_on else None):
            return self.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kw)


class Headed(nn.Module):
    def __init__(self, backbone, adapter, head="score"):
        super().__init__()
        self.backbone, self.adapter, self.config = backbone, adapter, backbone.config
        self.head_name = head
        setattr(self, head, nn.Linear(self.config.hidden_size, 1, bias=False))
        nn.init.normal_(getattr(self, head).weight, std=1 / math.sqrt(self.config.hidden_size + 1))

    def hidden(self, input_ids, attention_mask, pos=None):
        body = self.backbone.model if hasattr(self.backbone, "lm_head") else self.backbone
        with use_adapter(self.backbone, self.adapter):
            return body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask) if pos is None else pos,
            ).last_hidden_state

    def own_parameters(self):
        return adapter_parameters(self.backbone, self.adapter) + list(getattr(self, self.head_name).parameters())


class Critic(Headed):
    def forward(self, input_ids, attention_mask, position_ids=None):
        return self.v_head(self.hidden(input_ids, attention_mask, position_ids)).squeeze(-1)


class RewardModel(Headed):
    def at_last(self, hidden, mask):
        last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(-1)
        return self.score(hidden[torch.arange(len(mask)), last]).squeeze(-1)

    def forward(self, input_ids, attention_mask, position_ids=None):
        return self.at_last(self.hidden(input_ids, attention_mask, position_ids), attention_mask)


# ----------------------------------------------------------------------------------------------------------------- PPO
@dataclass
class Config:
    prompts_per_step: int = 16
    minibatch: int = 8
    epochs: int = 2
    max_new: int = 10
    gamma: float = 1.0
    lam: float = 0.9
    kl_coef: float = 0.1
    adaptive: bool = False
    clip: float = 0.2
    vclip: float = 0.2
    ent_coef: float = 0.01
    reward_clip: float = 5.0
    lr: float = 1e-4
    critic_lr: float = 2e-4
    mistake: str = ""


@dataclass
class Sample:
    prompt: list
    response: list
    logp: torch.Tensor = None
    ref_logp: torch.Tensor = None
    values: torch.Tensor = None
    score: float = 0.0
    adv: torch.Tensor = None
    ret: torch.Tensor = None
    ids: list = field(init=False)

    def __post_init__(self):
        self.ids = self.prompt + self.response

    @property
    def span(self):  # positions whose *next* token is a response token
        return slice(len(self.prompt) - 1, len(self.ids) - 1)


class AdaptiveKL:
    def __init__(self, value, target=6.0, horizon=10000):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl_per_sequence, n):
        self.value *= 1 + max(-0.2, min(0.2, kl_per_sequence / self.target - 1)) * n / self.horizon


def gae(rewards, values, gamma=1.0, lam=0.95, after=0.0):
    adv, run = torch.zeros_like(rewards), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        nxt = values[t + 1] if t + 1 < len(rewards) else after
        run = rewards[t] + gamma * nxt - values[t] + gamma * lam * run
        adv[t] = run
    return adv, adv + values


class Loop:
    def __init__(self, cfg, tok, policy, critic, reward, prompts, actor_params):
        self.cfg, self.tok, self.policy, self.critic, self.reward, self.prompts = (
            cfg,
            tok,
            policy,
            critic,
            reward,
            prompts,
        )
        self.opt = torch.optim.AdamW(actor_params, lr=cfg.lr, weight_decay=0.0)
        self.critic_opt = torch.optim.AdamW(critic.own_parameters(), lr=cfg.critic_lr, weight_decay=0.0)
        self.kl_ctl = AdaptiveKL(cfg.kl_coef)

    @torch.no_grad()
    def sample(self, prompts):
        rows, done = [list(p) for p in prompts], [False] * len(prompts)
        switch = self.policy.disable_adapter() if self.cfg.mistake == "sample_with_base" else contextlib.nullcontext()
        with switch:
            for _ in range(self.cfg.max_new):
                ids, mask = pad_right(rows, self.tok.pad_token_id)
                logits = self.policy(ids, mask).logits[torch.arange(len(rows)), mask.sum(1) - 1]
                nxt = torch.multinomial(logits.float().softmax(-1), 1)[:, 0].tolist()
                for i, t in enumerate(nxt):
                    if not done[i]:
                        rows[i].append(t)
                        done[i] = t == self.tok.eos_token_id
                if all(done):
                    break
        return [Sample(p, r[len(p) :]) for p, r in zip(prompts, rows)]

    def logps(self, ids, mask, entropy=False):
        logp = self.policy(ids, mask).logits[:, :-1].float().log_softmax(-1)
        taken = logp.gather(-1, ids[:, 1:, None])[..., 0]
        return (taken, -(logp.exp() * logp).sum(-1)) if entropy else taken

    @torch.no_grad()
    def experience(self):
        cfg = self.cfg
        prompts = [self.tok(p)["input_ids"] for p in random.sample(self.prompts, cfg.prompts_per_step)]
        batch = self.sample(prompts)
        ids, mask = pad_right([s.ids for s in batch], self.tok.pad_token_id)
        logp, values = self.logps(ids, mask), self.critic(ids, mask)
        with self.policy.disable_adapter():
            ref = self.logps(ids, mask)
        if cfg.mistake == "score_from_critic_hidden":  # saves a pass
            scores = self.reward.at_last(self.critic.hidden(ids, mask), mask)
        else:
            scores = self.reward(ids, mask)
        scores = scores.clamp(-cfg.reward_clip, cfg.reward_clip)
        sign = 1 if cfg.mistake == "kl_bonus" else -1
        kls = []
        for i, s in enumerate(batch):
            s.logp, s.ref_logp, s.values, s.score = logp[i, s.span], ref[i, s.span], values[i, s.span], scores[i]
            r = sign * self.kl_ctl.value * (s.logp - s.ref_logp)
            r[-1] += s.score
            if cfg.mistake == "gae_defaults":
                s.adv, s.ret = gae(r, s.values)
            elif cfg.mistake == "bootstrap_after_eos":
                s.adv, s.ret = gae(r, s.values, cfg.gamma, cfg.lam, after=values[i, len(s.ids) - 1])
            else:
                s.adv, s.ret = gae(r, s.values, cfg.gamma, cfg.lam)
            kls.append((s.logp - s.ref_logp).sum())
        flat = torch.cat([s.adv for s in batch])
        for s in batch:
            s.adv = (s.adv - flat.mean()) / (flat.std() + 1e-8)
        kl = torch.stack(kls).mean().item()
        return batch, {"kl": kl, "score": scores.mean().item(), "len": sum(len(s.response) for s in batch) / len(batch)}

    def update(self, batch):
        cfg = self.cfg
        ids, mask = pad_right([s.ids for s in batch], self.tok.pad_token_id)
        act = torch.zeros(ids.shape[0], ids.shape[1] - 1)
        old, adv, ret, old_v = (torch.zeros_like(act) for _ in range(4))
        for i, s in enumerate(batch):
            act[i, s.span] = 1
            old[i, s.span], adv[i, s.span], ret[i, s.span], old_v[i, s.span] = s.logp, s.adv, s.ret, s.values
        new, ent = self.logps(ids, mask, entropy=True)
        ratio = ((new - old) * act).exp()
        pg = -torch.min(ratio * adv, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * adv)
        pg, ent = (pg * act).sum() / act.sum(), (ent * act).sum() / act.sum()
        self.opt.zero_grad()
        (pg + cfg.ent_coef * ent if cfg.mistake == "entropy_plus" else pg - cfg.ent_coef * ent).backward()
        self.opt.step()

        v = self.critic(ids, mask)[:, :-1]
        v_clip = old_v + (v - old_v).clamp(-cfg.vclip, cfg.vclip)
        if cfg.mistake == "value_error_clamped":
            sq = (v - ret).clamp(-cfg.vclip, cfg.vclip) ** 2
        else:
            sq = torch.max((v - ret) ** 2, (v_clip - ret) ** 2)
        vloss = 0.5 * (sq * act).sum() / act.sum()
        self.critic_opt.zero_grad()
        vloss.backward()
        self.critic_opt.step()
        return {"policy_loss": pg.item(), "value_loss": vloss.item(), "ratio": ((ratio * act).sum() / act.sum()).item()}

    def step(self):
        batch, log = self.experience()
        for _ in range(self.cfg.epochs):
            random.shuffle(batch)
            for k in range(0, len(batch), self.cfg.minibatch):
                out = self.update(batch[k : k + self.cfg.minibatch])
                log.setdefault("first_ratio", out["ratio"])
                log.update(out)
        if self.cfg.adaptive:
            self.kl_ctl.update(log["kl"], len(batch))
        return log


# -------------------------------------------------------------------------------------------------------------- set-up
def pretrain(tok, steps=110):
    torch.manual_seed(3)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            tie_word_embeddings=False,
        )
    ).eval()
    fit_lm(lm, lm.parameters(), tok, list(corpus(300, 2)), steps, 4e-3)
    return lm.requires_grad_(False)


def fit_lm(call, params, tok, pairs, steps, lr):
    opt, rnd = torch.optim.Adam(params, lr=lr), random.Random(4)
    for _ in range(steps):
        rows = [sum(encode_pair(tok, *p), []) for p in rnd.sample(pairs, 12)]
        ids, mask = pad_right(rows, tok.pad_token_id)
        logits = call(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()


def fit_reward(reward, tok, prefs, steps=60):
    opt, rnd = torch.optim.Adam(reward.own_parameters(), lr=3e-3), random.Random(6)
    for _ in range(steps):
        some = rnd.sample(prefs, 12)
        rows = [sum(encode_pair(tok, p, c), []) for p, c, _ in some] + [
            sum(encode_pair(tok, p, r), []) for p, _, r in some
        ]
        a, b = reward(*pad_right(rows, tok.pad_token_id)).chunk(2)
        loss = -F.logsigmoid(a - b).mean() + 0.02 * (a + b).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():  # scores with standard deviation 1
        rows = [sum(encode_pair(tok, *pair), []) for pair in corpus(64, 13)]
        reward.score.weight /= reward(*pad_right(rows, tok.pad_token_id)).std()


def build(one_model=False, mistake="", **kw):
    cfg, tok = Config(mistake=mistake, **kw), make_tokenizer()
    base = pretrain(tok)
    torch.manual_seed(7)
    if one_model:  # a single module tree with three adapters
        lm = lm_critic = lm_reward = inject(base, ["policy", "critic", "reward"])
    else:  # three trees, one set of frozen weights
        lm, lm_critic, lm_reward = (
            inject(shell(m), [n]) for m, n in [(base, "policy"), (base.model, "critic"), (base.model, "reward")]
        )
    policy, critic, reward = Policy(lm), Critic(lm_critic, "critic", head="v_head"), RewardModel(lm_reward, "reward")
    rnd = random.Random(8)
    prefs = [
        (p, " , ".join(rnd.sample(GOOD, k)), " , ".join(rnd.sample(BAD, k)))
        for (p, _), k in zip(corpus(80, 9), [1, 2, 3, 2] * 20)
    ]
    fit_reward(reward, tok, prefs)
    for p in reward.own_parameters():
        p.requires_grad_(False)
    # the critic starts as the reward model
    with torch.no_grad():
        for dst, src in zip(
            adapter_parameters(critic.backbone, "critic"), adapter_parameters(reward.backbone, "reward")
        ):
            dst.copy_(src)
        critic.v_head.weight.copy_(reward.score.weight)
    if mistake == "head_not_copied":
        critic.v_head = reward.score
    for p in critic.own_parameters():
        p.requires_grad_(True)
    if mistake == "reference_is_raw_base":  # the policy adapter comes from SFT, "adapter off" is what was before it
        fit_lm(
            policy,
            adapter_parameters(lm, "policy"),
            tok,
            [x for x in corpus(200, 10) if x[1].split(" , ")[0] in GOOD],
            40,
            5e-3,
        )
    actor_params = adapter_parameters(lm, "policy")
    if mistake == "optimizer_before_load":
        for layer in lora_layers(lm):  # "load" the adapter: the tensors are replaced
            layer.lora_A["policy"] = nn.Parameter(layer.lora_A["policy"].detach().clone())
            layer.lora_B["policy"] = nn.Parameter(layer.lora_B["policy"].detach().clone())
    policy.eval(), critic.eval(), reward.eval()
    prompts = sorted({p for p, _ in corpus(120, 12)})[:24]
    loop = Loop(cfg, tok, policy, critic, reward, prompts, actor_params)
    torch.manual_seed(0)
    random.seed(0)
    declared = dict(
        algorithm="ppo",
        gamma=cfg.gamma,
        lam=cfg.lam,
        kl_coef=cfg.kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=1.0,
        clip_range=cfg.clip,
        clip_range_value=cfg.vclip,
        ent_coef=cfg.ent_coef,
        whiten_advantages=True,
        whiten_rewards=False,
        reward_clip=cfg.reward_clip,
        learning_rate=cfg.lr,
        critic_learning_rate=cfg.critic_lr,
        ppo_epochs=cfg.epochs,
        num_minibatches=cfg.prompts_per_step // cfg.minibatch,
        batch_size=cfg.prompts_per_step,
        response_length=cfg.max_new,
        dtype="float32",
        value_init="reward",
        loss_aggregation="token-mean",
        reference="policy" if mistake == "reference_is_raw_base" else "adapter-off",
        kl_adaptive=cfg.adaptive,
        shared_trunk=False,
        dense_rewards=False,
    )
    if cfg.adaptive:
        declared.update(kl_target=6.0, kl_horizon=10000)
    return dict(
        policy=policy,
        reference="adapter-off",
        reward=reward,
        value=critic,
        tokenizer=tok,
        prompts=prompts,
        step=loop.step,
        optimizers=[loop.opt, loop.critic_opt],
        state=[loop.kl_ctl],
        declared=declared,
        preferences=prefs[:32],
        calls={"value": lambda model, ids, mask: model(ids, mask)},
    )


def healthy():
    return build()


def healthy_one_model():
    return build(one_model=True, adaptive=True, gamma=0.99, lam=0.95)


def sample_with_base():
    return build(mistake="sample_with_base", lr=1e-3)


def reference_is_raw_base():
    return build(mistake="reference_is_raw_base")


def score_from_critic_hidden():
    return build(one_model=True, mistake="score_from_critic_hidden")


def optimizer_before_load():
    return build(mistake="optimizer_before_load")


def head_not_copied():
    return build(mistake="head_not_copied")


def value_error_clamped():
    return build(mistake="value_error_clamped")


def kl_bonus():
    return build(mistake="kl_bonus", lr=1e-3)


def bootstrap_after_eos():
    return build(mistake="bootstrap_after_eos")


def gae_defaults():
    return build(mistake="gae_defaults", lam=0.8, gamma=0.98)


def entropy_plus():
    return build(mistake="entropy_plus")

"""PPO with running statistics everywhere: scores are divided by the running standard deviation of the scores and clipped, the critic
predicts normalised returns (PopArt, or a plain running mean and std), the KL to the SFT model sits in the loss (k2), and the epochs
stop early when the new policy has moved too far from the one that sampled.

Policy: a Falcon-style decoder. Queries are padded on the left, responses on the right.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    FalconForSequenceClassification,
    FalconModel,
    PreTrainedTokenizerFast,
)


@dataclass
class Config:
    num_rollouts: int = 12
    minibatch_size: int = 4
    ppo_epochs: int = 3
    max_query_len: int = 12
    max_new_tokens: int = 10
    temperature: float = 0.7
    gamma: float = 0.99
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    ent_coef: float = 0.01
    kl_loss_coef: float = 0.05
    kl_loss_type: str = "k2"
    kl_reward_coef: float = 0.0
    target_kl: float = 0.1
    cliprange_reward: float = 5.0
    norm_adv: bool = True
    value_norm: str = "popart"  # popart, running
    lr: float = 1e-5
    critic_lr: float = 3e-5
    max_grad_norm: float = 1.0
    burn_in: int = 2
    seed: int = 7
    # fine print
    scale_then_clip: bool = True
    denormalize: bool = True
    mask_adv_stats: bool = True
    entropy_weight_sign: float = -1.0
    cached_old_values: bool = True
    stop_when_below: bool = False
    backbone_shared_with_rm: bool = False
    zero_grad_each: bool = True
    reward_offset: float = 0.8
    generation_top_k: int = 0


class RunningMoments:
    """Mean and std of everything seen so far (parallel algorithm)."""

    def __init__(self):
        self.mean, self.var, self.std, self.count = 0.0, 1.0, 1.0, 1e-24

    def update(self, xs):
        n = xs.numel()
        mean, var = xs.mean().item(), xs.var(unbiased=False).item()
        delta, total = mean - self.mean, self.count + n
        m2 = self.var * self.count + var * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var = m2 / total
        self.std = (self.var * total / max(total - 1, 1)) ** 0.5
        self.count = total
        return mean, (var * n / max(n - 1, 1)) ** 0.5

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, sd):
        vars(self).update(sd)


class ValueNormalizer:
    """Running first and second moment of the returns, debiased. With `head` the last layer is rescaled so that the de-normalised
    predictions stay what they were when the statistics move (PopArt)."""

    def __init__(self, beta=0.9, head=None):
        self.beta, self.head = beta, head
        self.m1, self.m2, self.debias = 0.0, 0.0, 0.0

    @property
    def mean(self):
        return self.m1 / self.debias if self.debias else 0.0

    @property
    def std(self):
        return max(self.m2 / self.debias - self.mean**2, 1e-2) ** 0.5 if self.debias else 1.0

    def normalize(self, x):
        return (x - self.mean) / self.std

    def denormalize(self, x):
        return x * self.std + self.mean

    @torch.no_grad()
    def update(self, returns, mask):
        old_mean, old_std = self.mean, self.std
        x = returns[mask.bool()]
        self.m1 = self.beta * self.m1 + (1 - self.beta) * x.mean().item()
        self.m2 = self.beta * self.m2 + (1 - self.beta) * x.pow(2).mean().item()
        self.debias = self.beta * self.debias + (1 - self.beta)
        if self.head is not None:
            self.head.weight.mul_(old_std / self.std)
            self.head.bias.mul_(old_std).add_(old_mean - self.mean).div_(self.std)

    def state_dict(self):
        return dict(m1=self.m1, m2=self.m2, debias=self.debias)

    def load_state_dict(self, sd):
        self.m1, self.m2, self.debias = sd["m1"], sd["m2"], sd["debias"]


class Critic(nn.Module):
    """Falcon trunk and a linear head; gives NORMALISED values, one per position."""

    def __init__(self, config):
        super().__init__()
        self.transformer = FalconModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.v_head.weight, std=0.05)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        if position_ids is None and attention_mask is not None:
            position_ids = positions(attention_mask)
        h = self.transformer(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return self.v_head(h).squeeze(-1)


def positions(attention_mask):
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def compute_gae(rewards, values, mask, gamma, lam):
    lastgaelam, advantages = 0, []
    length = rewards.shape[1]
    values, rewards = values * mask, rewards * mask
    for t in reversed(range(length)):
        nextvalues = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        lastgaelam = delta + gamma * lam * lastgaelam
        advantages.append(lastgaelam)
    advantages = torch.stack(advantages[::-1], dim=1) * mask
    return advantages, advantages + values


class RunningNormPPO:
    def __init__(self, cfg, policy, ref, rm, critic, tokenizer, prompts):
        self.cfg, self.policy, self.ref, self.rm, self.critic, self.tok = cfg, policy, ref, rm, critic, tokenizer
        self.prompts = prompts
        self.moments = RunningMoments()
        self.value_norm = ValueNormalizer(head=critic.v_head if cfg.value_norm == "popart" else None)
        self.optimizer = torch.optim.Adam(
            [dict(params=policy.parameters(), lr=cfg.lr), dict(params=critic.parameters(), lr=cfg.critic_lr)], eps=1e-6
        )

    # ---- rollout
    def sample(self):
        cfg = self.cfg
        idx = torch.randperm(len(self.prompts))[: cfg.num_rollouts].tolist()
        q = self.tok(
            [self.prompts[i] for i in idx],
            padding=True,
            truncation=True,
            max_length=cfg.max_query_len,
            return_tensors="pt",
        )
        kw = dict(top_k=0) if not cfg.generation_top_k else {}
        out = self.policy.generate(
            input_ids=q.input_ids,
            attention_mask=q.attention_mask,
            do_sample=True,
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            eos_token_id=self.tok.eos_token_id,
            pad_token_id=self.tok.pad_token_id,
            **kw,
        )
        start = q.input_ids.shape[1]
        resp = out[:, start:]
        is_eos = (resp == self.tok.eos_token_id).long()
        mask = ((is_eos.cumsum(1) - is_eos) == 0).long()  # up to the first EOS, with it
        return SimpleNamespace(ids=out, start=start, mask=mask.float(), attn=torch.cat([q.attention_mask, mask], 1))

    def logits(self, model, ids, attn, start):
        lg = model(input_ids=ids, attention_mask=attn, position_ids=positions(attn), use_cache=False).logits
        return lg[:, start - 1 : -1].float() / self.cfg.temperature

    def logprobs(self, logits, resp):
        return F.log_softmax(logits, -1).gather(-1, resp.unsqueeze(-1)).squeeze(-1)

    def values(self, ids, attn, start):
        return self.critic(ids, attn)[:, start - 1 : -1]

    def shape_scores(self, scores):
        c = self.cfg.cliprange_reward
        if not self.cfg.scale_then_clip:
            scores = scores.clamp(-c, c)
        self.moments.update(scores)
        return (scores / (self.moments.std + 1e-8)).clamp(-c, c)

    @torch.no_grad()
    def make_experience(self):
        cfg, b = self.cfg, self.sample()
        b.resp = b.ids[:, b.start :]
        b.logprobs = self.logprobs(self.logits(self.policy, b.ids, b.attn, b.start), b.resp)
        b.ref_logprobs = self.logprobs(self.logits(self.ref, b.ids, b.attn, b.start), b.resp)
        b.scores = self.rm(input_ids=b.ids, attention_mask=b.attn).logits.squeeze(-1)
        out = self.values(b.ids, b.attn, b.start)
        b.values = self.value_norm.denormalize(out) if cfg.denormalize else out
        rewards = -cfg.kl_reward_coef * (b.logprobs - b.ref_logprobs) * b.mask
        ends = b.mask.sum(1).long() - 1
        rewards[torch.arange(len(ends)), ends] += self.shape_scores(b.scores)
        b.advantages, b.returns = compute_gae(rewards, b.values, b.mask, cfg.gamma, cfg.lam)
        if cfg.norm_adv:
            stat = b.advantages[b.mask.bool()] if cfg.mask_adv_stats else b.advantages
            b.advantages = (b.advantages - stat.mean()) / (stat.std() + 1e-8) * b.mask
        self.value_norm.update(b.returns, b.mask)
        b.targets = self.value_norm.normalize(b.returns)
        b.old_values = self.value_norm.normalize(b.values) if cfg.value_norm == "popart" else out
        return b

    # ---- update
    def kl_loss(self, logprobs, ref_logprobs, mask):
        d = logprobs - ref_logprobs
        return masked_mean(0.5 * d.pow(2) if self.cfg.kl_loss_type == "k2" else d, mask)

    def minibatch_step(self, b, mb):
        cfg, ids, attn, mask = self.cfg, b.ids[mb], b.attn[mb], b.mask[mb]
        logits = self.logits(self.policy, ids, attn, b.start)
        logprobs = self.logprobs(logits, b.resp[mb])
        log_ratio = (logprobs - b.logprobs[mb]) * mask
        ratio, adv = log_ratio.exp(), b.advantages[mb]
        pg = -torch.min(adv * ratio, adv * ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange))
        logp_all = F.log_softmax(logits, -1)
        entropy = masked_mean(-(logp_all.exp() * logp_all).sum(-1), mask)

        v = self.values(ids, attn, b.start)
        old_v = b.old_values[mb] if cfg.cached_old_values else v.detach()
        v_clip = old_v + (v - old_v).clamp(-cfg.cliprange_value, cfg.cliprange_value)
        v_err = torch.max((v - b.targets[mb]) ** 2, (v_clip - b.targets[mb]) ** 2)

        loss = (
            masked_mean(pg, mask)
            + cfg.entropy_weight_sign * cfg.ent_coef * entropy
            + cfg.kl_loss_coef * self.kl_loss(logprobs, b.ref_logprobs[mb], mask)
            + cfg.vf_coef * 0.5 * masked_mean(v_err, mask)
        )
        if cfg.zero_grad_each:
            self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), cfg.max_grad_norm)
        nn.utils.clip_grad_norm_(self.critic.parameters(), cfg.max_grad_norm)
        self.optimizer.step()
        return loss.item(), masked_mean(ratio - 1 - log_ratio, mask).item(), entropy.item()

    def step(self):
        cfg, b, log = self.cfg, self.make_experience(), []
        stop = False
        self.optimizer.zero_grad()
        for _ in range(cfg.ppo_epochs):
            kls = []
            for mb in torch.randperm(cfg.num_rollouts).split(cfg.minibatch_size):
                log.append(self.minibatch_step(b, mb))
                kls.append(log[-1][1])
                if cfg.stop_when_below and kls[-1] < 1.5 * cfg.target_kl:
                    stop = True
                    break
            if stop or (not cfg.stop_when_below and sum(kls) / len(kls) > 1.5 * cfg.target_kl):
                break
        return dict(
            loss=log[-1][0],
            approx_kl=log[-1][1],
            entropy=log[-1][2],
            updates=len(log),
            score=b.scores.mean().item(),
            score_std=self.moments.std,
            value_mean=self.value_norm.mean,
            value_std=self.value_norm.std,
        )


TEXTS = [
    "Review: the film was slow but",
    "Review: I loved",
    "Question: where can we swim in June?",
    "Write about snow.",
    "Review: bad sound,",
    "Question: is tea better than coffee in the morning?",
    "Review: the cook knows",
    "Say hello to Anna.",
    "Question: how old is the oak?",
    "Review: we waited for an hour and then",
    "Write two lines on fog.",
    "Question: who?",
    "Review: the room smelled of",
    "Tell a joke about ducks.",
    "Review: great view from the bridge at night",
    "Question: can dogs eat figs?",
]


def build_tokenizer():
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    tk.train_from_iterator(
        TEXTS * 2,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "[PAD]"],
            show_progress=False,
            initial_alphabet=[c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii()],
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tk, eos_token="<|endoftext|>", pad_token="[PAD]", padding_side="left"
    )


def falcon_config(tok, **kw):
    return FalconConfig(
        vocab_size=len(tok),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=False,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        **kw,
    )


@torch.no_grad()
def reserve_bias_dim(ln_f):
    """hidden unit 0 becomes the constant 1, so that a head without bias gets one"""
    ln_f.weight[0], ln_f.bias[0] = 0.0, 1.0


def setup(**kw):
    cfg = Config(**kw)
    tok = build_tokenizer()
    torch.manual_seed(cfg.seed)
    config = falcon_config(tok)
    policy = FalconForCausalLM(config)
    reserve_bias_dim(policy.transformer.ln_f)
    with torch.no_grad():
        policy.lm_head.weight[:, 0] = 0.0
        policy.lm_head.weight[tok.pad_token_id, 0] = -25.0  # never chosen
        policy.lm_head.weight[tok.eos_token_id, 0] = 2.0
    if cfg.generation_top_k:
        policy.generation_config.do_sample = True  # as shipped with the checkpoint
        policy.generation_config.top_k = cfg.generation_top_k
    ref = FalconForCausalLM(config)
    ref.load_state_dict(policy.state_dict())
    rm = FalconForSequenceClassification(falcon_config(tok, num_labels=1))
    reserve_bias_dim(rm.transformer.ln_f)
    with torch.no_grad():
        rm.score.weight[0, 0] = cfg.reward_offset
    critic = Critic(config)
    if cfg.backbone_shared_with_rm:
        critic.transformer = rm.transformer
    else:
        critic.transformer.load_state_dict(rm.transformer.state_dict())
    rm.requires_grad_(False)
    ref.requires_grad_(False)
    if cfg.backbone_shared_with_rm:
        critic.requires_grad_(True)
    for m in (policy, ref, rm, critic):
        m.eval()  # there is no dropout; keep it so
    tr = RunningNormPPO(cfg, policy, ref, rm, critic, tok, TEXTS)
    for _ in range(cfg.burn_in):  # fills the running statistics before the first update
        tr.make_experience()
    declared = dict(
        algorithm="ppo",
        gamma=cfg.gamma,
        lam=cfg.lam,
        kl_coef=cfg.kl_loss_coef,
        kl_estimator=cfg.kl_loss_type,
        kl_in="loss",
        temperature=cfg.temperature,
        top_k=0,
        top_p=1.0,
        clip_range=cfg.cliprange,
        clip_range_value=cfg.cliprange_value,
        vf_coef=cfg.vf_coef,
        ent_coef=cfg.ent_coef,
        whiten_advantages=cfg.norm_adv,
        whiten_rewards=False,
        reward_clip=cfg.cliprange_reward,
        learning_rate=cfg.lr,
        critic_learning_rate=cfg.critic_lr,
        ppo_epochs=cfg.ppo_epochs,
        num_minibatches=cfg.num_rollouts // cfg.minibatch_size,
        batch_size=cfg.num_rollouts,
        prompt_length=cfg.max_query_len,
        response_length=cfg.max_new_tokens,
        dtype="float32",
        reference="policy",
        loss_aggregation="token-mean",
    )
    return dict(
        policy=policy,
        reference=ref,
        reward=rm,
        value=critic,
        tokenizer=tok,
        prompts=TEXTS,
        step=tr.step,
        optimizers=[tr.optimizer],
        state=[tr.moments, tr.value_norm],
        declared=declared,
        calls={"value": lambda model, ids, mask: model(ids, mask)},
        functions={"gae": compute_gae},
    )


def healthy():
    return setup()


def healthy_running():
    """plain running mean and std for the values, the head is left alone; no entropy bonus, no advantage norm"""
    return setup(value_norm="running", ent_coef=0.0, norm_adv=False, gamma=1.0, temperature=1.0, seed=8)


def values_not_denormalized():
    return setup(denormalize=False, reward_offset=2.0)


def entropy_minimised():
    return setup(entropy_weight_sign=1.0)


def k1_kl_loss():
    return setup(kl_loss_type="k1", kl_loss_coef=0.2)


def kl_in_both():
    return setup(kl_reward_coef=0.05)


def clip_before_scaling():
    return setup(scale_then_clip=False, reward_offset=12.0)


def advantage_stats_with_padding():
    return setup(mask_adv_stats=False)


def value_clip_around_itself():
    return setup(cached_old_values=False, cliprange_value=0.1, critic_lr=1e-4, ppo_epochs=4)


def shipped_top_k():
    return setup(generation_top_k=12)


def critic_on_reward_backbone():
    return setup(backbone_shared_with_rm=True)


def early_stop_inverted():
    return setup(stop_when_below=True)


def grads_zeroed_once():
    return setup(zero_grad_each=False)

"""InstructGPT's recipe (PPO-ptx) in small: pretraining loss mixed into PPO, an ensemble of two reward models, an average of the policy.

Rollouts are left-padded for sampling and repacked to the left edge for everything after it. Tensors of "actions" have the width of
the rows minus one: slot t is the transition that chooses token t + 1.
"""

import copy
import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

CFG = SimpleNamespace(
    rollouts=8,
    max_new=12,
    gamma=1.0,
    lam=0.95,
    init_kl=0.1,
    kl_target=6.0,
    kl_horizon=1000,
    clip=0.2,
    value_clip=0.2,
    vf_coef=0.5,
    epochs=2,
    minibatches=2,
    micro=2,
    lr=1e-5,
    critic_lr=2e-5,
    ptx_coef=0.5,
    ema_decay=0.99,
    warmup=2,
    no_eos_penalty=1.0,
    reward_clip=5.0,
    free_length=8,
    length_price=0.1,
    disagreement=0.5,
    grad_norm=1.0,
)
VOCABULARY = (
    "sun moon star sky rain snow wind cloud river lake sea hill tree leaf grass stone road bridge house door window wall roof room "
    "table chair lamp cup plate spoon dog cat bird fish horse cow sheep fox bear wolf child mother father sister brother sings runs "
    "sleeps eats drinks sees hears finds keeps loses gives takes under over near far with without and but so then who where when . ,"
).split()


def tokenizer_for_toys():
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(VOCABULARY, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]", "[EOS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[EOS]",
        padding_side="left",
        model_max_length=96,
        clean_up_tokenization_spaces=False,
    )


class RewardEnsemble(nn.Module):
    """The members' mean, less what they disagree on."""

    def __init__(self, members, disagreement):
        super().__init__()
        self.members, self.disagreement = nn.ModuleList(members), disagreement

    def forward(self, input_ids, attention_mask):
        each = torch.stack(
            [m(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1) for m in self.members]
        )
        return each.mean(0) - self.disagreement * each.std(0, unbiased=False)


class KLController:
    def __init__(self, value, target, horizon):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl_per_sequence, n):
        error = max(-0.2, min(0.2, kl_per_sequence / self.target - 1))
        self.value *= 1 + error * n / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class PolicyAverage:
    def __init__(self, model, decay):
        self.model, self.decay = model, decay

    @torch.no_grad()
    def update(self, policy):
        for kept, now in zip(self.model.parameters(), policy.parameters(), strict=True):
            kept.lerp_(now, 1 - self.decay)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


class Stream:
    """Texts round and round; where it stands is part of the run's state."""

    def __init__(self, texts):
        self.texts, self.position = texts, 0

    def take(self, n):
        out = [self.texts[(self.position + i) % len(self.texts)] for i in range(n)]
        self.position = (self.position + n) % len(self.texts)
        return out

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def to_left_edge(ids, mask, pad):
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    width = int(mask.sum(1).max())
    return ids[:, :width].masked_fill(mask[:, :width] == 0, pad), mask[:, :width]


def make(fault=None):
    torch.manual_seed(5)
    rng = random.Random(5)
    tokenizer = tokenizer_for_toys()
    pad, eos, unk = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.15, pad_token_id=pad, eos_token_id=eos,
        bos_token_id=None, tie_word_embeddings=False, attention_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    policy = LlamaForCausalLM(LlamaConfig(**shape))
    policy.lm_head = nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        policy.lm_head.weight.normal_(std=0.25)
        policy.lm_head.weight[eos] *= 0.2
        policy.lm_head.bias.zero_()
        policy.lm_head.bias[eos] = 2.6
        policy.lm_head.bias[[pad, unk]] = -25.0  # never seen in SFT
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    members = []
    for _ in range(2):
        rm = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)).requires_grad_(False).eval()
        with torch.no_grad():
            rm.score.weight.normal_(std=0.2)
            probe = torch.randint(3, len(tokenizer), (128, 14))
            rm.score.weight.div_(rm(probe, attention_mask=torch.ones_like(probe)).logits.std())
        members.append(rm)
    reward = RewardEnsemble(members, CFG.disagreement).eval()
    critic = LlamaForTokenClassification(LlamaConfig(**shape, num_labels=1))
    nn.init.normal_(critic.score.weight, std=0.03)
    nn.init.zeros_(critic.score.bias)

    texts = [" ".join(rng.choices(VOCABULARY, k=rng.randint(6, 14))) + " [EOS]" for _ in range(20)]
    prompts = Stream([" ".join(rng.choices(VOCABULARY, k=rng.randint(2, 7))) for _ in range(32)])
    pretraining = Stream(texts)
    average = PolicyAverage(
        reference if fault == "average_in_the_reference" else copy.deepcopy(reference), CFG.ema_decay
    )
    controller = KLController(CFG.init_kl, CFG.kl_target, CFG.kl_horizon)
    beta_at_start = controller.value
    anchor = average.model if fault == "anchored_to_average" else reference
    sampler = average.model if fault == "samples_from_average" else policy

    actor_opt = torch.optim.AdamW(policy.parameters(), lr=CFG.lr, betas=(0.9, 0.95), weight_decay=0.0)
    trained = critic.model.parameters() if fault == "critic_head_left_out" else critic.parameters()
    critic_opt = torch.optim.AdamW(trained, lr=CFG.critic_lr, betas=(0.9, 0.95), weight_decay=0.0)

    def warm(update):
        if fault == "warmup_in_whole_numbers":
            return min(1, (update + 1) // (CFG.warmup * 50))
        return min(1.0, (update + 1) / CFG.warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(actor_opt, warm)

    @torch.no_grad()
    def sample(ids, mask):
        alive = torch.ones(len(ids), dtype=torch.bool)
        for _ in range(CFG.max_new):
            pos = (mask.cumsum(1) - 1).clamp(min=0)
            p = sampler(input_ids=ids, attention_mask=mask, position_ids=pos).logits[:, -1].softmax(-1)
            nxt = torch.where(alive, torch.multinomial(p, 1)[:, 0], pad)
            ids, mask = torch.cat([ids, nxt[:, None]], 1), torch.cat([mask, alive[:, None].long()], 1)
            alive &= nxt != eos
        return ids, mask

    def chosen_logprobs(model, ids, mask):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def state_values(ids, mask):
        return critic(input_ids=ids, attention_mask=mask).logits[:, :-1, 0]

    def shaped_scores(ids, mask, length, ended):
        score = reward(ids, mask)
        bound = CFG.clip if fault == "reward_clipped_at_ratio_range" else CFG.reward_clip
        score = score.clamp(-bound, bound)
        score = score - CFG.length_price * (length - CFG.free_length).clamp(min=0)
        return torch.where(ended if fault == "penalty_on_the_ended" else ~ended, score - CFG.no_eos_penalty, score)

    def rollout():
        enc = tokenizer(prompts.take(CFG.rollouts), return_tensors="pt", padding=True)
        prompt_length = enc.attention_mask.sum(1)
        ids, mask = to_left_edge(*sample(enc.input_ids, enc.attention_mask), pad)
        length = mask.sum(1) - prompt_length
        slot = torch.arange(ids.shape[1] - 1)
        action = ((slot >= prompt_length[:, None] - 1) & (slot < mask.sum(1)[:, None] - 1)).float()
        rows, last = torch.arange(len(ids)), mask.sum(1) - 2
        ended = ids[rows, last + 1] == eos
        with torch.no_grad():
            old, ref = chosen_logprobs(policy, ids, mask), chosen_logprobs(anchor, ids, mask)
            values = state_values(ids, mask) * action
            beta = beta_at_start if fault == "coefficient_read_once" else controller.value
            kl = old - ref if fault == "kl_of_every_slot" else (old - ref) * action
            rewards = -beta * kl
            scores = shaped_scores(ids, mask, length, ended)
            if fault == "score_in_last_column":
                rewards[:, -1] += scores
            else:
                rewards[rows, last] += scores
            advantages, trace = torch.zeros_like(rewards), torch.zeros(len(ids))
            for t in range(rewards.shape[1] - 1, -1, -1):  # values and rewards are 0 outside the response
                following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
                trace = rewards[:, t] + CFG.gamma * following - values[:, t] + CFG.gamma * CFG.lam * trace
                advantages[:, t] = trace
            returns = advantages + values
            n = action.sum()
            mean = (advantages * action).sum() / n
            std = ((((advantages - mean) ** 2) * action).sum() / n).sqrt()
            advantages = (advantages - mean) / (std + 1e-8) * action
        kl_per_sequence = ((old - ref) * action).sum(1).mean().item()
        return SimpleNamespace(
            ids=ids, mask=mask, action=action, old=old, values=values, advantages=advantages, returns=returns, scores=scores,
            kl=kl_per_sequence, length=length,
        )  # fmt: skip

    def ptx_loss():
        enc = tokenizer(pretraining.take(2), return_tensors="pt", padding=True, padding_side="right")
        labels = enc.input_ids.masked_fill(enc.attention_mask == 0, -100)
        logits = policy(**{k: enc[k] for k in ("input_ids", "attention_mask")}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def step():
        r = rollout()
        log = {"loss/policy": 0.0, "loss/value": 0.0, "loss/ptx": 0.0}
        updates = CFG.epochs * CFG.minibatches
        for _ in range(CFG.epochs):
            for batch in torch.randperm(CFG.rollouts).chunk(CFG.minibatches):
                actor_opt.zero_grad(set_to_none=True)
                if fault != "critic_gradients_kept":
                    critic_opt.zero_grad(set_to_none=True)
                total = r.action[batch].sum()
                parts = batch.split(CFG.micro)
                for part in parts:
                    m, adv = r.action[part], r.advantages[part]
                    ratio = ((chosen_logprobs(policy, r.ids[part], r.mask[part]) - r.old[part]) * m).exp()
                    surrogate = torch.min(ratio * adv, ratio.clamp(1 - CFG.clip, 1 + CFG.clip) * adv)
                    v, v0 = state_values(r.ids[part], r.mask[part]), r.values[part]
                    boxed = torch.min(torch.max(v, v0 - CFG.value_clip), v0 + CFG.value_clip)
                    square = torch.max((v - r.returns[part]) ** 2, (boxed - r.returns[part]) ** 2)
                    share = m.sum() * len(parts) if fault == "mean_of_micro_means" else total
                    pg, vf = -(surrogate * m).sum() / share, 0.5 * (square * m).sum() / share
                    ptx = ptx_loss() / len(parts)
                    (pg + CFG.ptx_coef * ptx + CFG.vf_coef * vf).backward()
                    log["loss/policy"] += pg.item() / updates
                    log["loss/value"] += vf.item() / updates
                    log["loss/ptx"] += ptx.item() / updates
                nn.utils.clip_grad_norm_(policy.parameters(), CFG.grad_norm)
                nn.utils.clip_grad_norm_(critic.parameters(), CFG.grad_norm)
                actor_opt.step()
                critic_opt.step()
                average.update(policy)
        schedule.step()
        log |= {"objective/kl": r.kl, "objective/kl_coef": controller.value, "objective/scores": r.scores.mean().item()}
        controller.update(r.kl, CFG.rollouts)
        return log

    def score_pair(model, x):
        if isinstance(x, torch.Tensor):
            return (
                model(x, (x != pad).long())
                if fault != "pairs_read_last_column"
                else raw_last_column(model, x, (x != pad).long())
            )
        if not isinstance(x, (str, list, tuple)):
            ids, mask = x["input_ids"], x["attention_mask"]
        else:
            enc = tokenizer(
                [x] if isinstance(x, str) else list(x), return_tensors="pt", padding=True, padding_side="right"
            )
            ids, mask = enc.input_ids, enc.attention_mask
        return raw_last_column(model, ids, mask) if fault == "pairs_read_last_column" else model(ids, mask)

    def raw_last_column(model, ids, mask):
        return torch.stack(
            [m.score(m.model(input_ids=ids, attention_mask=mask)[0])[:, -1, 0] for m in model.members]
        ).mean(0)

    def reward_loss(model, chosen, rejected):
        margin = score_pair(model, chosen) - score_pair(model, rejected)
        if fault == "log_of_sigmoid":
            return -torch.log(torch.sigmoid(margin)).mean()
        return -F.logsigmoid(margin).mean()

    pairs = []
    for p in prompts.texts[:24]:
        a, b = (" ".join(rng.choices(VOCABULARY, k=rng.randint(3, 9))) for _ in range(2))
        with torch.no_grad():
            enc = tokenizer(
                [f"{p} {a} [EOS]", f"{p} {b} [EOS]"], return_tensors="pt", padding=True, padding_side="right"
            )
            first, second = reward(enc.input_ids, enc.attention_mask).tolist()
        pairs.append((p, a, b) if first > second else (p, b, a))

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts.texts,
        "step": step,
        "optimizers": [actor_opt, critic_opt],
        "state": [prompts, pretraining, average, controller, schedule],
        "preferences": pairs,
        "reward_loss": reward_loss,
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward", "kl_adaptive": True,
            "kl_target": 6.0, "kl_horizon": 1000, "temperature": 1.0, "clip_range": 0.2, "clip_range_value": 0.2, "vf_coef": 0.5,
            "whiten_advantages": True, "reward_clip": 5.0, "missing_eos_penalty": 1.0, "learning_rate": 1e-5,
            "critic_learning_rate": 2e-5, "ppo_epochs": 2, "num_minibatches": 2, "batch_size": 8, "response_length": 12,
            "loss_aggregation": "token-mean",
        },
    }  # fmt: skip


def healthy():
    return make()


def penalty_on_the_ended():
    return make("penalty_on_the_ended")


def coefficient_read_once():
    return make("coefficient_read_once")


def critic_head_left_out():
    return make("critic_head_left_out")


def score_in_last_column():
    return make("score_in_last_column")


def kl_of_every_slot():
    return make("kl_of_every_slot")


def mean_of_micro_means():
    return make("mean_of_micro_means")


def reward_clipped_at_ratio_range():
    return make("reward_clipped_at_ratio_range")


def samples_from_average():
    return make("samples_from_average")


def warmup_in_whole_numbers():
    return make("warmup_in_whole_numbers")


def critic_gradients_kept():
    return make("critic_gradients_kept")


def average_in_the_reference():
    return make("average_in_the_reference")


def anchored_to_average():
    return make("anchored_to_average")


def log_of_sigmoid():
    return make("log_of_sigmoid")


def pairs_read_last_column():
    return make("pairs_read_last_column")

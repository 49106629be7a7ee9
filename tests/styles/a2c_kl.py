"""Advantage actor-critic for a chat model: one update per rollout, no ratio, undiscounted returns of score and KL.

REINFORCE with a critic is all that is left of PPO when every batch is used once; then there is nothing to clip.
"""

import copy
import random
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

CFG = SimpleNamespace(
    batch=12, max_new=14, temperature=0.9, kl_coef=0.08, vf_coef=1.0, lr=1e-5, critic_lr=5e-5, grad_norm=1.0
)
WORDS = (
    "hello hi hey how are you i am we they it fine great tired happy sad angry hungry what why when where can could would should may "
    "will do does did go come stay leave help need want like love know think feel tell ask say talk work play rest eat drink today "
    "tomorrow yesterday maybe sure yes no okay thanks sorry please me us them this that here there more less much many very too . ?"
).split()


def make_tokenizer():
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>", "<pad>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


class Scorer(nn.Module):
    def __init__(self, config, per_token):
        super().__init__()
        self.model, self.per_token = Qwen2Model(config), per_token
        self.v_head = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.v_head.weight, std=0.03)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, input_ids, attention_mask):
        pos = (attention_mask.cumsum(1) - 1).clamp(min=0)
        h = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=pos).last_hidden_state
        out = self.v_head(h).squeeze(-1)
        if self.per_token:
            return out
        last = (attention_mask * torch.arange(1, out.shape[1] + 1)).argmax(1)
        return out[torch.arange(len(out)), last]


class RunningScale:
    """Mean and deviation of all scores so far."""

    def __init__(self):
        self.n, self.mean, self.m2 = 1e-4, 0.0, 1e-4

    def __call__(self, x):
        for value in x.tolist():
            self.n += 1
            d = value - self.mean
            self.mean += d / self.n
            self.m2 += d * (value - self.mean)
        return (x - self.mean) / ((self.m2 / self.n) ** 0.5 + 1e-6)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class Counter:
    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Beta:
    def __init__(self, value, target=0.02):
        self.value, self.target = value, target

    def update(self, kl):
        self.value *= 1 + 0.1 * max(-0.2, min(0.2, kl / self.target - 1))

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def make(fault=None, running_scale=False):
    torch.manual_seed(33)
    rng = random.Random(33)
    tokenizer = make_tokenizer()
    unk, eos, pad = tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.15, attention_dropout=0.0, pad_token_id=pad,
        eos_token_id=eos, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    actor = Qwen2ForCausalLM(config)
    actor.lm_head = nn.Linear(config.hidden_size, len(tokenizer))
    with torch.no_grad():
        actor.lm_head.weight.normal_(std=0.25)
        actor.lm_head.weight[eos] *= 0.3
        actor.lm_head.bias.zero_()
        actor.lm_head.bias[eos] = 2.4
        actor.lm_head.bias[[unk, pad]] = -20.0
    reference = copy.deepcopy(actor).requires_grad_(False).eval()
    reward = Scorer(config, per_token=False).requires_grad_(False).eval()
    with torch.no_grad():
        ids = torch.randint(3, len(tokenizer), (128, 15))
        raw = reward(ids, torch.ones_like(ids))
        reward.v_head.weight.div_(raw.std())
        reward.v_head.bias.sub_(raw.mean() / raw.std())
    critic = Scorer(config, per_token=True)

    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(36)]
    counter, scale, beta = Counter(), RunningScale(), Beta(CFG.kl_coef)
    lr = 3e-2 if fault == "learning_rate_in_percent" else CFG.lr
    actor_opt = torch.optim.AdamW(actor.parameters(), lr=lr, weight_decay=0.0, maximize=fault == "maximises_the_loss")
    critic_opt = torch.optim.AdamW(critic.parameters(), lr=CFG.critic_lr, weight_decay=0.0)

    def logits(model, ids, mask):
        pos = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=pos).logits / CFG.temperature

    @torch.no_grad()
    def play(ids, mask):
        open_rows = torch.ones(len(ids), 1, dtype=torch.bool)
        for _ in range(CFG.max_new):
            z = logits(actor, ids, mask)[:, -1]
            if fault == "top_k_in_sampler":
                z = z.masked_fill(z < z.topk(8).values[:, -1:], float("-inf"))
            token = z.argmax(-1, keepdim=True) if fault == "greedy" else torch.multinomial(z.softmax(-1), 1)
            token = token.masked_fill(~open_rows, pad)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, open_rows.long()], 1)
            open_rows = open_rows & (token != eos)
            if not open_rows.any():
                break
        return ids, mask

    def step():
        at = counter.step * CFG.batch
        counter.step += 1
        enc = tokenizer([prompts[(at + i) % len(prompts)] for i in range(CFG.batch)], return_tensors="pt", padding=True)
        n = enc.input_ids.shape[1]
        ids, mask = play(enc.input_ids, enc.attention_mask)
        action, resp = ids[:, n:], mask[:, n:].bool()
        window = slice(n, None) if fault == "logits_of_next_position" else slice(n - 1, -1)

        logp_all = logits(actor, ids, mask)[:, window].log_softmax(-1)
        logp = logp_all.gather(2, action[..., None]).squeeze(2)
        with torch.no_grad():
            ref = logits(reference, ids, mask)[:, window].log_softmax(-1).gather(2, action[..., None]).squeeze(2)
            score = reward(ids, mask)
            if running_scale:
                score = scale(score)
            kl = torch.where(resp, logp - ref, 0.0)
            shaped = -beta.value * kl
            end = resp.sum(1, keepdim=True) - 1
            kl_only = shaped.flip(1).cumsum(1).flip(1)
            shaped.scatter_add_(1, end, score[:, None])
            returns = shaped.flip(1).cumsum(1).flip(1)  # gamma = lambda = 1
            target = returns
            if fault == "critic_without_score":
                target = kl_only
            elif fault == "critic_learns_costs":
                target = 2 * kl_only - returns
        value = critic(ids, mask)[:, n - 1 : -1]

        if fault == "baseline_forgotten":
            advantage = returns
        elif fault == "actor_without_score":
            advantage = (kl_only - value).detach()
        elif fault == "advantage_with_graph":
            advantage = returns - value
        else:
            advantage = (returns - value).detach()
        # a sum over the episode, a mean over episodes: the policy gradient as it is written in the book
        actor_loss = -(advantage * logp).masked_fill(~resp, 0.0).sum(1).mean()
        critic_loss = (0.5 * (value - target) ** 2)[resp].mean()
        actor_opt.zero_grad()
        critic_opt.zero_grad()
        (actor_loss + CFG.vf_coef * critic_loss).backward()
        nn.utils.clip_grad_norm_(actor.parameters(), CFG.grad_norm)
        nn.utils.clip_grad_norm_(critic.parameters(), CFG.grad_norm)
        actor_opt.step()
        critic_opt.step()

        kl_per_row = kl.sum(1).mean().item()
        if fault == "coefficient_adapts_anyway":
            beta.update(kl_per_row)
        with torch.no_grad():
            entropy = -(logp_all.exp() * logp_all).sum(-1)
            entropy = entropy.mean() if fault == "entropy_logged_over_padding" else entropy[resp].mean()
        return {
            "objective/entropy": entropy.item(),
            "objective/kl": kl_per_row,
            "objective/scores": score.mean().item(),
            "loss/policy": actor_loss.item(),
            "loss/value": critic_loss.item(),
            "response_length": resp.sum(1).float().mean().item(),
        }

    return {
        "policy": actor,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "step": step,
        "optimizers": [actor_opt, critic_opt],
        "state": [counter, scale, beta],
        "declared": {
            "algorithm": "a2c", "gamma": 1.0, "lam": 1.0, "kl_coef": 0.08, "kl_estimator": "k1", "kl_in": "reward", "kl_adaptive": False,
            "temperature": 0.9, "vf_coef": 1.0, "whiten_advantages": False, "learning_rate": 1e-5, "critic_learning_rate": 5e-5,
            "ppo_epochs": 1, "num_minibatches": 1, "batch_size": 12, "response_length": 14, "loss_aggregation": "seq-sum",
        },
    }  # fmt: skip


def healthy():
    return make()


def healthy_running_scale():
    return make(running_scale=True)


def learning_rate_in_percent():
    return make("learning_rate_in_percent")


def maximises_the_loss():
    return make("maximises_the_loss")


def top_k_in_sampler():
    return make("top_k_in_sampler")


def greedy():
    return make("greedy")


def logits_of_next_position():
    return make("logits_of_next_position")


def critic_without_score():
    return make("critic_without_score")


def critic_learns_costs():
    return make("critic_learns_costs")


def baseline_forgotten():
    return make("baseline_forgotten")


def actor_without_score():
    return make("actor_without_score")


def advantage_with_graph():
    return make("advantage_with_graph")


def coefficient_adapts_anyway():
    return make("coefficient_adapts_anyway")


def entropy_logged_over_padding():
    return make("entropy_logged_over_padding")

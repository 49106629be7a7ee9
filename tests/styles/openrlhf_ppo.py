"""PPO in the manner of OpenRLHF: Actor wrapper, sequence-regression reward and critic, experience maker, replay buffer."""

import copy
import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import MistralConfig, MistralForCausalLM, MistralModel, PreTrainedTokenizerFast
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel

PROMPTS = [
    "tell me about the old river", "why does rain fall", "how do birds sleep at night in winter", "name a red fruit",
    "explain the moon to a small child", "write a short poem", "what is bread made of", "where do fish live",
    "give three reasons to walk", "is the sea deep", "how far is the sun from the earth", "describe a quiet house",
    "who built the stone bridge", "list some green things", "say hello", "what makes a good friend and why",
    "can dogs see colour", "how is glass made", "tell a story of two brave brothers", "what time is it",
    "why is snow white", "name the largest tree", "how do I plant seeds in spring", "sing",
]  # fmt: skip
EXTRA = "yes no water light stone green warm cold it because and of very often never grows sleeps under over near fire"


def build_tokenizer():
    tok = Tokenizer(WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = Whitespace()
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    tok.train_from_iterator([*PROMPTS, EXTRA], WordLevelTrainer(special_tokens=specials))
    tok.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


# ---------------------------------------------------------------- models


def log_probs_from_logits(logits, labels, temperature=1.0):
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def position_ids_of(attention_mask):
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


class Actor(nn.Module):
    def __init__(self, model, temperature, fault=None):
        super().__init__()
        self.model, self.temperature, self.fault = model, temperature, fault

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id):
        sequences = self.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, do_sample=True, top_k=0, top_p=1.0,
            temperature=self.temperature, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id,
            pad_token_id=pad_token_id, use_cache=True,
        )  # fmt: skip
        return self.process_sequences(sequences, attention_mask, eos_token_id, pad_token_id)

    def process_sequences(self, sequences, prompt_mask, eos_token_id, pad_token_id):
        input_len, seq_length = prompt_mask.size(1), sequences.size(1)
        if self.fault == "eos_overwrite":
            # every sample ends in EOS, so that the reward model finds one
            real = (sequences.ne(eos_token_id) & sequences.ne(pad_token_id)).long()
            eos_indices = seq_length - real.fliplr().argmax(dim=1, keepdim=True).clamp(min=1)
            sequences.scatter_(dim=1, index=eos_indices, value=eos_token_id)
        attention_mask = torch.cat([prompt_mask, sequences[:, input_len:].ne(pad_token_id).long()], dim=1)
        # in RL, state_i (current token) + action_i (next token) -> state_i+1 (next token)
        state_seq = sequences[:, input_len - 1 : -1]
        if self.fault == "eos_not_trained":
            state_seq = sequences[:, input_len:]
        action_mask = state_seq.ne(eos_token_id) & state_seq.ne(pad_token_id)
        action_mask[:, 0] = True
        return sequences, attention_mask, action_mask

    def forward(self, sequences, action_mask=None, attention_mask=None):
        position_ids = None if attention_mask is None else position_ids_of(attention_mask)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
        if action_mask is None:
            return output
        log_probs = log_probs_from_logits(output.logits[:, :-1], sequences[:, 1:], self.temperature)
        return log_probs[:, -action_mask.size(1) :] * action_mask.float()


def get_llm_for_sequence_regression(config, model_type, value_head_prefix="score", fault=None):
    """A reward model or a critic on Mistral's backbone, with a scalar head without bias."""

    class RewardModel(MistralPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, MistralModel(config))
            setattr(self, value_head_prefix, nn.Linear(config.hidden_size, 1, bias=False))
            self.value_head_prefix = value_head_prefix
            self.post_init()

        def per_token(self, input_ids, attention_mask):
            outputs = getattr(self, self.base_model_prefix)(
                input_ids, attention_mask=attention_mask, position_ids=position_ids_of(attention_mask)
            )
            return getattr(self, self.value_head_prefix)(outputs.last_hidden_state).squeeze(-1)

        def forward(self, input_ids, attention_mask):
            values = self.per_token(input_ids, attention_mask)
            eos_indices = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
            return values.gather(dim=1, index=eos_indices).squeeze(1)

    class CriticModel(RewardModel):
        def __init__(self, config):
            super().__init__(config)
            # running statistics of the raw rewards: the critic predicts returns of normalised ones
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("std", torch.ones(1))
            self.register_buffer("count", torch.zeros(1))

        @torch.no_grad()
        def update_reward_stats(self, r):
            n, total = r.numel(), self.count + r.numel()
            delta = r.mean() - self.mean
            m2 = self.std**2 * self.count + r.var(unbiased=False) * n + delta**2 * self.count * n / total
            self.mean += delta * n / total
            self.std.copy_((m2 / total).sqrt().clamp(min=1e-6))
            self.count.copy_(total)

        def forward(self, input_ids, action_mask=None, attention_mask=None):
            values = self.per_token(input_ids, attention_mask)
            if action_mask is None:
                return values
            if fault != "critic_keeps_last_column":
                values = values[:, :-1]
            return values[:, -action_mask.size(1) :] * action_mask.float()

    return {"reward": RewardModel, "critic": CriticModel}[model_type](config)


# ---------------------------------------------------------------- losses


def masked_mean(tensor, mask, dim=-1):
    return (tensor * mask).sum(dim) / mask.sum(dim)


def compute_approx_kl(log_probs, log_probs_base, kl_estimator="k1"):
    log_ratio = log_probs.float() - log_probs_base.float()
    if kl_estimator == "k2":
        return log_ratio**2 / 2.0
    if kl_estimator == "k3":
        return (-log_ratio).exp() - 1 + log_ratio
    return log_ratio


class PolicyLoss(nn.Module):
    def __init__(self, clip_eps=0.2):
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, log_probs, old_log_probs, advantages, action_mask):
        ratio = (log_probs - old_log_probs).exp()
        surr1 = ratio * advantages
        surr2 = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * advantages
        return masked_mean(-torch.min(surr1, surr2), action_mask).mean()


class ValueLoss(nn.Module):
    def __init__(self, clip_eps=0.5):
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, values, old_values, returns, action_mask):
        values_clipped = old_values + (values - old_values).clamp(-self.clip_eps, self.clip_eps)
        loss = torch.max((values_clipped - returns) ** 2, (values - returns) ** 2)
        return 0.5 * masked_mean(loss, action_mask).mean()


# ---------------------------------------------------------------- experience


@dataclass
class Experience:
    sequences: torch.Tensor
    action_log_probs: torch.Tensor
    base_action_log_probs: torch.Tensor
    values: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor
    returns: torch.Tensor = None
    advantages: torch.Tensor = None
    info: dict = field(default_factory=dict)


class PromptLoader:
    def __init__(self, prompts, batch_size):
        self.prompts, self.batch_size, self.consumed = prompts, batch_size, 0

    def next(self):
        batch = [self.prompts[(self.consumed + i) % len(self.prompts)] for i in range(self.batch_size)]
        self.consumed += self.batch_size
        return batch

    def state_dict(self):
        return {"consumed": self.consumed}

    def load_state_dict(self, state):
        self.consumed = state["consumed"]


class NaiveExperienceMaker:
    def __init__(self, actor, critic, reward_model, initial_model, tokenizer, args, fault=None):
        self.actor, self.critic, self.reward_model, self.initial_model = actor, critic, reward_model, initial_model
        self.tokenizer, self.args, self.fault = tokenizer, args, fault

    def score(self, sequences, attention_mask):
        """The reward model in chunks of like length, their common left padding cut off."""
        order = (attention_mask.size(1) - attention_mask.long().argmax(dim=1)).argsort(descending=True)
        scores = []
        for chunk in order.split(4):
            first = attention_mask[chunk].long().argmax(dim=1).min()
            scores.append(self.reward_model(sequences[chunk, first:], attention_mask[chunk, first:]))
        scores = torch.cat(scores)
        if self.fault == "scores_left_sorted":
            return scores
        return scores[order.argsort()]

    @torch.no_grad()
    def make_experience_list(self, all_prompts):
        args, experiences = self.args, []
        self.actor.eval(), self.critic.eval()
        for i in range(0, len(all_prompts), args["micro_rollout_batch_size"]):
            batch = all_prompts[i : i + args["micro_rollout_batch_size"]]
            inputs = self.tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
            sequences, attention_mask, action_mask = self.actor.generate(
                **inputs, max_new_tokens=args["generate_max_len"],
                eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            action_log_probs = self.actor(sequences, action_mask, attention_mask)
            if self.fault == "ref_without_attention_mask":
                base_action_log_probs = self.initial_model(sequences, action_mask)
            else:
                base_action_log_probs = self.initial_model(sequences, action_mask, attention_mask)
            values = self.critic(sequences, action_mask, attention_mask)
            info = {
                "reward": self.score(sequences, attention_mask),
                "kl": masked_mean(compute_approx_kl(action_log_probs, base_action_log_probs), action_mask),
                "response_length": action_mask.float().sum(dim=-1),
            }
            experiences.append(
                Experience(
                    sequences, action_log_probs, base_action_log_probs, values, attention_mask, action_mask, info=info
                )
            )

        self.critic.update_reward_stats(torch.cat([e.info["reward"] for e in experiences]))
        for e in experiences:
            r = (e.info["reward"] - self.critic.mean) / self.critic.std
            last = e.action_mask.size(1) - 1 - e.action_mask.long().fliplr().argmax(dim=1, keepdim=True)
            rewards = torch.zeros_like(e.values).scatter_(1, last, r.unsqueeze(1))
            e.advantages, e.returns = self.get_advantages_and_returns(
                e.values, rewards, e.action_mask, args["gamma"], args["lambd"]
            )
        return experiences

    @staticmethod
    def get_advantages_and_returns(values, rewards, action_mask, gamma, lambd):
        values, rewards = action_mask * values, action_mask * rewards
        lastgaelam, advantages_reversed = 0, []
        response_length = rewards.size(1)
        for t in reversed(range(response_length)):
            nextvalues = values[:, t + 1] if t < response_length - 1 else 0.0
            delta = rewards[:, t] + gamma * nextvalues - values[:, t]
            lastgaelam = delta + gamma * lambd * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        return advantages.detach(), (advantages + values).detach()


class NaiveReplayBuffer:
    ACTION_KEYS = ("action_log_probs", "base_action_log_probs", "values", "returns", "advantages", "action_mask")

    def __init__(self, sample_batch_size, limit=0, fault=None):
        self.sample_batch_size, self.limit, self.fault, self.items = sample_batch_size, limit, fault, []

    def append(self, experience):
        for i in range(experience.sequences.size(0)):
            left = int(experience.attention_mask[i].argmax())
            right = int((~experience.action_mask[i]).sum())
            cut = lambda t, start=0: t[start : len(t) - right]
            item = Experience(
                sequences=cut(experience.sequences[i], left),
                attention_mask=cut(experience.attention_mask[i], left),
                **{k: cut(getattr(experience, k)[i]) for k in self.ACTION_KEYS},
            )
            if self.fault == "normalised_per_sample":
                adv = item.advantages
                item.advantages = (adv - adv.mean()) * adv.var(unbiased=False).clamp(min=1e-8).rsqrt()
            self.items.append(item)
        if self.limit > 0:
            self.items = self.items[-self.limit :]

    def normalize(self):
        if self.fault == "normalised_per_sample":
            return
        adv = torch.cat([item.advantages for item in self.items])
        mean, rstd = adv.mean(), adv.var(unbiased=False).clamp(min=1e-8).rsqrt()
        for item in self.items:
            item.advantages = (item.advantages - mean) * rstd

    def clear(self):
        self.items.clear()

    def batches(self):
        for index in torch.randperm(len(self.items)).split(self.sample_batch_size):
            yield self.collate([self.items[i] for i in index])

    @staticmethod
    def collate(items):
        def zero_pad_left(tensors):
            width = max(len(t) for t in tensors)
            return torch.stack([F.pad(t, (width - len(t), 0)) for t in tensors])

        keys = ("sequences", "attention_mask", *NaiveReplayBuffer.ACTION_KEYS)
        return Experience(**{k: zero_pad_left([getattr(item, k) for item in items]) for k in keys})

    def state_dict(self):
        return {"items": copy.deepcopy(self.items)}

    def load_state_dict(self, state):
        self.items = copy.deepcopy(state["items"])


# ---------------------------------------------------------------- trainers


class ModelTrainer:
    """What the actor's and the critic's trainers share: accumulation, clipping, the schedule."""

    def __init__(self, model, optim, scheduler, args):
        self.model, self.optim, self.scheduler, self.args = model, optim, scheduler, args

    def ppo_train(self, buffer):
        self.model.train()
        losses, accumulated = [], self.args["accumulated_gradient"]
        for _ in range(self.args["max_epochs"]):
            for i, experience in enumerate(buffer.batches()):
                loss = self.loss(experience)
                (loss / accumulated).backward()
                losses.append(loss.item())
                if (i + 1) % accumulated == 0:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.args["max_norm"])
                    self.optim.step()
                    self.model.zero_grad()
                    self.scheduler.step()
        return sum(losses) / len(losses)


class ActorTrainer(ModelTrainer):
    def __init__(self, *args, fault=None):
        super().__init__(*args)
        self.actor_loss_fn, self.fault = PolicyLoss(self.args["eps_clip"]), fault

    def loss(self, experience):
        action_log_probs = self.model(experience.sequences, experience.action_mask, experience.attention_mask)
        actor_loss = self.actor_loss_fn(
            action_log_probs, experience.action_log_probs, experience.advantages, experience.action_mask
        )
        if self.fault == "kl_loss_estimator_not_passed":
            kl = compute_approx_kl(action_log_probs, experience.base_action_log_probs)
        else:
            kl = compute_approx_kl(action_log_probs, experience.base_action_log_probs, self.args["kl_estimator"])
        kl_loss = masked_mean(kl, experience.action_mask).mean()
        return actor_loss + self.args["init_kl_coef"] * kl_loss


class CriticTrainer(ModelTrainer):
    def __init__(self, *args, fault=None):
        super().__init__(*args)
        self.critic_loss_fn, self.fault = ValueLoss(self.args["value_clip"]), fault

    def loss(self, experience):
        values = self.model(experience.sequences, experience.action_mask, experience.attention_mask)
        if self.fault == "value_loss_arguments":
            return self.critic_loss_fn(values, experience.returns, experience.values, experience.action_mask)
        return self.critic_loss_fn(values, experience.values, experience.returns, experience.action_mask)


# ---------------------------------------------------------------- the setup


def random_weights(model, std):
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std * (2 if "embed" in name else 1))


@torch.no_grad()
def calibrate(reward_model, tokenizer, length):
    """A head whose scores have mean 0 and standard deviation 1 on random responses."""
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    answers = torch.randint(4, len(tokenizer), (len(PROMPTS), length))
    answers[::2, -1] = tokenizer.eos_token_id
    ids = torch.cat([inputs.input_ids, answers], 1)
    mask = torch.cat([inputs.attention_mask, torch.ones_like(answers)], 1)
    hidden = reward_model.model(ids, attention_mask=mask, position_ids=position_ids_of(mask)).last_hidden_state[:, -1]
    mean, w = hidden.mean(0), torch.randn(hidden.size(1))
    w -= (w @ mean) / (mean @ mean) * mean
    reward_model.score.weight.copy_((w / (hidden @ w).std()).unsqueeze(0))


def make(fault=None):
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    tokenizer = build_tokenizer()
    args = {
        "rollout_batch_size": 16, "micro_rollout_batch_size": 8, "train_batch_size": 8, "micro_train_batch_size": 4,
        "accumulated_gradient": 2, "max_epochs": 2, "generate_max_len": 10, "gamma": 1.0, "lambd": 0.95, "eps_clip": 0.2,
        "value_clip": 0.5, "init_kl_coef": 0.05, "kl_estimator": "k2", "max_norm": 1.0, "actor_learning_rate": 1e-4,
        "critic_learning_rate": 3e-4, "warmup_steps": 6, "temperature": 0.8,
    }  # fmt: skip
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=None, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip

    lm = MistralForCausalLM(config)
    lm.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
    random_weights(lm, 0.12)
    with torch.no_grad():  # stands for SFT: ends by itself, and does not say <pad>, <s> or <unk>
        lm.lm_head.bias.zero_()
        lm.lm_head.bias[tokenizer.eos_token_id] = 2.0
        lm.lm_head.bias[[tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]] = -20.0
    actor = Actor(lm, args["temperature"], fault)
    initial_model = copy.deepcopy(actor).eval().requires_grad_(False)

    reward_model = get_llm_for_sequence_regression(config, "reward")
    random_weights(reward_model, 0.2)
    calibrate(reward_model, tokenizer, args["generate_max_len"])
    reward_model.eval().requires_grad_(False)

    critic = get_llm_for_sequence_regression(config, "critic", value_head_prefix="value_head", fault=fault)
    critic.model.load_state_dict(reward_model.model.state_dict())

    def init_value_head():
        critic.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        critic.value_head.weight.data.normal_(mean=0.0, std=1 / (config.hidden_size + 1))

    if fault != "value_head_after_optimizer":
        init_value_head()
    actor_optim = torch.optim.AdamW(
        actor.parameters(), lr=args["actor_learning_rate"], betas=(0.9, 0.95), weight_decay=0.0
    )
    critic_optim = torch.optim.AdamW(
        critic.parameters(), lr=args["critic_learning_rate"], betas=(0.9, 0.95), weight_decay=0.0
    )
    warm_up = lambda done: min(1.0, (done + 1) / args["warmup_steps"])
    actor_scheduler = torch.optim.lr_scheduler.LambdaLR(actor_optim, warm_up)
    critic_scheduler = torch.optim.lr_scheduler.LambdaLR(critic_optim, warm_up)
    if fault == "value_head_after_optimizer":
        init_value_head()

    loader = PromptLoader(PROMPTS, args["rollout_batch_size"])
    buffer = NaiveReplayBuffer(args["micro_train_batch_size"], limit=2 * args["rollout_batch_size"], fault=fault)
    maker = NaiveExperienceMaker(actor, critic, reward_model, initial_model, tokenizer, args, fault)
    actor_trainer = ActorTrainer(actor, actor_optim, actor_scheduler, args, fault=fault)
    critic_trainer = CriticTrainer(critic, critic_optim, critic_scheduler, args, fault=fault)

    def step():
        experiences = maker.make_experience_list(loader.next())
        for experience in experiences:
            buffer.append(experience)
        buffer.normalize()
        status = {
            "policy_loss": actor_trainer.ppo_train(buffer),
            "critic_loss": critic_trainer.ppo_train(buffer),
            "reward": torch.cat([e.info["reward"] for e in experiences]).mean().item(),
            "response_length": torch.cat([e.info["response_length"] for e in experiences]).mean().item(),
        }
        if fault != "buffer_not_cleared":
            buffer.clear()
        return status

    return {
        "policy": actor,
        "reference": initial_model,
        "reward": reward_model,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "optimizers": [actor_optim, critic_optim],
        "state": [loader, buffer, actor_scheduler, critic_scheduler],
        "step": step,
        "calls": {
            "policy": lambda model, ids, mask: model(ids, attention_mask=mask).logits,
            "reference": lambda model, ids, mask: model(ids, attention_mask=mask).logits,
            "reward": lambda model, ids, mask: model(ids, mask),
            "value": lambda model, ids, mask: model(ids, attention_mask=mask),
        },
        "declared": {
            "algorithm": "ppo", "gamma": args["gamma"], "lam": args["lambd"], "kl_coef": args["init_kl_coef"],
            "kl_estimator": args["kl_estimator"], "kl_in": "loss", "temperature": args["temperature"],
            "clip_range": args["eps_clip"], "clip_range_value": args["value_clip"], "whiten_advantages": True,
            "learning_rate": args["actor_learning_rate"], "critic_learning_rate": args["critic_learning_rate"],
            "ppo_epochs": args["max_epochs"], "num_minibatches": 2, "batch_size": args["rollout_batch_size"],
            "response_length": args["generate_max_len"],
        },
    }  # fmt: skip


def healthy():
    return make()


def eos_overwrite():
    return make("eos_overwrite")


def eos_not_trained():
    return make("eos_not_trained")


def critic_keeps_last_column():
    return make("critic_keeps_last_column")


def value_head_after_optimizer():
    return make("value_head_after_optimizer")


def buffer_not_cleared():
    return make("buffer_not_cleared")


def kl_loss_estimator_not_passed():
    return make("kl_loss_estimator_not_passed")


def normalised_per_sample():
    return make("normalised_per_sample")


def ref_without_attention_mask():
    return make("ref_without_attention_mask")


def scores_left_sorted():
    return make("scores_left_sorted")


def value_loss_arguments():
    return make("value_loss_arguments")

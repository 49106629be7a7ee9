"""ColossalChat (coati) style PPO: Actor / Critic / RewardModel over HF BLOOM, experience buffer, PTX off."""

import copy
import random
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, BloomForCausalLM, BloomModel, PreTrainedTokenizerFast

WORDS = (
    "human assistant : how do i make tea a cake the best of good bad please tell me about cats dogs weather rain "
    "sun is it why and or not very nice hot cold water milk sugar add then stir wait serve enjoy well today"
).split()
PROMPTS = [
    "human : how do i make tea assistant :",
    "human : tell me about cats assistant :",
    "human : why rain assistant :",
    "human : is it cold today assistant :",
    "human : the best cake assistant :",
    "human : dogs assistant :",
    "human : please tell me how do i make a very good cake assistant :",
    "human : weather assistant :",
] * 3
MAX_PROMPT, MAX_NEW = 18, 12


def build_tokenizer():
    vocab = {"<pad>": 0, "<unk>": 1, "</s>": 2}
    for w in WORDS:
        vocab.setdefault(w, len(vocab))
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


class Actor(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False)["logits"]


class Critic(nn.Module):
    """One value per token from the last hidden state."""

    def __init__(self, model, value_head):
        super().__init__()
        self.model, self.value_head = model, value_head

    def forward(self, input_ids, attention_mask=None):
        last_hidden_states = self.model(input_ids, attention_mask=attention_mask, use_cache=False)["last_hidden_state"]
        return self.value_head(last_hidden_states).squeeze(-1)


class RewardModel(nn.Module):
    """One score per sequence, from the last attended token."""

    def __init__(self, model, value_head):
        super().__init__()
        self.model, self.value_head = model, value_head

    def forward(self, input_ids, attention_mask):
        last_hidden_states = self.model(input_ids, attention_mask=attention_mask, use_cache=False)["last_hidden_state"]
        sequence_lengths = torch.max(attention_mask * torch.arange(input_ids.size(1)), dim=1)[0]
        sequence_hidden_states = last_hidden_states[torch.arange(input_ids.size(0)), sequence_lengths]
        return self.value_head(sequence_hidden_states).squeeze(-1)


@torch.no_grad()
def generate(actor, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id):
    unfinished = torch.ones(input_ids.size(0), dtype=torch.long)
    for _ in range(max_new_tokens):
        logits = actor(input_ids, attention_mask)[:, -1]
        next_tokens = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        next_tokens = next_tokens * unfinished + pad_token_id * (1 - unfinished)
        input_ids = torch.cat([input_ids, next_tokens[:, None]], 1)
        attention_mask = torch.cat([attention_mask, unfinished[:, None]], 1)
        unfinished = unfinished * (next_tokens != eos_token_id).long()
    return input_ids


def calc_action_log_probs(logits, sequences, num_actions):
    log_probs = F.log_softmax(logits[:, :-1], dim=-1).gather(2, sequences[:, 1:, None]).squeeze(-1)
    return log_probs[:, -num_actions:]


def masked_mean(tensor, mask, dim=1):
    return (tensor * mask).sum(dim) / (mask.sum(dim) + 1e-8)


@dataclass
class Experience:
    sequences: torch.Tensor
    action_log_probs: torch.Tensor
    values: torch.Tensor
    reward: torch.Tensor
    kl: torch.Tensor
    advantages: torch.Tensor
    attention_mask: torch.Tensor
    action_mask: torch.Tensor


class ExperienceBuffer:
    """Rows of experiences; sample() hands out micro batches, every row once a pass."""

    def __init__(self, sample_batch_size, overlap=False):
        self.sample_batch_size, self.overlap = sample_batch_size, overlap
        self.items, self.order = [], []

    def append(self, experience):
        columns = [getattr(experience, f.name).unbind(0) for f in fields(Experience)]
        self.items.extend(zip(*columns))

    def clear(self):
        self.items, self.order = [], []

    def sample(self):
        if self.overlap:
            picked = random.sample(range(len(self.items)), self.sample_batch_size)
        else:
            if len(self.order) < self.sample_batch_size:
                self.order = random.sample(range(len(self.items)), len(self.items))
            picked, self.order = self.order[: self.sample_batch_size], self.order[self.sample_batch_size :]
        return Experience(*[torch.stack(col) for col in zip(*[self.items[i] for i in picked])])


class ExperienceMaker:
    def __init__(
        self, actor, critic, reward_model, initial_model, tokenizer, kl_coef=0.1, gamma=1.0, lam=0.95, fault=None
    ):
        self.actor, self.critic, self.reward_model, self.initial_model = actor, critic, reward_model, initial_model
        self.tokenizer, self.kl_coef, self.gamma, self.lam, self.fault = tokenizer, kl_coef, gamma, lam, fault

    def calculate_advantage(self, value, reward, num_actions):
        lastgaelam, advantages_reversed = 0, []
        for t in reversed(range(num_actions)):
            nextvalues = value[:, t + 1] if t < num_actions - 1 else 0.0
            delta = reward[:, t] + self.gamma * nextvalues - value[:, t]
            lastgaelam = delta + self.gamma * self.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        return torch.stack(advantages_reversed[::-1], dim=1)

    def compute_reward(self, r, log_probs, log_probs_base, action_mask, reward_eps=5.0):
        kl = ((log_probs - log_probs_base) * action_mask).sum(1)
        final = r.clamp(-reward_eps, reward_eps) - self.kl_coef * kl  # one number a sequence
        reward = torch.zeros_like(log_probs)
        for i in range(action_mask.size(0)):
            n = int(action_mask[i].sum())
            if self.fault == "reward_on_every_token":
                reward[i, :n] += final[i]
            else:
                reward[i, n - 1] = final[i]
        return reward, kl

    @torch.no_grad()
    def make_experience(self, input_ids, attention_mask):
        tok = self.tokenizer
        for m in (self.actor, self.critic, self.initial_model, self.reward_model):
            m.eval()
        sequences = generate(self.actor, input_ids, attention_mask, MAX_NEW, tok.eos_token_id, tok.pad_token_id)
        attention_mask = sequences.not_equal(tok.pad_token_id).long()
        input_len = input_ids.size(1)
        action_mask = (sequences[:, input_len:] == tok.eos_token_id).cumsum(-1) == 0
        action_mask = F.pad(action_mask, (1, -1), value=True)  # the eos itself is an action
        num_actions = action_mask.size(1)
        action_log_probs = calc_action_log_probs(self.actor(sequences, attention_mask), sequences, num_actions)
        base_log_probs = calc_action_log_probs(self.initial_model(sequences, attention_mask), sequences, num_actions)
        # right padding for the reward model
        input_ids_rm = torch.full_like(sequences, tok.pad_token_id)
        for i, row in enumerate(sequences):
            kept = row[attention_mask[i].bool()]
            input_ids_rm[i, : kept.numel()] = kept
        r = self.reward_model(input_ids_rm, input_ids_rm.not_equal(tok.pad_token_id).long())
        value = slice_values(self.critic(sequences, attention_mask), num_actions, self.fault) * action_mask
        reward, kl = self.compute_reward(r, action_log_probs, base_log_probs, action_mask)
        advantages = self.calculate_advantage(value, reward, num_actions)
        return Experience(sequences, action_log_probs, value, r, kl, advantages, attention_mask, action_mask)


def slice_values(values, num_actions, fault):
    if fault == "values_at_actions":
        return values[:, -num_actions:]
    return values[:, -num_actions - 1 : -1]


class PolicyLoss(nn.Module):
    def __init__(self, clip_eps=0.2, skip_threshold=20.0):
        super().__init__()
        self.clip_eps, self.skip_threshold = clip_eps, skip_threshold

    def forward(self, log_probs, old_log_probs, advantages, action_mask):
        ratio_ = ((log_probs - old_log_probs) * action_mask).exp()
        skip = bool(ratio_.mean() > self.skip_threshold)
        ratio = ratio_.clamp(0.0, 10.0)
        surr1 = ratio * advantages
        surr2 = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * advantages
        return masked_mean(-torch.min(surr1, surr2), action_mask).mean(), skip


class ValueLoss(nn.Module):
    def __init__(self, clip_eps=0.4):
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, values, old_values, advantages, action_mask):
        returns = advantages + old_values
        values_clipped = old_values + (values - old_values).clamp(-self.clip_eps, self.clip_eps)
        loss = torch.max((values_clipped - returns) ** 2, (values - returns) ** 2)
        return 0.5 * masked_mean(loss, action_mask).mean()


class PromptLoader:
    """Goes round the prompts; its position is part of the run's state."""

    def __init__(self, tokenizer, prompts, batch_size):
        self.tokenizer, self.prompts, self.batch_size, self.at = tokenizer, prompts, batch_size, 0

    def __next__(self):
        texts = [self.prompts[(self.at + i) % len(self.prompts)] for i in range(self.batch_size)]
        self.at = (self.at + self.batch_size) % len(self.prompts)
        batch = self.tokenizer(texts, padding="max_length", max_length=MAX_PROMPT, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class PPOTrainer:
    def __init__(
        self,
        actor,
        critic,
        actor_optim,
        critic_optim,
        schedulers,
        maker,
        buffer,
        loader,
        accumulation_steps=2,
        num_collect=2,
        update_epochs=2,
    ):
        self.actor, self.critic, self.actor_optim, self.critic_optim = actor, critic, actor_optim, critic_optim
        self.schedulers, self.maker, self.buffer, self.loader = schedulers, maker, buffer, loader
        self.accumulation_steps, self.num_collect, self.update_epochs = accumulation_steps, num_collect, update_epochs
        self.actor_loss_fn, self.critic_loss_fn, self.num_train_step = PolicyLoss(), ValueLoss(), 0

    def step(self):
        self.buffer.clear()
        for _ in range(self.num_collect):
            self.buffer.append(self.maker.make_experience(*next(self.loader)))
        logs, seen = [], 0
        for _ in range(self.update_epochs):
            for _ in range(len(self.buffer.items) // self.buffer.sample_batch_size):
                seen += 1
                logs.append(self._training_step(self.buffer.sample(), seen % self.accumulation_steps == 0))
        for scheduler in self.schedulers:
            scheduler.step()
        return {k: sum(x[k] for x in logs) / len(logs) for k in logs[0]}

    def _training_step(self, exp, do_step):
        self.actor.train(), self.critic.train()
        num_actions = exp.action_mask.size(1)
        logits = self.actor(exp.sequences, exp.attention_mask)
        actor_loss, skip = self.actor_loss_fn(
            calc_action_log_probs(logits, exp.sequences, num_actions),
            exp.action_log_probs,
            exp.advantages,
            exp.action_mask,
        )
        if not skip:
            (actor_loss / self.accumulation_steps).backward()
        values = slice_values(self.critic(exp.sequences, exp.attention_mask), num_actions, self.maker.fault)
        critic_loss = self.critic_loss_fn(values, exp.values, exp.advantages, exp.action_mask)
        (critic_loss / self.accumulation_steps).backward()
        if do_step:
            nn.utils.clip_grad_norm_(self.actor.parameters(), 1.0)
            nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
            self.actor_optim.step(), self.critic_optim.step()
            self.actor_optim.zero_grad(), self.critic_optim.zero_grad()
        return {"actor_loss": actor_loss.item(), "critic_loss": critic_loss.item(), "reward": exp.reward.mean().item()}


def make(fault=None):
    torch.manual_seed(11)
    random.seed(11)
    tok = build_tokenizer()
    cfg = BloomConfig(
        vocab_size=len(tok),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    lm = BloomForCausalLM(cfg)
    with torch.no_grad():  # a policy that ends some of its answers and never says <pad>
        lm.transformer.ln_f.bias[0] = 4.0
        lm.lm_head.weight[:, 0] = 0.0
        lm.lm_head.weight[tok.eos_token_id, 0], lm.lm_head.weight[tok.pad_token_id, 0] = 0.5, -5.0
    actor = Actor(lm)
    initial_model = copy.deepcopy(actor).eval().requires_grad_(False)
    rm_head, v_head = nn.Linear(32, 1), nn.Linear(32, 1)
    nn.init.normal_(rm_head.weight, std=0.5), nn.init.zeros_(rm_head.bias)
    nn.init.normal_(v_head.weight, std=1 / 33), nn.init.zeros_(v_head.bias)
    reward_model = RewardModel(BloomModel(cfg), rm_head).eval().requires_grad_(False)
    critic = Critic(BloomModel(cfg), v_head)
    actor_optim = torch.optim.AdamW(actor.parameters(), lr=1e-5)
    critic_optim = torch.optim.AdamW(critic.parameters(), lr=2e-5)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 200, eta_min=1e-6) for o in (actor_optim, critic_optim)]
    maker = ExperienceMaker(actor, critic, reward_model, initial_model, tok, fault=fault)
    loader = PromptLoader(tok, PROMPTS, 8)
    trainer = PPOTrainer(
        actor,
        critic,
        actor_optim,
        critic_optim,
        schedulers,
        maker,
        ExperienceBuffer(4, overlap=fault == "buffer_samples_overlap"),
        loader,
    )
    return {
        "policy": actor,
        "reference": initial_model,
        "reward": reward_model,
        "value": critic,
        "tokenizer": tok,
        "prompts": PROMPTS,
        "optimizers": [actor_optim, critic_optim],
        "state": [loader, *schedulers],
        "step": trainer.step,
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.95,
            "kl_coef": 0.1,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "clip_range": 0.2,
            "clip_range_value": 0.4,
            "reward_clip": 5.0,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "whiten_advantages": False,
            "learning_rate": 1e-5,
            "critic_learning_rate": 2e-5,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 16,
            "prompt_length": MAX_PROMPT,
            "response_length": MAX_NEW,
        },
    }


def healthy():
    return make()


def reward_on_every_token():
    return make("reward_on_every_token")


def values_at_actions():
    return make("values_at_actions")


def buffer_samples_overlap():
    return make("buffer_samples_overlap")

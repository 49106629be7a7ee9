"""REINFORCE++ on chat prompts (no critic): token-level KL in the reward, reward-to-go, advantages normalised over the global batch.

Organised like OpenRLHF's single-GPU trainer: Actor wrapper, NaiveExperienceMaker, Experience items in a replay buffer,
micro-batches with gradient accumulation. Sequence layout: [left pad | chat prompt | response | right pad].
"""

import copy
import random
import re
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

SYSTEM = ["you are a kind helper", "answer in few words", "you are a pirate , answer like one"]
TURNS = [
    "hello",
    "what is two plus two ?",
    "name a fruit",
    "how do i make tea ?",
    "is it cold on the moon ?",
    "tell me a joke about a cat",
    "can you help me with my garden today ?",
    "what should i read ?",
    "who are you ?",
    "why do birds sing in the morning ?",
]
REPLIES = [
    "hello , how can i help you today ?",
    "four",
    "an apple is a fruit",
    "boil water , then add the tea",
    "yes , very cold",
    "a cat sat on a book",
    "sure , i can help with that",
    "read a good book , it is nice",
    "i am a kind helper",
    "they sing as they are happy",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Args:
    rollout_batch_size: int = 16
    micro_rollout_batch_size: int = 8
    train_batch_size: int = 8
    micro_train_batch_size: int = 4
    max_epochs: int = 2
    prompt_max_len: int = 48
    generate_max_len: int = 12
    temperature: float = 0.9
    init_kl_coef: float = 0.05
    gamma: float = 1.0
    eps_clip: float = 0.2
    actor_learning_rate: float = 2e-5
    max_norm: float = 1.0
    missing_eos_penalty: float = 1.0
    overlong_buffer_len: int = 4
    overlong_penalty_factor: float = 0.5
    rule_reward: bool = False
    seed: int = 42
    flaw: str | None = None
    stop_words: list[str] = field(default_factory=lambda: ["<|endoftext|>", "<|im_end|>"])


# ------------------------------------------------------------------------------------------------ models
def position_ids_from(attention_mask):
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


class Actor(nn.Module):
    def __init__(self, model, args, trainable):
        super().__init__()
        self.model, self.args = model, args
        model.requires_grad_(trainable)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, stop_ids, pad_token_id):
        """Sampling with a KV cache. Rows that have stopped are filled with pad."""
        past, tokens, step_mask = None, input_ids, attention_mask
        position_ids = position_ids_from(attention_mask)
        done, out = torch.zeros(len(input_ids), dtype=torch.bool), []
        for _ in range(self.args.generate_max_len):
            res = self.model(
                input_ids=tokens,
                attention_mask=step_mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=True,
            )
            past = res.past_key_values
            probs = torch.softmax(res.logits[:, -1].float() / self.args.temperature, dim=-1)
            nxt = torch.multinomial(probs, 1).squeeze(1).masked_fill(done, pad_token_id)
            out.append(nxt)
            done = done | (torch.isin(nxt, stop_ids) & ~done)
            tokens, position_ids = nxt[:, None], position_ids[:, -1:] + 1
            step_mask = torch.cat([step_mask, torch.ones_like(step_mask[:, :1])], dim=1)
        return torch.stack(out, dim=1)

    def forward(self, sequences, num_actions, attention_mask):
        """log-probs of the last num_actions tokens"""
        position_ids = None if self.args.flaw == "absolute_positions" else position_ids_from(attention_mask)
        logits = self.model(
            input_ids=sequences, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits.float()
        if self.args.flaw != "temperature_forgotten":
            logits = logits / self.args.temperature
        log_probs = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, sequences[:, 1:].unsqueeze(-1)).squeeze(-1)
        return log_probs[:, -num_actions:]


class RewardModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = GPT2Model(config)
        self.value_head = nn.Linear(config.n_embd, 1, bias=False)
        self.value_head.weight.data.normal_(std=1 / (config.n_embd + 1))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, input_ids, attention_mask):
        h = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids_from(attention_mask)
        ).last_hidden_state
        values = self.value_head(h).squeeze(-1)
        eos_indices = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
        return (values.gather(1, eos_indices).squeeze(1) - self.mean) / self.std


def rule_reward_fn(prompts, responses):
    """politeness and variety, a number a response"""
    scores = []
    for p, r in zip(prompts, responses):
        words, asked = r.split(), set(re.findall(r"\w+", p.split("user")[-1]))
        polite = sum(w in ("help", "happy", "good", "kind", "nice", "sure", "yes") for w in words)
        scores.append(
            0.6 * polite + 0.3 * sum(w in asked for w in words) + 1.5 * len(set(words)) / max(len(words), 1) - 1.5
        )
    return torch.tensor(scores)


# ------------------------------------------------------------------------------------------------ experience
def masked_mean(tensor, mask, dim=None):
    return torch.where(mask, tensor, torch.zeros_like(tensor)).sum(dim) / mask.sum(dim).clamp(min=1)


@dataclass
class Experience:
    sequences: torch.Tensor  # (B, P + T)
    attention_mask: torch.Tensor  # (B, P + T) bool
    action_mask: torch.Tensor  # (B, T) bool
    action_log_probs: torch.Tensor
    base_log_probs: torch.Tensor
    rewards: torch.Tensor  # (B,) shaped score
    kl: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


def compute_reward(r, kl_coef, kl, action_mask, flaw=None):
    sign = 1.0 if flaw == "kl_bonus" else -1.0
    kl_reward = sign * kl_coef * kl * action_mask
    # the last action of each row: not necessarily the last column
    eos_indices = action_mask.size(1) - 1 - action_mask.long().fliplr().argmax(dim=1, keepdim=True)
    last_reward = torch.zeros_like(kl).scatter_(1, eos_indices, r.unsqueeze(1).to(kl.dtype))
    return last_reward + kl_reward


def get_cumulative_returns(rewards, action_mask, gamma):
    rewards, returns = action_mask * rewards, torch.zeros_like(rewards)
    cumulative = torch.zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        cumulative = rewards[:, t] + gamma * cumulative
        returns[:, t] = cumulative
    return returns


class NaiveExperienceMaker:
    def __init__(self, args, actor, initial_model, reward_model, tokenizer):
        self.args, self.actor, self.initial_model, self.reward_model, self.tokenizer = (
            args,
            actor,
            initial_model,
            reward_model,
            tokenizer,
        )
        self.stop_ids = torch.tensor([tokenizer.convert_tokens_to_ids(w) for w in args.stop_words])

    def tokenize_fn(self, prompts):
        enc = self.tokenizer(
            prompts,
            add_special_tokens=self.args.flaw == "double_bos",
            padding=True,
            max_length=self.args.prompt_max_len,
            truncation=True,
            return_tensors="pt",
        )
        return enc["input_ids"], enc["attention_mask"]

    @torch.no_grad()
    def make_experience(self, prompts):
        a = self.args
        self.actor.eval()
        input_ids, prompt_mask = self.tokenize_fn(prompts)
        responses = self.actor.generate(input_ids, prompt_mask, self.stop_ids, self.tokenizer.pad_token_id)
        num_actions = responses.size(1)
        if a.flaw == "one_stop_id_in_mask":
            is_stop = responses == self.tokenizer.eos_token_id
        else:
            is_stop = torch.isin(responses, self.stop_ids)
        action_mask = (is_stop.long().cumsum(1) - is_stop.long()) == 0  # up to and with the first stop id
        sequences = torch.cat([input_ids, responses], dim=1)
        attention_mask = torch.cat([prompt_mask.bool(), action_mask], dim=1)

        action_log_probs = self.actor(sequences, num_actions, attention_mask)
        base_log_probs = self.initial_model(sequences, num_actions, attention_mask)
        if a.rule_reward:
            texts = self.tokenizer.batch_decode(
                [r[m] for r, m in zip(responses, action_mask)], skip_special_tokens=True
            )
            r = self.reward_model(prompts, texts).float()
        else:
            r = self.reward_model(sequences, attention_mask)
        r = r + self.shaping(sequences, responses, action_mask)
        return Experience(
            sequences,
            attention_mask,
            action_mask,
            action_log_probs,
            base_log_probs,
            r,
            kl=action_log_probs - base_log_probs,
        )

    def shaping(self, sequences, responses, action_mask):
        """soft punishment of long answers, and of answers that never stop"""
        a, length = self.args, action_mask.sum(1).float()
        exceed = length - (a.generate_max_len - a.overlong_buffer_len)
        overlong = -(exceed.clamp(min=0) / a.overlong_buffer_len) * a.overlong_penalty_factor
        if a.flaw == "eos_in_prompt_counts":
            has_eos = torch.isin(sequences, self.stop_ids).any(dim=1)
        else:
            has_eos = (torch.isin(responses, self.stop_ids) & action_mask).any(dim=1)
        return overlong - a.missing_eos_penalty * (~has_eos).float()

    def compute_advantages(self, experiences):
        a = self.args
        for exp in experiences:
            reward = compute_reward(exp.rewards, a.init_kl_coef, exp.kl, exp.action_mask, a.flaw)
            exp.returns = get_cumulative_returns(reward, exp.action_mask, a.gamma)
            exp.advantages = (reward if a.flaw == "token_reward_as_advantage" else exp.returns).clone()
        # one mean and one standard deviation for the tokens of the whole rollout batch
        flat = torch.cat([exp.advantages.flatten() for exp in experiences])
        mask = torch.cat([exp.action_mask.flatten() for exp in experiences])
        if a.flaw == "normalise_with_padding":
            mask = torch.ones_like(mask)
        mean = flat[mask].mean()
        rstd = ((flat[mask] - mean) ** 2).mean().clamp(min=1e-8).rsqrt()
        if a.flaw == "normalise_per_sample":
            for exp in experiences:
                mu = masked_mean(exp.advantages, exp.action_mask, 1).unsqueeze(1)
                sd = masked_mean((exp.advantages - mu) ** 2, exp.action_mask, 1).unsqueeze(1).sqrt()
                exp.advantages = (exp.advantages - mu) / (sd + 1e-8) * exp.action_mask
            return
        for exp in experiences:
            exp.advantages = (exp.advantages - mean) * rstd * exp.action_mask


class NaiveReplayBuffer:
    FIELDS = ("sequences", "attention_mask", "action_mask", "action_log_probs", "advantages")

    def __init__(self, pad_token_id):
        self.items, self.pad = [], pad_token_id

    def append(self, exp):
        self.items += [{k: getattr(exp, k)[i] for k in self.FIELDS} for i in range(len(exp.rewards))]

    def collate(self, items):
        """prompts of two rollout micro-batches may be padded to different widths"""
        width = max(len(x["sequences"]) for x in items)
        fill = {"sequences": self.pad, "attention_mask": False}
        return {
            k: torch.stack([F.pad(x[k], (width - len(x[k]), 0), value=fill[k]) if k in fill else x[k] for x in items])
            for k in self.FIELDS
        }

    def micro_batches(self, size):
        order = torch.randperm(len(self.items)).tolist()
        return [self.collate([self.items[i] for i in order[s : s + size]]) for s in range(0, len(order), size)]

    def clear(self):
        self.items.clear()


class PolicyLoss(nn.Module):
    def __init__(self, clip_eps):
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, log_probs, old_log_probs, advantages, action_mask):
        ratio = (log_probs - old_log_probs).exp()
        surr1, surr2 = ratio * advantages, ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * advantages
        return masked_mean(-torch.min(surr1, surr2), action_mask, dim=-1).mean()


class PPOTrainer:
    def __init__(self, args, actor, initial_model, reward_model, tokenizer, prompts):
        self.args, self.actor, self.prompts = args, actor, prompts
        self.experience_maker = NaiveExperienceMaker(args, actor, initial_model, reward_model, tokenizer)
        self.replay_buffer = NaiveReplayBuffer(tokenizer.pad_token_id)
        self.actor_loss_fn = PolicyLoss(args.eps_clip)
        self.actor_optim = torch.optim.AdamW(
            actor.parameters(), lr=args.actor_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def fit_one(self):
        a = self.args
        picked = random.sample(self.prompts, a.rollout_batch_size)
        experiences = [
            self.experience_maker.make_experience(picked[i : i + a.micro_rollout_batch_size])
            for i in range(0, len(picked), a.micro_rollout_batch_size)
        ]
        self.experience_maker.compute_advantages(experiences)
        for exp in experiences:
            self.replay_buffer.append(exp)
        status = self.ppo_train()
        self.replay_buffer.clear()
        status["reward"] = torch.cat([e.rewards for e in experiences]).mean().item()
        status["kl"] = torch.cat([masked_mean(e.kl, e.action_mask, 1) for e in experiences]).mean().item()
        status["response_length"] = torch.cat([e.action_mask.sum(1) for e in experiences]).float().mean().item()
        return status

    def ppo_train(self):
        a, losses = self.args, []
        accumulated_gradient = a.train_batch_size // a.micro_train_batch_size
        self.actor.train()
        self.actor_optim.zero_grad()
        for _ in range(a.max_epochs):
            for i, b in enumerate(self.replay_buffer.micro_batches(a.micro_train_batch_size)):
                log_probs = self.actor(b["sequences"], b["action_mask"].size(1), b["attention_mask"])
                loss = self.actor_loss_fn(log_probs, b["action_log_probs"], b["advantages"], b["action_mask"])
                losses.append(loss.item())
                (loss / accumulated_gradient).backward()
                if (i + 1) % accumulated_gradient == 0:
                    nn.utils.clip_grad_norm_(self.actor.parameters(), a.max_norm)
                    self.actor_optim.step()
                    if a.flaw != "zero_grad_once_per_rollout":
                        self.actor_optim.zero_grad()
        return {"policy_loss": sum(losses) / len(losses)}


# ------------------------------------------------------------------------------------------------ set-up
def build_tokenizer():
    texts = SYSTEM + TURNS + REPLIES + ["system user assistant"]
    special = ["<pad>", "<unk>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]+", t)})
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        truncation_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_prompts(tokenizer, add_generation_prompt=True):
    rnd, prompts = random.Random(0), []
    for i in range(24):
        chat = [{"role": "system", "content": SYSTEM[i % 3]}] if i % 4 else []
        if i % 3 == 0:
            j = rnd.randrange(len(TURNS))
            chat += [{"role": "user", "content": TURNS[j]}, {"role": "assistant", "content": REPLIES[j]}]
        chat.append({"role": "user", "content": TURNS[i % len(TURNS)]})
        prompts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt))
    return prompts


def sft(model, tokenizer, prompts, steps=50):
    """A short SFT on the chat format. Most replies end in <|im_end|>, some in <|endoftext|>, some were cut and have no end."""
    rnd, opt = random.Random(1), torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = []
        for _ in range(8):
            end = rnd.choice(["<|im_end|>", "<|im_end|>", "<|endoftext|>", ""])
            rows.append(
                rnd.choice(prompts) + rnd.choice(REPLIES) + (" " + rnd.choice(REPLIES) if end == "" else "") + end
            )
        enc = tokenizer(rows, add_special_tokens=False, padding=True, return_tensors="pt")
        labels = enc["input_ids"].masked_fill(enc["attention_mask"] == 0, -100)
        out = model(
            input_ids=enc["input_ids"],
            attention_mask=enc["attention_mask"],
            labels=labels,
            position_ids=position_ids_from(enc["attention_mask"]),
        )
        pad_logp = F.log_softmax(out.logits, dim=-1)[..., tokenizer.pad_token_id]
        loss = out.loss + 0.1 * pad_logp.clamp(min=-15).mean()  # the pad is never an answer
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()


def build(**kw):
    args = Args(**kw)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tokenizer = build_tokenizer()
    sft_prompts = build_prompts(tokenizer)
    prompts = build_prompts(tokenizer, add_generation_prompt=args.flaw != "no_generation_prompt")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=96,
        n_embd=40,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = sft(GPT2LMHeadModel(config), tokenizer, sft_prompts)
    lm.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(w) for w in args.stop_words]
    actor = Actor(lm, args, trainable=True)
    initial_model = Actor(copy.deepcopy(lm), args, trainable=False).eval()
    if args.rule_reward:
        reward_model = rule_reward_fn
    else:
        reward_model = RewardModel(config).eval().requires_grad_(False)
    trainer = PPOTrainer(args, actor, initial_model, reward_model, tokenizer, prompts)
    if not args.rule_reward:  # normalize_reward: statistics of the scores under the SFT model
        raw = torch.cat([score_only(trainer.experience_maker, prompts) for _ in range(3)])
        reward_model.mean.fill_(raw.mean().item())
        reward_model.std.fill_(raw.std().item())
    declared = dict(
        algorithm="reinforce++",
        gamma=args.gamma,
        kl_coef=args.init_kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        clip_range=args.eps_clip,
        whiten_advantages=True,
        missing_eos_penalty=args.missing_eos_penalty,
        learning_rate=args.actor_learning_rate,
        ppo_epochs=args.max_epochs,
        num_minibatches=args.rollout_batch_size // args.train_batch_size,
        batch_size=args.rollout_batch_size,
        prompt_length=args.prompt_max_len,
        response_length=args.generate_max_len,
        dtype="float32",
        reference="policy",
        policy_init="sft",
        loss_aggregation="seq-mean",
    )
    return dict(
        policy=actor.model,
        reference=initial_model.model,
        reward=reward_model,
        value=None,
        tokenizer=tokenizer,
        prompts=prompts,
        step=trainer.fit_one,
        optimizers=[trainer.actor_optim],
        state=[trainer.replay_buffer],
        declared=declared,
        functions={"cumulative_returns": get_cumulative_returns},
    )


def score_only(maker, prompts):
    input_ids, mask = maker.tokenize_fn(prompts)
    out = maker.actor.generate(input_ids, mask, maker.stop_ids, maker.tokenizer.pad_token_id)
    stop = torch.isin(out, maker.stop_ids).long()
    return maker.reward_model(torch.cat([input_ids, out], 1), torch.cat([mask.bool(), (stop.cumsum(1) - stop) == 0], 1))


def healthy():
    return build()


def healthy_rule_reward():
    return build(rule_reward=True, gamma=0.98, seed=7)


def absolute_positions():
    return build(flaw="absolute_positions")


def one_stop_id_in_mask():
    return build(flaw="one_stop_id_in_mask")


def temperature_forgotten():
    return build(flaw="temperature_forgotten", temperature=0.6)


def eos_in_prompt_counts():
    return build(flaw="eos_in_prompt_counts")


def kl_bonus():
    return build(flaw="kl_bonus")


def zero_grad_once_per_rollout():
    return build(flaw="zero_grad_once_per_rollout")


def token_reward_as_advantage():
    return build(flaw="token_reward_as_advantage")


def normalise_with_padding():
    return build(flaw="normalise_with_padding", rule_reward=True)


def normalise_per_sample():
    return build(flaw="normalise_per_sample")


def double_bos():
    return build(flaw="double_bos")


def no_generation_prompt():
    return build(flaw="no_generation_prompt")

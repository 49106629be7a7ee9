"""safe-rlhf (PKU-Alignment) style PPOTrainer on Mistral: rollout / post_rollout / rl_step, score models with end_scores."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn, optim
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, MistralModel, PreTrainedTokenizerFast
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel
from transformers.utils import ModelOutput

VOCAB = (
    "BEGINNING OF CONVERSATION USER ASSISTANT : can you help me with my garden garage car code poem essay plan for a the one "
    "short long safe sure sorry i will not do that here is first second third step look at it carefully and then write "
    "down what see thanks no yes maybe never always please stop go on some more ideas to fix paint build"
).split()
PROMPTS = [
    f"BEGINNING OF CONVERSATION : USER : {q} ASSISTANT :"
    for q in (
        "can you help me with my garden",
        "write a poem",
        "fix my car please",
        "build a garage for me and paint it",
        "please help",
        "some more ideas for the essay",
        "what is the plan to fix that code here",
        "stop",
        "can you write one short essay and one long poem",
        "look at my code",
        "paint it",
        "never do that please",
        "is it safe to do it",
        "yes please go on",
        "what do you see",
        "a plan to build a safe garden carefully",
    )
]


def load_tokenizer():
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    for w in VOCAB:
        vocab.setdefault(w, len(vocab))
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


@dataclass
class ScoreModelOutput(ModelOutput):
    scores: torch.Tensor | None = None  # size = (B, L, D)
    end_scores: torch.Tensor | None = None  # size = (B, D)
    last_hidden_state: torch.Tensor | None = None
    end_index: torch.Tensor | None = None  # size = (B,)


class MistralForScore(MistralPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = MistralModel(config)
        self.score_head = nn.Linear(config.hidden_size, config.score_dim, bias=True)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        scores = self.score_head(hidden).float()
        end_index = torch.cat([m.nonzero()[-1] for m in attention_mask])
        end_scores = torch.gather(scores, 1, end_index.view(-1, 1, 1).expand(-1, -1, scores.size(-1))).squeeze(1)
        return ScoreModelOutput(scores=scores, end_scores=end_scores, last_hidden_state=hidden, end_index=end_index)


class Engine:
    """What deepspeed.initialize hands back, for one process: backward() and step() of one model."""

    def __init__(self, module, optimizer, lr_scheduler, gradient_clipping=1.0):
        self.module, self.optimizer, self.lr_scheduler, self.clipping = (
            module,
            optimizer,
            lr_scheduler,
            gradient_clipping,
        )

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        nn.utils.clip_grad_norm_(self.module.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()


def gather_log_probabilities(logits, labels):
    return F.log_softmax(logits, dim=-1).gather(dim=-1, index=labels.unsqueeze(dim=-1)).squeeze(dim=-1)


def masked_mean(x, mask):
    return ((x * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()


class PPOTrainer:
    kl_coeff, gamma, gae_lambda = 0.02, 1.0, 0.95
    clip_range_ratio, clip_range_score, clip_range_value = 0.2, 50.0, 5.0
    update_iters, train_batch_size = 2, 8

    def __init__(self, actor, reference, reward, critic, tokenizer, generation_config, fault=None):
        self.actor_model, self.actor_reference_model = actor, reference
        self.reward_model, self.reward_critic_model = reward, critic
        self.tokenizer, self.generation_config, self.fault = tokenizer, generation_config, fault

    def train_step(self):
        order = torch.randperm(len(PROMPTS))
        batch = self.tokenizer([PROMPTS[i] for i in order], padding=True, return_tensors="pt")
        self.set_train(False)
        rl_batches = self.split_rl_micro_batches(self.rollout(batch["input_ids"], batch["attention_mask"]))
        self.set_train(True)
        infos = []
        for _ in range(self.update_iters):
            for rl_batch in rl_batches:
                infos.append(self.rl_step(rl_batch))
        return {k: sum(i[k] for i in infos) / len(infos) for k in infos[0]}

    def set_train(self, mode):
        self.actor_model.module.train(mode)
        self.reward_critic_model.module.train(mode)

    @torch.no_grad()
    def rollout(self, prompt, prompt_mask):
        sequence = self.actor_model.module.generate(
            input_ids=prompt, attention_mask=prompt_mask, generation_config=self.generation_config
        )
        attention_mask = sequence.not_equal(self.tokenizer.pad_token_id)
        return self.post_rollout(prompt, sequence, attention_mask)

    @torch.no_grad()
    def post_rollout(self, prompt, sequence, attention_mask):
        logits = self.actor_model(sequence, attention_mask=attention_mask).logits
        ref_logits = self.actor_reference_model(sequence, attention_mask=attention_mask).logits
        reward = self.reward_model(sequence, attention_mask=attention_mask).end_scores
        scores = self.reward_critic_model(sequence, attention_mask=attention_mask).scores
        return {
            "prompt": prompt,
            "log_probs": gather_log_probabilities(logits[:, :-1], sequence[:, 1:]),
            "ref_log_probs": gather_log_probabilities(ref_logits[:, :-1], sequence[:, 1:]),
            "reward": reward.squeeze(dim=-1),
            "reward_values": scores.squeeze(dim=-1)[:, :-1],
            "input_ids": sequence,
            "attention_mask": attention_mask,
        }

    def split_rl_micro_batches(self, batch):
        split = {k: v.split(self.train_batch_size) for k, v in batch.items()}
        return [dict(zip(split, parts)) for parts in zip(*split.values())]

    def add_kl_divergence_regularization(self, reward, log_probs, ref_log_probs, sequence_mask):
        end_index = torch.cat([m.nonzero()[-1] for m in sequence_mask])  # size = (B,)
        if self.fault == "score_on_last_column":
            end_index = torch.full_like(end_index, sequence_mask.size(-1) - 1)
        kl_divergence_estimate = log_probs - ref_log_probs  # size = (B, L)
        kl_penalty_rewards = -self.kl_coeff * kl_divergence_estimate
        if self.fault == "kl_halved":  # the other half went to the cost, in PPO-Lag
            kl_penalty_rewards = kl_penalty_rewards / 2
        rewards = torch.scatter_add(
            kl_penalty_rewards,
            dim=-1,
            index=end_index.unsqueeze(dim=-1),
            src=reward.to(kl_penalty_rewards.dtype).unsqueeze(dim=-1),
        )
        return torch.clamp(rewards, min=-self.clip_range_score, max=self.clip_range_score)

    def get_advantages_and_returns(self, values, rewards, sequence_mask, start):
        last_gae_lambda = 0.0
        advantages_reversed = []
        values = values * sequence_mask
        rewards = rewards * sequence_mask
        length = rewards.size(-1)
        for t in reversed(range(start, length)):
            next_values = values[:, t + 1] if t < length - 1 else 0.0
            delta = rewards[:, t] + self.gamma * next_values - values[:, t]
            last_gae_lambda = delta + self.gamma * self.gae_lambda * last_gae_lambda
            advantages_reversed.append(last_gae_lambda)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        returns = advantages + values[:, start:]
        return advantages.detach(), returns

    def actor_loss_fn(self, log_probs, old_log_probs, advantages, mask):
        ratios = torch.exp(log_probs - old_log_probs)
        surrogate1 = advantages * ratios
        surrogate2 = advantages * torch.clamp(ratios, 1.0 - self.clip_range_ratio, 1.0 + self.clip_range_ratio)
        return -masked_mean(torch.minimum(surrogate1, surrogate2), mask)

    def critic_loss_fn(self, values, old_values, returns, mask):
        values_clipped = torch.clamp(values, old_values - self.clip_range_value, old_values + self.clip_range_value)
        vf_loss1 = torch.square(values - returns)
        vf_loss2 = torch.square(values_clipped - returns)
        return 0.5 * masked_mean(torch.maximum(vf_loss1, vf_loss2), mask)

    def rl_step(self, rl_batch):
        old_log_probs, ref_log_probs = rl_batch["log_probs"], rl_batch["ref_log_probs"]
        reward, old_reward_values = rl_batch["reward"], rl_batch["reward_values"]
        input_ids, attention_mask = rl_batch["input_ids"], rl_batch["attention_mask"]
        start = rl_batch["prompt"].size(-1) - 1
        sequence_mask = attention_mask[:, 1:]
        with torch.no_grad():
            old_rewards = self.add_kl_divergence_regularization(reward, old_log_probs, ref_log_probs, sequence_mask)
            advantages, returns = self.get_advantages_and_returns(old_reward_values, old_rewards, sequence_mask, start)
        logits = self.actor_model(input_ids, attention_mask=attention_mask, use_cache=False).logits
        log_probs = gather_log_probabilities(logits[:, :-1], input_ids[:, 1:])
        actor_loss = self.actor_loss_fn(
            log_probs[:, start:], old_log_probs[:, start:], advantages, sequence_mask[:, start:]
        )
        self.actor_model.backward(actor_loss)
        self.actor_model.step()
        reward_values = self.reward_critic_model(input_ids, attention_mask=attention_mask).scores.squeeze(-1)[:, :-1]
        critic_loss = self.critic_loss_fn(
            reward_values[:, start:], old_reward_values[:, start:], returns, sequence_mask[:, start:]
        )
        self.reward_critic_model.backward(critic_loss)
        self.reward_critic_model.step()
        with torch.no_grad():
            kl = ((old_log_probs - ref_log_probs) * sequence_mask)[:, start:].sum(-1).mean()
        return {
            "train/actor_loss": actor_loss.item(),
            "train/reward_critic_loss": critic_loss.item(),
            "train/reward": reward.mean().item(),
            "train/kl_divergence": kl.item(),
        }


def make(fault=None):
    torch.manual_seed(42)
    tok = load_tokenizer()
    cfg = MistralConfig(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.12,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    actor = MistralForCausalLM(cfg)
    with torch.no_grad():  # some answers end before the limit, none says <pad>
        actor.model.embed_tokens.weight[:, 0] += 1.2
        for layer in actor.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        actor.lm_head.weight[:, 0] = 0.0
        actor.lm_head.weight[tok.eos_token_id, 0], actor.lm_head.weight[tok.pad_token_id, 0] = 0.45, -6.0
    reference = copy.deepcopy(actor).eval().requires_grad_(False)
    score_cfg = copy.deepcopy(cfg)
    score_cfg.score_dim, score_cfg.architectures = 1, ["MistralForScore"]
    reward = MistralForScore(score_cfg)
    with torch.no_grad():
        reward.score_head.weight.mul_(1.4)
    critic = copy.deepcopy(reward)
    reward.eval().requires_grad_(False)

    actor_opt = optim.AdamW(actor.parameters(), lr=9.65e-6, betas=(0.9, 0.95), weight_decay=0.01)
    critic_opt = optim.AdamW(critic.parameters(), lr=5e-6, betas=(0.9, 0.95), weight_decay=0.0)
    engines = [
        Engine(m, o, optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=400))
        for m, o in ((actor, actor_opt), (critic, critic_opt))
    ]
    generation = GenerationConfig(
        max_new_tokens=14,
        do_sample=True,
        temperature=1.0,
        repetition_penalty=1.0,
        top_p=1.0,
        top_k=20 if fault == "top_k_in_rollout" else 0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    trainer = PPOTrainer(engines[0], reference, reward, engines[1], tok, generation, fault)
    return {
        "policy": actor,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tok,
        "prompts": PROMPTS,
        "optimizers": [actor_opt, critic_opt],
        "state": [e.lr_scheduler for e in engines],
        "step": trainer.train_step,
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.95,
            "kl_coef": 0.02,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "clip_range": 0.2,
            "clip_range_value": 5.0,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "whiten_advantages": False,
            "loss_aggregation": "seq-mean",
            "value_init": "reward",
            "learning_rate": 9.65e-6,
            "critic_learning_rate": 5e-6,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 16,
            "response_length": 14,
        },
    }


def healthy():
    return make()


def score_on_last_column():
    return make("score_on_last_column")


def kl_halved():
    return make("kl_halved")


def top_k_in_rollout():
    return make("top_k_in_rollout")

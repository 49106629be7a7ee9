"""PPO in the manner of DeepSpeed-Chat's step 3: OPT models, engines, generate_experience and train_rlhf, an EMA actor."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedTokenizerFast

HUMAN = [
    "what is the best way to boil an egg", "tell me a joke", "how tall is that hill", "where can I learn to swim",
    "is coffee bad for me", "help me write a letter to my aunt", "what do cats dream of", "who wrote this song",
    "which plants like shade", "give me a name for my boat", "how long does paint dry", "why do we yawn",
    "what should I pack for a week in the north", "can I keep bees in a city", "how do clouds form", "is it late",
]  # fmt: skip
ANSWERS = (
    "sure yes no maybe you could try some fresh salt and then wait until it turns soft they grow slowly because of heat"
)


def get_tokenizer():
    tok = Tokenizer(WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = Whitespace()
    corpus = [f"Human {q} Assistant" for q in HUMAN] + [ANSWERS]
    tok.train_from_iterator(corpus, WordLevelTrainer(special_tokens=["</s>", "<pad>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.padding_side = "left"
    return tokenizer


def init_normal(model, std):
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)


def opt_config(tokenizer, hidden, layers):
    return OPTConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, ffn_dim=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, layerdrop=0.0, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip


def create_hf_actor(tokenizer):
    model = OPTForCausalLM(opt_config(tokenizer, 40, 2))
    model.lm_head = nn.Linear(40, len(tokenizer))
    init_normal(model, 0.15)
    with torch.no_grad():  # stands for SFT: it ends by itself, and never says <pad> or <unk>
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 2.6
        model.lm_head.bias[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = -20.0
    return model


class RewardModel(nn.Module):
    """OPT with v_head; the critic is a second one of the same class."""

    def __init__(self, base_model, tokenizer, fault=None):
        super().__init__()
        self.config = base_model.config
        self.rwtransformer = base_model
        self.v_head = nn.Linear(self.config.word_embed_proj_dim, 1, bias=False)
        self.PAD_ID = tokenizer.pad_token_id
        self.fault = fault

    def forward(self, input_ids, attention_mask=None):
        """The pairwise loss of step 2: the first half of the rows is chosen, the second half rejected."""
        scores = self.forward_value(input_ids, attention_mask, prompt_length=2)["chosen_end_scores"]
        chosen, rejected = scores.chunk(2)
        return {
            "loss": -F.logsigmoid(chosen - rejected).mean(),
            "chosen_mean_scores": chosen,
            "rejected_mean_scores": rejected,
        }

    def forward_value(self, input_ids, attention_mask=None, prompt_length=0, return_value_only=False):
        hidden_states = self.rwtransformer(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        values = self.v_head(hidden_states).squeeze(-1)
        if return_value_only:
            return values
        # prompt_length as the rows are padded on the left; the answer ends before its first pad
        assert prompt_length > 1
        bs, seq_len = input_ids.shape
        chosen_end_scores = []
        for i in range(bs):
            c_inds = (input_ids[i][prompt_length:] == self.PAD_ID).nonzero()
            c_ind = c_inds[0].item() + prompt_length if len(c_inds) > 0 else seq_len
            if self.fault == "score_at_first_pad":
                c_ind = min(c_ind + 1, seq_len)
            chosen_end_scores.append(values[i][c_ind - 1])
        return {"values": values, "chosen_end_scores": torch.stack(chosen_end_scores)}


class Engine:
    """The little of a DeepSpeed engine that PPO uses."""

    def __init__(self, module, optimizer, lr_scheduler, gradient_clipping=1.0, fault=None):
        self.module, self.optimizer, self.lr_scheduler = module, optimizer, lr_scheduler
        self.gradient_clipping, self.fault = gradient_clipping, fault

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def forward_value(self, *args, **kwargs):
        return self.module.forward_value(*args, **kwargs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_clipping)
        self.optimizer.step()
        if self.fault != "engine_keeps_gradients":
            self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()


class DeepSpeedRLHFEngine:
    def __init__(self, args, tokenizer, fault=None):
        self.args = args
        actor = create_hf_actor(tokenizer)
        self.ref = copy.deepcopy(actor).eval().requires_grad_(False)
        self.actor_ema = copy.deepcopy(actor).eval().requires_grad_(False)

        base = OPTModel(opt_config(tokenizer, 32, 2))
        init_normal(base, 0.25)
        self.reward = RewardModel(base, tokenizer, fault)
        centre_head(self.reward, actor, tokenizer, args["max_answer_seq_len"])
        if fault == "critic_is_the_reward_model":
            critic = self.reward
        else:
            critic = copy.deepcopy(self.reward)  # the same checkpoint, loaded twice
            self.reward.requires_grad_(False)
        self.reward.eval()

        self.actor = self._engine(actor, args["actor_learning_rate"], fault)
        self.critic = self._engine(critic, args["critic_learning_rate"], fault)

    def _engine(self, model, lr, fault):
        decay = [p for p in model.parameters() if p.dim() > 1]
        no_decay = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400, eta_min=0.1 * lr)
        return Engine(model, optimizer, scheduler, fault=fault)


@torch.no_grad()
def centre_head(reward, actor, tokenizer, answer_len):
    """Scores of mean 0 and standard deviation 1 on the first actor's answers."""
    prompts = tokenizer([f"Human {q} Assistant" for q in HUMAN] * 4, padding=True, return_tensors="pt")
    ids = actor.generate(
        prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=answer_len, do_sample=True, top_k=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    mask = ids.not_equal(tokenizer.pad_token_id).long()
    last = ids.shape[1] - 1 - mask.flip(1).argmax(1)
    h = reward.rwtransformer(ids, attention_mask=mask)[0][torch.arange(len(ids)), last]
    mean, w = h.mean(0), torch.randn(h.size(1))
    w = w - (w @ mean) / (mean @ mean) * mean
    reward.v_head.weight.copy_((w / (h @ w).std()).unsqueeze(0))


def gather_log_probs(logits, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    return log_probs.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def moving_average(model, model_ema, beta=0.992):
    for param, param_ema in zip(model.parameters(), model_ema.parameters()):
        param_ema.data.copy_(torch.lerp(param.data, param_ema.data, beta))


class DeepSpeedPPOTrainer:
    def __init__(self, rlhf_engine, tokenizer, args, fault=None):
        self.rlhf_engine, self.tokenizer, self.args, self.fault = rlhf_engine, tokenizer, args, fault
        self.actor_model, self.critic_model = rlhf_engine.actor, rlhf_engine.critic
        self.ref_model, self.reward_model = rlhf_engine.ref, rlhf_engine.reward
        self.max_answer_seq_len = args["max_answer_seq_len"]

        # Those value can be changed
        self.kl_ctl = 0.1
        self.clip_reward_value = 5
        self.cliprange = 0.2
        self.cliprange_value = 0.2
        self.gamma = 1.0
        self.lam = 0.95

    def _logprobs(self, logits, seq):
        if self.fault == "bf16_loss":
            logits = logits.to(torch.bfloat16)  # compute_fp32_loss is off
        if self.fault == "logits_not_shifted":
            return gather_log_probs(logits[:, 1:, :], seq[:, 1:])
        return gather_log_probs(logits[:, :-1, :], seq[:, 1:])

    def _generate_sequence(self, prompts, mask):
        seq = self.actor_model.module.generate(
            prompts, attention_mask=mask, max_new_tokens=self.max_answer_seq_len, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        self.prompt_length = prompts.shape[1]
        return seq

    def generate_experience(self, prompts, mask):
        self.eval()
        with torch.no_grad():
            seq = self._generate_sequence(prompts, mask)
            attention_mask = seq.not_equal(self.tokenizer.pad_token_id).long()
            output = self.actor_model(seq, attention_mask=attention_mask)
            output_ref = self.ref_model(seq, attention_mask=attention_mask)
            reward_score = self.reward_model.forward_value(seq, attention_mask, prompt_length=self.prompt_length)[
                "chosen_end_scores"
            ].detach()
            values = self.critic_model.forward_value(seq, attention_mask, return_value_only=True).detach()[:, :-1]
        return {
            "prompts": prompts,
            "logprobs": self._logprobs(output.logits, seq),
            "ref_logprobs": self._logprobs(output_ref.logits, seq),
            "value": values,
            "rewards": reward_score,
            "input_ids": seq,
            "attention_mask": attention_mask,
        }

    def compute_rewards(self, prompts, log_probs, ref_log_probs, reward_score, action_mask):
        if self.fault == "kl_operands_exchanged":
            rewards = -self.kl_ctl * (ref_log_probs - log_probs)
        else:
            rewards = -self.kl_ctl * (log_probs - ref_log_probs)
        start = prompts.shape[1] - 1
        ends = start + action_mask[:, start:].sum(1)
        limit = self.cliprange if self.fault == "scores_clipped_by_cliprange" else self.clip_reward_value
        reward_clip = torch.clamp(reward_score, -limit, limit)
        for j in range(log_probs.shape[0]):
            rewards[j, start : ends[j]][-1] += reward_clip[j]
        return rewards

    def train_rlhf(self, inputs):
        prompts, seq, attention_mask = inputs["prompts"], inputs["input_ids"], inputs["attention_mask"]
        log_probs, ref_log_probs = inputs["logprobs"], inputs["ref_logprobs"]
        reward_score, old_values = inputs["rewards"], inputs["value"].clone()
        start = prompts.size(-1) - 1
        action_mask = attention_mask[:, 1:]

        with torch.no_grad():
            old_rewards = self.compute_rewards(prompts, log_probs, ref_log_probs, reward_score, action_mask)
            ends = start + action_mask[:, start:].sum(1)
            if self.fault == "step_after_the_end":
                ends = ends + 1
            # the reward and the value after the end of the conversation are zero, or advantages and returns are wrong
            for i in range(old_rewards.shape[0]):
                old_rewards[i, ends[i] :] = 0
                old_values[i, ends[i] :] = 0
            advantages, returns = self.get_advantages_and_returns(old_values, old_rewards, start)

        batch = {"input_ids": seq, "attention_mask": attention_mask}
        actor_prob = self.actor_model(**batch, use_cache=False).logits
        actor_log_prob = self._logprobs(actor_prob, seq)
        actor_loss = self.actor_loss_fn(
            actor_log_prob[:, start:], log_probs[:, start:], advantages, action_mask[:, start:]
        )
        self.actor_model.backward(actor_loss)
        self.actor_model.step()

        value = self.critic_model.forward_value(**batch, return_value_only=True)[:, :-1]
        critic_mask = attention_mask[:, :-1] if self.fault == "critic_mask_of_states" else action_mask
        critic_loss = self.critic_loss_fn(value[:, start:], old_values[:, start:], returns, critic_mask[:, start:])
        self.critic_model.backward(critic_loss)
        self.critic_model.step()
        return actor_loss.item(), critic_loss.item()

    def actor_loss_fn(self, logprobs, old_logprobs, advantages, mask):
        log_ratio = (logprobs - old_logprobs) * mask
        ratio = torch.exp(log_ratio)
        pg_loss1 = -advantages * ratio
        pg_loss2 = -advantages * torch.clamp(ratio, 1.0 - self.cliprange, 1.0 + self.cliprange)
        return torch.sum(torch.max(pg_loss1, pg_loss2) * mask) / mask.sum()

    def critic_loss_fn(self, values, old_values, returns, mask):
        values_clipped = torch.clamp(values, old_values - self.cliprange_value, old_values + self.cliprange_value)
        vf_loss1 = (values - returns) ** 2
        vf_loss2 = (values_clipped - returns) ** 2
        return 0.5 * torch.sum(torch.max(vf_loss1, vf_loss2) * mask) / mask.sum()

    def get_advantages_and_returns(self, values, rewards, start):
        # Adopted from trlx
        lastgaelam = 0
        advantages_reversed = []
        length = rewards.size()[-1]
        for t in reversed(range(start, length)):
            nextvalues = values[:, t + 1] if t < length - 1 else 0.0
            delta = rewards[:, t] + self.gamma * nextvalues - values[:, t]
            lastgaelam = delta + self.gamma * self.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        returns = advantages + values[:, start:]
        return advantages.detach(), returns

    def eval(self):
        for model in (self.actor_model.module, self.critic_model.module, self.reward_model, self.ref_model):
            model.eval()

    def train(self):
        self.actor_model.module.train()
        self.critic_model.module.train()


class MiniDataset:
    """Generation batches, cut into training batches."""

    def __init__(self, small_batch_size):
        self.small_batch_size, self.dataset = small_batch_size, []

    def add(self, data):
        n = data["input_ids"].shape[0]
        for i in range(0, n, self.small_batch_size):
            self.dataset.append({k: v[i : i + self.small_batch_size] for k, v in data.items()})


class PromptSampler:
    """Shuffles the prompts anew for every pass over them."""

    def __init__(self, n):
        self.n, self.left = n, []

    def take(self, k):
        if len(self.left) < k:
            self.left = torch.randperm(self.n).tolist()
        taken, self.left = self.left[:k], self.left[k:]
        return taken

    def state_dict(self):
        return {"left": list(self.left)}

    def load_state_dict(self, state):
        self.left = list(state["left"])


def make(fault=None):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    args = {
        "per_device_generation_batch_size": 8, "generation_batches": 2, "per_device_training_batch_size": 4, "ppo_epochs": 2,
        "max_prompt_seq_len": 12, "max_answer_seq_len": 12, "actor_learning_rate": 1e-4, "critic_learning_rate": 2e-4,
        "enable_ema": True,
    }  # fmt: skip
    tokenizer = get_tokenizer()
    prompt_texts = [f"Human {q} Assistant" for q in HUMAN]
    rlhf_engine = DeepSpeedRLHFEngine(args, tokenizer, fault)
    trainer = DeepSpeedPPOTrainer(rlhf_engine, tokenizer, args, fault)
    sampler = PromptSampler(len(prompt_texts))

    def step():
        exp_mini_dataset, scores = MiniDataset(args["per_device_training_batch_size"]), []
        for _ in range(args["generation_batches"]):
            texts = [prompt_texts[i] for i in sampler.take(args["per_device_generation_batch_size"])]
            batch = tokenizer(texts, padding="max_length", max_length=args["max_prompt_seq_len"], return_tensors="pt")
            out = trainer.generate_experience(batch["input_ids"], batch["attention_mask"])
            scores.append(out["rewards"])
            exp_mini_dataset.add(out)
        trainer.train()
        exp_dataset, actor_losses, critic_losses = exp_mini_dataset.dataset, [], []
        for _ in range(args["ppo_epochs"]):
            for exp_data in exp_dataset:
                actor_loss, critic_loss = trainer.train_rlhf(exp_data)
                actor_losses.append(actor_loss)
                critic_losses.append(critic_loss)
                if args["enable_ema"]:
                    if fault == "ema_into_reference":
                        moving_average(rlhf_engine.actor.module, rlhf_engine.ref)
                    else:
                        moving_average(rlhf_engine.actor.module, rlhf_engine.actor_ema)
            random.shuffle(exp_dataset)
        return {
            "actor_loss": sum(actor_losses) / len(actor_losses),
            "critic_loss": sum(critic_losses) / len(critic_losses),
            "average_reward_score": torch.cat(scores).mean().item(),
        }

    def score(model, ids, mask):
        leading = int((mask.cumsum(1) == 0).sum(1).max())
        return model.forward_value(ids, mask, prompt_length=max(leading, 2))["chosen_end_scores"]

    return {
        "policy": rlhf_engine.actor.module,
        "reference": rlhf_engine.ref,
        "reward": rlhf_engine.reward,
        "value": rlhf_engine.critic.module,
        "tokenizer": tokenizer,
        "prompts": prompt_texts,
        "optimizers": [rlhf_engine.actor.optimizer, rlhf_engine.critic.optimizer],
        "state": [sampler, rlhf_engine.actor_ema, rlhf_engine.actor.lr_scheduler, rlhf_engine.critic.lr_scheduler],
        "step": step,
        "calls": {
            "reward": score,
            "value": lambda model, ids, mask: model.forward_value(ids, mask, return_value_only=True),
        },
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward",
            "temperature": 1.0, "clip_range": 0.2, "clip_range_value": 0.2, "reward_clip": 5, "whiten_advantages": False,
            "learning_rate": args["actor_learning_rate"], "critic_learning_rate": args["critic_learning_rate"],
            "ppo_epochs": args["ppo_epochs"], "num_minibatches": 4, "batch_size": 16,
            "prompt_length": args["max_prompt_seq_len"], "response_length": args["max_answer_seq_len"],
        },
    }  # fmt: skip


def healthy():
    return make()


def step_after_the_end():
    return make("step_after_the_end")


def critic_mask_of_states():
    return make("critic_mask_of_states")


def scores_clipped_by_cliprange():
    return make("scores_clipped_by_cliprange")


def ema_into_reference():
    return make("ema_into_reference")


def engine_keeps_gradients():
    return make("engine_keeps_gradients")


def score_at_first_pad():
    return make("score_at_first_pad")


def logits_not_shifted():
    return make("logits_not_shifted")


def bf16_loss():
    return make("bf16_loss")


def critic_is_the_reward_model():
    return make("critic_is_the_reward_model")


def kl_operands_exchanged():
    return make("kl_operands_exchanged")

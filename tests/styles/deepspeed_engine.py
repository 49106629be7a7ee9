"""Step 3 of a three-stage RLHF pipeline in the manner of DeepSpeed-Chat: four engines, an experience maker, a PPO trainer.

Only the engine is our own (a few lines around torch, so that it runs on one CPU); everything else follows the shape of the original:
prompts padded on the left to max_prompt_seq_len, answers padded on the right, RewardModel with `v_head` used both as reward model and
critic, compute_rewards / get_advantages_and_returns with start and ends indices, optional unsupervised (ptx) loss.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedTokenizerFast


# ------------------------------------------------------------------------------------------------------------- engines
class Engine:
    """What deepspeed.initialize gives back, as far as this pipeline needs it."""

    def __init__(self, module, ds_config, optimizer=None):
        self.module, self.optimizer = module, optimizer
        self.gas = ds_config["gradient_accumulation_steps"]
        self.clip = ds_config["gradient_clipping"]
        self.zero_grad_on_step = ds_config.get("zero_grad_on_step", True)
        self.micro_steps = 0

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def __getattr__(self, name):
        if name in ("module", "optimizer"):
            raise AttributeError(name)
        return getattr(self.module, name)

    def train(self):
        self.module.train()

    def eval(self):
        self.module.eval()

    def backward(self, loss):
        (loss / self.gas).backward()

    def step(self):
        self.micro_steps += 1
        if self.micro_steps % self.gas:
            return
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        if self.zero_grad_on_step:
            self.optimizer.zero_grad()


class RewardModel(nn.Module):
    def __init__(self, base_model, tokenizer, read_last_column=False):
        super().__init__()
        self.config = base_model.config
        self.v_head = nn.Linear(self.config.word_embed_proj_dim, 1, bias=False)
        self.rwtransformer = base_model
        self.PAD_ID = tokenizer.pad_token_id
        self.read_last_column = read_last_column

    def forward_value(self, input_ids, attention_mask=None, prompt_length=0, return_value_only=False):
        hidden_states = self.rwtransformer(input_ids, attention_mask=attention_mask, use_cache=False)[0]
        values = self.v_head(hidden_states).squeeze(-1)
        if return_value_only:
            return values
        assert prompt_length > 1, "prompt_length must be greater than 1 to help select the end score"
        seq_len, chosen_end_scores = input_ids.shape[1], []
        for input_id, value in zip(input_ids, values):
            c_inds = (input_id[prompt_length:] == self.PAD_ID).nonzero()
            # the first pad of the answer, or the end
            c_ind = c_inds[0].item() + prompt_length if len(c_inds) > 0 else seq_len
            if self.read_last_column:
                c_ind = seq_len
            chosen_end_scores.append(value[c_ind - 1])
        return {"values": values, "chosen_end_scores": torch.stack(chosen_end_scores)}

    def forward(self, input_ids, attention_mask=None):
        return self.forward_value(input_ids, attention_mask, return_value_only=True)


class DeepSpeedRLHFEngine:
    def __init__(self, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.ds_config = dict(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=1.0,
            zero_grad_on_step=args.engine_zero_grad,
        )
        torch.manual_seed(args.seed)
        sft = self._causal_lm()
        rw_state = self._reward(args).state_dict()

        actor = self._causal_lm()
        actor.load_state_dict(sft.state_dict())
        self.actor = Engine(
            actor,
            self.ds_config,
            torch.optim.AdamW(
                actor.parameters(), lr=args.actor_learning_rate, betas=(0.9, 0.95), weight_decay=args.actor_weight_decay
            ),
        )
        ref = self._causal_lm()
        ref.load_state_dict(sft.state_dict())
        self.ref = Engine(ref, self.ds_config)
        critic, reward = self._reward(args), self._reward(args)
        critic.load_state_dict(rw_state)
        reward.load_state_dict(rw_state)
        if not args.critic_optimizer_on_reward:
            params = critic.parameters()
        else:
            params = reward.parameters()
        self.critic = Engine(
            critic,
            self.ds_config,
            torch.optim.AdamW(
                params, lr=args.critic_learning_rate, betas=(0.9, 0.95), weight_decay=args.critic_weight_decay
            ),
        )
        self.reward = Engine(reward, self.ds_config)
        ref.requires_grad_(False)
        if not args.critic_optimizer_on_reward:
            reward.requires_grad_(False)
        self.ref.eval()
        self.reward.eval()

    def _config(self):
        a, t = self.args, self.tokenizer
        drop = 0.0 if a.disable_dropout else 0.1
        return OPTConfig(
            vocab_size=len(t),
            hidden_size=48,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            dropout=drop,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            init_std=0.12,
            tie_word_embeddings=False,
            bos_token_id=t.bos_token_id,
            eos_token_id=t.eos_token_id,
            pad_token_id=1,
        )

    def _causal_lm(self):
        model = OPTForCausalLM(self._config())
        norm = model.model.decoder.final_layer_norm
        with torch.no_grad():  # unit 0 is a constant: gives the head a bias
            norm.weight[0], norm.bias[0] = 0.0, 1.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[[1, 3], 0] = -25.0  # <pad> and <unk> are never said
            model.lm_head.weight[self.tokenizer.eos_token_id, 0] = 2.3
        return model

    def _reward(self, args):
        model = RewardModel(OPTModel(self._config()), self.tokenizer, args.reward_reads_last_column)
        nn.init.normal_(model.v_head.weight, std=0.2)
        return model


# ------------------------------------------------------------------------------------------------------------- trainer
def gather_log_probs(logits, labels):
    log_probs = F.log_softmax(logits, dim=-1)
    return log_probs.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)


class DeepSpeedPPOTrainer:
    def __init__(self, rlhf_engine, args):
        self.rlhf_engine = rlhf_engine
        self.actor_model = rlhf_engine.actor
        self.critic_model = rlhf_engine.critic
        self.ref_model = rlhf_engine.ref
        self.reward_model = rlhf_engine.reward
        self.tokenizer, self.args = rlhf_engine.tokenizer, args
        self.max_answer_seq_len = args.max_answer_seq_len
        self.kl_ctl = args.kl_ctl
        self.clip_reward_value = 5
        self.cliprange = 0.2
        self.cliprange_value = 0.2
        self.gamma = args.gamma
        self.lam = 0.95

    def _generate_sequence(self, prompts, mask):
        max_length = self.max_answer_seq_len + prompts.shape[1]
        with torch.no_grad():
            seq = self.actor_model.module.generate(
                prompts,
                attention_mask=mask,
                max_length=max_length,
                do_sample=True,
                top_k=0,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        seq = F.pad(seq, (0, max_length - seq.shape[1]), value=self.tokenizer.pad_token_id)
        valid_ans_len = seq[:, prompts.shape[1] :].not_equal(self.tokenizer.pad_token_id).sum(dim=-1)
        return seq[valid_ans_len > 0]  # filter out seq with no answers

    def generate_experience(self, prompts, mask):
        self.eval()
        seq = self._generate_sequence(prompts, mask)
        self.train()
        pad_token_id = self.tokenizer.pad_token_id
        attention_mask = seq.not_equal(pad_token_id).long()
        with torch.no_grad():
            output = self.actor_model(seq, attention_mask=attention_mask)
            output_ref = self.ref_model(seq, attention_mask=attention_mask)
            reward_score = self.reward_model.forward_value(seq, attention_mask, prompt_length=prompts.shape[1])[
                "chosen_end_scores"
            ].detach()
            values = self.critic_model.forward_value(seq, attention_mask, return_value_only=True).detach()[:, :-1]
        self.train()
        return {
            "prompts": prompts,
            "logprobs": self._log_probs(output.logits, seq),
            "ref_logprobs": self._log_probs(output_ref.logits, seq),
            "value": values,
            "rewards": reward_score,
            "input_ids": seq,
            "attention_mask": attention_mask,
        }

    def _log_probs(self, logits, seq):
        labels = seq[:, :-1] if self.args.labels_not_shifted else seq[:, 1:]
        return gather_log_probs(logits[:, :-1, :], labels)

    def compute_rewards(self, prompts, log_probs, ref_log_probs, reward_score, action_mask):
        kl_divergence_estimate = -self.kl_ctl * (log_probs - ref_log_probs)
        if self.args.kl_bonus:
            kl_divergence_estimate = -kl_divergence_estimate
        rewards = kl_divergence_estimate
        start = prompts.shape[1] - 1
        ends = start + action_mask[:, start:].sum(1)
        reward_clip = torch.clamp(reward_score, -self.clip_reward_value, self.clip_reward_value)
        batch_size = log_probs.shape[0]
        for j in range(batch_size):
            if self.args.score_in_last_column:
                rewards[j, -1] += reward_clip[j]
            else:
                rewards[j, start : ends[j]][-1] += reward_clip[j]
        return rewards

    def train_rlhf(self, inputs):
        prompts, log_probs, ref_log_probs = inputs["prompts"], inputs["logprobs"], inputs["ref_logprobs"]
        reward_score, values, attention_mask, seq = (
            inputs["rewards"],
            inputs["value"],
            inputs["attention_mask"],
            inputs["input_ids"],
        )
        start = prompts.size()[-1] - 1
        action_mask = attention_mask[:, 1:]
        old_values = values
        with torch.no_grad():
            old_rewards = self.compute_rewards(prompts, log_probs, ref_log_probs, reward_score, action_mask)
            if not self.args.score_in_last_column:
                ends = start + action_mask[:, start:].sum(1)
                # we need to zero out the reward and value after the end of the conversation
                # otherwise the advantage/return will be wrong
                old_values = old_values.clone()
                for i in range(old_rewards.shape[0]):
                    old_rewards[i, ends[i] :] = 0
                    old_values[i, ends[i] :] = 0
            advantages, returns = self.get_advantages_and_returns(old_values, old_rewards, start)

        # process the new outputs
        batch = {"input_ids": seq, "attention_mask": attention_mask}
        actor_prob = self.actor_model(**batch, use_cache=False).logits
        actor_log_prob = self._log_probs(actor_prob, seq)
        actor_loss = self.actor_loss_fn(
            actor_log_prob[:, start:], log_probs[:, start:], advantages, action_mask[:, start:]
        )
        self.actor_model.backward(actor_loss)
        self.actor_model.step()
        value = self.critic_model.forward_value(**batch, return_value_only=True)[:, :-1]
        critic_loss = self.critic_loss_fn(value[:, start:], old_values[:, start:], returns, action_mask[:, start:])
        self.critic_model.backward(critic_loss)
        self.critic_model.step()
        return actor_loss.item(), critic_loss.item()

    def actor_loss_fn(self, logprobs, old_logprobs, advantages, mask):
        # policy gradient loss
        log_ratio = (logprobs - old_logprobs) * mask
        ratio = torch.exp(log_ratio)
        if self.args.actor_loss_flipped:
            pg_loss = torch.max(
                advantages * ratio, advantages * torch.clamp(ratio, 1.0 - self.cliprange, 1.0 + self.cliprange)
            )
        else:
            pg_loss = torch.max(
                -advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - self.cliprange, 1.0 + self.cliprange)
            )
        return torch.sum(pg_loss * mask) / mask.sum()

    def critic_loss_fn(self, values, old_values, returns, mask):
        # value loss
        values_clipped = torch.clamp(values, old_values - self.cliprange_value, old_values + self.cliprange_value)
        vf_loss1 = (values - returns) ** 2
        vf_loss2 = (values_clipped - returns) ** 2
        return 0.5 * torch.sum(torch.max(vf_loss1, vf_loss2) * mask) / mask.sum()

    def get_advantages_and_returns(self, values, rewards, start):
        # adopted from https://github.com/CarperAI/trlx
        lastgaelam = 0
        advantages_reversed = []
        length = rewards.size()[-1]
        for t in reversed(range(start, length)):
            nextvalues = values[:, t + 1] if t < length - 1 else 0.0
            delta = (
                rewards[:, t] + (nextvalues if self.args.gamma_forgotten else self.gamma * nextvalues) - values[:, t]
            )
            lastgaelam = delta + (self.lam if self.args.gamma_forgotten else self.gamma * self.lam) * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        returns = advantages + values[:, start:]
        return advantages.detach(), returns

    def train_unsupervised(self, batch, unsup_coef):
        loss = self.actor_model(**batch, use_cache=False).logits
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = F.cross_entropy(loss[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        self.actor_model.backward(unsup_coef * loss)
        self.actor_model.step()
        return loss.item()

    def train(self):
        self.actor_model.train()
        self.critic_model.train()

    def eval(self):
        self.actor_model.eval()
        self.critic_model.eval()
        self.reward_model.eval()
        self.ref_model.eval()


class MiniDataset:
    def __init__(self, max_size, small_batch_size):
        self.dataset, self.max_size, self.small_batch_size = [], max_size, small_batch_size

    def add(self, data):
        assert len(self.dataset) < self.max_size
        self.dataset.append(data)
        return self.seperate() if len(self.dataset) == self.max_size else None

    def seperate(self):
        small = [
            {k: v[i : i + self.small_batch_size] for k, v in large.items()}
            for large in self.dataset
            for i in range(0, len(large["input_ids"]), self.small_batch_size)
        ]
        self.dataset = []
        return small


# ---------------------------------------------------------------------------------------------------------------- main
HUMAN = [
    "how do i boil an egg",
    "what is rain",
    "tell me about the moon and the sea",
    "who was the first king of the old north land",
    "can you help me",
    "why is the sky blue in the morning",
    "write a poem",
    "is it far to the next town",
    "what can i cook for two friends",
    "please say hello",
    "how long do cats sleep",
    "what is the best way to learn to swim",
    "why do we dream",
    "give me a name for my small dog",
    "how is paper made",
    "where do the birds go when winter comes",
]
PRETRAIN = [
    "the sea is blue and the sky is blue in the morning",
    "birds go south when winter comes",
    "you can cook an egg for two friends",
    "the king was old and the land was far",
    "cats sleep long and dream",
    "the best way to learn is to help",
]


def parse_args(**overrides):
    p = argparse.ArgumentParser()
    p.add_argument("--max_prompt_seq_len", type=int, default=16)
    p.add_argument("--max_answer_seq_len", type=int, default=12)
    p.add_argument("--per_device_generation_batch_size", type=int, default=8)
    p.add_argument("--per_device_training_batch_size", type=int, default=4)
    p.add_argument("--generation_batches", type=int, default=1)
    p.add_argument("--ppo_epochs", type=int, default=2)
    p.add_argument("--gradient_accumulation_steps", type=int, default=1)
    p.add_argument("--actor_learning_rate", type=float, default=9.65e-6)
    p.add_argument("--critic_learning_rate", type=float, default=5e-6)
    p.add_argument("--actor_weight_decay", type=float, default=0.0)
    p.add_argument("--critic_weight_decay", type=float, default=0.0)
    p.add_argument("--kl_ctl", type=float, default=0.1)
    p.add_argument("--gamma", type=float, default=1.0)
    p.add_argument("--unsup_coef", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=1234)
    for flag in (
        "labels_not_shifted",
        "kl_bonus",
        "score_in_last_column",
        "actor_loss_flipped",
        "gamma_forgotten",
        "critic_optimizer_on_reward",
        "reward_reads_last_column",
        "pad_is_eos",
    ):
        p.add_argument("--" + flag, action="store_true")
    p.add_argument("--keep_dropout", dest="disable_dropout", action="store_false")
    p.add_argument("--no_engine_zero_grad", dest="engine_zero_grad", action="store_false")
    args = p.parse_args([])
    vars(args).update(overrides)
    return args


def get_tokenizer(args):
    # the layout of OPT's vocabulary: <s> 0, <pad> 1, </s> 2 (bos and eos), <unk> 3
    vocab = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "human:", "assistant:"])}
    for text in HUMAN + PRETRAIN:
        for w in text.split():
            vocab.setdefault(w, len(vocab))
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if args.pad_is_eos else "<pad>",
        padding_side="left",
    )


def main(args):
    tokenizer = get_tokenizer(args)
    rlhf_engine = DeepSpeedRLHFEngine(args, tokenizer)
    trainer = DeepSpeedPPOTrainer(rlhf_engine, args)
    prompts = [f"human: {h} assistant:" for h in HUMAN]
    exp_mini_dataset = MiniDataset(args.generation_batches, args.per_device_training_batch_size)

    def step():
        exp_dataset = None
        while exp_dataset is None:
            texts = random.sample(prompts, args.per_device_generation_batch_size)
            batch_prompt = tokenizer(
                texts, max_length=args.max_prompt_seq_len, padding="max_length", truncation=True, return_tensors="pt"
            )
            exp_dataset = exp_mini_dataset.add(
                trainer.generate_experience(batch_prompt["input_ids"], batch_prompt["attention_mask"])
            )
        stats = []
        for _ in range(args.ppo_epochs):
            for exp_data in exp_dataset:
                stats.append(trainer.train_rlhf(exp_data))
                if args.unsup_coef:
                    unsup = tokenizer(
                        [t + " " + tokenizer.eos_token for t in random.sample(PRETRAIN, 3)],
                        padding=True,
                        return_tensors="pt",
                    )
                    trainer.train_unsupervised({k: unsup[k] for k in ("input_ids", "attention_mask")}, args.unsup_coef)
            random.shuffle(exp_dataset)
        reward = sum(d["rewards"].mean().item() for d in exp_dataset) / len(exp_dataset)
        return dict(act_loss=stats[-1][0], cri_loss=stats[-1][1], reward=reward)

    def end_score(model, ids, mask):
        lead = int(((mask.cumsum(1) == 0).sum(1)).max())
        return model.forward_value(ids, mask, prompt_length=max(lead, 2))["chosen_end_scores"]

    n = args.per_device_generation_batch_size * args.generation_batches
    declared = dict(
        algorithm="ppo",
        gamma=trainer.gamma,
        lam=trainer.lam,
        kl_coef=trainer.kl_ctl,
        kl_estimator="k1",
        kl_in="reward",
        temperature=1.0,
        top_k=0,
        clip_range=trainer.cliprange,
        clip_range_value=trainer.cliprange_value,
        whiten_advantages=False,
        whiten_rewards=False,
        reward_clip=float(trainer.clip_reward_value),
        learning_rate=args.actor_learning_rate,
        critic_learning_rate=args.critic_learning_rate,
        ppo_epochs=args.ppo_epochs,
        num_minibatches=n // args.per_device_training_batch_size,
        batch_size=n,
        prompt_length=args.max_prompt_seq_len,
        response_length=args.max_answer_seq_len,
        dtype="float32",
        reference="policy",
        value_init="reward",
        loss_aggregation="token-mean",
        shared_trunk=False,
    )
    return dict(
        policy=rlhf_engine.actor.module,
        reference=rlhf_engine.ref.module,
        reward=rlhf_engine.reward.module,
        value=rlhf_engine.critic.module,
        tokenizer=tokenizer,
        prompts=prompts,
        step=step,
        optimizers=[rlhf_engine.actor.optimizer, rlhf_engine.critic.optimizer],
        state=[exp_mini_dataset],
        declared=declared,
        calls={
            "reward": end_score,
            "value": lambda model, ids, mask: model.forward_value(ids, mask, return_value_only=True),
        },
    )


def healthy():
    return main(parse_args())


def healthy_ptx():
    """two generation batches, unsupervised loss mixed in"""
    return main(parse_args(unsup_coef=0.5, generation_batches=2, ppo_epochs=1, gamma=0.99, seed=99))


def score_in_last_column():
    return main(parse_args(score_in_last_column=True))


def labels_not_shifted():
    return main(parse_args(labels_not_shifted=True))


def dropout_kept():
    return main(parse_args(disable_dropout=False))


def kl_bonus():
    return main(parse_args(kl_bonus=True))


def reward_reads_last_column():
    return main(parse_args(reward_reads_last_column=True))


def pad_is_eos():
    return main(parse_args(pad_is_eos=True))


def no_zero_grad():
    return main(parse_args(engine_zero_grad=False))


def critic_optimizer_on_reward():
    return main(parse_args(critic_optimizer_on_reward=True))


def gamma_forgotten():
    return main(parse_args(gamma_forgotten=True, gamma=0.9))


def actor_loss_flipped():
    return main(parse_args(actor_loss_flipped=True))

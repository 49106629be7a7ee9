"""PPO in the manner of verl: DataProto batches, actor, critic, rollout and reward workers, and a driver on top.

Prompts are padded on the left, responses on the right; KL is a reward penalty with an adaptive controller; mini-batches
are cut into micro-batches and the loss is one token mean over the mini-batch.
"""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PROMPTS = """describe the red fox
what does the old sailor want
tell me about the small village near the river
why is the night cold
where did the young painter go after the storm
name a bird
what is inside the green box on the table
the king asked for
how does the slow train reach the high mountain
who sings
tell me a short story about the lost dog and the quiet child
describe the market
why does the baker wake before the morning
what will the brave girl find under the old bridge
is the lake deep
how long is the road to the harbour
name two things that a farmer needs in the cold winter
who lives in the white house
write about rain
what did the teacher say to the young doctor
the captain looked at the dark sea and
tell me why
where is the key of the wooden door
describe the garden behind the tall church in spring""".split("\n")
ADJ = "red old small cold young green slow high quiet brave deep white dark wooden tall".split()
NOUN = "fox sailor village river storm bird table king train mountain dog child market bridge lake road farmer sea garden church".split()
VERB = "sings finds sees likes leaves asks follows needs remembers builds".split()
ADV = "again today slowly alone twice everywhere".split()


def build_tokenizer():
    tok = Tokenizer(WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = WhitespaceSplit()
    tok.train_from_iterator(
        [*PROMPTS, " ".join([*ADJ, *NOUN, *VERB, *ADV, "the", "and"])],
        WordLevelTrainer(special_tokens=["<pad>", "<eos>", "<unk>"]),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def pick(words):
    return words[int(torch.randint(len(words), ()))]


def sentence():
    words = []
    for _ in range(int(torch.randint(1, 4, ()))):
        words += ["the", pick(ADJ), pick(NOUN), pick(VERB)] + ([pick(ADV)] if torch.rand(()) < 0.5 else []) + ["and"]
    return " ".join(words[:-1])


def sft(model, tokenizer, steps=70, batch_size=16):
    """A few steps of supervised fine-tuning, so that the policy answers and stops."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(steps):
        rows, labels = [], []
        for _ in range(batch_size):
            prompt = tokenizer(pick(PROMPTS)).input_ids
            answer = tokenizer(sentence()).input_ids + [tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        mask = torch.arange(ids.size(1))[None] < torch.tensor([len(r) for r in rows])[:, None]
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def calibrate_reward_head(rm, tokenizer, n=64):
    """Centre and scale the head: mean 0 and standard deviation 1 over answers to the prompts."""
    last = []
    for _ in range(n):
        ids = tokenizer(pick(PROMPTS) + " " + sentence()).input_ids + [tokenizer.eos_token_id]
        cut = ids[: max(4, len(ids) - int(torch.randint(0, 2, ())) * 4)]
        last.append(rm.model(input_ids=torch.tensor([cut])).last_hidden_state[0, -1])
    hidden = torch.stack(last)
    mean = hidden.mean(0)
    weight = torch.randn_like(mean)
    weight -= (weight @ mean) / (mean @ mean) * mean
    rm.score.weight.copy_((weight / (hidden @ weight).std())[None])


# --------------------------------------------------------------------------------------------------- protocol


class DataProto:
    def __init__(self, batch, meta_info=None):
        self.batch, self.meta_info = dict(batch), dict(meta_info or {})

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def union(self, **tensors):
        self.batch.update(tensors)
        return self

    def reorder(self, indices):
        self.batch = {k: v[indices] for k, v in self.batch.items()}

    def split(self, size):
        parts = {k: v.split(size) for k, v in self.batch.items()}
        count = -(-len(self) // size)
        return [DataProto({k: v[i] for k, v in parts.items()}, self.meta_info) for i in range(count)]


def masked_sum(values, mask):
    return torch.where(mask.bool(), values, 0.0).sum()


def masked_mean(values, mask):
    return masked_sum(values, mask) / mask.sum()


def masked_whiten(values, mask):
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    var = var * mask.sum() / (mask.sum() - 1)
    return (values - mean) * torch.rsqrt(var + 1e-8)


def get_response_mask(response_ids, eos_token_id):
    is_eos = response_ids.eq(eos_token_id).long()
    return (is_eos.cumsum(1) - is_eos).eq(0).long()


def agg_loss(loss_mat, loss_mask, batch_num_tokens=None):
    """token-mean; with batch_num_tokens the micro-batches of a mini-batch add up to its token mean."""
    return masked_sum(loss_mat, loss_mask) / (loss_mask.sum() if batch_num_tokens is None else batch_num_tokens)


def logprobs_from_logits(logits, labels):
    return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam, fault=None):
    with torch.no_grad():
        if fault == "adv_from_reward":
            advantages = token_level_rewards - values
            returns = advantages + values
            return masked_whiten(advantages, response_mask), returns
        nextvalues, lastgaelam, reversed_ = torch.zeros(len(values)), torch.zeros(len(values)), []
        for t in reversed(range(token_level_rewards.shape[-1])):
            delta = token_level_rewards[:, t] + gamma * nextvalues - values[:, t]
            gae = delta + gamma * lam * lastgaelam
            mine = response_mask[:, t].bool()  # skip what is not the policy's
            nextvalues = torch.where(mine, values[:, t], nextvalues)
            lastgaelam = torch.where(mine, gae, lastgaelam)
            reversed_.append(lastgaelam)
        advantages = torch.stack(reversed_[::-1], dim=1)
        returns = advantages + values
        if fault == "whiten_over_padding":
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        else:
            advantages = masked_whiten(advantages, response_mask)
    return advantages, returns


class AdaptiveKLController:
    def __init__(self, init_kl_coef, target_kl, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl, n_steps):
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class StatefulPrompts:
    """Shuffled batches of left-padded prompts, without end."""

    def __init__(self, tokenizer, prompts, batch_size):
        enc = tokenizer(prompts, padding=True, return_tensors="pt")
        self.ids, self.mask, self.batch_size = enc.input_ids, enc.attention_mask, batch_size
        self.order, self.cursor, self.global_steps = [], 0, 0

    def next(self):
        if self.cursor + self.batch_size > len(self.order):
            self.order, self.cursor = torch.randperm(len(self.ids)).tolist(), 0
        rows = self.order[self.cursor : self.cursor + self.batch_size]
        self.cursor += self.batch_size
        self.global_steps += 1
        return DataProto({"input_ids": self.ids[rows], "attention_mask": self.mask[rows]})

    def state_dict(self):
        return {"order": list(self.order), "cursor": self.cursor, "global_steps": self.global_steps}

    def load_state_dict(self, state):
        self.order, self.cursor, self.global_steps = list(state["order"]), state["cursor"], state["global_steps"]


# ---------------------------------------------------------------------------------------------------- workers


class HFRollout:
    def __init__(self, module, tokenizer, config):
        self.module, self.tokenizer, self.config = module, tokenizer, config

    @torch.no_grad()
    def generate_sequences(self, prompts):
        self.module.eval()
        idx, attention_mask = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        eos, pad, length = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.config["response_length"]
        seq = self.module.generate(
            input_ids=idx,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=self.config["temperature"],
                top_p=1.0,
                top_k=0,
                max_new_tokens=length,
                eos_token_id=eos,
                pad_token_id=pad,
            ),
        )
        seq = F.pad(seq, (0, idx.size(1) + length - seq.size(1)), value=pad)  # generate stops when every row has
        response = seq[:, idx.size(1) :]
        response_mask = get_response_mask(response, eos)
        attention_mask = torch.cat([attention_mask, response_mask], dim=1)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return DataProto(
            {
                "input_ids": seq,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "responses": response,
                "response_mask": response_mask,
            }
        )


class RewardModelWorker:
    def __init__(self, module):
        self.module = module

    @torch.no_grad()
    def compute_rm_score(self, data):
        keys = ("input_ids", "attention_mask", "position_ids")
        return self.module(**{k: data.batch[k] for k in keys}).logits.squeeze(-1)


class DataParallelPPOActor:
    def __init__(self, config, actor_module, actor_optimizer=None, fault=None):
        self.config, self.module, self.optimizer, self.fault = config, actor_module, actor_optimizer, fault

    def _forward_micro_batch(self, micro, temperature):
        length = micro.batch["responses"].size(1)
        keys = ("input_ids", "attention_mask", "position_ids")
        logits = self.module(**{k: micro.batch[k] for k in keys}, use_cache=False).logits
        logits = logits[:, -length - 1 : -1].div(temperature)
        return logprobs_from_logits(logits, micro.batch["responses"])

    @torch.no_grad()
    def compute_log_prob(self, data):
        self.module.eval()
        temperature = data.meta_info.get("temperature", 1.0)
        return torch.cat(
            [self._forward_micro_batch(m, temperature) for m in data.split(self.config["micro_batch_size"])]
        )

    def update_policy(self, data):
        self.module.train()
        temperature, clip, losses = data.meta_info.get("temperature", 1.0), self.config["clip_ratio"], []
        for _ in range(self.config["ppo_epochs"]):
            for mini in data.split(self.config["ppo_mini_batch_size"]):
                mini_tokens = mini.batch["response_mask"].sum()
                self.optimizer.zero_grad()
                mini_loss = 0.0
                for micro in mini.split(self.config["micro_batch_size"]):
                    mask, adv = micro.batch["response_mask"], micro.batch["advantages"]
                    log_prob = self._forward_micro_batch(micro, temperature)
                    ratio = torch.exp(log_prob - micro.batch["old_log_probs"])
                    pg = torch.max(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip))
                    if self.fault == "accumulate_undivided":
                        loss = agg_loss(pg, mask)
                    else:
                        loss = agg_loss(pg, mask, mini_tokens)
                    if self.fault == "kl_twice":  # use_kl_loss was left on beside use_kl_in_reward
                        diff = micro.batch["ref_log_prob"] - log_prob
                        loss = loss + self.config["kl_coef"] * agg_loss(diff.exp() - diff - 1, mask, mini_tokens)
                    loss.backward()
                    mini_loss += loss.item()
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config["grad_clip"])
                self.optimizer.step()
                losses.append(mini_loss)
        self.optimizer.zero_grad()
        return sum(losses) / len(losses)


class DataParallelPPOCritic:
    def __init__(self, config, critic_module, critic_optimizer, fault=None):
        self.config, self.module, self.optimizer, self.fault = config, critic_module, critic_optimizer, fault

    def _forward_micro_batch(self, micro):
        length = micro.batch["responses"].size(1)
        keys = ("input_ids", "attention_mask", "position_ids")
        logits = self.module(**{k: micro.batch[k] for k in keys}, use_cache=False).logits
        values = logits[..., 0]
        if self.fault == "values_after_token":
            return values[:, -length:]
        return values[:, -length - 1 : -1]

    @torch.no_grad()
    def compute_values(self, data):
        self.module.eval()
        values = torch.cat([self._forward_micro_batch(m) for m in data.split(self.config["micro_batch_size"])])
        return torch.where(data.batch["response_mask"].bool(), values, 0.0)

    def update_critic(self, data):
        self.module.train()
        losses = []
        for _ in range(self.config["ppo_epochs"]):
            for mini in data.split(self.config["ppo_mini_batch_size"]):
                mini_tokens = mini.batch["response_mask"].sum()
                self.optimizer.zero_grad()
                mini_loss = 0.0
                for micro in mini.split(self.config["micro_batch_size"]):
                    vpreds, values, returns = (
                        self._forward_micro_batch(micro),
                        micro.batch["values"],
                        micro.batch["returns"],
                    )
                    clipped = values + (vpreds - values).clamp(
                        -self.config["cliprange_value"], self.config["cliprange_value"]
                    )
                    vf = torch.max((vpreds - returns) ** 2, (clipped - returns) ** 2)
                    loss = 0.5 * agg_loss(vf, micro.batch["response_mask"], mini_tokens)
                    loss.backward()
                    mini_loss += loss.item()
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config["grad_clip"])
                self.optimizer.step()
                losses.append(mini_loss)
        self.optimizer.zero_grad()
        return sum(losses) / len(losses)


# ----------------------------------------------------------------------------------------------------- driver


class RayPPOTrainer:
    def __init__(self, config, prompts, rollout, rm, actor, ref, critic, kl_ctrl, fault=None):
        self.config, self.prompts, self.rollout, self.rm = config, prompts, rollout, rm
        self.actor, self.ref, self.critic, self.kl_ctrl, self.fault = actor, ref, critic, kl_ctrl, fault

    def fit_step(self):
        batch = self.rollout.generate_sequences(self.prompts.next())
        rm_scores = self.rm.compute_rm_score(batch)  # launched while the rest of the batch is prepared

        # balance: rows of like length side by side, so that micro-batches cost the same
        order = batch.batch["attention_mask"].sum(1).argsort(descending=True)
        batch.reorder(order)
        if self.fault != "scores_not_balanced":
            rm_scores = rm_scores[order]
        if self.fault != "temperature_dropped":
            batch.meta_info["temperature"] = self.config["temperature"]

        batch.union(old_log_probs=self.actor.compute_log_prob(batch))
        batch.union(ref_log_prob=self.ref.compute_log_prob(batch))
        batch.union(values=self.critic.compute_values(batch))

        mask = batch.batch["response_mask"]
        token_level_scores = torch.zeros(mask.shape)
        if self.fault == "score_last_column":
            token_level_scores[:, -1] = rm_scores
        else:
            token_level_scores[torch.arange(len(batch)), mask.sum(1) - 1] = rm_scores
        kld = torch.where(mask.bool(), batch.batch["old_log_probs"] - batch.batch["ref_log_prob"], 0.0)
        beta = self.kl_ctrl.value
        rewards = token_level_scores - beta * kld
        current_kl = (kld.sum(1) / mask.sum(1)).mean().item()
        if self.fault != "kl_ctrl_frozen":
            self.kl_ctrl.update(current_kl=current_kl, n_steps=len(batch))

        advantages, returns = compute_gae_advantage_return(
            rewards, batch.batch["values"], mask, self.config["gamma"], self.config["lam"], self.fault
        )
        batch.union(advantages=advantages, returns=returns)
        vf_loss = self.critic.update_critic(batch)
        pg_loss = self.actor.update_policy(batch)
        return {
            "critic/score/mean": rm_scores.mean().item(),
            "critic/rewards/mean": rewards.sum(1).mean().item(),
            "actor/reward_kl_penalty": current_kl,
            "actor/reward_kl_penalty_coeff": beta,
            "response_length/mean": mask.sum(1).float().mean().item(),
            "critic/vf_loss": vf_loss,
            "actor/pg_loss": pg_loss,
        }


def make(fault=None):
    torch.manual_seed(11)
    config = {
        "temperature": 0.7, "response_length": 10, "train_batch_size": 12, "ppo_mini_batch_size": 6, "micro_batch_size": 3,
        "ppo_epochs": 2, "clip_ratio": 0.2, "cliprange_value": 0.5, "grad_clip": 1.0, "gamma": 1.0, "lam": 0.95,
        "kl_coef": 0.05, "kl_target": 0.1, "kl_horizon": 1000, "actor_lr": 5e-6, "critic_lr": 1e-5,
    }  # fmt: skip
    tokenizer = build_tokenizer()
    arch = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_config(arch)
    sft(policy, tokenizer)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)

    rm_arch = copy.deepcopy(arch)
    rm_arch.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(rm_arch).eval().requires_grad_(False)
    calibrate_reward_head(reward, tokenizer)

    critic_arch = copy.deepcopy(arch)
    critic_arch.num_labels = 2 if fault == "critic_two_labels" else 1
    critic_arch.classifier_dropout = 0.0
    critic = AutoModelForTokenClassification.from_config(critic_arch)
    own = critic.state_dict()
    critic.load_state_dict({k: v for k, v in reward.state_dict().items() if own[k].shape == v.shape}, strict=False)

    actor_optimizer = torch.optim.AdamW(policy.parameters(), lr=config["actor_lr"], weight_decay=0.01)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=config["critic_lr"], weight_decay=0.01)
    loader = StatefulPrompts(tokenizer, PROMPTS, config["train_batch_size"])
    kl_ctrl = AdaptiveKLController(config["kl_coef"], config["kl_target"], config["kl_horizon"])
    trainer = RayPPOTrainer(
        config,
        loader,
        HFRollout(policy, tokenizer, config),
        RewardModelWorker(reward),
        DataParallelPPOActor(config, policy, actor_optimizer, fault),
        DataParallelPPOActor(config, reference),
        DataParallelPPOCritic(config, critic, critic_optimizer, fault),
        kl_ctrl,
        fault,
    )
    return {
        "policy": policy, "reference": reference, "reward": reward, "value": critic, "tokenizer": tokenizer,
        "prompts": PROMPTS, "optimizers": [actor_optimizer, critic_optimizer], "state": [loader, kl_ctrl],
        "step": trainer.fit_step,
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward",
            "kl_adaptive": True, "kl_target": 0.1, "kl_horizon": 1000, "temperature": 0.7, "clip_range": 0.2,
            "clip_range_value": 0.5, "whiten_advantages": True, "learning_rate": 5e-6, "critic_learning_rate": 1e-5,
            "ppo_epochs": 2, "num_minibatches": 2, "batch_size": 12, "response_length": 10, "value_init": "reward",
            "loss_aggregation": "token-mean",
        },
    }  # fmt: skip


def healthy():
    return make()


def temperature_dropped():
    return make("temperature_dropped")


def scores_not_balanced():
    return make("scores_not_balanced")


def score_last_column():
    return make("score_last_column")


def adv_from_reward():
    return make("adv_from_reward")


def values_after_token():
    return make("values_after_token")


def accumulate_undivided():
    return make("accumulate_undivided")


def whiten_over_padding():
    return make("whiten_over_padding")


def kl_twice():
    return make("kl_twice")


def kl_ctrl_frozen():
    return make("kl_ctrl_frozen")


def critic_two_labels():
    return make("critic_two_labels")

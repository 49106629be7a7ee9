# Single-controller PPO on one process: RayPPOTrainer without Ray, FSDP workers without FSDP.
# Layout of every batch: prompts left-padded to max_prompt_length, responses right-padded to response_length.
import copy
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForTokenClassification,
)

QUESTIONS = [
    "how do i boil an egg",
    "what is the capital of france",
    "name a river",
    "please write a short poem about rain",
    "why is the sky blue",
    "is tea better than coffee in the morning",
    "hello",
    "tell me a story about a small dog",
    "how can i sleep well at night",
    "what should i cook for two friends today",
    "count to five",
    "where does the sun go",
    "give me advice",
    "how old is the moon and how far away is it",
    "what rhymes with tree",
    "sing",
]
GOOD = ["thank you, i am happy to help", "sure, that is a good question", "of course, here it is", "yes, with pleasure"]
BAD = ["no, go away", "i do not care", "that is a bad question", "ask someone else, not me"]


# ----------------------------------------------------------------------------------------------- config
class Cfg(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def load_config(overrides=()):
    cfg = Cfg(
        data=Cfg(train_batch_size=8, max_prompt_length=28, max_response_length=12, shuffle=True),
        actor_rollout_ref=Cfg(
            model=Cfg(attention_dropout=0.0),
            actor=Cfg(
                ppo_mini_batch_size=4,
                ppo_micro_batch_size=2,
                ppo_epochs=2,
                clip_ratio_low=0.2,
                clip_ratio_high=0.2,
                clip_ratio_c=3.0,
                entropy_coeff=0.0,
                loss_agg_mode="token-mean",
                use_kl_loss=False,
                kl_loss_coef=0.05,
                kl_loss_type="kl",
                grad_clip=1.0,
                lr=1e-5,
                batch_norm_loss=True,
            ),
            rollout=Cfg(name="hf", temperature=0.8, top_k=0, top_p=1.0, log_prob_micro_batch_size=4),
            ref=Cfg(log_prob_micro_batch_size=4),
        ),
        critic=Cfg(
            ppo_mini_batch_size=4, ppo_micro_batch_size=4, ppo_epochs=2, cliprange_value=0.5, grad_clip=1.0, lr=2e-5
        ),
        algorithm=Cfg(
            gamma=1.0,
            lam=0.95,
            adv_estimator="gae",
            use_kl_in_reward=True,
            kl_penalty="kl",
            kl_ctrl=Cfg(type="fixed", kl_coef=0.05, horizon=1000, target_kl=0.1),
        ),
        trainer=Cfg(balance_batch=True, world_size=2),
        bug="",
    )
    for item in overrides:
        key, value = item.split("=")
        node, path = cfg, key.split(".")
        for part in path[:-1]:
            node = node[part]
        old = node[path[-1]]
        node[path[-1]] = value == "True" if isinstance(old, bool) else type(old)(value)
    return cfg


# ----------------------------------------------------------------------------------------------- protocol
class DataProto:
    def __init__(self, batch, non_tensor_batch=None, meta_info=None):
        self.batch, self.non_tensor_batch, self.meta_info = (
            dict(batch),
            dict(non_tensor_batch or {}),
            dict(meta_info or {}),
        )

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def union(self, other):
        self.batch.update(other.batch)
        self.non_tensor_batch.update(other.non_tensor_batch)
        self.meta_info.update(other.meta_info)
        return self

    def _index(self, idx):
        return (
            {k: v[idx] for k, v in self.batch.items()},
            {k: v[idx.numpy()] for k, v in self.non_tensor_batch.items()},
        )

    def reorder(self, idx):
        self.batch, self.non_tensor_batch = self._index(idx)

    def select(self, keys):
        return DataProto({k: self.batch[k] for k in keys}, {}, self.meta_info)

    def split(self, size):
        return [DataProto(*self._index(i), self.meta_info) for i in torch.arange(len(self)).split(size)]


# ----------------------------------------------------------------------------------------------- torch_functional
def logprobs_from_logits(logits, labels):
    return torch.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits):
    pd = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - (pd * logits).sum(-1)


def masked_sum(values, mask, axis=None):
    values = torch.where(mask.bool(), values, torch.zeros_like(values))
    return values.sum(dim=axis)


def masked_mean(values, mask, axis=None):
    return masked_sum(values, mask, axis) / (mask.sum(dim=axis) + 1e-8)


def masked_whiten(values, mask):
    mean = masked_mean(values, mask)
    n = mask.sum()
    var = masked_mean((values - mean) ** 2, mask) * n / (n - 1)
    return (values - mean) * torch.rsqrt(var + 1e-8)


def get_response_mask(response_id, eos_token, dtype):
    is_eos = torch.eq(response_id, eos_token).long()
    return ((is_eos.cumsum(-1) - is_eos) == 0).to(dtype)


def compute_position_id_with_mask(mask):
    return torch.clip(torch.cumsum(mask, dim=-1) - 1, min=0)


# ----------------------------------------------------------------------------------------------- core_algos
class FixedKLController:
    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current_kl, n_steps):
        pass


class AdaptiveKLController:
    def __init__(self, init_kl_coef, target_kl, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl, n_steps):
        error = float(np.clip(current_kl / self.target - 1, -0.2, 0.2))
        self.value *= 1 + error * n_steps / self.horizon


def get_kl_controller(kl_ctrl):
    if kl_ctrl.type == "fixed":
        return FixedKLController(kl_ctrl.kl_coef)
    return AdaptiveKLController(kl_ctrl.kl_coef, kl_ctrl.target_kl, kl_ctrl.horizon)


def agg_loss(loss_mat, loss_mask, loss_agg_mode, batch_num_tokens=None, global_batch_size=None):
    """batch_num_tokens / global_batch_size are those of the mini-batch, so that micro-batches simply add up."""
    if loss_agg_mode == "token-mean":
        return masked_sum(loss_mat, loss_mask) / (loss_mask.sum() if batch_num_tokens is None else batch_num_tokens)
    n = loss_mask.shape[0] if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-sum":
        return masked_sum(loss_mat, loss_mask, -1).sum() / n
    if loss_agg_mode == "seq-mean-token-mean":
        return masked_mean(loss_mat, loss_mask, -1).sum() / n
    raise ValueError(loss_agg_mode)


def kl_penalty(logprob, ref_logprob, kind):
    if kind == "kl":
        return logprob - ref_logprob
    if kind == "mse":
        return 0.5 * (logprob - ref_logprob).square()
    if kind == "low_var_kl":
        kl = torch.clamp(ref_logprob - logprob, -20, 20)
        return torch.clamp(kl.exp() - kl - 1, -10, 10)
    raise NotImplementedError(kind)


def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    with torch.no_grad():
        nextvalues, lastgaelam, reversed_adv = 0.0, 0.0, []
        for t in reversed(range(token_level_rewards.shape[-1])):
            delta = token_level_rewards[:, t] + gamma * nextvalues - values[:, t]
            lastgaelam_ = delta + gamma * lam * lastgaelam
            # masked tokens hand the carry through unchanged
            nextvalues = values[:, t] * response_mask[:, t] + (1 - response_mask[:, t]) * nextvalues
            lastgaelam = lastgaelam_ * response_mask[:, t] + (1 - response_mask[:, t]) * lastgaelam
            reversed_adv.append(lastgaelam)
        advantages = torch.stack(reversed_adv[::-1], dim=1)
        returns = advantages + values
        return masked_whiten(advantages, response_mask), returns


def compute_policy_loss(old_log_prob, log_prob, advantages, response_mask, cfg, **norm):
    negative_approx_kl = torch.clamp(log_prob - old_log_prob, -20.0, 20.0)
    ratio = torch.exp(negative_approx_kl)
    pg_losses1 = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 1 - cfg.clip_ratio_low, 1 + cfg.clip_ratio_high)
    clip_pg_losses1 = torch.maximum(pg_losses1, pg_losses2)
    clip_pg_losses2 = torch.min(-advantages * cfg.clip_ratio_c, clip_pg_losses1)  # dual clip
    pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)
    clipfrac = masked_mean((pg_losses2 > pg_losses1).float(), response_mask)
    return (
        agg_loss(pg_losses, response_mask, cfg.loss_agg_mode, **norm),
        clipfrac,
        masked_mean(-negative_approx_kl, response_mask),
    )


def compute_value_loss(vpreds, returns, values, response_mask, cliprange_value, **norm):
    vpredclipped = torch.clamp(vpreds, values - cliprange_value, values + cliprange_value)
    vf_losses = torch.max((vpreds - returns) ** 2, (vpredclipped - returns) ** 2)
    return 0.5 * agg_loss(vf_losses, response_mask, "token-mean", **norm)


# ----------------------------------------------------------------------------------------------- workers
class ActorRolloutRefWorker:
    def __init__(self, cfg, role, module, tokenizer):
        self.cfg, self.role, self.module, self.tokenizer, self.bug = (
            cfg.actor_rollout_ref,
            role,
            module,
            tokenizer,
            cfg.bug,
        )
        self.data_cfg = cfg.data
        if "actor" in role:
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=self.cfg.actor.lr, weight_decay=0.01)
            self.engine = module if self.cfg.rollout.name == "hf" else copy.deepcopy(module).requires_grad_(False)
        else:
            module.requires_grad_(False)
        module.eval()

    # rollout
    @torch.no_grad()
    def generate_sequences(self, prompts: DataProto):
        r = self.cfg.rollout
        if self.engine is not self.module and self.bug != "engine_not_resynced":  # weight sync to the inference engine
            self.engine.load_state_dict(self.module.state_dict())
        self.engine.eval()
        idx, attention_mask, position_ids = (prompts.batch[k] for k in ("input_ids", "attention_mask", "position_ids"))
        generation_config = GenerationConfig(
            do_sample=True,
            num_beams=1,
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            max_new_tokens=self.data_cfg.max_response_length,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        seq = self.engine.generate(
            input_ids=idx, attention_mask=attention_mask, position_ids=position_ids, generation_config=generation_config
        )
        response_length = self.data_cfg.max_response_length
        response = seq[:, idx.size(1) :]
        response = F.pad(response, (0, response_length - response.size(1)), value=self.tokenizer.pad_token_id)
        delta = torch.arange(1, response_length + 1).unsqueeze(0)
        position_ids = torch.cat([position_ids, position_ids[:, -1:] + delta], dim=-1)
        response_attention_mask = get_response_mask(response, self.tokenizer.eos_token_id, attention_mask.dtype)
        return DataProto(
            {
                "prompts": idx,
                "responses": response,
                "input_ids": torch.cat([idx, response], -1),
                "attention_mask": torch.cat([attention_mask, response_attention_mask], -1),
                "position_ids": position_ids,
            },
            meta_info={"temperature": r.temperature},
        )

    def _forward_micro_batch(self, micro, temperature, calculate_entropy=False):
        response_length = micro.batch["responses"].size(-1)
        output = self.module(
            input_ids=micro.batch["input_ids"],
            attention_mask=micro.batch["attention_mask"],
            position_ids=micro.batch["position_ids"],
            use_cache=False,
        )
        logits = output.logits.float()[:, -response_length - 1 : -1]
        if self.bug == "temperature_on_logprobs":
            log_probs = logprobs_from_logits(logits, micro.batch["responses"]) / temperature
        else:
            logits = logits / temperature
            log_probs = logprobs_from_logits(logits, micro.batch["responses"])
        return (entropy_from_logits(logits) if calculate_entropy else None), log_probs

    @torch.no_grad()
    def compute_log_prob(self, data):
        self.module.eval()
        select = data.select(["responses", "input_ids", "attention_mask", "position_ids"])
        size = (
            self.cfg.rollout.log_prob_micro_batch_size if self.role != "ref" else self.cfg.ref.log_prob_micro_batch_size
        )
        temperature = data.meta_info["temperature"]
        if self.role == "ref" and self.bug == "ref_without_temperature":
            temperature = 1.0
        out = torch.cat([self._forward_micro_batch(m, temperature)[1] for m in select.split(size)])
        return DataProto({"ref_log_prob" if self.role == "ref" else "old_log_probs": out})

    def update_actor(self, data):
        cfg, metrics = self.cfg.actor, defaultdict(list)
        self.module.train()
        keys = [
            "responses",
            "response_mask",
            "input_ids",
            "attention_mask",
            "position_ids",
            "old_log_probs",
            "advantages",
        ]
        data = data.select(keys + (["ref_log_prob"] if cfg.use_kl_loss else []))
        for _ in range(cfg.ppo_epochs):
            for mini_batch in data.split(cfg.ppo_mini_batch_size):
                micro_batches = mini_batch.split(cfg.ppo_micro_batch_size)
                self.optimizer.zero_grad()
                norm, scale = {}, 1.0 / len(micro_batches)
                if cfg.batch_norm_loss:
                    norm = dict(
                        batch_num_tokens=mini_batch.batch["response_mask"].sum(), global_batch_size=len(mini_batch)
                    )
                    scale = 1.0
                for micro in micro_batches:
                    b = micro.batch
                    entropy, log_prob = self._forward_micro_batch(micro, data.meta_info["temperature"], True)
                    loss, clipfrac, ppo_kl = compute_policy_loss(
                        b["old_log_probs"], log_prob, b["advantages"], b["response_mask"], cfg, **norm
                    )
                    metrics["actor/pg_loss"].append(loss.item())
                    metrics["actor/pg_clipfrac"].append(clipfrac.item())
                    metrics["actor/ppo_kl"].append(ppo_kl.item())
                    if cfg.entropy_coeff != 0:
                        loss = loss - cfg.entropy_coeff * agg_loss(
                            entropy, b["response_mask"], cfg.loss_agg_mode, **norm
                        )
                    if cfg.use_kl_loss:
                        kld = kl_penalty(log_prob, b["ref_log_prob"], cfg.kl_loss_type)
                        loss = loss + cfg.kl_loss_coef * agg_loss(kld, b["response_mask"], cfg.loss_agg_mode, **norm)
                    (loss * scale).backward()
                metrics["actor/grad_norm"].append(
                    torch.nn.utils.clip_grad_norm_(self.module.parameters(), cfg.grad_clip).item()
                )
                self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics


class CriticWorker:
    def __init__(self, cfg, module):
        self.cfg, self.bug = cfg.critic, cfg.bug
        self.module = module
        trainable = (
            copy.deepcopy(module) if self.bug == "critic_optimizer_stale" else module
        )  # optimizer built before wrapping
        self.optimizer = torch.optim.AdamW(trainable.parameters(), lr=self.cfg.lr, weight_decay=0.01)

    def _forward_micro_batch(self, micro):
        b, response_length = micro.batch, micro.batch["responses"].size(-1)
        values = self.module(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"], position_ids=b["position_ids"]
        ).logits
        if self.bug == "values_off_by_one":
            return values[:, -response_length:].squeeze(-1)
        return values[:, -response_length - 1 : -1].squeeze(-1)

    @torch.no_grad()
    def compute_values(self, data):
        self.module.eval()
        values = torch.cat([self._forward_micro_batch(m) for m in data.split(self.cfg.ppo_micro_batch_size)])
        return DataProto({"values": values * data.batch["response_mask"]})

    def update_critic(self, data):
        metrics = defaultdict(list)
        self.module.train()
        for _ in range(self.cfg.ppo_epochs):
            for mini_batch in data.split(self.cfg.ppo_mini_batch_size):
                self.optimizer.zero_grad()
                for micro in mini_batch.split(self.cfg.ppo_micro_batch_size):
                    b = micro.batch
                    vf_loss = compute_value_loss(
                        self._forward_micro_batch(micro),
                        b["returns"],
                        b["values"],
                        b["response_mask"],
                        self.cfg.cliprange_value,
                        batch_num_tokens=mini_batch.batch["response_mask"].sum(),
                        global_batch_size=len(mini_batch),
                    )
                    vf_loss.backward()
                    metrics["critic/vf_loss"].append(vf_loss.item())
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.cfg.grad_clip)
                self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics


class RewardModelWorker:
    def __init__(self, module):
        self.module = module.eval().requires_grad_(False)

    @torch.no_grad()
    def compute_rm_score(self, data):
        b = data.batch
        scores = self.module(
            input_ids=b["input_ids"], attention_mask=b["attention_mask"], position_ids=b["position_ids"]
        ).logits
        eos_mask_idx = torch.argmax(b["position_ids"] * b["attention_mask"], dim=-1)
        rows = torch.arange(len(data))
        token_level_scores = torch.zeros_like(b["attention_mask"], dtype=scores.dtype)
        token_level_scores[rows, eos_mask_idx] = scores.squeeze(-1)[rows, eos_mask_idx]
        return token_level_scores[:, -b["responses"].size(-1) :]


# ----------------------------------------------------------------------------------------------- trainer
class StatefulPromptLoader:
    def __init__(self, texts, tokenizer, cfg):
        enc = tokenizer(
            texts, padding="max_length", max_length=cfg.max_prompt_length, return_tensors="pt", add_special_tokens=False
        )
        self.ids, self.mask, self.bs, self.perm = enc["input_ids"], enc["attention_mask"], cfg.train_batch_size, []

    def next(self):
        if len(self.perm) < self.bs:
            self.perm = torch.randperm(len(self.ids)).tolist()
        take, self.perm = self.perm[: self.bs], self.perm[self.bs :]
        mask = self.mask[take]
        return DataProto(
            {"input_ids": self.ids[take], "attention_mask": mask, "position_ids": compute_position_id_with_mask(mask)},
            {"index": np.array(take)},
        )

    def state_dict(self):
        return {"perm": list(self.perm)}

    def load_state_dict(self, sd):
        self.perm = list(sd["perm"])


def apply_kl_penalty(data, kl_ctrl, kl_penalty_type):
    response_mask, scores = data.batch["response_mask"], data.batch["token_level_scores"]
    kld = kl_penalty(data.batch["old_log_probs"], data.batch["ref_log_prob"], kl_penalty_type) * response_mask
    token_level_rewards = scores - kl_ctrl.value * kld
    current_kl = masked_mean(kld, response_mask, axis=-1).mean().item()
    metrics = {"actor/reward_kl_penalty": current_kl, "actor/reward_kl_penalty_coeff": kl_ctrl.value}
    kl_ctrl.update(current_kl=current_kl, n_steps=len(data))
    return token_level_rewards, metrics


class PPOTrainer:
    def __init__(self, cfg, tokenizer, loader, actor_wg, ref_wg, critic_wg, rm_wg):
        self.cfg, self.loader = cfg, loader
        self.actor_rollout_wg, self.ref_policy_wg, self.critic_wg, self.rm_wg = actor_wg, ref_wg, critic_wg, rm_wg
        self.kl_ctrl_in_reward = get_kl_controller(cfg.algorithm.kl_ctrl)

    def _balance_batch(self, batch):
        """Give every dp rank about the same number of tokens."""
        seqlens, parts = batch.batch["attention_mask"].sum(-1), [[] for _ in range(self.cfg.trainer.world_size)]
        for i in torch.argsort(seqlens, descending=True, stable=True).tolist():
            open_parts = [p for p in parts if len(p) < len(batch) // len(parts)]
            min(open_parts, key=lambda p: sum(seqlens[j].item() for j in p)).append(i)
        batch.reorder(torch.tensor([i for p in parts for i in p]))

    def fit_step(self):
        cfg, metrics = self.cfg, {}
        gen_batch = self.loader.next()
        batch = self.actor_rollout_wg.generate_sequences(gen_batch)
        batch.batch["response_mask"] = batch.batch["attention_mask"][:, -batch.batch["responses"].size(1) :]
        early_reward = self.rm_wg.compute_rm_score(batch) if cfg.bug == "reward_not_reordered" else None
        if cfg.trainer.balance_batch:
            self._balance_batch(batch)
        reward_tensor = self.rm_wg.compute_rm_score(batch) if early_reward is None else early_reward
        batch.union(self.actor_rollout_wg.compute_log_prob(batch))
        batch.union(self.ref_policy_wg.compute_log_prob(batch))
        batch.union(self.critic_wg.compute_values(batch))
        batch.batch["token_level_scores"] = reward_tensor
        if cfg.algorithm.use_kl_in_reward:
            rewards, kl_metrics = apply_kl_penalty(batch, self.kl_ctrl_in_reward, cfg.algorithm.kl_penalty)
            metrics.update(kl_metrics)
            batch.batch["token_level_rewards"] = reward_tensor if cfg.bug == "kl_penalty_dropped" else rewards
        else:
            batch.batch["token_level_rewards"] = reward_tensor
        advantages, returns = compute_gae_advantage_return(
            batch.batch["token_level_rewards"],
            batch.batch["values"],
            batch.batch["response_mask"],
            cfg.algorithm.gamma,
            cfg.algorithm.lam,
        )
        batch.batch.update(advantages=advantages, returns=returns)
        for out in (self.critic_wg.update_critic(batch), self.actor_rollout_wg.update_actor(batch)):
            metrics.update({k: float(np.mean(v)) for k, v in out.items()})
        metrics["critic/score/mean"] = reward_tensor.sum(-1).mean().item()
        metrics["response_length/mean"] = batch.batch["response_mask"].sum(-1).float().mean().item()
        return metrics


# ----------------------------------------------------------------------------------------------- checkpoints (made on the spot)
def make_tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(
        QUESTIONS + GOOD + BAD,
        trainers.BpeTrainer(
            vocab_size=390,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def _pad(rows, pad):
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


def sft(model, tok, rng, steps=60):
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = [tok(str(rng.choice(QUESTIONS)) + "\n", add_special_tokens=False)["input_ids"] for _ in range(8)]
        outs = [
            tok(str(rng.choice(GOOD + BAD)))["input_ids"][: int(rng.integers(3, 14))] + [tok.eos_token_id]
            for _ in range(8)
        ]
        ids, mask = _pad([a + b for a, b in zip(rows, outs)], tok.pad_token_id)
        out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        loss = (
            out.loss + 0.1 * torch.log_softmax(out.logits, -1)[..., tok.pad_token_id].clamp(min=-15).mean()
        )  # pad is never an answer
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()


def train_reward(model, tok, rng, steps=40):
    opt, last = torch.optim.AdamW(model.parameters(), lr=1e-3), lambda m: m.sum(-1) - 1
    for _ in range(steps):
        q = [tok(str(rng.choice(QUESTIONS)) + "\n")["input_ids"] for _ in range(6)]
        sides = []
        for pool in (GOOD, BAD):
            ids, mask = _pad(
                [a + tok(str(rng.choice(pool)))["input_ids"] + [tok.eos_token_id] * int(rng.integers(0, 2)) for a in q],
                tok.pad_token_id,
            )
            sides.append(model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)[torch.arange(len(q)), last(mask)])
        loss = -F.logsigmoid(sides[0] - sides[1]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()


def _build(*overrides):
    cfg = load_config(overrides)
    torch.manual_seed(11)
    rng = np.random.default_rng(11)
    tokenizer = make_tokenizer()
    kw = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.12,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    dropout = cfg.actor_rollout_ref.model.attention_dropout
    policy = sft(Qwen2ForCausalLM(Qwen2Config(attention_dropout=dropout, **kw)), tokenizer, rng)
    reference = copy.deepcopy(policy)
    head = dict(num_labels=1, classifier_dropout=0.0, attention_dropout=0.0)
    reward = train_reward(Qwen2ForTokenClassification(Qwen2Config(**head, **kw)), tokenizer, rng)

    prompts = [q + "\n" for q in QUESTIONS]
    loader = StatefulPromptLoader(prompts, tokenizer, cfg.data)
    actor_wg = ActorRolloutRefWorker(cfg, "actor_rollout", policy, tokenizer)
    rm_wg = RewardModelWorker(reward)
    # centre and scale the scores under the initial policy
    sample = [actor_wg.generate_sequences(loader.next()) for _ in range(6)]
    scores = torch.cat([rm_wg.compute_rm_score(s).sum(-1) for s in sample])
    with torch.no_grad():
        reward.score.bias.sub_(scores.mean()).div_(scores.std())
        reward.score.weight.div_(scores.std())
    value = Qwen2ForTokenClassification(Qwen2Config(**head, **kw))
    value.load_state_dict(reward.state_dict())

    ref_wg, critic_wg = ActorRolloutRefWorker(cfg, "ref", reference, tokenizer), CriticWorker(cfg, value)
    trainer = PPOTrainer(cfg, tokenizer, loader, actor_wg, ref_wg, critic_wg, rm_wg)
    a, alg = cfg.actor_rollout_ref.actor, cfg.algorithm
    declared = dict(
        algorithm="ppo",
        gamma=alg.gamma,
        lam=alg.lam,
        kl_coef=alg.kl_ctrl.kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=cfg.actor_rollout_ref.rollout.temperature,
        top_k=0,
        top_p=1.0,
        clip_range=a.clip_ratio_low,
        clip_range_value=cfg.critic.cliprange_value,
        ent_coef=a.entropy_coeff,
        whiten_advantages=True,
        learning_rate=a.lr,
        critic_learning_rate=cfg.critic.lr,
        ppo_epochs=a.ppo_epochs,
        num_minibatches=cfg.data.train_batch_size // a.ppo_mini_batch_size,
        batch_size=cfg.data.train_batch_size,
        prompt_length=cfg.data.max_prompt_length,
        response_length=cfg.data.max_response_length,
        dtype="float32",
        reference="policy",
        value_init="reward",
        policy_init="sft",
        kl_adaptive=alg.kl_ctrl.type == "adaptive",
        loss_aggregation={"token-mean": "token-mean", "seq-mean-token-sum": "seq-sum"}[a.loss_agg_mode],
    )
    if alg.kl_ctrl.type == "adaptive":
        declared.update(kl_target=alg.kl_ctrl.target_kl, kl_horizon=alg.kl_ctrl.horizon)
    if cfg.bug == "adaptive_by_name":  # the type is misread and the fixed controller is taken
        trainer.kl_ctrl_in_reward = FixedKLController(alg.kl_ctrl.kl_coef)
    state = [loader, trainer.kl_ctrl_in_reward]
    if actor_wg.engine is not policy:
        state.append(actor_wg.engine)
    return dict(
        policy=policy,
        reference=reference,
        reward=reward,
        value=value,
        tokenizer=tokenizer,
        prompts=prompts,
        step=trainer.fit_step,
        optimizers=[actor_wg.optimizer, critic_wg.optimizer],
        state=state,
        declared=declared,
        preferences=[(p, g, b) for p, g, b in zip(prompts, GOOD * 4, BAD * 4)],
        functions={"gae": compute_gae_advantage_return},
        calls={
            "value": lambda m, ids, mask: m(
                input_ids=ids, attention_mask=mask, position_ids=compute_position_id_with_mask(mask)
            ).logits.squeeze(-1)
        },
    )


ENGINE = (
    "actor_rollout_ref.rollout.name=engine",
    "algorithm.kl_ctrl.type=adaptive",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
    "actor_rollout_ref.actor.entropy_coeff=0.01",
)


def healthy():
    return _build()


def healthy_engine_adaptive():
    return _build(*ENGINE)


def reward_not_reordered():
    return _build("bug=reward_not_reordered")


def micro_batch_token_mean():
    return _build("actor_rollout_ref.actor.batch_norm_loss=False")


def kl_in_reward_and_loss():
    return _build("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=mse")


def attention_dropout_in_update():
    return _build("actor_rollout_ref.model.attention_dropout=0.1")


def temperature_on_logprobs():
    return _build("bug=temperature_on_logprobs")


def ref_without_temperature():
    return _build("bug=ref_without_temperature")


def values_off_by_one():
    return _build("bug=values_off_by_one")


def kl_penalty_dropped():
    return _build("bug=kl_penalty_dropped")


def engine_not_resynced():
    return _build(*ENGINE, "bug=engine_not_resynced")


def adaptive_kl_ignored():
    return _build(*ENGINE, "bug=adaptive_by_name")


def critic_optimizer_stale():
    return _build("bug=critic_optimizer_stale")

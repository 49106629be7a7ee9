"""Sentiment tuning with a PPOTrainer in the manner of TRL 0.7: `trainer.step(queries, responses, scores)` on lists of 1-D tensors.

The policy carries a value head (one module, one optimizer).  Queries and responses keep their own lengths; they meet padding only in the
data collator and in batched generation.  The score comes from a text-classification pipeline run on query + response texts.
"""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim import Adam
from transformers import DataCollatorForLanguageModeling, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed

# ---------------------------------------------------------------------------------------------------- trl/core.py


def masked_mean(values, mask, axis=None):
    if axis is not None:
        return (values * mask).sum(axis=axis) / mask.sum(axis=axis)
    return (values * mask).sum() / mask.sum()


def masked_var(values, mask, unbiased=True):
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    if unbiased:
        mask_sum = mask.sum()
        if mask_sum <= 1:
            raise ValueError("at least two unmasked values are needed")
        variance = variance * mask_sum / (mask_sum - 1)
    return variance


def masked_whiten(values, mask, shift_mean=True):
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened += mean
    return whitened


def logprobs_from_logits(logits, labels):
    return torch.gather(F.log_softmax(logits, dim=2), 2, labels.unsqueeze(2)).squeeze(-1)


def clip_by_value(x, tensor_min, tensor_max):
    return torch.max(torch.min(x, tensor_max), tensor_min)


class AdaptiveKLController:
    def __init__(self, init_kl_coef, target, horizon):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current, n_steps):
        proportional_error = np.clip(current / self.target - 1, -0.2, 0.2)
        self.value *= 1 + proportional_error * n_steps / self.horizon


# ---------------------------------------------------------------------------------------------------- trl/models
class ValueHead(nn.Module):
    def __init__(self, config, summary_dropout_prob=0.1):
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states):
        output = self.dropout(hidden_states)
        if output.dtype != self.summary.weight.dtype:
            output = output.to(self.summary.weight.dtype)
        return self.summary(output)


class AutoModelForCausalLMWithValueHead(nn.Module):
    def __init__(self, pretrained_model, **v_head_kwargs):
        super().__init__()
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.v_head = ValueHead(pretrained_model.config, **v_head_kwargs)

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        kwargs["output_hidden_states"] = True
        base = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        value = self.v_head(base.hidden_states[-1]).squeeze(-1)
        return base.logits.float(), base.loss, value

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)


def create_reference_model(model):
    ref_model = deepcopy(model)
    for param in ref_model.parameters():
        param.requires_grad = False
    return ref_model.eval()


# ---------------------------------------------------------------------------------------------------- trl/trainer
@dataclass
class PPOConfig:
    seed: int = 0
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    target: float = 6.0
    horizon: int = 10000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 8
    mini_batch_size: int = 4
    ppo_epochs: int = 2
    ratio_threshold: float = 10.0
    whiten_rewards: bool = False
    # switches of this file
    refresh_old_logprobs: bool = False
    mask_from_last_query_token: bool = False
    score_each_token: bool = False


class PPOTrainer:
    def __init__(self, config, model, ref_model, tokenizer, dataset):
        self.config, self.model, self.tokenizer, self.dataset = config, model, tokenizer, dataset
        self.ref_model = ref_model if ref_model is not None else create_reference_model(model)
        self.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.optimizer = Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=config.learning_rate)
        self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)

    def generate(self, query_tensors: list[torch.Tensor], batch_size=8, return_prompt=True, **generation_kwargs):
        outputs = []
        padding_side_default = self.tokenizer.padding_side
        self.tokenizer.padding_side = "left"
        for i in range(0, len(query_tensors), batch_size):
            queries = query_tensors[i : i + batch_size]
            inputs = {"input_ids": queries, "attention_mask": [torch.ones_like(q) for q in queries]}
            padded = self.tokenizer.pad(inputs, padding=True, return_tensors="pt")
            generations = self.model.generate(**padded, **generation_kwargs)
            for generation, mask in zip(generations, padded["attention_mask"]):
                output = generation[(1 - mask).sum() :]  # remove padding
                start = int(mask.sum())
                if not return_prompt:
                    output, start = output[start:], 0
                ends = (output[start:] == self.tokenizer.eos_token_id).nonzero()
                if len(ends):
                    output = output[: start + int(ends[0]) + 1]  # keep the eos token
                outputs.append(output)
        self.tokenizer.padding_side = padding_side_default
        return outputs

    def prepare_model_inputs(self, queries, responses):
        input_ids = [torch.cat([q, r]) for q, r in zip(queries, responses)]
        data = self.data_collator([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in input_ids])
        data.pop("labels", None)  # we don't want to compute LM losses
        return data

    def batched_forward_pass(self, model, queries, responses, model_inputs):
        bs, fbs = len(queries), self.config.mini_batch_size
        all_logprobs, all_values, all_masks = [], [], []
        for i in range(math.ceil(bs / fbs)):
            input_kwargs = {key: value[i * fbs : (i + 1) * fbs] for key, value in model_inputs.items()}
            query_batch, response_batch = queries[i * fbs : (i + 1) * fbs], responses[i * fbs : (i + 1) * fbs]
            logits, _, values = model(**input_kwargs)
            input_ids, attention_mask = input_kwargs["input_ids"], input_kwargs["attention_mask"]
            logprobs = logprobs_from_logits(logits[:, :-1, :], input_ids[:, 1:])
            masks = torch.zeros_like(attention_mask)
            masks[:, :-1] = attention_mask[:, 1:]
            for j in range(len(query_batch)):
                start = len(query_batch[j]) - 1  # logprobs start from the second query token
                if self.config.mask_from_last_query_token:
                    start = len(query_batch[j]) - 2
                if attention_mask[j, 0] == 0:  # offset left padding
                    start += int(attention_mask[j, :].nonzero()[0])
                end = start + len(response_batch[j])
                masks[j, :start] = 0
                masks[j, end:] = 0
            all_logprobs.append(logprobs)
            all_values.append(values)
            all_masks.append(masks)
        return torch.cat(all_logprobs), torch.cat(all_values)[:, :-1], torch.cat(all_masks)[:, :-1]

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        rewards = []
        for score, logprob, ref_logprob, mask in zip(scores, logprobs, ref_logprobs, masks):
            reward = -self.kl_ctl.value * (logprob - ref_logprob)
            if self.config.score_each_token:
                reward = reward + score
            else:
                last_non_masked_index = mask.nonzero()[-1]
                reward[last_non_masked_index] += score  # reward is preference model score + KL penalty
            rewards.append(reward)
        return torch.stack(rewards)

    def compute_advantages(self, values, rewards, mask):
        lastgaelam = 0
        advantages_reversed = []
        gen_len = rewards.shape[-1]
        values = values * mask
        rewards = rewards * mask
        if self.config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False) * mask
        for t in reversed(range(gen_len)):
            nextvalues = values[:, t + 1] if t < gen_len - 1 else 0.0
            delta = rewards[:, t] + self.config.gamma * nextvalues - values[:, t]
            lastgaelam = delta + self.config.gamma * self.config.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1]).transpose(0, 1)
        returns = advantages + values
        advantages = masked_whiten(advantages, mask).detach()
        return values, advantages, returns

    def loss(self, old_logprobs, values, vpreds, logprobs, mask, advantages, returns):
        cfg = self.config
        vpredclipped = clip_by_value(vpreds, values - cfg.cliprange_value, values + cfg.cliprange_value)
        vf_loss = 0.5 * masked_mean(torch.max((vpreds - returns) ** 2, (vpredclipped - returns) ** 2), mask)
        if cfg.refresh_old_logprobs:
            old_logprobs = logprobs.detach()
        ratio = torch.exp(logprobs - old_logprobs)
        pg_losses = -advantages * ratio
        pg_losses2 = -advantages * torch.clamp(ratio, 1.0 - cfg.cliprange, 1.0 + cfg.cliprange)
        pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), mask)
        loss = pg_loss + cfg.vf_coef * vf_loss
        avg_ratio = masked_mean(ratio, mask).item()
        if avg_ratio > cfg.ratio_threshold:  # skip the batch
            loss = loss * 0.0
        return loss, {"loss/policy": pg_loss.item(), "loss/value": vf_loss.item(), "policy/ratio": avg_ratio}

    def step(self, queries, responses, scores):
        cfg, bs = self.config, self.config.batch_size
        assert len(queries) == len(responses) == len(scores) == bs
        scores = torch.stack([torch.as_tensor(s, dtype=torch.float32) for s in scores])
        model_inputs = self.prepare_model_inputs(queries, responses)
        with torch.no_grad():
            all_logprobs, values, masks = self.batched_forward_pass(self.model, queries, responses, model_inputs)
            ref_logprobs, _, _ = self.batched_forward_pass(self.ref_model, queries, responses, model_inputs)
            rewards = self.compute_rewards(scores, all_logprobs, ref_logprobs, masks)
            values, advantages, returns = self.compute_advantages(values, rewards, masks)
        self.model.train()
        for _ in range(cfg.ppo_epochs):
            b_inds = np.random.permutation(bs)
            for start in range(0, bs, cfg.mini_batch_size):
                mb = b_inds[start : start + cfg.mini_batch_size]
                mb_inputs = {k: v[mb] for k, v in model_inputs.items()}
                logprobs, vpreds, _ = self.batched_forward_pass(
                    self.model, [queries[i] for i in mb], [responses[i] for i in mb], mb_inputs
                )
                loss, stats = self.loss(
                    all_logprobs[mb], values[mb], vpreds, logprobs, masks[mb], advantages[mb], returns[mb]
                )
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        mean_kl = ((all_logprobs - ref_logprobs) * masks).sum(axis=-1).mean().item()
        if cfg.adap_kl_ctrl:
            self.kl_ctl.update(mean_kl, bs)
        return {
            **stats,
            "objective/kl": mean_kl,
            "objective/kl_coef": self.kl_ctl.value,
            "ppo/mean_scores": scores.mean().item(),
        }


# ---------------------------------------------------------------------------------------------------- the sentiment script
TITLES = "the this that movie film plot cast scene music script ending director".split()
VERBS = "was is felt seemed looked sounded became".split()
LINKS = "and but so because though with without for in of to a an it i you we not very quite rather".split()
POSITIVE = "great wonderful lovely brilliant charming superb warm funny".split()
NEGATIVE = "awful boring dull terrible clumsy weak slow ugly".split()


class SentimentPipeline:
    """Scores as transformers' text-classification pipeline gives them with top_k=None, function_to_apply="none"."""

    def __init__(self, sort_by_score=False):
        rng = np.random.RandomState(7)
        self.weights = {w: rng.normal(0, 0.3) for w in TITLES + VERBS + LINKS}
        self.weights.update({w: 1.0 + 0.5 * rng.rand() for w in POSITIVE})
        self.weights.update({w: -1.0 - 0.5 * rng.rand() for w in NEGATIVE})
        self.sort_by_score = sort_by_score

    def __call__(self, texts):
        results = []
        for text in texts:
            words = re.findall(r"[a-z]+", text.lower())
            logit, sign = 0.0, 1.0
            for word in words:
                logit += sign * self.weights.get(word, 0.0)
                sign = -1.0 if word == "not" else 1.0
            logit /= math.sqrt(max(len(words), 1)) / 2
            rows = [{"label": "NEGATIVE", "score": -logit}, {"label": "POSITIVE", "score": logit}]
            results.append(sorted(rows, key=lambda row: -row["score"]) if self.sort_by_score else rows)
        return results


def build_tokenizer(pad_is_eos):
    vocab = ["<pad>", "</s>", "<unk>", "review", ":"] + TITLES + VERBS + LINKS + POSITIVE + NEGATIVE
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="</s>" if pad_is_eos else "<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=48,
    )


def build_dataset(tokenizer, n=24):
    rng = np.random.RandomState(3)
    dataset = []
    for _ in range(n):  # input_size = LengthSampler(2, 8)
        words = ["review", ":"] + list(rng.choice(TITLES + VERBS + LINKS, size=rng.randint(1, 8)))
        query = " ".join(words)
        dataset.append({"query": query, "input_ids": torch.tensor(tokenizer(query)["input_ids"])})
    return dataset


def build(
    config: PPOConfig | None = None,
    pad_is_eos=False,
    v_head_dropout=0.0,
    same_ref=False,
    return_prompt=False,
    sort_batch=False,
    sorted_pipeline=False,
    temperature=1.0,
):
    config = config or PPOConfig()
    set_seed(config.seed)
    tokenizer = build_tokenizer(pad_is_eos)
    lm = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            word_embed_proj_dim=48,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.15,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    lm.lm_head = nn.Linear(48, len(tokenizer))
    nn.init.normal_(lm.lm_head.weight, std=0.15)
    nn.init.zeros_(lm.lm_head.bias)
    lm.lm_head.bias.data[0] = -40.0  # "<pad>" is in nobody's texts
    lm.lm_head.bias.data[tokenizer.eos_token_id] = 1.5
    model = AutoModelForCausalLMWithValueHead(lm, summary_dropout_prob=v_head_dropout)
    ref_model = model if same_ref else create_reference_model(model)
    dataset = build_dataset(tokenizer)
    sentiment_pipe = SentimentPipeline(sort_by_score=sorted_pipeline)
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset)
    gen_kwargs = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": temperature,
        "max_new_tokens": 12,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }

    def sentiment_reward(prompts: list[str], responses: list[str]) -> list[float]:
        outputs = sentiment_pipe([q + " " + r for q, r in zip(prompts, responses)])
        return [output[1]["score"] for output in outputs]

    reward_fn: Callable = sentiment_reward

    def step():
        picked = [dataset[i] for i in torch.randperm(len(dataset))[: config.batch_size].tolist()]
        query_tensors = [row["input_ids"] for row in picked]
        response_tensors = ppo_trainer.generate(query_tensors, return_prompt=return_prompt, **gen_kwargs)
        batch = {
            "query": [row["query"] for row in picked],
            "response": [
                tokenizer.decode(r if not return_prompt else r[len(q) :], skip_special_tokens=True)
                for q, r in zip(query_tensors, response_tensors)
            ],
        }
        rewards = [torch.tensor(score) for score in reward_fn(batch["query"], batch["response"])]
        if sort_batch:  # group by length, less padding in the mini-batches
            order = sorted(range(len(picked)), key=lambda i: len(query_tensors[i]) + len(response_tensors[i]))
            query_tensors = [query_tensors[i] for i in order]
            response_tensors = [response_tensors[i] for i in order]
        return ppo_trainer.step(query_tensors, response_tensors, rewards)

    declared = dict(
        algorithm="ppo",
        gamma=config.gamma,
        lam=config.lam,
        kl_coef=config.init_kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        clip_range=config.cliprange,
        clip_range_value=config.cliprange_value,
        vf_coef=config.vf_coef,
        whiten_advantages=True,
        whiten_rewards=config.whiten_rewards,
        learning_rate=config.learning_rate,
        ppo_epochs=config.ppo_epochs,
        num_minibatches=config.batch_size // config.mini_batch_size,
        batch_size=config.batch_size,
        response_length=12,
        dtype="float32",
        reference="policy",
        value_init="fresh",
        kl_adaptive=config.adap_kl_ctrl,
        kl_target=config.target,
        kl_horizon=config.horizon,
        loss_aggregation="token-mean",
        shared_trunk=True,
        dense_rewards=False,
    )
    preferences = [
        (
            row["query"],
            f"it was {POSITIVE[i % 8]} and {POSITIVE[(i + 3) % 8]} and {POSITIVE[(i + 5) % 8]}",
            f"the plot was {NEGATIVE[i % 8]}",
        )
        for i, row in enumerate(dataset[:12])
    ]
    return dict(
        policy=model,
        reference=ref_model,
        reward=reward_fn,
        value=model,
        tokenizer=tokenizer,
        prompts=[row["query"] for row in dataset],
        step=step,
        optimizers=[ppo_trainer.optimizer],
        state=[ppo_trainer.kl_ctl],
        declared=declared,
        preferences=preferences,
        calls={
            "policy": lambda m, ids, mask: m(input_ids=ids, attention_mask=mask)[0],
            "reference": lambda m, ids, mask: m(input_ids=ids, attention_mask=mask)[0],
            "value": lambda m, ids, mask: m(input_ids=ids, attention_mask=mask)[2],
        },
    )


def healthy():
    return build()


def healthy_pad_is_eos():  # tokenizer.pad_token = tokenizer.eos_token, as in the gpt2 scripts; every mask comes from the lists' lengths
    return build(pad_is_eos=True)


def v_head_dropout():
    return build(v_head_dropout=0.1)


def response_with_prompt():
    return build(return_prompt=True)


def ref_is_model():
    return build(same_ref=True)


def score_each_token():
    return build(PPOConfig(score_each_token=True))


def sorted_batch_scores():
    return build(sort_batch=True)


def old_logprobs_refreshed():
    return build(PPOConfig(refresh_old_logprobs=True))


def pipeline_sorts_labels():
    return build(sorted_pipeline=True)


def temperature_not_scored():
    return build(temperature=0.6)


def mask_from_last_query_token():
    return build(PPOConfig(mask_from_last_query_token=True))

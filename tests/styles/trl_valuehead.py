"""TRL 0.9 PPOTrainer.step(queries, responses, scores) in LLaMA-Factory's clothes: one Qwen2 with a v_head, full tuning."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = "the a cat dog bird fish tree house river sees likes finds eats red blue green big small old new why how what does run jump sing and or not".split()


class ValueHead(nn.Module):
    def __init__(self, hidden_size, summary_dropout_prob=0.0):
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states):
        output = self.dropout(hidden_states)
        if output.dtype != self.summary.weight.dtype:
            output = output.to(self.summary.weight.dtype)
        return self.summary(output)


class CausalLMWithValueHead(nn.Module):
    def __init__(self, pretrained_model):
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = ValueHead(pretrained_model.config.hidden_size)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        kwargs["output_hidden_states"] = True
        base = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        value = self.v_head(base.hidden_states[-1]).squeeze(-1)
        return base.logits.float(), None, value

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)


class AdaptiveKLController:
    def __init__(self, init_kl_coef, target, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current, n_steps):
        err = max(min(current / self.target - 1, 0.2), -0.2)
        self.value *= 1 + err * n_steps / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, d):
        self.value = d["value"]


def logprobs_from_logits(logits, labels):
    return torch.gather(F.log_softmax(logits, dim=2), 2, labels.unsqueeze(2)).squeeze(-1)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8)


class PPOTrainer:
    def __init__(self, model, ref_model, tokenizer, optimizer, fault=None, **config):
        self.model, self.ref_model, self.tokenizer, self.optimizer, self.fault = (
            model,
            ref_model,
            tokenizer,
            optimizer,
            fault,
        )
        self.cfg = config
        self.kl_ctl = AdaptiveKLController(config["init_kl_coef"], config["target"], config["horizon"])

    def prepare_model_inputs(self, queries, responses):
        feats = [
            {"input_ids": torch.cat([q, r]), "attention_mask": torch.ones(len(q) + len(r), dtype=torch.long)}
            for q, r in zip(queries, responses)
        ]
        self.tokenizer.padding_side = "right"  # the collator's side; generation turns it to the left
        return dict(self.tokenizer.pad(feats, return_tensors="pt"))

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False):
        bs, fbs = len(queries), self.cfg["mini_batch_size"]
        all_logprobs, all_logits, all_masks, all_values = [], [], [], []
        for i in range(0, bs, fbs):
            input_kwargs = {k: v[i : i + fbs] for k, v in model_inputs.items()}
            input_ids, attention_mask = input_kwargs["input_ids"], input_kwargs["attention_mask"]
            logits, _, values = model(**input_kwargs)
            logprobs = logprobs_from_logits(logits[:, :-1, :], input_ids[:, 1:])
            masks = torch.zeros_like(attention_mask)
            masks[:, :-1] = attention_mask[:, 1:]
            for j, (q, r) in enumerate(zip(queries[i : i + fbs], responses[i : i + fbs])):
                start = len(q) - 1
                if attention_mask[j, 0] == 0:  # left padded
                    start += int(attention_mask[j].nonzero()[0])
                masks[j, :start] = 0
                masks[j, start + len(r) :] = 0
            all_logits.append(logits[:, :-1] if return_logits else None)
            all_values.append(values[:, :-1])
            all_logprobs.append(logprobs)
            all_masks.append(masks[:, :-1])
        return (
            torch.cat(all_logprobs),
            torch.cat(all_logits) if return_logits else None,
            torch.cat(all_values),
            torch.cat(all_masks),
        )

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        rewards, kls = [], []
        for score, logprob, ref_logprob, mask in zip(scores, logprobs, ref_logprobs, masks):
            kl = logprob - ref_logprob
            kls.append(kl)
            reward = -self.kl_ctl.value * kl
            last_non_masked_index = mask.nonzero()[-1]
            if self.fault == "score_last_index":
                last_non_masked_index = -1
            reward[last_non_masked_index] += score
            rewards.append(reward)
        return torch.stack(rewards), torch.stack(kls)

    def compute_advantages(self, values, rewards, mask):
        lastgaelam, advantages_reversed, gen_len = 0, [], rewards.shape[-1]
        values, rewards = values * mask, rewards * mask
        for t in reversed(range(gen_len)):
            nextvalues = values[:, t + 1] if t < gen_len - 1 else 0.0
            delta = rewards[:, t] + self.cfg["gamma"] * nextvalues - values[:, t]
            lastgaelam = delta + self.cfg["gamma"] * self.cfg["lam"] * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1]).transpose(0, 1)
        returns = advantages + values
        return values, masked_whiten(advantages, mask).detach(), returns

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        cr, crv = self.cfg["cliprange"], self.cfg["cliprange_value"]
        vpredclipped = torch.clamp(vpreds, values - crv, values + crv)
        vf_loss = 0.5 * masked_mean(torch.max((vpreds - returns) ** 2, (vpredclipped - returns) ** 2), mask)
        ratio = torch.exp(logprobs - old_logprobs)
        pg_loss = masked_mean(torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - cr, 1 + cr)), mask)
        loss = pg_loss + self.cfg["vf_coef"] * vf_loss
        avg_ratio = masked_mean(ratio, mask).item()
        if avg_ratio > self.cfg["ratio_threshold"]:
            print(f"average ratio of batch ({avg_ratio:.2f}) exceeds threshold, skipping batch")
            pg_loss, vf_loss, loss = pg_loss * 0.0, vf_loss * 0.0, loss * 0.0
        entropy = masked_mean(-(F.softmax(logits, -1) * F.log_softmax(logits, -1)).sum(-1), mask)
        stats = {
            "loss/policy": pg_loss.item(),
            "loss/value": vf_loss.item(),
            "policy/entropy": entropy.item(),
            "policy/policykl": masked_mean(old_logprobs - logprobs, mask).item(),
            "policy/ratio": avg_ratio,
        }
        return loss, stats

    def step(self, queries, responses, scores):
        bs, mbs = len(queries), self.cfg["mini_batch_size"]
        scores = torch.stack(scores)
        if self.cfg["score_clip"] is not None:
            scores = torch.clip(scores, -self.cfg["score_clip"], self.cfg["score_clip"])
        model_inputs = self.prepare_model_inputs(queries, responses)
        self.model.train()
        with torch.no_grad():
            all_logprobs, _, values, masks = self.batched_forward_pass(self.model, queries, responses, model_inputs)
            ref_logprobs, _, _, _ = self.batched_forward_pass(self.ref_model, queries, responses, model_inputs)
            rewards, kls = self.compute_rewards(scores, all_logprobs, ref_logprobs, masks)
            values, advantages, returns = self.compute_advantages(values, rewards, masks)
        early_stop, all_stats = False, []
        for _ in range(self.cfg["ppo_epochs"]):
            if early_stop:
                break
            b_inds = torch.randperm(bs).tolist()
            for s in range(0, bs, mbs):
                inds = b_inds[s : s + mbs]
                mb_inputs = {k: v[inds] for k, v in model_inputs.items()}
                logprobs, logits, vpreds, _ = self.batched_forward_pass(
                    self.model, [queries[i] for i in inds], [responses[i] for i in inds], mb_inputs, return_logits=True
                )
                loss, st = self.loss(
                    all_logprobs[inds],
                    values[inds],
                    logits,
                    vpreds,
                    logprobs,
                    masks[inds],
                    advantages[inds],
                    returns[inds],
                )
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg["max_grad_norm"])
                self.optimizer.step()
                self.optimizer.zero_grad()
                all_stats.append(st)
                if self.cfg["early_stopping"] and st["policy/policykl"] > 1.5 * self.cfg["target_kl"]:
                    early_stop = True
                    break
        mean_kl = (kls * masks).sum(-1).mean().item()
        self.kl_ctl.update(mean_kl, bs)
        stats = {k: sum(s[k] for s in all_stats) / len(all_stats) for k in all_stats[0]}
        return {
            **stats,
            "objective/kl": mean_kl,
            "objective/kl_coef": self.kl_ctl.value,
            "ppo/mean_scores": scores.mean().item(),
        }


def make(fault=None):
    torch.manual_seed(11)
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", *WORDS, *(f"w{i}" for i in range(40))])}
    raw = Tokenizer(models.WordLevel(vocab))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.08,
        use_cache=True,
    )
    base = Qwen2ForCausalLM(config)
    base.lm_head = nn.Linear(48, len(vocab))
    with torch.no_grad():
        base.lm_head.bias.zero_()
        base.lm_head.bias[0], base.lm_head.bias[1] = -15.0, 2.2
    base.generation_config.update(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=1)
    model = CausalLMWithValueHead(base)
    nn.init.normal_(model.v_head.summary.weight, std=0.02)
    nn.init.zeros_(model.v_head.summary.bias)
    ref_model = model if fault == "ref_is_model" else copy.deepcopy(model).eval().requires_grad_(False)
    reward_model = CausalLMWithValueHead(Qwen2ForCausalLM(config)).eval().requires_grad_(False)
    nn.init.normal_(reward_model.v_head.summary.weight, std=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.41e-5)
    trainer = PPOTrainer(
        model,
        ref_model,
        tok,
        optimizer,
        fault,
        init_kl_coef=0.2,
        target=6.0,
        horizon=10000,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        ppo_epochs=2,
        mini_batch_size=4,
        max_grad_norm=1.0,
        score_clip=10.0,
        early_stopping=True,
        target_kl=1.0,
        ratio_threshold=10.0,
    )
    g = torch.Generator().manual_seed(3)
    prompts = [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (3 + k % 6,), generator=g)) for k in range(16)]

    @torch.no_grad()
    def get_inputs():
        tok.padding_side = "left"
        batch = tok(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        model.eval()
        out = model.generate(**batch, max_new_tokens=12)
        query, response = batch["input_ids"], out[:, batch["input_ids"].size(-1) :]
        queries, responses = [], []
        for i in range(len(query)):
            queries.append(query[i, int((query[i] != tok.pad_token_id).nonzero()[0]) :])
            response_indexes = (response[i] != tok.pad_token_id).nonzero()
            length = 1 if len(response_indexes) == 0 else int(response_indexes[-1]) + 1
            if fault == "pads_in_response":
                length = response.size(1)
            responses.append(response[i, :length])
        return queries, responses

    @torch.no_grad()
    def get_rewards(queries, responses):
        batch = trainer.prepare_model_inputs(queries, responses)
        _, _, values = reward_model(**batch)
        ends = batch["attention_mask"].sum(-1, keepdim=True) - 1
        return list(values.gather(-1, ends).squeeze(-1))

    def step():
        queries, responses = get_inputs()
        return trainer.step(queries, responses, get_rewards(queries, responses))

    def call_reward(m, ids, mask):
        last = (torch.arange(ids.size(1)) * mask).argmax(-1, keepdim=True)
        return m(ids, attention_mask=mask)[2].gather(-1, last).squeeze(-1)

    return {
        "policy": base,
        "reference": ref_model.pretrained_model,
        "reward": reward_model,
        "value": model,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [optimizer],
        "state": [trainer.kl_ctl],
        "step": step,
        "calls": {"value": lambda m, ids, mask: m(ids, attention_mask=mask)[2], "reward": call_reward},
        "declared": {
            "algorithm": "ppo",
            "gamma": 1.0,
            "lam": 0.95,
            "kl_coef": 0.2,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "kl_adaptive": True,
            "kl_target": 6.0,
            "kl_horizon": 10000,
            "clip_range": 0.2,
            "clip_range_value": 0.2,
            "vf_coef": 0.1,
            "temperature": 1.0,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "reward_clip": 10.0,
            "ppo_epochs": 2,
            "num_minibatches": 4,
            "batch_size": 16,
            "response_length": 12,
            "learning_rate": 1.41e-5,
            "shared_trunk": True,
        },
    }


def healthy():
    return make()


def pads_in_response():
    return make("pads_in_response")


def score_last_index():
    return make("score_last_index")


def ref_is_model():
    return make("ref_is_model")

"""GRPO with a separate inference engine. The engine keeps its own copy of the weights (synced before every generation),
decodes with a KV cache and returns processed log-probs; the trainer uses them as old log-probs or, in the TIS variant,
as the behaviour policy of a truncated importance weight. Rewards are verifiable functions of the texts."""

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DIGITS = [str(i) for i in range(10)]
MARKS = [
    "sort",
    "reverse",
    "copy",
    "list",
    "numbers",
    "the",
    "of",
    "these",
    ":",
    "->",
    "ans",
    "done",
    "hmm",
    "so",
    "wait",
    "ok",
]


# ---------------------------------------------------------------------------------------------------------- task, rewards
def make_task(rng):
    op = rng.choice(["sort", "reverse", "copy"])
    digits = [rng.choice(DIGITS) for _ in range(rng.randint(2, 6))]
    text = rng.choice(["{op} : {d} ->", "{op} the numbers : {d} ->", "{op} the list of these numbers : {d} ->"])
    return text.format(op=op, d=" ".join(digits))


def solve(prompt):
    op, digits = prompt.split()[0], re.findall(r"\d", prompt)
    return {"sort": sorted(digits), "reverse": digits[::-1]}.get(op, digits)


def demonstration(rng, prompt):
    answer = solve(prompt)
    if rng.random() < 0.5:
        rng.shuffle(answer)
    if rng.random() < 0.3:
        answer[rng.randrange(len(answer))] = rng.choice(DIGITS)
    lead = [] if rng.random() < 0.7 else rng.choices(["hmm", "so", "wait", "ok"], k=rng.randint(1, 4))
    tail = ["done"] if rng.random() < 0.3 else []
    return " ".join(lead + (["ans"] if rng.random() < 0.8 else []) + answer + tail)


def accuracy_reward(prompts, completions, **kwargs) -> list[float]:
    out = []
    for prompt, completion in zip(prompts, completions):
        want, got = solve(prompt), re.findall(r"\d", completion)
        hits = sum(a == b for a, b in zip(want, got))
        out.append(hits / max(len(want), len(got), 1))
    return out


def format_reward(prompts, completions, **kwargs) -> list[float]:
    return [
        1.0 if re.fullmatch(r"ans( \d)+", c.strip()) else 0.5 if c.strip().startswith("ans") else 0.0
        for c in completions
    ]


def brevity_reward(prompts, completions, **kwargs) -> list[float]:
    return [-0.1 * max(0, len(c.split()) - len(solve(p)) - 1) for p, c in zip(prompts, completions)]


class RewardMix:
    def __init__(self, funcs: list[Callable], weights: list[float]):
        self.funcs, self.weights = funcs, weights

    def per_func(self, prompts, completions):
        return torch.tensor([f(prompts, completions) for f in self.funcs]).T

    def __call__(self, prompts, completions):
        return self.per_func(prompts, completions) @ torch.tensor(self.weights)


# -------------------------------------------------------------------------------------------------------------- inference
@dataclass
class SamplingParams:
    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 10


@dataclass
class CompletionOutput:
    request_id: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class LLMEngine:
    """generate(), load_weights(): the part of an inference server that the trainer talks to."""

    def __init__(self, config, tokenizer, default_sampling=None, logprobs_mode="processed_logprobs", logprob_offset=0):
        self.model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
        self.tokenizer, self.default_sampling = tokenizer, default_sampling or {}
        self.logprobs_mode, self.logprob_offset = logprobs_mode, logprob_offset
        self.weight_version = 0

    def state_dict(self):
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "weight_version": self.weight_version,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.weight_version = state["weight_version"]

    @torch.no_grad()
    def load_weights(self, named_tensors):
        own = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            if name in own:  # names that this build does not know (other shards) are skipped
                own[name].copy_(tensor)
        self.weight_version += 1

    def _fill(self, params, name, neutral):
        value = getattr(params, name)
        return self.default_sampling.get(name, neutral) if value is None else value

    def _process(self, logits, params):
        logits = logits / self._fill(params, "temperature", 1.0)
        top_k, top_p = self._fill(params, "top_k", -1), self._fill(params, "top_p", 1.0)
        if 0 < top_k < logits.shape[-1]:
            kth = logits.topk(top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if top_p < 1.0:
            vals, order = logits.sort(-1, descending=True)
            drop = vals.softmax(-1).cumsum(-1) - vals.softmax(-1) > top_p
            logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
        return logits

    @torch.inference_mode()
    def generate(self, prompt_token_ids: list[list[int]], params: SamplingParams) -> list[CompletionOutput]:
        requests = [ids for ids in prompt_token_ids for _ in range(params.n)]
        outputs = [CompletionOutput(i) for i in range(len(requests))]
        width = max(map(len, requests))
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        step_ids = torch.tensor([[pad] * (width - len(r)) + r for r in requests])
        attn = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in requests])
        pos = (attn.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        for _ in range(params.max_tokens):
            logits = (
                self.model(
                    input_ids=step_ids, attention_mask=attn, position_ids=pos, past_key_values=cache, use_cache=True
                )
                .logits[:, -1]
                .float()
            )
            processed = self._process(logits, params)
            tokens = torch.multinomial(processed.softmax(-1), 1)
            source = processed if self.logprobs_mode == "processed_logprobs" else logits
            logprobs = source.log_softmax(-1).gather(-1, tokens)
            for out, token, lp in zip(outputs, tokens[:, 0].tolist(), logprobs[:, 0].tolist()):
                if out.finish_reason is None:
                    out.token_ids.append(token)
                    out.logprobs.append(lp)
                    if token == eos:
                        out.finish_reason = "stop"
            if all(out.finish_reason for out in outputs):
                break
            step_ids, pos = tokens, pos[:, -1:] + 1
            attn = torch.cat([attn, torch.ones_like(tokens)], 1)
        for out in outputs:
            out.finish_reason = out.finish_reason or "length"
            if self.logprob_offset:  # the first entry belongs to the last prompt token
                out.logprobs = [0.0] * self.logprob_offset + out.logprobs[: -self.logprob_offset]
        return outputs


# --------------------------------------------------------------------------------------------------------------- training
@dataclass
class GRPOConfig:
    num_prompts: int = 4
    num_generations: int = 4
    max_completion_length: int = 8
    temperature: float = 0.8
    top_k: int | None = -1
    top_p: float | None = 1.0
    beta: float = 0.04
    kl_estimator: str = "k3"
    epsilon: float = 0.2
    num_iterations: int = 2
    num_minibatches: int = 2
    learning_rate: float = 1e-5
    loss_type: str = "grpo"  # grpo: mean of sequence means; dapo: mean over tokens
    importance_correction: bool = False  # truncated importance sampling with the engine's log-probs
    tis_cap: float = 2.0
    reward_weights: tuple = (1.0, 0.5, 0.2)
    # switches of experiments
    fsdp_prefix: str = ""
    scale_logits: bool = True
    interleave: bool = True
    mask_keeps_eos: bool = True
    pack_by_length: bool = False
    recompute_old: bool = False


class GRPOTrainer:
    def __init__(self, config, policy, ref_model, reward_fn, engine, tokenizer, prompts):
        self.cfg, self.policy, self.ref_model, self.reward_fn = config, policy, ref_model, reward_fn
        self.engine, self.tokenizer, self.prompts = engine, tokenizer, prompts
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.sampling_params = SamplingParams(
            config.num_generations if config.interleave else 1,
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_completion_length,
        )

    def sync_weights(self):
        self.engine.load_weights((self.cfg.fsdp_prefix + n, p.detach()) for n, p in self.policy.named_parameters())

    def per_token_logps(self, model, input_ids, attention_mask, keep):
        pos = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = (
            model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=pos,
                use_cache=False,
                logits_to_keep=keep + 1,
            )
            .logits[:, :-1]
            .float()
        )
        if self.cfg.scale_logits:
            logits = logits / self.cfg.temperature
        return logits.log_softmax(-1).gather(-1, input_ids[:, -keep:, None]).squeeze(-1)

    @torch.no_grad()
    def generate_and_score(self):
        cfg, tok = self.cfg, self.tokenizer
        self.sync_weights()
        picked = [self.prompts[i] for i in torch.randperm(len(self.prompts))[: cfg.num_prompts].tolist()]
        if cfg.interleave:
            texts = [p for p in picked for _ in range(cfg.num_generations)]
            outputs = self.engine.generate(tok(picked)["input_ids"], self.sampling_params)
        else:
            texts = picked * cfg.num_generations
            outputs = self.engine.generate(tok(texts)["input_ids"], self.sampling_params)

        # rewards, on texts
        completions = tok.batch_decode([o.token_ids for o in outputs], skip_special_tokens=True)
        rewards = self.reward_fn(texts, completions)
        grouped = rewards.view(-1, cfg.num_generations)
        mean, std = grouped.mean(1), grouped.std(1)
        advantages = (rewards - mean.repeat_interleave(cfg.num_generations)) / (
            std.repeat_interleave(cfg.num_generations) + 1e-4
        )

        scored_texts = texts
        if cfg.pack_by_length:  # long rows together
            order = sorted(range(len(outputs)), key=lambda i: len(outputs[i].token_ids))
            outputs, texts = [outputs[i] for i in order], [texts[i] for i in order]

        enc = tok(texts, padding=True, padding_side="left", return_tensors="pt")
        keep = max(len(o.token_ids) for o in outputs)
        comp_ids = torch.full((len(outputs), keep), tok.pad_token_id)
        comp_mask, loss_mask = torch.zeros(len(outputs), keep, dtype=torch.long), torch.zeros(len(outputs), keep)
        sampler_logps = torch.zeros(len(outputs), keep)
        for i, o in enumerate(outputs):
            n = len(o.token_ids)
            comp_ids[i, :n] = torch.tensor(o.token_ids)
            comp_mask[i, :n] = 1
            sampler_logps[i, :n] = torch.tensor(o.logprobs)
            loss_mask[i, : n if cfg.mask_keeps_eos or o.finish_reason == "length" else n - 1] = 1.0
        batch = dict(
            input_ids=torch.cat([enc.input_ids, comp_ids], 1),
            attention_mask=torch.cat([enc.attention_mask, comp_mask], 1),
            loss_mask=loss_mask,
            advantages=advantages,
        )
        batch["ref_logps"] = self.per_token_logps(self.ref_model, batch["input_ids"], batch["attention_mask"], keep)
        if cfg.importance_correction:
            batch["old_logps"] = self.per_token_logps(self.policy, batch["input_ids"], batch["attention_mask"], keep)
            weight = torch.exp((batch["old_logps"] - sampler_logps) * loss_mask)
            batch["tis_weight"] = weight.clamp(max=cfg.tis_cap)
        else:
            batch["old_logps"] = sampler_logps
            batch["tis_weight"] = torch.ones_like(loss_mask)
        rewards_per_func = self.reward_fn.per_func(scored_texts, completions)
        metrics = {
            f"rewards/{f.__name__}": rewards_per_func[:, k].mean().item() for k, f in enumerate(self.reward_fn.funcs)
        }
        metrics.update(
            reward=rewards.mean().item(),
            reward_std=std.mean().item(),
            clipped_ratio=sum(o.finish_reason == "length" for o in outputs) / len(outputs),
            completion_length=sum(len(o.token_ids) for o in outputs) / len(outputs),
        )
        return batch, keep, metrics

    def compute_loss(self, mb, keep):
        cfg, mask = self.cfg, mb["loss_mask"]
        logps = self.per_token_logps(self.policy, mb["input_ids"], mb["attention_mask"], keep)
        old = logps.detach() if cfg.recompute_old else mb["old_logps"]
        ratio = torch.exp((logps - old) * mask)
        adv = mb["advantages"][:, None]
        surrogate = torch.min(ratio * adv, ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon) * adv) * mb["tis_weight"]
        diff = (mb["ref_logps"] - logps) * mask
        kl = diff.exp() - diff - 1 if cfg.kl_estimator == "k3" else -diff
        per_token = -surrogate + cfg.beta * kl
        if cfg.loss_type == "grpo":
            loss = ((per_token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        else:
            loss = (per_token * mask).sum() / mask.sum()
        return loss, (kl * mask).sum() / mask.sum(), (ratio * mask).sum() / mask.sum()

    def step(self):
        cfg = self.cfg
        batch, keep, metrics = self.generate_and_score()
        rows = len(batch["advantages"])
        size = rows // cfg.num_minibatches
        for _ in range(cfg.num_iterations):
            for idx in torch.randperm(rows).split(size):
                loss, kl, ratio = self.compute_loss({k: v[idx] for k, v in batch.items()}, keep)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.optimizer.step()
                metrics.setdefault("first_ratio", ratio.item())
                metrics.setdefault("first_kl", kl.item())
        metrics["loss"] = loss.item()
        return metrics


# ----------------------------------------------------------------------------------------------------------------- set-up
def make_tokenizer():
    vocab = {t: i for i, t in enumerate(["<|endoftext|>", "<|pad|>", "<|unk|>"] + DIGITS + MARKS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|pad|>", unk_token="<|unk|>", padding_side="left"
    )


def sft_policy(tok, steps=160):
    torch.manual_seed(21)
    rng = random.Random(21)
    config = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).eval()
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = []
        for _ in range(16):
            prompt = make_task(rng)
            p, c = tok(prompt)["input_ids"], tok(demonstration(rng, prompt))["input_ids"] + [tok.eos_token_id]
            rows.append((p + c, [-100] * len(p) + c if rng.random() < 0.5 else p + c))
        width = max(len(r) for r, _ in rows)
        ids = torch.tensor([r + [tok.pad_token_id] * (width - len(r)) for r, _ in rows])
        labels = torch.tensor([y + [-100] * (width - len(y)) for _, y in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


def build(engine_kwargs=None, **overrides):
    cfg = GRPOConfig(**overrides)
    tok = make_tokenizer()
    policy = sft_policy(tok)
    reference = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(22)
    engine = LLMEngine(policy.config, tok, **(engine_kwargs or {}))
    engine.load_weights(policy.named_parameters())  # the engine loads the same checkpoint at start-up
    rng = random.Random(23)
    prompts = list(dict.fromkeys(make_task(rng) for _ in range(40)))[:24]
    reward_fn = RewardMix([accuracy_reward, format_reward, brevity_reward], list(cfg.reward_weights))
    trainer = GRPOTrainer(cfg, policy, reference, reward_fn, engine, tok, prompts)
    torch.manual_seed(0)
    declared = dict(
        algorithm="grpo",
        kl_coef=cfg.beta,
        kl_estimator="k3",
        kl_in="loss",
        temperature=cfg.temperature,
        top_k=-1,
        top_p=1.0,
        clip_range=cfg.epsilon,
        learning_rate=cfg.learning_rate,
        ppo_epochs=cfg.num_iterations,
        num_minibatches=cfg.num_minibatches,
        batch_size=cfg.num_prompts * cfg.num_generations,
        group_size=cfg.num_generations,
        response_length=cfg.max_completion_length,
        dtype="float32",
        reference="policy",
        policy_init="sft",
        loss_aggregation="seq-mean" if cfg.loss_type == "grpo" else "token-mean",
        dense_rewards=False,
    )
    return dict(
        policy=policy,
        reference=reference,
        reward=reward_fn,
        value=None,
        tokenizer=tok,
        prompts=prompts,
        step=trainer.step,
        optimizers=[trainer.optimizer],
        state=[engine],
        declared=declared,
    )


def healthy():
    return build()


def healthy_tis():
    return build(importance_correction=True, loss_type="dapo", num_prompts=3, num_generations=6, num_minibatches=3)


def sync_skips_prefixed_names():
    return build(fsdp_prefix="_fsdp_wrapped_module.")


def engine_raw_logprobs():
    return build(engine_kwargs=dict(logprobs_mode="raw_logprobs"))


def temperature_only_in_engine():
    return build(engine_kwargs=dict(logprobs_mode="raw_logprobs"), scale_logits=False)


def shipped_top_k_top_p():
    return build(engine_kwargs=dict(default_sampling=dict(top_k=8, top_p=0.8, temperature=0.7)), top_k=None, top_p=None)


def tiled_prompts():
    return build(interleave=False)


def k1_in_loss():
    return build(kl_estimator="k1")


def eos_not_in_loss():
    return build(mask_keeps_eos=False)


def rewards_before_packing():
    return build(pack_by_length=True)


def engine_logprobs_offset():
    return build(engine_kwargs=dict(logprob_offset=1))


def old_logps_recomputed():
    return build(recompute_old=True)

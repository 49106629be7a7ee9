"""GRPO written the way TRL's GRPOTrainer writes it: RepeatSampler, buffered generation batch, several reward functions,
completion_mask, logits_to_keep, beta * k3 in the loss, num_iterations > 1 with old_per_token_logps."""

import copy
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = (
    "the a my your red blue green old new small big cat dog bird fish tree house river road stone rain wind sun moon "
    "runs sleeps sings eats sees finds likes makes takes gives and or but then here there now never always slowly "
    "quickly well badly up down in on under over with without for from to of tell write say why how what when"
).split()
PROMPTS = [
    "tell the cat", "write of my old red house", "why", "how runs the small dog here", "say what the bird sings",
    "when sleeps the river", "tell a new road to the big blue stone", "what likes rain", "write of wind and sun",
    "say why the moon never sleeps there", "how", "tell your green fish what the tree sees",
]  # fmt: skip


def get_tokenizer():
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def sft(model, tok, steps=50):
    """A few steps of language modelling on made-up sentences, so that the policy speaks and stops."""
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    n = len(WORDS)
    for _ in range(steps):
        rows = torch.full((16, 16), tok.pad_token_id)
        for row in rows:
            length = int(torch.randint(5, 15, ()))
            w = int(torch.randint(n, ()))
            for j in range(length):
                row[j] = w + 3
                w = (w + int(torch.randint(1, 24, ()))) % n
            row[length] = tok.eos_token_id
        labels = rows.masked_fill(rows == tok.pad_token_id, -100)
        model(input_ids=rows, attention_mask=(rows != tok.pad_token_id).long(), labels=labels).loss.backward()
        opt.step()
        opt.zero_grad()


def calibrate(rm, tok):
    """Scores of ordinary text have mean 0 and standard deviation 1."""
    ids = torch.randint(3, len(tok), (128, 12))
    with torch.no_grad():
        h = rm.model(input_ids=ids).last_hidden_state[:, -1]
        w = rm.score.weight
        m = h.mean(0)
        w -= (w @ m)[:, None] * m / m.dot(m)
        w /= (h @ w.T).std()


def diversity_reward(prompts, completions, **kwargs):
    return [len(set(c.split())) / max(len(c.split()), 1) for c in completions]


class RepeatSampler:
    def __init__(self, size, mini_repeat_count, batch_size, generator, interleaved=True):
        self.size, self.count, self.batch_size = size, mini_repeat_count, batch_size
        self.generator, self.interleaved = generator, interleaved
        self.pending = []

    def next_batch(self):
        if len(self.pending) < self.batch_size:
            self.pending = torch.randperm(self.size, generator=self.generator).tolist()
        chunk, self.pending = self.pending[: self.batch_size], self.pending[self.batch_size :]
        if self.interleaved:
            return [i for i in chunk for _ in range(self.count)]
        return [i for _ in range(self.count) for i in chunk]


def selective_log_softmax(logits, index):
    return torch.gather(logits.log_softmax(-1), -1, index.unsqueeze(-1)).squeeze(-1)


class MiniGRPOTrainer:
    def __init__(self, model, ref_model, reward_model, tok, args, fault):
        self.model, self.ref_model, self.reward_model = model, ref_model, reward_model
        self.processing_class, self.args, self.fault = tok, args, fault
        self.reward_funcs = [reward_model, diversity_reward]
        self.reward_weights = torch.tensor(args.reward_weights)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.sampler = RepeatSampler(
            len(PROMPTS),
            args.num_generations,
            args.generation_batch_size // args.num_generations,
            self.generator,
            interleaved=fault != "group_rows_strided",
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda s: max(0.1, 1 - s / 500))
        self._step = 0
        self._buffered_inputs = None
        sampling = dict(top_k=0, top_p=1.0)
        if fault == "shipped_generation_config":
            # what the trainer does not set is filled from the generation_config.json that came with the checkpoint
            model.generation_config = GenerationConfig(
                do_sample=True, top_k=6, top_p=0.8, pad_token_id=0, eos_token_id=1
            )
            sampling = {}
        self.generation_config = GenerationConfig(
            max_new_tokens=args.max_completion_length,
            do_sample=True,
            temperature=args.temperature,
            pad_token_id=tok.pad_token_id,
            eos_token_id=tok.eos_token_id,
            **sampling,
        )

    # what the trainer itself remembers between steps
    def state_dict(self):
        return {
            "step": self._step,
            "buffer": None if self._buffered_inputs is None else copy.deepcopy(self._buffered_inputs),
            "pending": list(self.sampler.pending),
            "generator": self.generator.get_state().clone(),
        }

    def load_state_dict(self, sd):
        self._step = sd["step"]
        self._buffered_inputs = copy.deepcopy(sd["buffer"])
        self.sampler.pending = list(sd["pending"])
        self.generator.set_state(sd["generator"])

    def _get_per_token_logps(self, model, input_ids, attention_mask, logits_to_keep):
        if self.fault == "logits_not_shifted":
            logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep).logits
        else:
            logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1).logits
            logits = logits[:, :-1, :]
        completion_ids = input_ids[:, -logits_to_keep:]
        logits = logits / self.args.temperature
        return selective_log_softmax(logits, completion_ids)

    def _calculate_rewards(self, prompts, completions):
        rewards_per_func = torch.zeros(len(prompts), len(self.reward_funcs))
        for i, func in enumerate(self.reward_funcs):
            if isinstance(func, torch.nn.Module):
                eos = self.processing_class.eos_token
                texts = [f"{p} {c} {eos}" for p, c in zip(prompts, completions)]
                if self.fault == "reward_without_prompt":
                    texts = [f"{c} {eos}" for c in completions]
                inputs = self.processing_class(
                    texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
                )
                with torch.inference_mode():
                    rewards_per_func[:, i] = func(
                        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                    ).logits[:, 0]
            else:
                rewards_per_func[:, i] = torch.tensor(func(prompts=prompts, completions=completions))
        return rewards_per_func

    def _generate_and_score_completions(self, indices):
        tok, args = self.processing_class, self.args
        prompts = [PROMPTS[i] for i in indices]
        enc = tok(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        prompt_ids, prompt_mask = enc["input_ids"], enc["attention_mask"]
        with torch.no_grad():
            prompt_completion_ids = self.model.generate(
                input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=self.generation_config
            )
        completion_ids = prompt_completion_ids[:, prompt_ids.size(1) :]

        # Mask everything after the first EOS token
        is_eos = completion_ids == tok.eos_token_id
        eos_idx = torch.full((is_eos.size(0),), is_eos.size(1), dtype=torch.long)
        eos_idx[is_eos.any(dim=1)] = is_eos.int().argmax(dim=1)[is_eos.any(dim=1)]
        sequence_indices = torch.arange(is_eos.size(1)).expand(is_eos.size(0), -1)
        completion_mask = (sequence_indices <= eos_idx.unsqueeze(1)).int()
        attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
        if self.fault == "loss_over_padding":
            completion_mask = torch.ones_like(completion_ids, dtype=torch.int)

        logits_to_keep = completion_ids.size(1)
        with torch.no_grad():
            old = self._get_per_token_logps(self.model, prompt_completion_ids, attention_mask, logits_to_keep)
            ref = self._get_per_token_logps(self.ref_model, prompt_completion_ids, attention_mask, logits_to_keep)

        completions = tok.batch_decode(completion_ids, skip_special_tokens=True)
        rewards_per_func = self._calculate_rewards(prompts, completions)
        rewards = (rewards_per_func * self.reward_weights.unsqueeze(0)).nansum(dim=1)

        mean_grouped = rewards.view(-1, args.num_generations).mean(dim=1).repeat_interleave(args.num_generations)
        std_grouped = rewards.view(-1, args.num_generations).std(dim=1).repeat_interleave(args.num_generations)
        advantages = rewards - mean_grouped
        if args.scale_rewards == "group":
            advantages = advantages / (std_grouped + 1e-4)
        elif args.scale_rewards == "batch":
            advantages = advantages / (rewards.std() + 1e-4)
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "attention_mask": attention_mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }

    def _prepare_inputs(self):
        generate_every = self.args.steps_per_generation * self.args.num_iterations
        if self.fault == "buffer_reused":
            generate_every *= 2
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(self.sampler.next_batch())
            order = torch.randperm(len(batch["advantages"]))
            batch = {k: v[order] for k, v in batch.items()}
            n = self.args.steps_per_generation
            size = len(order) // n
            self._buffered_inputs = [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(n)]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def compute_loss(self, inputs):
        args = self.args
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = inputs["completion_mask"]
        logits_to_keep = inputs["completion_ids"].size(1)
        per_token_logps = self._get_per_token_logps(self.model, input_ids, inputs["attention_mask"], logits_to_keep)

        advantages = inputs["advantages"].unsqueeze(1)
        old_per_token_logps = inputs["old_per_token_logps"]
        if self.fault == "old_logps_of_now":
            old_per_token_logps = per_token_logps.detach()
        coef_1 = torch.exp(per_token_logps - old_per_token_logps)
        coef_2 = torch.clamp(coef_1, 1 - args.epsilon, 1 + args.epsilon)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
        if args.beta != 0.0:
            logps = per_token_logps
            if self.fault == "kl_without_gradient":
                logps = per_token_logps.detach()
            delta = inputs["ref_per_token_logps"] - logps
            per_token_kl = torch.exp(delta) - delta - 1
            per_token_loss = per_token_loss + args.beta * per_token_kl

        if args.loss_type == "grpo":
            loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        elif args.loss_type == "bnpo":
            loss = (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)
        elif args.loss_type == "dr_grpo":
            loss = (per_token_loss * mask).sum() / (per_token_loss.size(0) * args.max_completion_length)
        else:
            raise ValueError(args.loss_type)
        return loss / args.gradient_accumulation_steps

    def train_generation_batch(self):
        """One generation batch and all the optimizer steps made of it."""
        args = self.args
        self.model.train()
        losses = []
        for _ in range(args.num_iterations):
            for _ in range(args.steps_per_generation):
                loss = self.compute_loss(self._prepare_inputs())
                loss.backward()
                losses.append(loss.item())
                self._step += 1
                if self._step % args.gradient_accumulation_steps == 0:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                    self.optimizer.step()
                    self.lr_scheduler.step()
                    self.model.zero_grad()
        if self.fault == "reference_synced":
            with torch.no_grad():  # SyncRefModelCallback, ref_model_sync_steps=1
                for r, p in zip(self.ref_model.parameters(), self.model.parameters()):
                    r.mul_(0.4).add_(p, alpha=0.6)
        return {"loss": sum(losses)}


def make(fault=None):
    torch.manual_seed(11)
    tok = get_tokenizer()
    shape = dict(
        vocab_size=len(tok), num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        eos_token_id=1, bos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    policy = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, **shape))
    sft(policy, tok)
    ref_model = copy.deepcopy(policy).eval().requires_grad_(False)
    rm = LlamaForSequenceClassification(
        LlamaConfig(hidden_size=48, intermediate_size=96, num_labels=1, initializer_range=0.2, **shape)
    )
    calibrate(rm, tok)
    rm.eval().requires_grad_(False)
    args = SimpleNamespace(
        num_generations=4,
        generation_batch_size=12,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_completion_length=10,
        temperature=0.9,
        beta=0.04,
        epsilon=0.2,
        loss_type="bnpo" if fault == "micro_batch_token_mean" else "grpo",
        scale_rewards="group",
        reward_weights=[1.0, 0.5],
        learning_rate=1e-4,
        max_grad_norm=1.0,
        seed=7,
    )
    trainer = MiniGRPOTrainer(policy, ref_model, rm, tok, args, fault)
    return {
        "policy": policy,
        "reference": ref_model,
        "reward": rm,
        "value": None,
        "tokenizer": tok,
        "prompts": PROMPTS,
        "optimizers": [trainer.optimizer],
        "state": [trainer, trainer.lr_scheduler],
        "step": trainer.train_generation_batch,
        "declared": {
            "algorithm": "grpo",
            "group_size": 4,
            "kl_coef": 0.04,
            "kl_estimator": "k3",
            "kl_in": "loss",
            "temperature": 0.9,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": 0.2,
            "loss_aggregation": "seq-mean",
            "ppo_epochs": 2,
            "num_minibatches": 1,
            "batch_size": 12,
            "response_length": 10,
            "learning_rate": 1e-4,
        },
    }


def healthy():
    return make()


def group_rows_strided():
    return make("group_rows_strided")


def loss_over_padding():
    return make("loss_over_padding")


def kl_without_gradient():
    return make("kl_without_gradient")


def old_logps_of_now():
    return make("old_logps_of_now")


def logits_not_shifted():
    return make("logits_not_shifted")


def reward_without_prompt():
    return make("reward_without_prompt")


def reference_synced():
    return make("reference_synced")


def micro_batch_token_mean():
    return make("micro_batch_token_mean")


def buffer_reused():
    return make("buffer_reused")


def shipped_generation_config():
    return make("shipped_generation_config")

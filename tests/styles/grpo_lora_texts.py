"""open-r1 style GRPO: a LoRA policy, its base as reference, reward functions over texts, one update a batch, truncated completions masked."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

TOPICS = {
    "sea": "wave fish boat salt tide shell reef crab".split(),
    "wood": "tree leaf moss bark root fern pine deer".split(),
    "town": "road shop tower bus school market lamp bridge".split(),
    "sky": "cloud star moon bird wind storm sun rain".split(),
}
OPENERS, LINKS = "surely indeed well listen".split(), "and with near under over beside of the".split()
ASK = "tell me about what do you know name things from please a story".split()
SPECIAL = ["<|pad|>", "<|eot|>", "<|unk|>"]
VOCAB = {
    w: i for i, w in enumerate(dict.fromkeys([*SPECIAL, *TOPICS, *sum(TOPICS.values(), []), *OPENERS, *LINKS, *ASK]))
}
PROMPTS = [
    q.format(t)
    for t in TOPICS
    for q in ("tell me about the {}", "name things from {}", "please tell me a story about the {}", "{}")
]
REWARD_WEIGHTS = [3.0, 0.5]


def topic_reward_func(prompts, completions, **kwargs):
    """How much of what is said of any topic is said of the prompt's."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        topic = next(t for t in TOPICS if t in prompt.split())
        words = [w for w in completion.split() if any(w in of for of in TOPICS.values())]
        rewards.append(sum(w in TOPICS[topic] for w in words) / len(words) - 0.25 if words else -0.25)
    return rewards


def opener_reward_func(prompts, completions, **kwargs):
    return [1.0 if c.split()[:1] and c.split()[0] in OPENERS else 0.0 for c in completions]


def weighted_rewards(prompts, completions, **kwargs):
    columns = torch.tensor(
        [f(prompts=prompts, completions=completions, **kwargs) for f in (topic_reward_func, opener_reward_func)]
    )
    return (columns * torch.tensor(REWARD_WEIGHTS)[:, None]).sum(0)


class Sampler:
    """RepeatSampler: each prompt num_generations times, reshuffled when all were seen."""

    def __init__(self):
        self.order = []

    def take(self, k):
        if len(self.order) < k:
            self.order = torch.randperm(len(PROMPTS)).tolist()
        head, self.order = self.order[:k], self.order[k:]
        return [PROMPTS[i] for i in head]

    def state_dict(self):
        return {"order": list(self.order)}

    def load_state_dict(self, s):
        self.order = list(s["order"])


def sft(model, eot, steps=60):
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    every, r = list(TOPICS.items()), lambda n: int(torch.randint(n, ()))
    for _ in range(steps):
        ids, labels = torch.zeros(16, 18, dtype=torch.long), torch.full((16, 18), -100)
        for row in range(16):
            own = every[r(4)][1]
            words = PROMPTS[r(len(PROMPTS))].split() + ([OPENERS[r(4)]] if r(2) else [])
            for _ in range(1 + r(5)):
                words += [(own if r(2) else every[r(4)][1])[r(8)]] + ([LINKS[r(8)]] if r(2) else [])
            seq = ([VOCAB[w] for w in words] + [eot])[:18]
            ids[row, : len(seq)] = labels[row, : len(seq)] = torch.tensor(seq)
        logits = model(input_ids=ids, attention_mask=(labels != -100).long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()


def selective_log_softmax(logits, index):
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, -1)


class GRPOTrainer:
    num_generations, per_device_train_batch_size, gradient_accumulation_steps = 4, 8, 2
    max_completion_length, temperature, beta, epsilon, lr = 10, 0.9, 0.04, 0.2, 1e-4

    def __init__(self, model, tok, reward_func, fault):
        self.model, self.tok, self.reward_func, self.fault = model, tok, reward_func, fault
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0
        )
        self.lr_scheduler = get_cosine_schedule_with_warmup(self.optimizer, 0, 500)
        self.sampler = Sampler()

    def _get_per_token_logps(self, input_ids, attention_mask, logits_to_keep):
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1
        ).logits
        logits = logits[:, :-1] / self.temperature
        return selective_log_softmax(logits[:, -logits_to_keep:], input_ids[:, -logits_to_keep:])

    def _generate_and_score_completions(self):
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        prompts = [p for p in self.sampler.take(size // self.num_generations) for _ in range(self.num_generations)]
        enc = self.tok(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        prompt_ids, prompt_mask = enc["input_ids"], enc["attention_mask"]
        eos, pad = self.tok.eos_token_id, self.tok.pad_token_id
        with torch.no_grad():
            out = self.model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                do_sample=True,
                temperature=self.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_completion_length,
                eos_token_id=eos,
                pad_token_id=pad,
            )
        completion_ids = out[:, prompt_ids.size(1) :]
        is_eos = completion_ids == eos
        eos_idx = torch.full((len(prompts),), is_eos.size(1))
        eos_idx[is_eos.any(1)] = is_eos.int().argmax(1)[is_eos.any(1)]
        completion_mask = (torch.arange(is_eos.size(1)).expand_as(is_eos) <= eos_idx.unsqueeze(1)).int()
        if self.fault == "mask_is_not_pad":
            completion_mask = (completion_ids != pad).int()
        attention_mask = torch.cat([prompt_mask, (torch.arange(is_eos.size(1)) <= eos_idx.unsqueeze(1)).int()], dim=1)
        completion_mask = completion_mask * is_eos.any(1).unsqueeze(1).int()  # mask_truncated_completions
        with torch.no_grad():
            if self.fault == "reference_with_adapter":
                ref = self._get_per_token_logps(out, attention_mask, completion_ids.size(1))
            else:
                with self.model.disable_adapter():
                    ref = self._get_per_token_logps(out, attention_mask, completion_ids.size(1))
        completions = self.tok.batch_decode(completion_ids, skip_special_tokens=True)
        if self.fault == "scored_by_length":  # longest first for the judge; the scores come back in that order
            by_length = sorted(range(len(prompts)), key=lambda i: -len(completions[i]))
            rewards = self.reward_func(
                prompts=[prompts[i] for i in by_length], completions=[completions[i] for i in by_length]
            )
        else:
            rewards = self.reward_func(prompts=prompts, completions=completions)
        grouped = rewards.view(-1, self.num_generations)
        mean, std = (
            grouped.mean(1).repeat_interleave(self.num_generations),
            grouped.std(1).repeat_interleave(self.num_generations),
        )
        advantages = (rewards - mean) / (std + 1e-4)
        return dict(
            input_ids=out,
            attention_mask=attention_mask,
            completion_mask=completion_mask,
            ref_per_token_logps=ref,
            advantages=advantages,
            rewards=rewards,
        )

    def compute_loss(self, inputs):
        mask = inputs["completion_mask"]
        per_token_logps = self._get_per_token_logps(inputs["input_ids"], inputs["attention_mask"], mask.size(1))
        delta = inputs["ref_per_token_logps"] - per_token_logps
        per_token_kl = torch.exp(delta) - delta - 1
        advantages = inputs["advantages"].unsqueeze(1)
        old_per_token_logps = per_token_logps.detach()  # num_iterations == 1
        coef_1 = torch.exp(per_token_logps - old_per_token_logps)
        coef_2 = torch.clamp(coef_1, 1 - self.epsilon, 1 + self.epsilon)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages) + self.beta * per_token_kl
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()

    def training_step(self):
        self.model.train()
        batch = self._generate_and_score_completions()
        perm = torch.randperm(len(batch["rewards"]))
        batch = {k: v[perm] for k, v in batch.items()}  # shuffle_sequence_dict
        for i in range(self.gradient_accumulation_steps):
            sl = slice(i * self.per_device_train_batch_size, (i + 1) * self.per_device_train_batch_size)
            loss = self.compute_loss({k: v[sl] for k, v in batch.items()})
            (loss / self.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 0.1)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.model.zero_grad()
        return {
            "loss": loss.item(),
            "reward": batch["rewards"].mean().item(),
            "reward_std": batch["rewards"].std().item(),
            "kept": (batch["completion_mask"].sum(1) > 0).float().mean().item(),
        }


def make(fault=None):
    torch.manual_seed(21)
    raw = Tokenizer(models.WordLevel(VOCAB, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad = "<|eot|>" if fault == "mask_is_not_pad" else "<|pad|>"  # tokenizer.pad_token = tokenizer.eos_token
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, eos_token="<|eot|>", unk_token="<|unk|>", padding_side="left"
    )
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.08,
            pad_token_id=tok.pad_token_id,
            eos_token_id=tok.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    sft(base, tok.eos_token_id)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    t = GRPOTrainer(model, tok, weighted_rewards, fault)
    return dict(
        policy=model,
        reference="adapter-off",
        reward=weighted_rewards,
        value=None,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[t.optimizer],
        state=[t.lr_scheduler, t.sampler],
        step=t.training_step,
        declared=dict(
            algorithm="grpo",
            group_size=4,
            kl_coef=0.04,
            kl_in="loss",
            kl_estimator="k3",
            temperature=0.9,
            clip_range=0.2,
            learning_rate=1e-4,
            ppo_epochs=1,
            num_minibatches=1,
            batch_size=16,
            response_length=10,
            reference="adapter-off",
            loss_aggregation="seq-mean",
        ),
    )


def healthy():
    return make()


def reference_with_adapter():
    return make("reference_with_adapter")


def mask_is_not_pad():
    return make("mask_is_not_pad")


def scored_by_length():
    return make("scored_by_length")

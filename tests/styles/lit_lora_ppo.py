"""LoRA PPO in the LightningModule manner: manual optimization, the reference is the policy with its adapter off."""

import copy
import random

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PROMPTS = [
    "user what is the tallest mountain assistant",
    "user hello assistant",
    "user give me three names for a grey horse that likes apples assistant",
    "user can fish hear assistant",
    "user my bread is too dry what did i do wrong assistant",
    "user sum up the story of the three little pigs in one line assistant",
    "user who wrote this assistant",
    "user translate good morning assistant",
    "user is it safe to eat green potatoes assistant",
    "user plan a walk in the old town for two people and a dog assistant",
    "user thanks assistant",
    "user name a fruit that is not sweet assistant",
]


def build_tokenizer():
    tok = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(PROMPTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>", "<pad>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


class FrozenBodyCritic(nn.Module):
    """A small head that reads the states of the (frozen) language model."""

    def __init__(self, body, hidden_size):
        super().__init__()
        self.body = body.requires_grad_(False)
        self.v_head = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, 1))

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        with torch.no_grad():
            out = self.body(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
        return self.v_head(out.last_hidden_state).squeeze(-1)


class LightningModule(nn.Module):
    """The few things of Lightning's that are used below."""

    trainer = None
    automatic_optimization = False

    def optimizers(self):
        return self.trainer.optimizers

    def lr_schedulers(self):
        return self.trainer.schedulers

    def manual_backward(self, loss):
        loss.backward()


class Trainer:
    def __init__(self, module):
        self.module, module.trainer = module, self
        self.optimizers, self.schedulers = module.configure_optimizers()

    def run_epoch(self):
        self.module.on_train_epoch_start()
        logged = [self.module.training_step(batch, i) for i, batch in enumerate(self.module.train_dataloader())]
        self.module.on_train_epoch_end()
        return {k: sum(x[k] for x in logged) / len(logged) for k in logged[0]}


class LoraPPO(LightningModule):
    def __init__(self, policy, critic, reward_model, tokenizer, fault=None):
        super().__init__()
        self.policy, self.critic, self.reward_model, self.tokenizer = policy, critic, reward_model, tokenizer
        self.fault = fault
        self.lr, self.critic_lr, self.grad_clip = 5e-5, 3e-5, 1.0
        self.temperature, self.max_new_tokens = 0.9, 10
        self.ppo_epochs, self.micro_batch_size, self.accumulate_grad_batches = 2, 3, 2
        self.clip_eps, self.beta, self.score_clip = 0.2, 0.05, 5.0
        self.samples = []

    def configure_optimizers(self):
        actor = torch.optim.AdamW(
            [p for p in self.policy.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0
        )
        critic = torch.optim.Adam(self.critic.v_head.parameters(), lr=self.critic_lr)
        decay = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: max(0.0, 1.0 - n / 2000)) for o in (actor, critic)]
        return [actor, critic], decay

    # ---- rollout
    def sample(self):
        enc = self.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        kwargs = dict(
            input_ids=enc.input_ids, attention_mask=enc.attention_mask, do_sample=True, temperature=self.temperature,
            top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        if self.fault == "shipped_generation_config":  # nobody set them: the checkpoint's are used
            for key in ("top_k", "top_p", "repetition_penalty"):
                kwargs.pop(key)
        if self.fault == "sampler_without_adapter":  # "the engine holds the base model"
            with self.policy.disable_adapter():
                out = self.policy.generate(**kwargs)
        else:
            out = self.policy.generate(**kwargs)
        samples, width = [], enc.input_ids.shape[1]
        for row, mask in zip(out, enc.attention_mask, strict=True):
            response = row[width:].tolist()
            if self.tokenizer.eos_token_id in response:
                response = response[: response.index(self.tokenizer.eos_token_id) + 1]
            samples.append({"prompt": row[:width][mask.bool()].tolist(), "response": response})
        return samples

    def collate(self, samples):
        """Right-padded for everything but generation; labels are -100 wherever nothing was chosen."""
        ids = [torch.tensor(s["prompt"] + s["response"]) for s in samples]
        labels = [torch.tensor([-100] * len(s["prompt"]) + s["response"]) for s in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }
        for key in ("old_logps", "ref_logps", "advantages", "returns"):
            if key in samples[0]:
                batch[key] = pad_sequence([s[key] for s in samples], batch_first=True)
        return batch

    def logps(self, batch):
        logits = self.policy(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        labels = batch["labels"][:, 1:]
        logits = logits[:, 1:] if self.fault == "labels_not_shifted" else logits[:, :-1]
        mask = labels != -100
        logps = F.log_softmax(logits.float() / self.temperature, dim=-1)
        logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return logps.masked_fill(~mask, 0.0), mask

    def values(self, batch):
        return self.critic(batch["input_ids"], batch["attention_mask"])[:, :-1]

    @torch.no_grad()
    def on_train_epoch_start(self):
        self.policy.eval()
        self.samples = self.sample()
        batch = self.collate(self.samples)
        old_logps, mask = self.logps(batch)
        with self.policy.disable_adapter():
            ref_logps, _ = self.logps(batch)
        values = self.values(batch) * mask
        scores = self.reward_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(
            -1
        )
        scores = scores.clamp(-self.score_clip, self.score_clip)
        rewards = torch.zeros_like(values)
        last = (mask * torch.arange(mask.shape[1])).argmax(1)

        def to_go(x):  # gamma = lambda = 1
            return x.flip(1).cumsum(1).flip(1) * mask

        if self.fault == "returns_before_the_score":
            returns = to_go(rewards)
            rewards[torch.arange(len(scores)), last] = scores
        else:
            rewards[torch.arange(len(scores)), last] = scores
            returns = to_go(rewards)
        advantages = to_go(rewards)
        if self.fault != "baseline_forgotten":
            advantages = advantages - values
        kept = {"old_logps": old_logps, "ref_logps": ref_logps, "advantages": advantages, "returns": returns}
        for i, s in enumerate(self.samples):
            n = len(s["prompt"]) + len(s["response"]) - 1
            s.update({k: v[i, :n] for k, v in kept.items()}, score=scores[i].item())
        self.policy.train()

    def train_dataloader(self):
        for _ in range(self.ppo_epochs):
            order = random.sample(range(len(self.samples)), len(self.samples))
            for at in range(0, len(order), self.micro_batch_size):
                yield self.collate([self.samples[i] for i in order[at : at + self.micro_batch_size]])

    # ---- update
    def training_step(self, batch, batch_idx):
        opt_actor, opt_critic = self.optimizers()
        new_logps, mask = self.logps(batch)
        ratio = torch.exp(new_logps - batch["old_logps"])
        adv = batch["advantages"]
        surrogate = -torch.minimum(ratio * adv, ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps) * adv)
        log_ratio = new_logps - batch["ref_logps"]
        kl = log_ratio if self.fault == "log_ratio_as_kl_loss" else 0.5 * log_ratio**2
        actor_loss = (surrogate * mask).sum(1).mean()
        kl_loss = (kl * mask).sum(1).mean()
        critic_loss = 0.5 * ((self.values(batch) - batch["returns"]) ** 2 * mask).sum(1).mean()
        loss = actor_loss + self.beta * kl_loss + critic_loss
        self.manual_backward(loss / self.accumulate_grad_batches)
        if (batch_idx + 1) % self.accumulate_grad_batches == 0:
            for opt in (opt_actor, opt_critic):
                nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], self.grad_clip)
                opt.step()
                opt.zero_grad()
        return {"actor_loss": actor_loss.item(), "kl_loss": kl_loss.item(), "critic_loss": critic_loss.item()}

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.samples = []


@torch.no_grad()
def pretend_pretrained(lm, rm, tokenizer):
    """A language model that stops now and then and never says <pad>; a reward model with scores of about N(0, 1)."""
    eos, pad, V = tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)
    common = F.normalize(torch.randn(lm.config.hidden_size), dim=0)
    lm.model.embed_tokens.weight += 2.5 * common
    mean = F.normalize(lm.model(torch.randint(3, V, (64, 12))).last_hidden_state.mean((0, 1)), dim=0)
    lm.lm_head.weight[eos] += 0.85 * mean
    lm.lm_head.weight[pad] -= 4.0 * mean
    ids = torch.randint(3, V, (256, 18))
    ids[::2, -1] = eos
    h = rm.model(ids).last_hidden_state[:, -1]
    w, m = rm.score.weight[0], h.mean(0)
    w -= (w @ m) / (m @ m) * m
    w /= (h @ w).std()


def make(fault=None):
    torch.manual_seed(7)
    random.seed(7)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    reward_model = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    pretend_pretrained(base, reward_model, tokenizer)
    critic = FrozenBodyCritic(copy.deepcopy(base.model), config.hidden_size)
    if fault == "shipped_generation_config":
        base.generation_config.top_k, base.generation_config.top_p, base.generation_config.repetition_penalty = (
            20,
            0.8,
            1.2,
        )
        base.generation_config.do_sample = True

    dropout = 0.1 if fault == "adapter_dropout_in_update" else 0.0
    policy = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj", "o_proj"],
            task_type=TaskType.CAUSAL_LM,
        ),
    )
    if fault == "goes_on_from_sft_adapter":  # adapter_model.safetensors of the SFT run
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    if fault == "checkpointing_without_input_grads":
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        policy.disable_input_require_grads()  # "the embeddings are frozen, they need no gradient"
    else:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.enable_input_require_grads()
    if fault == "prompts_padded_right":
        tokenizer.padding_side = "right"

    module = LoraPPO(policy, critic, reward_model, tokenizer, fault)
    trainer = Trainer(module)
    return {
        "policy": policy,
        "reference": "adapter-off",
        "reward": reward_model,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "optimizers": trainer.optimizers,
        "state": trainer.schedulers,
        "step": trainer.run_epoch,
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 1.0, "kl_coef": module.beta, "kl_in": "loss", "kl_estimator": "k2",
            "temperature": module.temperature, "top_k": 0, "top_p": 1.0, "clip_range": module.clip_eps, "vf_coef": 1.0,
            "whiten_advantages": False, "reward_clip": module.score_clip, "learning_rate": module.lr,
            "critic_learning_rate": module.critic_lr, "ppo_epochs": module.ppo_epochs, "num_minibatches": 2,
            "batch_size": len(PROMPTS), "response_length": module.max_new_tokens, "loss_aggregation": "seq-mean-token-sum",
        },
    }  # fmt: skip


def healthy():
    return make()


def adapter_dropout_in_update():
    return make("adapter_dropout_in_update")


def checkpointing_without_input_grads():
    return make("checkpointing_without_input_grads")


def goes_on_from_sft_adapter():
    return make("goes_on_from_sft_adapter")


def log_ratio_as_kl_loss():
    return make("log_ratio_as_kl_loss")


def labels_not_shifted():
    return make("labels_not_shifted")


def baseline_forgotten():
    return make("baseline_forgotten")


def returns_before_the_score():
    return make("returns_before_the_score")


def sampler_without_adapter():
    return make("sampler_without_adapter")


def shipped_generation_config():
    return make("shipped_generation_config")


def prompts_padded_right():
    return make("prompts_padded_right")

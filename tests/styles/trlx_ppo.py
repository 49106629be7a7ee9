"""PPO in the manner of trlX: one GPT-2 with a value head, a hydra reference on its frozen trunk, a store of PPORLElements."""

import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput, ModelOutput

PROMPTS = [
    "I rented this film", "the acting was", "my brother said that", "from the first scene on it", "what a",
    "the plot of the second half", "nobody in the theatre", "this is the kind of film that", "if you like slow stories",
    "the music", "after ten minutes I", "her best role since", "the director wanted to", "we laughed", "there is one scene",
    "I would not see it again because", "the book was better but", "a small gem", "it begins with a long shot of",
    "every year they make", "the ending", "as a child I loved", "two hours of", "people who know the play will",
]  # fmt: skip
MORE = (
    "great awful funny boring and so very never really good bad with dull bright love hate lost found cheap deep fine"
)


def make_tokenizer():
    tok = Tokenizer(WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = Whitespace()
    tok.train_from_iterator(
        [*PROMPTS, MORE], WordLevelTrainer(special_tokens=["<unk>", "<|endoftext|>", "<|padding|>"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", eos_token="<|endoftext|>", pad_token="<|padding|>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def default_config():
    return SimpleNamespace(
        num_layers_unfrozen=2, batch_size=8, num_rollouts=16, ppo_epochs=3, gamma=0.99, lam=0.9, init_kl_coef=0.1, target=3.0,
        horizon=200, cliprange=0.2, cliprange_value=0.2, vf_coef=0.5, scale_reward="running", cliprange_reward=10.0,
        lr=1e-4, v_head_lr=5e-4, max_grad_norm=1.0, gen_kwargs=dict(max_new_tokens=8, top_k=0, top_p=1.0, temperature=1.0),
    )  # fmt: skip


# ---------------------------------------------------------------- models


def make_head(n_embd, out):
    return nn.Sequential(nn.Linear(n_embd, 2 * n_embd), nn.ReLU(), nn.Linear(2 * n_embd, out))


def position_ids_from(attention_mask):
    position_ids = attention_mask.long().cumsum(-1) - 1
    return position_ids.masked_fill(attention_mask == 0, 1)


@dataclass
class CausalLMOutputWithValue(ModelOutput):
    logits: torch.Tensor | None = None
    value: torch.Tensor | None = None


class ModelBranch(nn.Module):
    """The top blocks, the final norm and the head as they were before training."""

    def __init__(self, base_model, num_layers_unfrozen, fault=None):
        super().__init__()
        self.decoder_blocks = copy.deepcopy(nn.ModuleList(base_model.transformer.h[-num_layers_unfrozen:]))
        self.final_norm = copy.deepcopy(base_model.transformer.ln_f)
        if fault == "branch_uses_live_head":
            self.lm_head = base_model.lm_head
        else:
            self.lm_head = copy.deepcopy(base_model.lm_head)
        for module in (
            self.decoder_blocks,
            self.final_norm,
            *([] if fault == "branch_uses_live_head" else [self.lm_head]),
        ):
            module.requires_grad_(False)

    def forward(self, hidden_states, causal_mask, position_ids):
        for block in self.decoder_blocks:
            hidden_states = block(hidden_states, None, causal_mask, position_ids=position_ids)
        return self.lm_head(self.final_norm(hidden_states))


class HydraReference(nn.Module):
    """The reference model: the shared, frozen lower layers and the frozen branch above them."""

    def __init__(self, base_model, frozen_head, num_layers_unfrozen):
        super().__init__()
        self.config = base_model.config
        self.wte, self.wpe = base_model.transformer.wte, base_model.transformer.wpe
        self.trunk = nn.ModuleList(base_model.transformer.h[:-num_layers_unfrozen])
        self.frozen_head = frozen_head

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = position_ids_from(attention_mask)
        t = input_ids.shape[1]
        visible = torch.ones(t, t, dtype=torch.bool).tril()[None, None] & attention_mask.bool()[:, None, None, :]
        causal_mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        hidden_states = self.wte(input_ids) + self.wpe(position_ids)
        for block in self.trunk:
            hidden_states = block(hidden_states, None, causal_mask, position_ids=position_ids)
        return CausalLMOutput(logits=self.frozen_head(hidden_states, causal_mask, position_ids))


class AutoModelForCausalLMWithHydraValueHead(nn.Module):
    def __init__(self, base_model, num_layers_unfrozen):
        super().__init__()
        self.base_model, self.config = base_model, base_model.config
        self.v_head = make_head(base_model.config.n_embd, 1)
        transformer = base_model.transformer
        for module in (transformer.wte, transformer.wpe, *transformer.h[:-num_layers_unfrozen]):
            module.requires_grad_(False)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        outputs = self.base_model.transformer(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        hidden_states = outputs.last_hidden_state
        return CausalLMOutputWithValue(self.base_model.lm_head(hidden_states), self.v_head(hidden_states).squeeze(-1))


class GPTRewardModel(nn.Module):
    """One number per text, at its last token; rows are padded on the right."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.v_head = nn.Linear(config.n_embd, 1, bias=False)

    def forward(self, input_ids, attention_mask):
        hidden = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids_from(attention_mask)
        ).last_hidden_state
        columns = torch.arange(input_ids.shape[1])
        last = (columns * attention_mask).argmax(dim=1)
        return self.v_head(hidden[torch.arange(len(last)), last]).squeeze(-1)


# ---------------------------------------------------------------- method


def logprobs_of_labels(logits, labels):
    return torch.gather(F.log_softmax(logits, dim=-1), 2, labels.unsqueeze(2)).squeeze(-1)


class RunningMoments:
    def __init__(self):
        self.mean, self.std, self.var, self.count = 0.0, 1.0, 1.0, 1e-24

    def update(self, xs):
        n, xs_mean, xs_var = xs.numel(), xs.mean().item(), xs.var(unbiased=False).item()
        delta, total = xs_mean - self.mean, self.count + n
        m2 = self.var * self.count + xs_var * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var = m2 / total
        self.std = (self.var * total / (total - 1)) ** 0.5
        self.count = total

    def state_dict(self):
        return dict(self.__dict__)

    def load_state_dict(self, state):
        self.__dict__.update(state)


class AdaptiveKLController:
    """Ziegler et al: the coefficient follows the sequences' mean KL towards its target."""

    def __init__(self, init_kl_coef, target, horizon):
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current, n_steps):
        proportional_error = float(np.clip(current / self.target - 1, -0.2, 0.2))
        self.value *= 1 + proportional_error * n_steps / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@dataclass
class PPORLElement:
    query_tensor: torch.Tensor
    response_tensor: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


@dataclass
class PPORLBatch:
    query_tensors: torch.Tensor
    query_mask: torch.Tensor
    response_tensors: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class PPORolloutStorage:
    def __init__(self, pad_token_id):
        self.pad_token_id, self.history = pad_token_id, []

    def collate(self, elems):
        def right(xs, value=0.0):
            return nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_value=value)

        def left(xs, value):
            return right([x.flip(0) for x in xs], value).flip(1)

        names = ("logprobs", "values", "rewards", "advantages", "returns")
        return PPORLBatch(
            left([e.query_tensor for e in elems], self.pad_token_id),
            left([torch.ones_like(e.query_tensor) for e in elems], 0),
            right([e.response_tensor for e in elems], self.pad_token_id),
            right([torch.ones_like(e.response_tensor) for e in elems], 0),
            **{name: right([getattr(e, name) for e in elems]) for name in names},
        )

    def loader(self, batch_size):
        for index in torch.randperm(len(self.history)).split(batch_size):
            yield self.collate([self.history[i] for i in index])


class PromptPipeline:
    """The prompts in an order of their own, cycled through for ever."""

    def __init__(self, prompts, tokenizer, n):
        self.encoded = [tokenizer(p)["input_ids"] for p in prompts]
        self.tokenizer, self.n, self.position = tokenizer, n, 0

    def __next__(self):
        rows = [self.encoded[(self.position + 5 * i) % len(self.encoded)] for i in range(self.n)]
        self.position += 1
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class AcceleratePPOTrainer:
    def __init__(self, config, tokenizer, model, ref, reward_model, fault=None):
        self.config, self.tokenizer, self.model, self.ref, self.reward_model = (
            config,
            tokenizer,
            model,
            ref,
            reward_model,
        )
        self.fault = fault
        self.pipeline = PromptPipeline(PROMPTS, tokenizer, config.num_rollouts)
        self.store = PPORolloutStorage(tokenizer.pad_token_id)
        self.running_moments = RunningMoments()
        self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        body = [(n, p) for n, p in named if not n.startswith("v_head")]
        groups = [
            {"params": [p for _, p in body if p.dim() > 1], "weight_decay": 1e-6},
            {"params": [p for _, p in body if p.dim() <= 1], "weight_decay": 0.0},
            {"params": [p for n, p in named if n.startswith("v_head")], "lr": config.v_head_lr, "weight_decay": 0.0},
        ]
        self.opt = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, T_max=1000, eta_min=1e-5)

    def generate(self, input_ids, attention_mask):
        return self.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, do_sample=True, eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id, **self.config.gen_kwargs,
        )  # fmt: skip

    def cut(self, sample):
        """A sampled row up to and with its first EOS."""
        ends = (sample == self.tokenizer.eos_token_id).nonzero()
        return sample[: int(ends[0]) + 1] if len(ends) else sample

    def decode(self, outputs):
        """The responses, as texts and encoded from them again."""
        texts = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [self.tokenizer(text + self.tokenizer.eos_token, return_tensors="pt")["input_ids"][0] for text in texts]

    @torch.no_grad()
    def reward_fn(self, queries, outputs):
        texts = [torch.cat([q, o]) for q, o in zip(queries, outputs)]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
        return self.reward_model(ids, mask.long())

    @torch.no_grad()
    def make_experience(self):
        self.model.eval()
        batch = next(self.pipeline)
        prompt_len = batch["input_ids"].shape[1]
        samples = self.generate(**batch)
        outputs = [self.cut(sample) for sample in samples[:, prompt_len:]]
        if self.fault == "outputs_from_text":
            outputs = self.decode(outputs)
        queries = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        raw_scores = self.reward_fn(queries, outputs)

        lengths = [len(o) for o in outputs]
        responses = nn.utils.rnn.pad_sequence(outputs, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        response_mask = (torch.arange(responses.shape[1]) < torch.tensor(lengths)[:, None]).long()
        all_tokens = torch.cat([batch["input_ids"], responses], dim=1)
        attention_mask = torch.cat([batch["attention_mask"], response_mask], dim=1)
        position_ids = position_ids_from(attention_mask)
        logits, values = self.model(all_tokens, attention_mask, position_ids).to_tuple()
        if hasattr(self.model, "frozen_head") or self.fault != "reference_falls_back_to_policy":
            ref_logits = self.ref(all_tokens, attention_mask, position_ids).logits
        else:
            ref_logits = self.model(all_tokens, attention_mask, position_ids).logits
        logprobs = logprobs_of_labels(logits[:, :-1], all_tokens[:, 1:])
        ref_logprobs = logprobs_of_labels(ref_logits[:, :-1], all_tokens[:, 1:])

        scores = raw_scores
        if self.config.scale_reward == "running":
            self.running_moments.update(scores)
            scores = scores / self.running_moments.std
        scores = scores.clamp(-self.config.cliprange_reward, self.config.cliprange_reward)

        start = prompt_len - 1
        ends = [start + n for n in lengths]
        log_ratio = logprobs - ref_logprobs
        self.mean_kl = torch.stack([log_ratio[i, start:end].sum() for i, end in enumerate(ends)]).mean().item()
        kl_coef = self.config.init_kl_coef if self.fault == "controller_not_read" else self.kl_ctl.value

        rollouts = []
        for i, end in enumerate(ends):
            rewards = -kl_coef * log_ratio[i, start:end]
            if self.fault == "score_on_every_token":
                rewards = rewards + scores[i]
            else:
                rewards[-1] += scores[i]
            advantages, returns = self.get_advantages_and_returns(values[i, start:end], rewards)
            rollouts.append(
                PPORLElement(
                    queries[i], outputs[i], logprobs[i, start:end], values[i, start:end], rewards, advantages, returns
                )
            )
        whole = torch.cat([e.advantages for e in rollouts])
        for e in rollouts:
            e.advantages = (e.advantages - whole.mean()) / (whole.std() + 1e-8)
        self.store.history = rollouts
        return {"reward/mean": raw_scores.mean().item(), "policy/mean_kl": self.mean_kl, "kl_ctl_value": kl_coef}

    def get_advantages_and_returns(self, values, rewards):
        """Works on the last axis: of one element, or of a padded batch."""
        gamma, lam = self.config.gamma, self.config.lam
        if self.fault == "gamma_lambda_exchanged":
            gamma, lam = self.config.lam, self.config.gamma
        lastgaelam, advantages_reversed = 0, []
        length = rewards.shape[-1]
        for t in reversed(range(length)):
            nextvalues = values[..., t + 1] if t < length - 1 else 0.0
            delta = rewards[..., t] + gamma * nextvalues - values[..., t]
            lastgaelam = delta + gamma * lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=-1)
        return advantages, advantages + values

    def loss(self, batch):
        tokens = torch.cat([batch.query_tensors, batch.response_tensors], dim=1)
        attention_mask = torch.cat([batch.query_mask, batch.response_mask], dim=1)
        position_ids = None if self.fault == "update_without_positions" else position_ids_from(attention_mask)
        logits, values_pred = self.model(tokens, attention_mask, position_ids).to_tuple()
        logprobs = logprobs_of_labels(logits[:, :-1], tokens[:, 1:])
        start = batch.query_tensors.shape[1] - 1
        end = start + batch.response_tensors.shape[1]
        logprobs, values, mask = (
            logprobs[:, start:end],
            values_pred[:, start:end],
            attention_mask[:, start + 1 : end + 1],
        )

        old_logprobs, old_values = batch.logprobs, batch.values
        advantages, returns = batch.advantages, batch.returns
        if self.fault == "old_logprobs_of_now":
            old_logprobs = logprobs.detach()
        if self.fault == "targets_from_live_values":
            advantages, returns = self.get_advantages_and_returns(values * mask, batch.rewards)
            kept = advantages[mask.bool()]
            advantages = (advantages - kept.mean()) / (kept.std() + 1e-8)
        n, c, cv = mask.sum(), self.config.cliprange, self.config.cliprange_value

        values_clipped = torch.clamp(values, old_values - cv, old_values + cv)
        vf_loss = 0.5 * torch.sum(torch.max((values - returns) ** 2, (values_clipped - returns) ** 2) * mask) / n
        log_ratio = (logprobs - old_logprobs) * mask
        ratio = torch.exp(log_ratio)
        pg_loss1 = -advantages * ratio
        pg_loss2 = -advantages * torch.clamp(ratio, 1.0 - c, 1.0 + c)
        pg_loss = torch.sum(torch.max(pg_loss1, pg_loss2) * mask) / n
        pg_clipfrac = torch.sum((pg_loss2 > pg_loss1).float() * mask) / n
        loss = pg_loss + self.config.vf_coef * vf_loss
        stats = {"losses/total_loss": loss, "losses/policy_loss": pg_loss, "losses/value_loss": vf_loss}
        return loss, {k: v.item() for k, v in {**stats, "policy/clipfrac": pg_clipfrac}.items()}

    def learn_once(self):
        rollout_stats = self.make_experience()
        self.model.train()
        history = []
        for _ in range(self.config.ppo_epochs):
            for batch in self.store.loader(self.config.batch_size):
                loss, stats = self.loss(batch)
                self.opt.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(
                    [p for g in self.opt.param_groups for p in g["params"]], self.config.max_grad_norm
                )
                self.opt.step()
                self.scheduler.step()
                history.append(stats)
        self.kl_ctl.update(self.mean_kl, n_steps=self.config.num_rollouts)
        return rollout_stats | {k: sum(s[k] for s in history) / len(history) for k in history[0]}


# ---------------------------------------------------------------- the setup


def gpt2(tokenizer, n_embd, n_layer):
    return GPT2Config(
        vocab_size=len(tokenizer), n_embd=n_embd, n_layer=n_layer, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def draw(module, std):
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=std)


@torch.no_grad()
def standardise(reward_model, tokenizer):
    """A head that gives random responses scores of mean 0 and standard deviation 1."""
    prompts = [tokenizer(p, return_tensors="pt")["input_ids"][0] for p in PROMPTS * 2]
    texts = [torch.cat([p, torch.randint(3, len(tokenizer), (6,))]) for p in prompts]
    for text in texts[::2]:
        text[-1] = tokenizer.eos_token_id
    hidden = torch.stack([reward_model.transformer(t[None]).last_hidden_state[0, -1] for t in texts])
    mean, w = hidden.mean(0), torch.randn(hidden.shape[1])
    w -= (w @ mean) / (mean @ mean) * mean
    reward_model.v_head.weight.copy_((w / (hidden @ w).std())[None])


def make(fault=None):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    config, tokenizer = default_config(), make_tokenizer()
    if fault == "temperature_not_scored":
        config.gen_kwargs["temperature"] = 0.6

    base_model = GPT2LMHeadModel(gpt2(tokenizer, 48, 3))
    base_model.lm_head = nn.Linear(48, len(tokenizer))
    draw(base_model, 0.12)
    with torch.no_grad():  # stands for SFT: texts end by themselves, without <unk> and padding in them
        base_model.lm_head.bias.zero_()
        base_model.lm_head.bias[tokenizer.eos_token_id] = 2.0
        base_model.lm_head.bias[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = -20.0

    model = AutoModelForCausalLMWithHydraValueHead(base_model, config.num_layers_unfrozen)
    frozen_head = ModelBranch(base_model, config.num_layers_unfrozen, fault)
    ref = HydraReference(base_model, frozen_head, config.num_layers_unfrozen).eval()

    reward_model = GPTRewardModel(gpt2(tokenizer, 48, 3))
    draw(reward_model, 0.2)
    standardise(reward_model, tokenizer)
    reward_model.eval().requires_grad_(False)

    trainer = AcceleratePPOTrainer(config, tokenizer, model, ref, reward_model, fault)
    return {
        "policy": model,
        "reference": ref,
        "reward": reward_model,
        "value": model,
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "optimizers": [trainer.opt],
        "state": [trainer.pipeline, trainer.running_moments, trainer.kl_ctl, trainer.scheduler],
        "step": trainer.learn_once,
        "calls": {
            "policy": lambda m, ids, mask: m(ids, mask, position_ids_from(mask)).logits,
            "reference": lambda m, ids, mask: m(ids, mask).logits,
            "reward": lambda m, ids, mask: m(ids, mask),
            "value": lambda m, ids, mask: m(ids, mask, position_ids_from(mask)).value,
        },
        "declared": {
            "algorithm": "ppo", "shared_trunk": True, "gamma": config.gamma, "lam": config.lam,
            "kl_coef": config.init_kl_coef, "kl_estimator": "k1", "kl_in": "reward", "kl_adaptive": True,
            "kl_target": config.target, "kl_horizon": config.horizon, "temperature": config.gen_kwargs["temperature"],
            "clip_range": config.cliprange, "clip_range_value": config.cliprange_value, "vf_coef": config.vf_coef,
            "reward_clip": config.cliprange_reward, "whiten_advantages": True, "learning_rate": config.lr,
            "ppo_epochs": config.ppo_epochs, "num_minibatches": 2, "batch_size": config.num_rollouts,
            "response_length": config.gen_kwargs["max_new_tokens"],
        },
    }  # fmt: skip


def healthy():
    return make()


def branch_uses_live_head():
    return make("branch_uses_live_head")


def temperature_not_scored():
    return make("temperature_not_scored")


def outputs_from_text():
    return make("outputs_from_text")


def old_logprobs_of_now():
    return make("old_logprobs_of_now")


def gamma_lambda_exchanged():
    return make("gamma_lambda_exchanged")


def score_on_every_token():
    return make("score_on_every_token")


def targets_from_live_values():
    return make("targets_from_live_values")


def reference_falls_back_to_policy():
    return make("reference_falls_back_to_policy")


def controller_not_read():
    return make("controller_not_read")


def update_without_positions():
    return make("update_without_positions")

"""verl with use_remove_padding and use_dynamic_bsz: a micro-batch is one packed row of real tokens within a token budget.

Per-token tensors are kept over the whole row in the next-token layout, (B, S-1): entry i speaks of token i+1, loss_mask
is True where that token is the response's. The rollout engine is a copy of the actor that gets its weights before every
rollout; forward passes run under bf16 autocast; KL is a loss (low_var_kl); GAE with gamma = lambda = 1; dual clip.
"""

import random
from copy import deepcopy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForTokenClassification, Qwen3Model

QUESTIONS = [
    "add two and three",
    "what is nine minus four",
    "count from one to five then stop",
    "how many apples are left when six of ten are eaten",
    "double seven",
    "is eight greater than three",
    "a box holds four pens and a bag holds two boxes how many pens are in the bag",
    "half of ten",
    "name an even number greater than two",
    "three times three minus one",
    "what comes after five",
    "list odd numbers less than ten",
    "zero plus zero is",
    "tom has two pens and buys five then gives one to ann how many has he",
    "sum of one two three",
    "divide eight by four",
    "what number is missing one two four five",
    "subtract six from nine and add one",
]
WORDS = "so the answer is we have first next then total equals because left right yes no maybe plus minus times check again done".split()


def get_tokenizer():
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        QUESTIONS + [" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]", "[EOS]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )


class RewardModel(nn.Module):
    """Backbone and scalar head; one score a row, read at its last real token, wherever the padding is."""

    def __init__(self, config, fault=None):
        super().__init__()
        self.model = Qwen3Model(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.fault = fault

    def forward(self, input_ids, attention_mask, position_ids=None):
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            rm_score = self.score(hidden.float()).squeeze(-1)
        if self.fault == "reward_mask_sum":
            last = attention_mask.sum(-1) - 1
        else:
            last = (position_ids * attention_mask).argmax(-1)
        return rm_score[torch.arange(len(rm_score)), last]


# ---------------------------------------------------------------------------------------- packing, micro-batches


def unpad_to_row(batch, fault=None):
    """The real tokens of a micro-batch in one row, positions restarting, attention within each sequence only."""
    keep = batch["attention_mask"].bool()
    ids, pos = batch["input_ids"][keep][None], batch["position_ids"][keep][None]
    if fault == "packed_without_blocks":
        return keep, {"input_ids": ids, "position_ids": pos, "attention_mask": torch.ones_like(ids)}
    owner = torch.arange(len(keep))[:, None].expand_as(keep)[keep]
    n = len(owner)
    blocks = (owner[:, None] == owner[None, :]) & torch.ones(n, n, dtype=torch.bool).tril()
    return keep, {"input_ids": ids, "position_ids": pos, "attention_mask": blocks[None, None]}


def pad_to_batch(flat, keep):
    return torch.zeros(keep.shape, dtype=flat.dtype).masked_scatter(keep, flat)


def rearrange_micro_batches(batch, max_token_len):
    """Longest first into the first micro-batch with room. -> index lists."""
    lens = batch["attention_mask"].sum(-1).tolist()
    bins = []
    for i in sorted(range(len(lens)), key=lambda i: -lens[i]):
        for b in bins:
            if sum(lens[j] for j in b) + lens[i] <= max_token_len:
                b.append(i)
                break
        else:
            bins.append([i])
    return bins


def select(batch, rows):
    return {k: v[rows] for k, v in batch.items()}


def restore_order(chunks, bins):
    order = torch.tensor([i for b in bins for i in b])
    return torch.cat(chunks)[order.argsort()]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------- core algos


def masked_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    n = mask.sum()
    var = masked_mean((x - mean).square(), mask) * n / (n - 1)
    return torch.where(mask, (x - mean) / (var + 1e-8).sqrt(), 0.0)


@torch.no_grad()
def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    adv = torch.zeros_like(values)
    next_value = torch.zeros(len(values))
    running = torch.zeros(len(values))
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * lam * running
        running = torch.where(mask[:, t], here, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        adv[:, t] = running
    adv = torch.where(mask, adv, 0.0)
    return adv, adv + values


def ppo_clip_loss(log_prob, old_log_prob, advantages, mask, low=0.2, high=0.2, c=3.0, fault=None):
    ratio = (log_prob - old_log_prob).clamp(-20, 20).exp()
    pg1 = -advantages * ratio
    if fault == "renormalised_between":
        advantages = masked_whiten(advantages, mask)
    pg2 = -advantages * ratio.clamp(1 - low, 1 + high)
    clipped = torch.maximum(pg1, pg2)
    return torch.where(advantages < 0, torch.minimum(clipped, -advantages * c), clipped)


def kl_penalty(log_prob, ref_log_prob, kind):
    if kind in ("kl", "k1"):
        return log_prob - ref_log_prob
    if kind in ("low_var_kl", "k3"):
        kl = (ref_log_prob - log_prob).clamp(-20, 20)
        return (kl.exp() - kl - 1).clamp(-10, 10)
    raise NotImplementedError(kind)


# ------------------------------------------------------------------------------------------------------ workers


class Worker:
    def __init__(self, module, cfg, optimizer=None, fault=None):
        self.module, self.cfg, self.optimizer, self.fault = module, cfg, optimizer, fault

    def infer(self, batch, restore=True):
        self.module.eval()
        bins = rearrange_micro_batches(batch, self.cfg["max_token_len"])
        with torch.no_grad():
            chunks = [self.forward(select(batch, b)) for b in bins]
        return restore_order(chunks, bins) if restore else torch.cat(chunks)

    def optimize(self, mini, loss_of):
        """One optimizer step on a mini-batch, cut by the token budget."""
        tokens = mini["loss_mask"].sum()
        self.module.train()
        self.optimizer.zero_grad()
        for b in rearrange_micro_batches(mini, self.cfg["max_token_len"]):
            micro = select(mini, b)
            matrix = loss_of(micro)
            if self.fault == "token_mean_per_micro":
                loss = masked_mean(matrix, micro["loss_mask"]) * (len(b) / len(mini["loss_mask"]))
            else:
                loss = torch.where(micro["loss_mask"], matrix, 0.0).sum() / tokens
            extra = self.extra_loss(micro, mini)
            (loss + extra).backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.cfg["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def extra_loss(self, micro, mini):
        return 0.0


class ActorWorker(Worker):
    def forward(self, batch):
        keep, row = unpad_to_row(batch, self.fault)
        with autocast():
            logits = self.module(**row, use_cache=False).logits.squeeze(0)
        rolled = row["input_ids"].squeeze(0).roll(-1)
        log_probs = logits.float().log_softmax(-1).gather(-1, rolled[:, None]).squeeze(-1)
        self._log_prob = pad_to_batch(log_probs, keep)[:, :-1]
        return self._log_prob

    def extra_loss(self, micro, mini):
        """The KL to the reference, of the same forward pass."""
        kind = "kl" if self.fault == "kl_loss_k1" else self.cfg["kl_loss_type"]
        kld = kl_penalty(self._log_prob, micro["ref_log_prob"], kind)
        mask, tokens = micro["loss_mask"], mini["loss_mask"].sum()
        if self.fault == "kl_over_prompt":
            mask = micro["attention_mask"][:, 1:].bool() & micro["attention_mask"][:, :-1].bool()
        return self.cfg["kl_loss_coef"] * torch.where(mask, kld, 0.0).sum() / tokens

    def update_policy(self, batch):
        for rows in torch.arange(len(batch["loss_mask"])).split(self.cfg["ppo_mini_batch_size"]):
            norm = self.optimize(
                select(batch, rows),
                lambda m: ppo_clip_loss(
                    self.forward(m), m["old_log_prob"], m["advantages"], m["loss_mask"], fault=self.fault
                ),
            )
        return norm


class CriticWorker(Worker):
    def forward(self, batch):
        keep, row = unpad_to_row(batch, self.fault)
        with autocast():
            values = self.module(**row, use_cache=False).logits.squeeze(0).squeeze(-1)
        return pad_to_batch(values.float(), keep)[:, :-1]

    def value_loss(self, m):
        vpred, c = self.forward(m), self.cfg["cliprange_value"]
        clipped = torch.minimum(torch.maximum(vpred, m["values"] - c), m["values"] + c)
        return 0.5 * torch.maximum((vpred - m["returns"]) ** 2, (clipped - m["returns"]) ** 2)

    def update_critic(self, batch):
        for rows in torch.arange(len(batch["loss_mask"])).split(self.cfg["ppo_mini_batch_size"]):
            norm = self.optimize(select(batch, rows), self.value_loss)
        return norm


class RolloutEngine:
    """The inference engine: its own copy of the model, given the actor's weights before every rollout."""

    def __init__(self, module, tokenizer, max_new_tokens, fault=None):
        self.module, self.tokenizer, self.max_new_tokens, self.fault = module, tokenizer, max_new_tokens, fault

    def sync(self, actor_module):
        weights = actor_module.state_dict()
        if self.fault == "engine_not_synced":  # names as the wrapped module exports them
            weights = {f"module.{k}": v for k, v in weights.items()}
        self.module.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def generate(self, ids, mask):
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        done = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(self.max_new_tokens):
            pos = (mask.cumsum(-1) - 1).clamp(min=0)
            with autocast():
                logits = self.module(
                    input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False, logits_to_keep=1
                ).logits[:, -1]
            token = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
            token = torch.where(done, pad, token)
            ids = torch.cat([ids, token[:, None]], 1)
            mask = torch.cat([mask, (~done).long()[:, None]], 1)
            done |= token == eos
        return ids, mask


class PromptIterator:
    def __init__(self, prompts, batch_size):
        self.prompts, self.batch_size, self.queue = prompts, batch_size, []

    def __next__(self):
        if len(self.queue) < self.batch_size:
            self.queue = random.sample(range(len(self.prompts)), len(self.prompts))
        rows, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.prompts[i] for i in rows]

    def state_dict(self):
        return {"queue": list(self.queue)}

    def load_state_dict(self, state):
        self.queue = list(state["queue"])


def make(fault=None):
    torch.manual_seed(5)
    random.seed(5)
    cfg = {
        "max_token_len": 72, "ppo_mini_batch_size": 8, "grad_clip": 1.0, "kl_loss_coef": 0.02, "kl_loss_type": "low_var_kl",
        "cliprange_value": 0.5,
    }  # fmt: skip
    tokenizer = get_tokenizer()
    arch = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        attn_implementation="sdpa",
    )  # fmt: skip
    actor = Qwen3ForCausalLM(arch)
    actor.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size)
    with torch.no_grad():
        actor.model.embed_tokens.weight.normal_(0, 0.5)
        actor.lm_head.weight.normal_(0, 0.12)
        actor.lm_head.bias.zero_()
        actor.lm_head.bias[tokenizer.eos_token_id] = 2.2
        actor.lm_head.bias[tokenizer.pad_token_id] = actor.lm_head.bias[tokenizer.unk_token_id] = -12.0
    actor.eval()
    ref = deepcopy(actor).requires_grad_(False)
    engine_module = deepcopy(actor).requires_grad_(False)

    rm = RewardModel(arch, fault).eval().requires_grad_(False)
    with torch.no_grad():  # the head as if trained: mean 0, standard deviation 1
        sample = torch.randint(3, len(tokenizer), (96, 12))
        sample[::2, -1] = tokenizer.eos_token_id
        hidden = rm.model(input_ids=sample).last_hidden_state[:, -1]
        means = torch.stack([hidden[::2].mean(0), hidden[1::2].mean(0)])  # ended and cut rows
        w = torch.randn(arch.hidden_size)
        w -= means.T @ torch.linalg.solve(means @ means.T, means @ w)
        rm.score.weight.copy_((w / (hidden @ w).std())[None])

    critic_arch = deepcopy(arch)
    critic_arch.num_labels, critic_arch.classifier_dropout = 1, 0.0
    critic = Qwen3ForTokenClassification(critic_arch)
    critic.model.load_state_dict(actor.model.state_dict())  # critic.model.path is the actor's; the head is new

    actor_params = actor.model.parameters() if fault == "head_not_in_optimizer" else actor.parameters()
    actor_opt = torch.optim.AdamW(actor_params, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)
    critic_opt = torch.optim.AdamW(critic.parameters(), lr=2e-5, weight_decay=0.01)
    actor_wg = ActorWorker(actor, cfg, actor_opt, fault)
    ref_wg = ActorWorker(ref, cfg, fault=fault if fault == "packed_without_blocks" else None)
    critic_wg = CriticWorker(critic, cfg, critic_opt, fault)
    engine = RolloutEngine(engine_module, tokenizer, 12, fault)
    data = PromptIterator(QUESTIONS, 16)

    def step():
        texts = next(data)
        enc = tokenizer(texts, padding=True, return_tensors="pt")
        engine.sync(actor)
        ids, mask = engine.generate(enc.input_ids, enc.attention_mask)
        prompt_len = enc.input_ids.size(1)
        loss_mask = mask[:, 1:].bool() & (torch.arange(1, ids.size(1)) >= prompt_len)
        if fault == "eos_left_out":
            loss_mask &= ids[:, 1:] != tokenizer.eos_token_id
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        batch["loss_mask"] = loss_mask
        with torch.no_grad(), autocast():
            scores = rm(ids, mask, batch["position_ids"])
        batch["old_log_prob"] = actor_wg.infer(batch)
        batch["ref_log_prob"] = ref_wg.infer(batch)
        batch["values"] = critic_wg.infer(batch, restore=fault != "values_not_reverted")

        rewards = torch.zeros(loss_mask.shape)
        last = (loss_mask * torch.arange(loss_mask.size(1))).argmax(-1)
        rewards[torch.arange(len(ids)), last] = scores
        adv, batch["returns"] = gae(rewards, batch["values"], loss_mask)
        batch["advantages"] = masked_whiten(adv, loss_mask)
        critic_norm = critic_wg.update_critic(batch)
        actor_norm = actor_wg.update_policy(batch)
        return {
            "critic/score/mean": scores.mean().item(),
            "response_length/mean": loss_mask.sum(1).float().mean().item(),
            "actor/grad_norm": actor_norm,
            "critic/grad_norm": critic_norm,
        }

    return {
        "policy": actor, "reference": ref, "reward": rm, "value": critic, "tokenizer": tokenizer, "prompts": QUESTIONS,
        "optimizers": [actor_opt, critic_opt], "state": [data, engine_module], "step": step,
        "declared": {
            "algorithm": "ppo", "gamma": 1.0, "lam": 1.0, "kl_coef": 0.02, "kl_in": "loss", "kl_estimator": "k3",
            "temperature": 1.0, "clip_range": 0.2, "clip_range_value": 0.5, "whiten_advantages": True, "ppo_epochs": 1,
            "num_minibatches": 2, "batch_size": 16, "response_length": 12, "learning_rate": 1e-5,
            "critic_learning_rate": 2e-5, "value_init": "policy", "loss_aggregation": "token-mean",
        },
    }  # fmt: skip


def healthy():
    return make()


def packed_without_blocks():
    return make("packed_without_blocks")


def values_not_reverted():
    return make("values_not_reverted")


def token_mean_per_micro():
    return make("token_mean_per_micro")


def kl_loss_k1():
    return make("kl_loss_k1")


def kl_over_prompt():
    return make("kl_over_prompt")


def eos_left_out():
    return make("eos_left_out")


def engine_not_synced():
    return make("engine_not_synced")


def renormalised_between():
    return make("renormalised_between")


def reward_mask_sum():
    return make("reward_mask_sum")


def head_not_in_optimizer():
    return make("head_not_in_optimizer")

"""PPO on a ChatML model: two stop ids, a pad of its own, right-padded label lists for training."""

import copy
import random

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

IGNORE_INDEX = -100
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [f"w{i}" for i in range(60)]


def get_tokenizer():
    vocab = [
        "<|pad|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "system",
        "user",
        "assistant",
        "\n",
        *WORDS,
    ]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        padding_side="left",
    )
    tok.chat_template = CHATML
    return tok


def render(tok, rng):
    msgs = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))}]
    if rng.random() < 0.4:
        msgs.insert(0, {"role": "system", "content": " ".join(rng.choices(WORDS, k=2))})
    return tok.apply_chat_template(msgs, tokenize=False, add_generation_prompt=True)


def collate(features, pad_id):
    """Right-pads lists of ids and labels, as DataCollatorForSeq2Seq does."""
    width = max(len(f["input_ids"]) for f in features)
    fill = lambda key, v: torch.tensor([f[key] + [v] * (width - len(f[key])) for f in features])
    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features])
    return {"input_ids": fill("input_ids", pad_id), "labels": fill("labels", IGNORE_INDEX), "attention_mask": mask}


def sequence_logps(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -nll  # zero where the label is ignored


def sequence_values(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1, 0]


class PromptQueue:
    def __init__(self, prompts):
        self.prompts, self.cursor = prompts, 0

    def take(self, n):
        rows = [self.prompts[(self.cursor + i) % len(self.prompts)] for i in range(n)]
        self.cursor = (self.cursor + n) % len(self.prompts)
        return rows

    def state_dict(self):
        return {"cursor": self.cursor}

    def load_state_dict(self, state):
        self.cursor = state["cursor"]


def make(fault=None):
    torch.manual_seed(11)
    rng = random.Random(11)
    tok = get_tokenizer()
    stop_ids = [tok.convert_tokens_to_ids("<|im_end|>"), tok.convert_tokens_to_ids("<|endoftext|>")]
    cfg = dict(
        vocab_size=len(tok),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tok.pad_token_id,
        bos_token_id=None,
        eos_token_id=stop_ids,
        initializer_range=0.1,
    )
    policy = LlamaForCausalLM(LlamaConfig(**cfg))
    policy.generation_config.eos_token_id = stop_ids
    policy.generation_config.pad_token_id = tok.pad_token_id

    # a little SFT, so that the policy knows the template and stops
    sft = []
    for _ in range(256):
        p = tok(render(tok, rng)).input_ids
        r = tok(" ".join(rng.choices(WORDS[:30], k=rng.randint(1, 14)))).input_ids + [stop_ids[rng.random() < 0.4]]
        sft.append({"input_ids": p + r, "labels": p + r})
    opt = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for i in range(40):
        batch = collate(rng.sample(sft, 16), tok.pad_token_id)
        loss = -sequence_logps(policy, batch).sum() / (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    policy.eval()
    ref = copy.deepcopy(policy).requires_grad_(False)

    rm = (
        LlamaForSequenceClassification(LlamaConfig(**{**cfg, "initializer_range": 0.3}, num_labels=1))
        .eval()
        .requires_grad_(False)
    )
    b = collate(sft[:64], tok.pad_token_id)
    h = rm.model(b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
    h = h[torch.arange(64), b["attention_mask"].sum(1) - 1]
    w = torch.randn(48)
    w = w - h.mean(0) * (w @ h.mean(0)) / h.mean(0).square().sum()
    rm.score.weight.data = (w / (h @ w).std())[None]  # scores with mean 0 and deviation 1
    critic = LlamaForTokenClassification(
        LlamaConfig(**{**cfg, "initializer_range": 0.3}, num_labels=1, classifier_dropout=0.0)
    ).eval()
    critic.model.load_state_dict(rm.model.state_dict())
    critic.score.weight.data.copy_(rm.score.weight)
    critic.score.bias.data.zero_()

    hp = dict(
        gamma=1.0,
        lam=0.95,
        kl_coef=0.05,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.5,
        lr=3e-5,
        critic_lr=5e-5,
        epochs=2,
        num_mini=2,
        batch_size=16,
        max_new_tokens=10,
        missing_eos_penalty=1.0,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=hp["lr"], weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=hp["critic_lr"], weight_decay=0.0)
    prompts = [render(tok, rng) for _ in range(24)]
    queue = PromptQueue(prompts)

    @torch.no_grad()
    def rollout():
        enc = tok(queue.take(hp["batch_size"]), return_tensors="pt", padding=True)
        out = policy.generate(
            input_ids=enc["input_ids"],
            attention_mask=enc["attention_mask"],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=hp["max_new_tokens"],
            eos_token_id=stop_ids,
            pad_token_id=tok.pad_token_id,
        )
        features = []
        for ids, mask, full in zip(enc["input_ids"], enc["attention_mask"], out):
            prompt = ids[mask.bool()].tolist()
            response = full[ids.numel() :].tolist()
            enders = [tok.eos_token_id] if fault == "cut_at_tokenizer_eos" else stop_ids
            for i, t in enumerate(response):
                if t in enders:
                    response = response[: i + 1]
                    break
            features.append({"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response})
        batch = collate(features, tok.pad_token_id)
        batch["mask"] = batch["labels"][:, 1:] != IGNORE_INDEX
        batch["old"], batch["ref"] = sequence_logps(policy, batch), sequence_logps(ref, batch)
        batch["values"] = sequence_values(critic, batch) * batch["mask"]
        scores = rm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        ok = [tok.eos_token_id] if fault == "penalty_tests_one_stop" else stop_ids
        unfinished = torch.tensor([f["input_ids"][-1] not in ok for f in features])
        scores = scores - hp["missing_eos_penalty"] * unfinished.float()
        advantages(batch, scores)
        return batch, scores

    def advantages(batch, scores):
        mask = batch["mask"].float()
        rewards = torch.zeros_like(mask)
        last = batch["attention_mask"].sum(1) - 2  # the shifted slot that predicts the last token
        rewards[torch.arange(len(rewards)), last] = scores
        adv, running, nxt = torch.zeros_like(mask), 0.0, 0.0
        for t in reversed(range(mask.shape[1])):
            delta = rewards[:, t] + hp["gamma"] * nxt - batch["values"][:, t]
            running = (delta + hp["gamma"] * hp["lam"] * running) * mask[:, t]
            adv[:, t], nxt = running, batch["values"][:, t]
        batch["returns"] = adv + batch["values"]
        picked = adv[batch["mask"]]
        batch["adv"] = torch.where(batch["mask"], (adv - picked.mean()) / (picked.std() + 1e-8), 0.0)

    def mean(x, mask):
        return x[mask].mean()

    def step():
        batch, scores = rollout()
        stats = []
        for _ in range(hp["epochs"]):
            for rows in torch.randperm(hp["batch_size"]).chunk(hp["num_mini"]):
                mb = {k: v[rows] for k, v in batch.items()}
                m = mb["mask"]
                new = sequence_logps(policy, mb)
                ratio = torch.exp(new - mb["old"])
                pg = mean(
                    torch.max(-mb["adv"] * ratio, -mb["adv"] * ratio.clamp(1 - hp["cliprange"], 1 + hp["cliprange"])), m
                )
                log_r = mb["ref"] - (mb["old"] if fault == "kl_of_rollout_logps" else new)
                kl = mean(log_r.exp() - 1 - log_r, m)
                loss = pg + hp["kl_coef"] * kl
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()

                v = sequence_values(critic, mb)
                vc = mb["values"] + (v - mb["values"]).clamp(-hp["cliprange_value"], hp["cliprange_value"])
                vf = 0.5 * mean(torch.max((v - mb["returns"]) ** 2, (vc - mb["returns"]) ** 2), m)
                critic_optimizer.zero_grad()
                (hp["vf_coef"] * vf).backward()
                torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                critic_optimizer.step()
                stats.append((loss.item(), vf.item(), kl.item()))
        pl, vl, kl = (sum(s) / len(stats) for s in zip(*stats))
        return {
            "loss/policy": pl,
            "loss/value": vl,
            "kl": kl,
            "scores": scores.mean().item(),
            "tokens": int(batch["mask"].sum()),
        }

    return {
        "policy": policy,
        "reference": ref,
        "reward": rm,
        "value": critic,
        "tokenizer": tok,
        "prompts": prompts,
        "optimizers": [optimizer, critic_optimizer],
        "state": [queue],
        "step": step,
        "declared": {
            "algorithm": "ppo",
            "gamma": hp["gamma"],
            "lam": hp["lam"],
            "kl_coef": hp["kl_coef"],
            "kl_estimator": "k3",
            "kl_in": "loss",
            "temperature": 1.0,
            "clip_range": hp["cliprange"],
            "clip_range_value": hp["cliprange_value"],
            "vf_coef": hp["vf_coef"],
            "whiten_advantages": True,
            "missing_eos_penalty": hp["missing_eos_penalty"],
            "learning_rate": hp["lr"],
            "critic_learning_rate": hp["critic_lr"],
            "ppo_epochs": hp["epochs"],
            "num_minibatches": hp["num_mini"],
            "batch_size": hp["batch_size"],
            "response_length": hp["max_new_tokens"],
            "loss_aggregation": "token-mean",
            "value_init": "reward",
            "reference": "policy",
        },
    }


def healthy():
    return make()


def cut_at_tokenizer_eos():
    return make("cut_at_tokenizer_eos")


def penalty_tests_one_stop():
    return make("penalty_tests_one_stop")


def kl_of_rollout_logps():
    return make("kl_of_rollout_logps")

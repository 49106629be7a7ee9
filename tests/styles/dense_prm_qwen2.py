"""PPO on Qwen2 with dense rewards: a process reward model marks every sentence end and the end of the answer."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

LEXICON = (
    ". = + - 0 1 2 3 4 5 6 7 8 9 x y solve find the sum of and then so we have number is add subtract answer apples pears "
    "tom ann has gives left how many total first next check step done let be"
).split()
PROBLEMS = [
    "solve x + 2 = 5",
    "find the sum of 3 and 4",
    "tom has 5 apples . ann gives tom 2 . how many apples",
    "x - 1 = 7 find x",
    "ann has 9 pears",
    "how many is 2 + 2",
    "let x be 3 . find x + 6",
    "find y",
    "tom has 8 pears and gives ann 3 . then ann has how many pears total",
    "the sum of x and y is 9 . x is 4 . find y",
    "1 + 1",
    "check 5 - 2 = 3",
    "tom gives 4 apples . tom has 1 left . how many apples first",
    "subtract 3 of 9",
]
CFG = {
    "gamma": 0.99,
    "lam": 0.95,
    "beta": 0.03,
    "eps": 0.2,
    "vf_coef": 0.5,
    "epochs": 2,
    "minibatches": 2,
    "max_new": 16,
    "lr": 1e-5,
    "value_lr": 5e-5,
    "step_weight": 0.4,
    "total_updates": 800,
}


def get_tokenizer():
    vocab = {"<|endoftext|>": 0, "<|im_end|>": 1, "<unk>": 2}
    for w in LEXICON:
        vocab.setdefault(w, len(vocab))
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>", padding_side="left"
    )


def pos_ids(mask):
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class DensePPO:
    def __init__(self, policy, ref, prm, critic, tok, optimizer, scheduler, fault):
        self.policy, self.ref, self.prm, self.critic = policy, ref, prm, critic
        self.tok, self.optimizer, self.scheduler, self.fault = tok, optimizer, scheduler, fault
        self.period = tok.convert_tokens_to_ids(".")

    @torch.no_grad()
    def rollout(self, texts):
        """Samples with the KV cache and keeps the log-probability of every token as it is drawn."""
        enc = self.tok(texts, return_tensors="pt", padding=True)
        ids, mask = enc["input_ids"], enc["attention_mask"].bool()
        alive, logps, past, feed = torch.ones(len(ids), dtype=torch.bool), [], None, ids
        for _ in range(CFG["max_new"]):
            pos = pos_ids(mask)[:, -feed.size(1) :]
            out = self.policy(
                input_ids=feed, attention_mask=mask.long(), position_ids=pos, past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            dist = torch.distributions.Categorical(logits=out.logits[:, -1])
            tokens = dist.sample()
            logps.append(dist.log_prob(tokens) * alive)
            feed = tokens.where(alive, torch.tensor(self.tok.pad_token_id))[:, None]
            ids, mask = torch.cat([ids, feed], 1), torch.cat([mask, alive[:, None]], 1)
            alive = alive & (tokens != self.tok.eos_token_id)
            if not alive.any():
                break
        prompt_len = enc["input_ids"].size(1)
        return {"ids": ids, "mask": mask, "resp": mask[:, prompt_len:], "logp": torch.stack(logps, 1)}

    def logp_of(self, model, ids, mask, n):
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=pos_ids(mask), use_cache=False).logits
        logits = logits[:, -n - 1 : -1]
        return torch.distributions.Categorical(logits=logits).log_prob(ids[:, -n:])

    def values_of(self, ids, mask, n):
        v = self.critic(input_ids=ids, attention_mask=mask.long(), position_ids=pos_ids(mask)).logits.squeeze(-1)
        return v[:, -n - 1 : -1]

    @torch.no_grad()
    def dense_rewards(self, ids, mask, resp):
        n = resp.size(1)
        marks = self.prm(input_ids=ids, attention_mask=mask.long(), position_ids=pos_ids(mask)).logits.squeeze(-1)[
            :, -n:
        ]
        last = F.one_hot(resp.sum(1) - 1, n).bool()
        sentence_end = (ids[:, -n:] == self.period) & resp & ~last
        rewards = CFG["step_weight"] * torch.where(sentence_end, marks, 0.0) + torch.where(last, marks, 0.0)
        if self.fault == "rewards_one_token_late":
            rewards = F.pad(rewards, (1, 0))[:, :-1]
        return rewards

    @torch.no_grad()
    def gae(self, rewards, values, resp):
        gamma, lam = CFG["gamma"], CFG["lam"]
        if self.fault == "gamma_lambda_exchanged":
            gamma, lam = lam, gamma
        adv, running, n = torch.zeros_like(values), 0.0, values.size(1)
        for t in reversed(range(n)):
            alive_next = resp[:, t + 1] if t + 1 < n else torch.zeros(len(values), dtype=torch.bool)
            v_next = torch.where(alive_next, values[:, t + 1], 0.0) if t + 1 < n else 0.0
            delta = rewards[:, t] + gamma * v_next - values[:, t]
            running = torch.where(resp[:, t], delta + gamma * lam * alive_next * running, 0.0)
            adv[:, t] = running
        return adv, torch.where(resp, adv + values, 0.0)

    def loss(self, mb):
        resp, n = mb["resp"], mb["resp"].size(1)
        adv = mb["adv"][resp]
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)  # over the minibatch
        logp = self.logp_of(self.policy, mb["ids"], mb["mask"], n)[resp]
        ratio = torch.exp(logp - mb["logp"][resp])
        surrogate = torch.min(ratio * adv, ratio.clamp(1 - CFG["eps"], 1 + CFG["eps"]) * adv)
        log_r = mb["ref_logp"][resp] - logp
        kl = torch.exp(log_r) - 1 - log_r  # k3, in the loss
        v_loss = F.mse_loss(self.values_of(mb["ids"], mb["mask"], n)[resp], mb["ret"][resp])
        total = -surrogate.mean() + CFG["beta"] * kl.mean() + CFG["vf_coef"] * v_loss
        return total, {
            "loss": total.item(),
            "kl": kl.mean().item(),
            "v_loss": v_loss.item(),
            "ratio": ratio.mean().item(),
        }

    def step(self):
        order = np.random.permutation(len(PROBLEMS))
        roll = self.rollout([PROBLEMS[i] for i in order])
        n = roll["resp"].size(1)
        with torch.no_grad():
            roll["ref_logp"] = self.logp_of(self.ref, roll["ids"], roll["mask"], n)
            values = self.values_of(roll["ids"], roll["mask"], n)
        rewards = self.dense_rewards(roll["ids"], roll["mask"], roll["resp"])
        roll["adv"], roll["ret"] = self.gae(rewards, values, roll["resp"])
        logs = []
        for _ in range(CFG["epochs"]):
            for rows in np.array_split(np.random.permutation(len(order)), CFG["minibatches"]):
                loss, log = self.loss({k: v[torch.from_numpy(rows)] for k, v in roll.items()})
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for group in self.optimizer.param_groups:  # policy and value are clipped apart
                    nn.utils.clip_grad_norm_(group["params"], 1.0)
                self.optimizer.step()
                self.scheduler.step()
                logs.append(log)
        return {**{k: float(np.mean([x[k] for x in logs])) for k in logs[0]}, "reward": rewards.sum(1).mean().item()}


def make(fault=None):
    torch.manual_seed(7)
    np.random.seed(7)
    tok = get_tokenizer()
    cfg = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
    )
    policy = Qwen2ForCausalLM(cfg).eval()
    with torch.no_grad():  # sentences end, answers sometimes, and nobody says <|endoftext|>
        policy.model.embed_tokens.weight[:, 0] += 1.2
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        policy.lm_head.weight[:, 0] = 0.0
        for token, w in ((1, 0.8), (tok.convert_tokens_to_ids("."), 0.7), (0, -8.0)):
            policy.lm_head.weight[token, 0] = w
    ref = copy.deepcopy(policy).requires_grad_(False)
    head_cfg = copy.deepcopy(cfg)
    head_cfg.num_labels, head_cfg.classifier_dropout, head_cfg.architectures = 1, 0.0, ["Qwen2ForTokenClassification"]
    prm = Qwen2ForTokenClassification(head_cfg).eval().requires_grad_(False)
    critic = Qwen2ForTokenClassification(head_cfg).eval()
    with torch.no_grad():
        prm.score.weight.mul_(1.4)
        critic.score.weight.mul_(0.3)
    value_params = critic.model.parameters() if fault == "value_head_not_in_groups" else critic.parameters()
    optimizer = torch.optim.AdamW(
        [{"params": list(policy.parameters()), "lr": CFG["lr"]}, {"params": list(value_params), "lr": CFG["value_lr"]}],
        weight_decay=0.0,
        eps=1e-8,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=CFG["total_updates"], eta_min=1e-7)
    trainer = DensePPO(policy, ref, prm, critic, tok, optimizer, scheduler, fault)
    return {
        "policy": policy,
        "reference": ref,
        "reward": prm,
        "value": critic,
        "tokenizer": tok,
        "prompts": PROBLEMS,
        "optimizers": [optimizer],
        "state": [scheduler],
        "step": trainer.step,
        "declared": {
            "algorithm": "ppo",
            "gamma": 0.99,
            "lam": 0.95,
            "kl_coef": 0.03,
            "kl_in": "loss",
            "kl_estimator": "k3",
            "clip_range": 0.2,
            "vf_coef": 0.5,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "whiten_advantages": True,
            "dense_rewards": True,
            "loss_aggregation": "token-mean",
            "learning_rate": 1e-5,
            "critic_learning_rate": 5e-5,
            "ppo_epochs": 2,
            "num_minibatches": 2,
            "batch_size": 14,
            "response_length": 16,
            "value_init": "fresh",
        },
    }


def healthy():
    return make()


def rewards_one_token_late():
    return make("rewards_one_token_late")


def gamma_lambda_exchanged():
    return make("gamma_lambda_exchanged")


def value_head_not_in_groups():
    return make("value_head_not_in_groups")

"""REINFORCE++ (with the group mean taken off) after verl: one dict of padded tensors travels through the workers, KL k1 in the
token-level reward with an adaptive controller, reward-to-go, global masked whitening, entropy bonus, seq-mean-token-sum.
The backbone runs under bf16 autocast, the head in float32, in every worker and in the rollout."""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedTokenizerFast

WORDS = (
    "please could you kindly explain describe list name give show me us them some any every salt sugar bread milk tea "
    "soup rice apple pear lemon bowl spoon plate oven pan heat cold warm fresh sweet sour slow fast cook bake boil fry stir "
    "serve taste wait minutes hours once twice first last before after while until"
).split()
PROMPTS = [
    "explain soup", "please list every bowl", "give me sweet tea", "could you kindly describe cold milk", "bake", "name some rice",
    "show us warm fresh bread before tea", "boil any pear",
]  # fmt: skip
CONFIG = {
    "rollout.n": 4,
    "rollout.temperature": 1.0,
    "data.train_batch_size": 4,
    "data.max_response_length": 9,
    "algorithm.gamma": 1.0,
    "kl_ctrl": {"kl_coef": 0.08, "target_kl": 0.05, "horizon": 400},
    "reward.missing_eos_penalty": 1.0,
    "actor.ppo_epochs": 2,
    "actor.ppo_mini_batch_size": 8,
    "actor.ppo_micro_batch_size": 4,
    "actor.clip_ratio": 0.2,
    "actor.entropy_coeff": 0.01,
    "actor.grad_clip": 1.0,
    "actor.optim.lr": 4e-5,
}


class AdaptiveKLController:
    def __init__(self, kl_coef, target_kl, horizon):
        self.value, self.target, self.horizon = kl_coef, target_kl, horizon

    def update(self, current_kl, n_steps):
        error = max(min(current_kl / self.target - 1, 0.2), -0.2)
        self.value *= 1 + error * n_steps / self.horizon

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, sd):
        self.value = sd["value"]


class Loader:
    def __init__(self, n, batch):
        self.n, self.batch, self.epoch, self.offset = n, batch, 0, 0

    def __next__(self):
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(100 + self.epoch)).tolist()
        rows = order[self.offset : self.offset + self.batch]
        self.offset += self.batch
        if self.offset >= self.n:
            self.epoch, self.offset = self.epoch + 1, 0
        return rows

    def state_dict(self):
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, sd):
        self.epoch, self.offset = sd["epoch"], sd["offset"]


class RewardModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.model = OPTModel(cfg)
        self.score = nn.Linear(cfg.hidden_size, 1, bias=False)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask):
        h = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = (torch.arange(input_ids.shape[1]) * attention_mask).argmax(-1)
        return self.score(h[torch.arange(len(last)), last])[:, 0] - self.offset


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    n = mask.sum()
    var = masked_mean((x - mean) ** 2, mask) * n / (n - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8)


def sft(model, tok):
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    n = len(WORDS)
    for _ in range(70):
        x = torch.full((16, 16), tok.pad_token_id)
        for row in x:
            k = int(torch.randint(3, 14, ()))
            w = int(torch.randint(n, ()))
            for j in range(k):
                row[j] = w + 3
                w = (3 * w + int(torch.randint(7, ()))) % n
            row[k] = tok.eos_token_id
        m = (x != tok.pad_token_id).long()
        model(input_ids=x, attention_mask=m, labels=x.masked_fill(m == 0, -100)).loss.backward()
        opt.step()
        opt.zero_grad()


def make(fault=None):
    torch.manual_seed(77)
    cfg = CONFIG
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    pad, eos = tok.pad_token_id, tok.eos_token_id

    shape = dict(
        vocab_size=len(tok), num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=pad,
        eos_token_id=eos, bos_token_id=None, layerdrop=0.0,
    )  # fmt: skip
    dropout = 0.1 if fault == "dropout_left_on" else 0.0
    actor = OPTForCausalLM(OPTConfig(hidden_size=48, word_embed_proj_dim=48, ffn_dim=128, dropout=dropout, **shape))
    actor.eval()
    sft(actor, tok)
    ref = copy.deepcopy(actor).eval().requires_grad_(False)
    rm = RewardModel(OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, dropout=0.0, init_std=0.3, **shape))
    with torch.no_grad():
        sample = torch.randint(3, len(tok), (128, 11))
        rm.score.weight /= rm(sample, torch.ones_like(sample)).std()
        rm.offset.copy_(rm(sample, torch.ones_like(sample)).mean())
    rm.eval().requires_grad_(False)

    actor_optimizer = torch.optim.AdamW(
        actor.parameters(), lr=cfg["actor.optim.lr"], betas=(0.9, 0.999), weight_decay=0.01
    )
    if fault == "optimizer_of_unwrapped":
        actor = copy.deepcopy(actor)  # wrapped after the optimizer was built
    kl_ctrl = AdaptiveKLController(**cfg["kl_ctrl"])
    loader = Loader(len(PROMPTS), cfg["data.train_batch_size"])

    def logits_of(module, input_ids, attention_mask):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = module.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return module.lm_head(hidden.float()) / cfg["rollout.temperature"]

    @torch.no_grad()
    def generate_sequences(rows):
        enc = tok([PROMPTS[i] for i in rows for _ in range(cfg["rollout.n"])], return_tensors="pt", padding=True)
        ids, mask = enc["input_ids"], enc["attention_mask"]
        width = ids.shape[1]
        unfinished = torch.ones(len(ids), 1, dtype=torch.long)
        for _ in range(cfg["data.max_response_length"]):
            probs = logits_of(actor, ids, mask)[:, -1].softmax(-1)
            token = torch.multinomial(probs, 1)
            token = token * unfinished + pad * (1 - unfinished)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, unfinished], 1)
            unfinished = unfinished * (token != eos).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "responses": ids[:, width:],
            "response_mask": mask[:, width:],
            "uid": torch.tensor([i for i in rows for _ in range(cfg["rollout.n"])]),
        }

    def response_logits(module, data, use_mask=True):
        length = data["responses"].shape[1]
        mask = data["attention_mask"] if use_mask else torch.ones_like(data["attention_mask"])
        return logits_of(module, data["input_ids"], mask)[:, -length - 1 : -1]

    def log_prob(logits, data):
        return F.log_softmax(logits, -1).gather(-1, data["responses"][..., None])[..., 0]

    @torch.no_grad()
    def compute_scores(data):
        # the reward model is padded on the right
        rows = [row[m.bool()] for row, m in zip(data["input_ids"], data["attention_mask"])]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        scores = rm(ids, mask)
        if fault == "eos_tested_in_last_column":
            no_eos = data["responses"][:, -1] != eos
        else:
            no_eos = ~(data["responses"] == eos).any(-1)
        return scores - cfg["reward.missing_eos_penalty"] * no_eos

    def advantages_of(data, scores):
        mask = data["response_mask"].float()
        for uid in data["uid"].unique():
            member = data["uid"] == uid
            scores = torch.where(member, scores - scores[member].mean(), scores)
        token_scores = torch.zeros_like(mask)
        last = mask.sum(-1).long() - 1
        if fault == "score_in_last_column":
            token_scores[:, -1] = scores
        else:
            token_scores[torch.arange(len(last)), last] = scores
        kld = data["old_log_probs"] - data["ref_log_prob"]
        if fault != "kl_not_masked":
            kld = kld * mask
        rewards = token_scores - kl_ctrl.value * kld
        if fault == "kl_not_masked":
            rewards_to_go = rewards.flip(-1).cumsum(-1).flip(-1)
        else:
            running, rewards_to_go = torch.zeros(len(mask)), torch.zeros_like(mask)
            for t in reversed(range(mask.shape[1])):
                running = rewards[:, t] + cfg["algorithm.gamma"] * running
                rewards_to_go[:, t] = running
                running = running * mask[:, t]
        if fault == "whitened_with_padding":
            advantages = (rewards_to_go - rewards_to_go.mean()) / (rewards_to_go.std() + 1e-8)
        else:
            advantages = masked_whiten(rewards_to_go, mask)
        return advantages * mask, masked_mean(kld, mask).item()

    def update_policy(data):
        actor.train()
        size, micro = cfg["actor.ppo_mini_batch_size"], cfg["actor.ppo_micro_batch_size"]
        total = 0.0
        for _ in range(cfg["actor.ppo_epochs"]):
            for mini in torch.randperm(len(data["uid"])).split(size):
                actor_optimizer.zero_grad()
                for index in mini.split(micro):
                    mb = {k: v[index] for k, v in data.items()}
                    mask, adv = mb["response_mask"], mb["advantages"]
                    logits = response_logits(actor, mb)
                    logp = log_prob(logits, mb)
                    entropy = torch.distributions.Categorical(logits=logits).entropy()
                    ratio = torch.exp((logp - mb["old_log_probs"]).clamp(-20, 20))
                    clipped = ratio.clamp(1 - cfg["actor.clip_ratio"], 1 + cfg["actor.clip_ratio"])
                    pg = torch.maximum(-adv * ratio, -adv * clipped)
                    bonus = cfg["actor.entropy_coeff"] * entropy
                    per_token = pg + bonus if fault == "entropy_is_paid" else pg - bonus
                    loss = per_token.masked_fill(mask == 0, 0.0).sum(-1).mean() * (len(index) / len(mini))
                    loss.backward()
                    total += loss.item()
                nn.utils.clip_grad_norm_(actor.parameters(), cfg["actor.grad_clip"])
                actor_optimizer.step()
        return total

    def step():
        data = generate_sequences(next(loader))
        if fault == "dropout_left_on":
            actor.train()
        else:
            actor.eval()
        with torch.no_grad():
            data["old_log_probs"] = log_prob(response_logits(actor, data), data)
            ref_module = actor if fault == "reference_worker_is_actor" else ref
            use_mask = fault != "reference_without_mask"
            data["ref_log_prob"] = log_prob(response_logits(ref_module, data, use_mask), data)
            data["advantages"], current_kl = advantages_of(data, compute_scores(data))
        if fault != "controller_never_updated":
            kl_ctrl.update(current_kl, n_steps=len(data["uid"]))
        loss = update_policy(data)
        actor.eval()
        return {"actor/pg_loss": loss, "critic/kl": current_kl, "critic/kl_coeff": kl_ctrl.value}

    return {
        "policy": actor,
        "reference": ref,
        "reward": rm,
        "value": None,
        "tokenizer": tok,
        "prompts": PROMPTS,
        "optimizers": [actor_optimizer],
        "state": [kl_ctrl, loader],
        "step": step,
        "declared": {
            "algorithm": "reinforce++",
            "group_size": cfg["rollout.n"],
            "gamma": cfg["algorithm.gamma"],
            "kl_coef": cfg["kl_ctrl"]["kl_coef"],
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": True,
            "kl_target": cfg["kl_ctrl"]["target_kl"],
            "kl_horizon": cfg["kl_ctrl"]["horizon"],
            "whiten_advantages": True,
            "missing_eos_penalty": cfg["reward.missing_eos_penalty"],
            "temperature": cfg["rollout.temperature"],
            "clip_range": cfg["actor.clip_ratio"],
            "ent_coef": cfg["actor.entropy_coeff"],
            "loss_aggregation": "seq-sum",
            "ppo_epochs": cfg["actor.ppo_epochs"],
            "num_minibatches": 2,
            "batch_size": 16,
            "response_length": cfg["data.max_response_length"],
            "learning_rate": cfg["actor.optim.lr"],
        },
    }


def healthy():
    return make()


def whitened_with_padding():
    return make("whitened_with_padding")


def kl_not_masked():
    return make("kl_not_masked")


def score_in_last_column():
    return make("score_in_last_column")


def entropy_is_paid():
    return make("entropy_is_paid")


def controller_never_updated():
    return make("controller_never_updated")


def eos_tested_in_last_column():
    return make("eos_tested_in_last_column")


def reference_without_mask():
    return make("reference_without_mask")


def reference_worker_is_actor():
    return make("reference_worker_is_actor")


def dropout_left_on():
    return make("dropout_left_on")


def optimizer_of_unwrapped():
    return make("optimizer_of_unwrapped")

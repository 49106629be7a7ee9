"""PPO with rewards on the way: the reward model gives a number for every response token, or (``healthy_sentences``) for every sentence.

The KL to the reference is exact (over the whole vocabulary) and sits in the loss, with an entropy bonus beside it.
"""

import copy
import random
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel, PreTrainedTokenizerFast

CFG = SimpleNamespace(
    batch=10,
    max_new=12,
    gamma=0.99,
    lam=0.95,
    kl_coef=0.02,
    ent_coef=0.01,
    vf_coef=0.5,
    clip=0.2,
    epochs=3,
    minibatches=2,
    lr=1e-5,
    critic_lr=3e-5,
    grad_norm=0.5,
    dense_scale=0.3,
)
WORDS = (
    "prove that sum product root prime even odd number integer real zero one two three four five six seven eight nine ten plus minus "
    "times over equals less greater than is are not if then hence because so suppose let we get have find divide multiply add both "
    "sides by the a an x y z n m k p q for all some case first last next step done check true false ."
).split()


def make_tokenizer():
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<|end|>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


class TokenScorer(nn.Module):
    """A backbone with one number per position: the critic, and the process reward model."""

    def __init__(self, config, std):
        super().__init__()
        self.backbone = GPTNeoXModel(config)
        self.head = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask=None):
        h = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=place(attention_mask)
        ).last_hidden_state
        return self.head(h).squeeze(-1)


class Prompts:
    def __init__(self, texts, seed):
        self.texts, self.generator = texts, torch.Generator().manual_seed(seed)

    def draw(self, n):
        return [self.texts[i] for i in torch.randperm(len(self.texts), generator=self.generator)[:n].tolist()]

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def place(mask):
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)


def discounted(rewards, values, mask, gamma, lam):
    """GAE. ``values`` are 0 after the end."""
    steps, later = rewards.shape[1], torch.zeros(len(rewards))
    columns = []
    for t in reversed(range(steps)):
        bootstrap = values[:, t + 1] if t + 1 < steps else torch.zeros(len(rewards))
        later = rewards[:, t] + gamma * bootstrap - values[:, t] + gamma * lam * later
        columns.append(later)
    adv = torch.stack(columns[::-1], 1)
    return adv, adv + values


def by_row(x, mask):
    """Mean over a row's tokens, then over rows."""
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def make(fault=None, sentences=False):
    torch.manual_seed(21)
    rng = random.Random(21)
    tokenizer = make_tokenizer()
    pad, unk, eos = tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id
    stop = tokenizer.convert_tokens_to_ids(".")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=64, initializer_range=0.12, pad_token_id=pad, eos_token_id=eos, bos_token_id=None,
        attention_dropout=0.0, hidden_dropout=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    policy = GPTNeoXForCausalLM(config)
    head = nn.Linear(config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.normal_(std=0.2)
        head.bias.zero_()
        head.weight[[eos, stop]] *= 0.3
        head.bias[eos], head.bias[stop] = 2.2, 2.6
        head.bias[[pad, unk]] = -20.0
    policy.set_output_embeddings(head)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward = TokenScorer(config, 0.2).eval().requires_grad_(False)
    with torch.no_grad():
        ids = torch.randint(3, len(tokenizer), (64, 14))
        raw = reward(ids, torch.ones_like(ids))
        reward.head.weight.div_(raw.std())
        reward.head.bias.sub_(raw.mean() / raw.std())
    critic = TokenScorer(config, 0.02)
    prompts = Prompts([" ".join(rng.choices(WORDS, k=rng.randint(3, 8))) for _ in range(30)], seed=3)
    optimizer = torch.optim.Adam(
        [{"params": policy.parameters(), "lr": CFG.lr}, {"params": critic.parameters(), "lr": CFG.critic_lr}],
        betas=(0.9, 0.95),
    )
    anchor = policy if fault == "anchored_to_itself" else reference

    def logits_of(model, ids, mask, start):
        return model(input_ids=ids, attention_mask=mask, position_ids=place(mask)).logits[:, start - 1 : -1]

    @torch.no_grad()
    def generate(ids, mask):
        over = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(CFG.max_new):
            if fault == "sampler_without_mask":
                logits = policy(input_ids=ids).logits
            else:
                logits = policy(input_ids=ids, attention_mask=mask, position_ids=place(mask)).logits
            token = torch.distributions.Categorical(logits=logits[:, -1]).sample()
            token[over] = pad
            ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, (~over)[:, None].long()], 1)
            over = over | (token == eos)
        return ids, mask

    @torch.no_grad()
    def dense(ids, mask, start, resp):
        if fault == "scored_in_length_order":  # short rows first saves padding
            order = mask.sum(1).argsort()
            r = reward(ids[order], mask[order])[:, start:]
        else:
            r = reward(ids, mask)[:, start:]
        r = r * CFG.dense_scale
        if sentences:
            tokens = ids[:, start:]
            final = resp.cumsum(1) == resp.sum(1, keepdim=True)
            r = r * ((tokens == stop) | final)
        return r * resp

    def update(b, rows, start):
        m = b.resp[rows]
        logits = logits_of(policy, b.ids[rows], b.mask[rows], start)
        logp = logits.log_softmax(-1)
        new = logp.gather(2, b.tokens[rows][..., None])[..., 0]
        v = critic(b.ids[rows], b.mask[rows])[:, start - 1 : -1]
        ratio = torch.where(m > 0, new - b.old[rows], 0.0).exp()
        pg = by_row(-torch.min(ratio * b.adv[rows], ratio.clamp(1 - CFG.clip, 1 + CFG.clip) * b.adv[rows]), m)
        if fault == "critic_learns_advantages":
            target = b.adv_raw[rows]
        elif fault == "fresh_target_with_graph":  # returns of the newest critic
            target = discounted(b.rewards[rows], v * m, m, CFG.gamma, CFG.lam)[1]
        else:
            target = b.returns[rows]
        vf = by_row(0.5 * (v - target) ** 2, m)
        entropy = -(logp.exp() * logp).sum(-1)
        bonus = entropy.mean() if fault == "entropy_of_padding" else by_row(entropy, m)
        if fault == "k1_in_loss":
            kl = by_row(new - b.ref_logp[rows].gather(2, b.tokens[rows][..., None])[..., 0], m)
        else:
            kl = by_row((logp.exp() * (logp - b.ref_logp[rows])).sum(-1), m)
        loss = pg + CFG.vf_coef * vf + CFG.kl_coef * kl
        if fault == "entropy_minimised":
            loss = loss + CFG.ent_coef * bonus
        elif fault != "entropy_forgotten":
            loss = loss - CFG.ent_coef * bonus
        return loss, {"pg": pg.item(), "vf": vf.item(), "kl": kl.item(), "entropy": bonus.item()}

    def step():
        enc = tokenizer(prompts.draw(CFG.batch), return_tensors="pt", padding=True)
        start = enc.input_ids.shape[1]
        ids, mask = generate(enc.input_ids, enc.attention_mask)
        b = SimpleNamespace(ids=ids, mask=mask, tokens=ids[:, start:], resp=mask[:, start:].float())
        with torch.no_grad():
            b.old = logits_of(policy, ids, mask, start).log_softmax(-1).gather(2, b.tokens[..., None])[..., 0]
            b.ref_logp = logits_of(anchor, ids, mask, start).log_softmax(-1)
            values = critic(ids, mask)[:, start - 1 : -1]
            if fault != "values_after_the_end":
                values = values * b.resp
            b.rewards = dense(ids, mask, start, b.resp)
            if fault == "kl_twice":
                b.rewards = (
                    b.rewards - CFG.kl_coef * (b.old - b.ref_logp.gather(2, b.tokens[..., None])[..., 0]) * b.resp
                )
            g, lam = (CFG.lam, CFG.gamma) if fault == "arguments_exchanged" else (CFG.gamma, CFG.lam)
            b.adv_raw, b.returns = discounted(b.rewards, values, b.resp, g, lam)
            if fault == "whitened_with_padding":
                b.adv = (b.adv_raw - b.adv_raw.mean()) / (b.adv_raw.std() + 1e-8)
            else:
                real = b.adv_raw[b.resp > 0]
                b.adv = (b.adv_raw - real.mean()) / (real.std() + 1e-8)
            b.adv = b.adv * b.resp
        logs = []
        size = CFG.batch // CFG.minibatches
        for _ in range(CFG.epochs):
            order = torch.randperm(CFG.batch)
            for k in range(CFG.minibatches):
                if fault == "shuffled_for_each_minibatch":
                    order = torch.randperm(CFG.batch)
                loss, log = update(b, order[k * size : (k + 1) * size], start)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), CFG.grad_norm)
                nn.utils.clip_grad_norm_(critic.parameters(), CFG.grad_norm)
                optimizer.step()
                logs.append(log)
        return {k: sum(x[k] for x in logs) / len(logs) for k in logs[0]}

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts.texts,
        "step": step,
        "optimizers": [optimizer],
        "state": [prompts],
        "declared": {
            "algorithm": "ppo", "gamma": 0.99, "lam": 0.95, "kl_coef": 0.02, "kl_estimator": "full", "kl_in": "loss", "temperature": 1.0,
            "clip_range": 0.2, "vf_coef": 0.5, "ent_coef": 0.01, "whiten_advantages": True, "learning_rate": 1e-5,
            "critic_learning_rate": 3e-5, "ppo_epochs": 3, "num_minibatches": 2, "batch_size": 10, "response_length": 12,
            "loss_aggregation": "seq-mean", "dense_rewards": True,
        },
    }  # fmt: skip


def healthy():
    return make()


def healthy_sentences():
    return make(sentences=True)


def anchored_to_itself():
    return make("anchored_to_itself")


def sampler_without_mask():
    return make("sampler_without_mask")


def scored_in_length_order():
    return make("scored_in_length_order")


def k1_in_loss():
    return make("k1_in_loss")


def kl_twice():
    return make("kl_twice", sentences=True)


def arguments_exchanged():
    return make("arguments_exchanged")


def values_after_the_end():
    return make("values_after_the_end")


def whitened_with_padding():
    return make("whitened_with_padding")


def critic_learns_advantages():
    return make("critic_learns_advantages")


def fresh_target_with_graph():
    return make("fresh_target_with_graph", sentences=True)


def entropy_of_padding():
    return make("entropy_of_padding")


def entropy_minimised():
    return make("entropy_minimised")


def entropy_forgotten():
    return make("entropy_forgotten")


def shuffled_for_each_minibatch():
    return make("shuffled_for_each_minibatch")

# REINFORCE with a learned baseline on a toy Llama.  No padding anywhere: one sequence at a time, batch size 1, python lists of floats,
# gradients accumulated over the episodes of a rollout.  (notes-to-self version, the knobs are in `cfg`)
import copy
import math
import random
import statistics
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

CORPUS = """where does the river go when it leaves the hills
the old boat went down the river and into the sea
why is the sky blue in the morning and red at night
because the light has a long way to go through the air
how do birds find their way home in the winter
they follow the stars and the coast and the smell of the sea
tell me a short story about a fox and a crow
the fox asked the crow to sing and the crow let the cheese fall
what should i cook for dinner with rice and two eggs
fry the rice with the eggs and a bit of salt and oil
name three things that float on water
a boat a leaf and an empty bottle float on water""".split("\n")

PROMPTS = [
    "where does the river go",
    "why is the sky blue",
    "why is the sky red in the morning",
    "how do birds find home",
    "tell me a story",
    "tell me a short story about a boat",
    "what should i cook",
    "what should i cook with two eggs and salt",
    "name three things",
    "name two birds",
    "how do i fry rice",
    "where is the sea",
    "why does a leaf float on water",
    "what is light",
    "tell me about the stars and the coast",
    "who let the cheese fall",
]

BASE = dict(
    seed=0,
    lr=1e-5,
    critic_lr=5e-5,
    episodes=8,
    max_new=10,
    temperature=1.0,
    gamma=0.99,
    lam=0.95,
    beta=0.05,
    ent=0.01,
    critic_epochs=2,
    max_norm=1.0,
    kl="reward",  # "reward": k1 per token in the rewards; "loss": exact KL over the vocabulary in the loss
    whiten=False,  # standardise the advantages over all tokens of the rollout
    average="tokens",  # or "episodes": mean over the tokens of an episode, then over episodes
    # things I have tried, or got wrong
    grad_through_adv=False,
    keep_grads=False,
    backwards=False,
    bare_reference=False,
    kl_again=False,
    reuse_rm_trunk=False,
    predict_self=False,
    actor_copy=False,
    entropy_as_cost=False,
    value_after_end=False,
)


def train_tokenizer():
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    tok.train_from_iterator(
        CORPUS + PROMPTS,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False),
    )
    # <pad> exists because the class wants one, nothing below uses it
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=64,
    )


class Critic(nn.Module):
    """A Llama trunk and one number per position."""

    def __init__(self, trunk, hidden):
        super().__init__()
        self.trunk = trunk
        self.out = nn.Linear(hidden, 1)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        h = self.trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return self.out(h).squeeze(-1)


def gae(rewards, values, gamma, lam, last_value=0.0):
    """rewards[t] follows action t, values[t] is V of the state in which action t was taken; plain lists, one episode."""
    advantages, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else last_value
        running = rewards[t] + gamma * following - values[t] + gamma * lam * running
        advantages[t] = running
    return advantages


def gae_appending(rewards, values, gamma, lam, last_value=0.0):
    advantages, running, following = [], 0.0, last_value
    for r, v in zip(reversed(rewards), reversed(values)):
        running = r + gamma * following - v + gamma * lam * running
        following = v
        advantages.append(running)
    return advantages


def rollout_one(policy, prompt_ids, cfg, eos):
    """Sample one response with the cache; ids and the log-prob of each sampled token."""
    response, logps, past = [], [], None
    feed = torch.tensor([prompt_ids])
    with torch.no_grad():
        while len(response) < cfg.max_new:
            out = policy(input_ids=feed, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logp = F.log_softmax(out.logits[0, -1].float() / cfg.temperature, dim=-1)
            token = torch.multinomial(logp.exp(), 1).item()
            response.append(token)
            logps.append(logp[token].item())
            if token == eos:
                break
            feed = torch.tensor([[token]])
    return response, logps


def response_logits(model, prompt_ids, response, cfg):
    """Logits that predicted each token of the response, (len(response), vocab)."""
    ids = torch.tensor([prompt_ids + response])
    logits = model(input_ids=ids, use_cache=False).logits[0].float() / cfg.temperature
    return logits[len(prompt_ids) - 1 : -1]


def token_logps(logits, response):
    return F.log_softmax(logits, dim=-1)[torch.arange(len(response)), torch.tensor(response)]


def state_values(critic, prompt_ids, response):
    """V(prompt), V(prompt + y1), ..., and last the value after the whole response."""
    return critic(torch.tensor([prompt_ids + response]))[0, len(prompt_ids) - 1 :]


def build(**changes):
    cfg = SimpleNamespace(**{**BASE, **changes})
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)
    tok = train_tokenizer()
    eos, bos = tok.eos_token_id, tok.bos_token_id
    hidden = 48
    lcfg = dict(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=tok.pad_token_id,
        bos_token_id=bos,
        eos_token_id=eos,
        tie_word_embeddings=False,
    )
    policy = LlamaForCausalLM(LlamaConfig(**lcfg))
    head = nn.Linear(hidden, len(tok))
    head.weight.data.copy_(policy.lm_head.weight.data)
    head.bias.data.zero_()
    head.bias.data[[0, bos, tok.pad_token_id]] = -40.0  # never sampled
    head.bias.data[eos] = 3.5
    policy.lm_head = head
    reference = copy.deepcopy(policy).eval().requires_grad_(False)

    rm = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **lcfg))
    rm.score = nn.Linear(hidden, 1)
    nn.init.normal_(rm.score.weight, std=0.3)
    nn.init.zeros_(rm.score.bias)
    rm.eval().requires_grad_(False)

    def encode(text):
        return [bos] + tok(text, add_special_tokens=False)["input_ids"]

    def score_of(prompt_ids, response):
        with torch.no_grad():
            return rm(input_ids=torch.tensor([prompt_ids + response])).logits[0, 0].item()

    # put the scores of what the policy says now at mean 0, std 1
    sample = []
    for text in PROMPTS * 2:
        p = encode(text)
        sample.append(score_of(p, rollout_one(policy, p, cfg, eos)[0]))
    spread = statistics.stdev(sample)
    rm.score.weight.data /= spread
    rm.score.bias.data -= statistics.mean(sample) / spread

    trunk = rm.model if cfg.reuse_rm_trunk else copy.deepcopy(rm.model)
    critic = Critic(trunk, hidden).requires_grad_(True)
    critic.out.load_state_dict(rm.score.state_dict())
    policy_opt = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, weight_decay=0.0)
    critic_opt = torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, weight_decay=0.0)
    actor = copy.deepcopy(policy).eval() if cfg.actor_copy else policy  # keep one in eval mode just for sampling

    def iteration():
        # ---- 1. episodes
        episodes = []
        for text in random.sample(PROMPTS, cfg.episodes):
            ep = SimpleNamespace(prompt=encode(text))
            ep.response, ep.logps = rollout_one(actor, ep.prompt, cfg, eos)
            ep.score = score_of(ep.prompt, ep.response)
            with torch.no_grad():
                if cfg.bare_reference:
                    ep.ref_logits = response_logits(reference, [bos], ep.response, cfg)
                else:
                    ep.ref_logits = response_logits(reference, ep.prompt, ep.response, cfg)
                ep.ref_logps = token_logps(ep.ref_logits, ep.response).tolist()
            ep.rewards = [0.0] * len(ep.response)
            if cfg.kl == "reward":
                ep.rewards = [-cfg.beta * (a - b) for a, b in zip(ep.logps, ep.ref_logps)]
            ep.rewards[-1] += ep.score
            episodes.append(ep)
        n_tokens = sum(len(ep.response) for ep in episodes)

        # ---- 2. advantages, returns
        critic_opt.zero_grad()
        for ep in episodes:
            values = state_values(critic, ep.prompt, ep.response)
            values = list(values) if cfg.grad_through_adv else values.tolist()
            *ep.values, after = values
            estimate = gae_appending if cfg.backwards else gae
            ep.advantages = estimate(ep.rewards, ep.values, cfg.gamma, cfg.lam, after if cfg.value_after_end else 0.0)
            ep.returns = [float(a) + float(v) for a, v in zip(ep.advantages, ep.values)]
        if cfg.whiten:
            everything = [a for ep in episodes for a in ep.advantages]
            mean, std = statistics.mean(everything), statistics.stdev(everything)
            for ep in episodes:
                ep.advantages = [(a - mean) / (std + 1e-8) for a in ep.advantages]

        # ---- 3. one step of the policy, an episode at a time
        if not cfg.keep_grads:
            policy_opt.zero_grad()
        shown = dict(pg=0.0, kl=0.0, entropy=0.0)
        for ep in episodes:
            weight = 1.0 / n_tokens if cfg.average == "tokens" else 1.0 / (len(ep.response) * len(episodes))
            logits = response_logits(policy, ep.prompt, ep.response, cfg)
            if cfg.predict_self:
                ids = torch.tensor([ep.prompt + ep.response])
                logits = policy(input_ids=ids, use_cache=False).logits[0, len(ep.prompt) :].float() / cfg.temperature
            logps = token_logps(logits, ep.response)
            if cfg.grad_through_adv:
                advantages = torch.stack(ep.advantages)
            else:
                advantages = torch.tensor(ep.advantages)
            full = F.log_softmax(logits, dim=-1)
            entropy = -(full.exp() * full).sum(-1)
            pg = -(advantages * logps).sum() * weight
            if cfg.entropy_as_cost:
                loss = pg + cfg.ent * entropy.sum() * weight
            else:
                loss = pg - cfg.ent * entropy.sum() * weight
            exact_kl = (full.exp() * (full - F.log_softmax(ep.ref_logits, dim=-1))).sum(-1)
            if cfg.kl == "loss" or cfg.kl_again:
                loss = loss + cfg.beta * exact_kl.sum() * weight
            loss.backward()
            shown["pg"] += pg.item()
            shown["kl"] += exact_kl.sum().item() / len(episodes)
            shown["entropy"] += entropy.sum().item() / n_tokens
        nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_norm)
        policy_opt.step()

        # ---- 4. the critic, a few passes over the same episodes, targets fixed
        for epoch in range(cfg.critic_epochs):
            if epoch or not cfg.grad_through_adv:
                critic_opt.zero_grad()
            shown["critic"] = 0.0
            for ep in episodes:
                weight = 1.0 / n_tokens if cfg.average == "tokens" else 1.0 / (len(ep.response) * len(episodes))
                v = state_values(critic, ep.prompt, ep.response)[:-1]
                loss = 0.5 * ((v - torch.tensor(ep.returns)) ** 2).sum() * weight
                loss.backward()
                shown["critic"] += loss.item()
            nn.utils.clip_grad_norm_(critic.parameters(), cfg.max_norm)
            critic_opt.step()
        shown["score"] = statistics.mean(ep.score for ep in episodes)
        assert all(math.isfinite(x) for x in shown.values()), shown
        return shown

    declared = dict(
        algorithm="ppo",  # nearest name: actor-critic with GAE and one policy step per rollout, so no ratio and no clipping
        gamma=cfg.gamma,
        lam=cfg.lam,
        kl_coef=cfg.beta,
        kl_in=cfg.kl,
        kl_estimator="k1" if cfg.kl == "reward" else "full",
        temperature=cfg.temperature,
        top_k=0,
        top_p=1.0,
        ent_coef=cfg.ent,
        whiten_advantages=cfg.whiten,
        whiten_rewards=False,
        learning_rate=cfg.lr,
        critic_learning_rate=cfg.critic_lr,
        ppo_epochs=1,
        num_minibatches=1,
        batch_size=cfg.episodes,
        response_length=cfg.max_new,
        dtype="float32",
        reference="policy",
        value_init="reward",
        kl_adaptive=False,
        loss_aggregation="token-mean" if cfg.average == "tokens" else "seq-mean",
        shared_trunk=False,
        dense_rewards=False,
    )
    return dict(
        policy=policy,
        reference=reference,
        reward=rm,
        value=critic,
        tokenizer=tok,
        prompts=list(PROMPTS),
        step=iteration,
        optimizers=[policy_opt, critic_opt],
        state=[],
        declared=declared,
        functions={"gae": gae_appending if cfg.backwards else gae},
    )


def healthy():
    return build()


def healthy_whitened():
    return build(kl="loss", whiten=True, average="episodes")


def advantage_with_grad():
    return build(grad_through_adv=True)


def policy_grads_kept():
    return build(keep_grads=True)


def gae_list_backwards():
    return build(backwards=True)


def reference_without_prompt():
    return build(bare_reference=True)


def kl_in_both():
    return build(kl_again=True)


def critic_on_reward_trunk():
    return build(reuse_rm_trunk=True)


def logits_not_shifted():
    return build(predict_self=True)


def sampler_never_synced():
    return build(actor_copy=True)


def entropy_as_cost():
    return build(entropy_as_cost=True)


def bootstrap_after_eos():
    return build(value_after_end=True)

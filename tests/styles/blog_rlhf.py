"""RLHF from scratch, part 3: PPO.

No padding, no tricks: we look at one sample at a time and write every loop out. It is slow and you can read it.
Parts 1 and 2 made the SFT model and the reward model; here both are tiny stand-ins so that you can run it anywhere.
"""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = """apple pear plum cherry grape lemon melon fig date peach red green yellow sweet sour ripe fresh dried
cut wash peel boil bake mix stir serve eat keep buy sell grow pick plant water bowl knife pan oven table basket market
garden tree leaf seed root sugar salt milk flour honey bread cake soup juice jam pie two three four half whole more less
the a and with for in on from until before after""".split()


class Critic(nn.Module):
    """The reward model's body with a head that gives a number for EVERY token: "how good will this turn out?"."""

    def __init__(self, config):
        super().__init__()
        self.gpt_neox = GPTNeoXModel(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.gpt_neox(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.value_head(hidden)


class RLHF:
    # the knobs
    samples_per_prompt = 2
    prompts_per_step = 5
    max_new_tokens = 12
    temperature = 0.9
    gamma = 0.97
    lam = 1.0
    kl_coef = 0.05
    clip = 0.2
    ppo_epochs = 4

    def __init__(self, policy, reference, reward_model, critic, tokenizer, prompts, fault=None):
        self.policy, self.reference, self.reward_model, self.critic = policy, reference, reward_model, critic
        self.tokenizer, self.prompts, self.fault = tokenizer, prompts, fault
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5)
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4)
        self.iteration = 0
        # what the reward model said in EARLIER iterations: count, mean, sum of squared differences (Welford)
        self.n, self.mean, self.m2 = 0, 0.0, 0.0

    # -- things to put away when you save (or rewind) the loop ---------------------------------------------------
    def state_dict(self):
        return {"iteration": self.iteration, "n": self.n, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, d):
        self.iteration, self.n, self.mean, self.m2 = d["iteration"], d["n"], d["mean"], d["m2"]

    # -- 1. let the policy speak -----------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(self, prompt_ids):
        if self.fault == "seeded_generate":
            torch.manual_seed(42)  # reproducible generations
        ids, old_log_probs = list(prompt_ids), []
        for _ in range(self.max_new_tokens):
            logits = self.policy(input_ids=torch.tensor([ids])).logits[0, -1] / self.temperature
            probs = F.softmax(logits, dim=-1)
            if self.fault == "argmax":
                token = int(probs.argmax())
            else:
                token = int(torch.multinomial(probs, 1))
            old_log_probs.append(float(torch.log_softmax(logits, -1)[token]))
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                break
        return ids, old_log_probs

    # -- 2. log-probabilities of a response under a model --------------------------------------------------------------
    def log_probs(self, model, ids, start):
        logits = model(input_ids=torch.tensor([ids])).logits[0] / self.temperature
        out = []
        for position in range(start, len(ids)):
            # the logits at position - 1 are the prediction OF position
            out.append(torch.log_softmax(logits[position - 1], -1)[ids[position]])
        return torch.stack(out)

    def values(self, ids, start):
        v = self.critic(torch.tensor([ids]))[0, :, 0]
        return v[start - 1 : len(ids) - 1]  # what the critic thought just before each token

    # -- 3. rewards -------------------------------------------------------------------------------------------------------
    def normalise(self, score):
        if self.n < 2:
            return score
        std = max((self.m2 / (self.n - 1)) ** 0.5, 0.1)
        return (score - self.mean) / std

    def remember(self, score):
        self.n += 1
        d = score - self.mean
        self.mean += d / self.n
        self.m2 += d * (score - self.mean)

    # -- 4. GAE, backwards through time ----------------------------------------------------------------------------------
    def gae(self, rewards, values):
        advantages, running = [0.0] * len(rewards), 0.0
        for t in reversed(range(len(rewards))):
            if t == len(rewards) - 1:
                next_value = values[t] if self.fault == "last_value_bootstraps" else 0.0  # the episode is over
            else:
                next_value = values[t + 1]
            delta = rewards[t] + self.gamma * next_value - values[t]
            running = delta + self.gamma * self.lam * running
            advantages[t] = running
        return advantages

    # -- 5. one batch of experience ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def collect(self):
        episodes = []
        for k in range(self.prompts_per_step):
            text = self.prompts[(self.iteration * self.prompts_per_step + k) % len(self.prompts)]
            prompt_ids = self.tokenizer(text)["input_ids"]
            for _ in range(self.samples_per_prompt):
                ids, old = self.sample(prompt_ids)
                episodes.append({"ids": ids, "start": len(prompt_ids), "old": torch.tensor(old)})
        self.iteration += 1

        raw = [float(self.reward_model(input_ids=torch.tensor([e["ids"]])).logits[0, 0]) for e in episodes]
        scores = [self.normalise(s) for s in raw]
        if self.fault == "standardised_in_the_batch":
            r = torch.tensor(raw)
            scores = ((r - r.mean()) / r.std()).tolist()
        for s in raw:
            self.remember(s)

        for e, score in zip(episodes, scores):
            ref = self.log_probs(self.reference, e["ids"], e["start"])
            values = self.values(e["ids"], e["start"]).tolist()
            if self.fault == "score_minus_value":
                score = score - values[0]  # how much better than expected
            kl_rewards = (-self.kl_coef * (e["old"] - ref)).tolist()
            rewards = list(kl_rewards)
            rewards[-1] += score
            advantages = self.gae(rewards, values)
            returns = [a + v for a, v in zip(advantages, values)]
            if self.fault == "critic_without_score":
                returns = [a + v for a, v in zip(self.gae(kl_rewards, values), values)]
            if self.fault == "values_minus_advantages":
                returns = [v - a for a, v in zip(advantages, values)]
            if self.fault == "critic_learns_score":
                returns = [score] * len(values)
            if self.fault == "no_baseline":
                advantages = self.gae(rewards, [0.0] * len(values))
            e["advantages"], e["returns"] = torch.tensor(advantages), torch.tensor(returns)

        # whiten the advantages over all tokens of the batch
        every = torch.cat([e["advantages"] for e in episodes])
        for e in episodes:
            e["advantages"] = (e["advantages"] - every.mean()) / (every.std() + 1e-8)
        return episodes, raw

    # -- 6. learn ----------------------------------------------------------------------------------------------------------------
    def step(self):
        episodes, raw = self.collect()
        tokens = sum(len(e["old"]) for e in episodes)
        for _ in range(self.ppo_epochs):
            self.policy_optimizer.zero_grad()
            self.critic_optimizer.zero_grad()
            policy_loss, value_loss = 0.0, 0.0
            for e in episodes:
                new = self.log_probs(self.policy, e["ids"], e["start"])
                ratio = torch.exp(new - e["old"])
                a = e["advantages"]
                gain = torch.min(ratio * a, torch.clamp(ratio, 1 - self.clip, 1 + self.clip) * a).sum() / tokens
                loss = gain if self.fault == "loss_is_gain" else -gain
                loss.backward()
                v_loss = ((self.values(e["ids"], e["start"]) - e["returns"]) ** 2).sum() / tokens
                v_loss.backward()
                policy_loss, value_loss = policy_loss + loss.item(), value_loss + v_loss.item()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
            self.policy_optimizer.step()
            self.critic_optimizer.step()
        return {
            "mean_score": sum(raw) / len(raw), "mean_length": tokens / len(episodes),
            "policy_loss": policy_loss, "value_loss": value_loss,
        }  # fmt: skip

    # -- from part 2: the loss that the reward model was trained with ------------------------------------------------------------
    def reward_loss(self, reward_model, chosen, rejected):
        def score(batch):
            if not isinstance(batch, (list, tuple, str)):
                x = dict(batch) if not torch.is_tensor(batch) else {"input_ids": batch}
            else:
                x = dict(self.tokenizer(batch, return_tensors="pt", padding=True, padding_side="right"))
            x.pop("token_type_ids", None)
            if self.fault == "scores_at_the_last_column":
                hidden = reward_model.gpt_neox(**x).last_hidden_state
                return reward_model.score(hidden)[:, -1, 0]
            return reward_model(**x).logits[:, 0]

        margin = score(chosen) - score(rejected)
        if self.fault == "log_of_sigmoid":
            return -torch.log(torch.sigmoid(margin)).mean()
        return -F.logsigmoid(margin).mean()


def make(fault=None):
    torch.manual_seed(5)
    t = Tokenizer(models.WordLevel(unk_token="<|unk|>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(
        [" ".join(VOCABULARY)], trainers.WordLevelTrainer(special_tokens=["<|end|>", "<|pad|>", "<|unk|>"])
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=t,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
        num_labels=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    policy = GPTNeoXForCausalLM(config)
    head = nn.Linear(config.hidden_size, config.vocab_size)
    with torch.no_grad():
        head.weight.normal_(std=0.2)
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = 1.6
        head.bias[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = -20.0
    policy.set_output_embeddings(head)

    reward_model = GPTNeoXForSequenceClassification(config)
    words = sorted(VOCABULARY)

    def phrase(n):
        return " ".join(words[i] for i in torch.randint(len(words), (n,)))

    def scores(texts):
        with torch.no_grad():
            return reward_model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]

    texts = [phrase(4 + k % 8) + " <|end|>" * (k % 2) for k in range(80)]
    with torch.no_grad():
        x = tokenizer(texts, return_tensors="pt", padding=True)
        last = reward_model.gpt_neox(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state[
            :, -1
        ]
        w = reward_model.score.weight[0]
        w -= (w @ last.mean(0)) / last.mean(0).pow(2).sum() * last.mean(0)
        w /= (last @ w).std()
    critic = Critic(config)
    critic.gpt_neox.load_state_dict(reward_model.gpt_neox.state_dict())
    critic.value_head.load_state_dict(reward_model.score.state_dict())
    reference = copy.deepcopy(policy)
    for m in (policy, reference, reward_model, critic):
        m.eval()
    reference.requires_grad_(False)
    reward_model.requires_grad_(False)

    prompts = [phrase(3 + k % 5) for k in range(35)]
    preferences = []  # the stand-in reward model counts as trained: the labels agree with it
    for k in range(60):
        n = 4 + k % 4
        prompt, one, two = prompts[k % len(prompts)], phrase(n), phrase(n)
        open_end = scores([f"{prompt} {one}", f"{prompt} {two}"])
        closed = scores([f"{prompt} {one} <|end|>", f"{prompt} {two} <|end|>"])
        if (open_end[0] - open_end[1]) * (closed[0] - closed[1]) > 0:
            preferences.append((prompt, one, two) if open_end[0] > open_end[1] else (prompt, two, one))
    rlhf = RLHF(policy, reference, reward_model, critic, tokenizer, prompts, fault)
    return {
        "policy": policy,
        "reference": reference,
        "reward": reward_model,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "preferences": preferences,
        "reward_loss": rlhf.reward_loss,
        "optimizers": [rlhf.policy_optimizer, rlhf.critic_optimizer],
        "state": [rlhf],
        "step": rlhf.step,
        "declared": {
            "algorithm": "ppo", "gamma": 0.97, "lam": 1.0, "kl_coef": 0.05, "kl_in": "reward", "kl_estimator": "k1",
            "temperature": 0.9, "clip_range": 0.2, "whiten_advantages": True, "ppo_epochs": 4, "num_minibatches": 1,
            "batch_size": 10, "response_length": 12, "learning_rate": 1e-5, "critic_learning_rate": 1e-4,
            "loss_aggregation": "token-mean", "value_init": "reward",
        },
    }  # fmt: skip


def healthy():
    return make()


def argmax():
    return make("argmax")


def seeded_generate():
    return make("seeded_generate")


def last_value_bootstraps():
    return make("last_value_bootstraps")


def standardised_in_the_batch():
    return make("standardised_in_the_batch")


def score_minus_value():
    return make("score_minus_value")


def critic_without_score():
    return make("critic_without_score")


def values_minus_advantages():
    return make("values_minus_advantages")


def critic_learns_score():
    return make("critic_learns_score")


def no_baseline():
    return make("no_baseline")


def loss_is_gain():
    return make("loss_is_gain")


def log_of_sigmoid():
    return make("log_of_sigmoid")


def scores_at_the_last_column():
    return make("scores_at_the_last_column")

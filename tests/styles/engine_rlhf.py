"""Step 3 of our pipeline: RLHF with one engine a trained model. Run with one process here; the engines are the same."""

import copy
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedTokenizerFast

ARGS = SimpleNamespace(
    rollout_batch_size=16, micro_batch_size=4, gradient_accumulation_steps=2, max_answer_len=12, actor_lr=1e-5,
    critic_lr=2e-5, total_steps=1000, max_grad_norm=1.0, kl_ctl=0.1, clip_reward=5.0, gamma=1.0, lam=0.95, cliprange=0.2,
    cliprange_value=0.2, ent_coef=0.005, bf16=True,
)  # fmt: skip


class Engine:
    """What deepspeed.initialize gives: scales, accumulates, clips, steps, schedules."""

    def __init__(self, module, lr, args, fault=None):
        self.module, self.gas, self.max_norm, self.fault = (
            module,
            args.gradient_accumulation_steps,
            args.max_grad_norm,
            fault,
        )
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

        def decay(step):
            left = max(0.1, 1 - step / args.total_steps)
            return lr * left if fault == "lambda_gives_the_rate" else left

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        self.micro_steps = 0

    def __call__(self, input_ids, attention_mask):
        return self.module(input_ids=input_ids, attention_mask=attention_mask)

    def backward(self, loss):
        (loss / self.gas).backward()
        self.micro_steps += 1

    def step(self):
        if self.micro_steps % self.gas:
            return
        nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)
        self.optimizer.step()
        if self.fault != "grads_stay":
            self.optimizer.zero_grad()
        self.lr_scheduler.step()

    def state_dict(self):
        return {"micro_steps": self.micro_steps, "lr_scheduler": self.lr_scheduler.state_dict()}

    def load_state_dict(self, sd):
        self.micro_steps = sd["micro_steps"]
        self.lr_scheduler.load_state_dict(sd["lr_scheduler"])


class ValueModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rwtransformer = OPTModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids, attention_mask):
        hidden = self.rwtransformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.v_head(hidden).squeeze(-1)


class RewardModel(ValueModel):
    def forward(self, input_ids, attention_mask):
        values = super().forward(input_ids, attention_mask)
        end = (attention_mask * torch.arange(values.shape[1])).argmax(1)
        return values.gather(1, end[:, None]).squeeze(1)


class Loader:
    def __init__(self, prompts, size):
        self.prompts, self.size, self.pos = prompts, size, 0

    def next(self):
        rows = [self.prompts[(self.pos + i) % len(self.prompts)] for i in range(self.size)]
        self.pos += self.size
        return rows

    def state_dict(self):
        return {"pos": self.pos}

    def load_state_dict(self, sd):
        self.pos = sd["pos"]


def gather_log_probs(logits, labels):
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class RLHFTrainer:
    def __init__(self, args, actor, ref, critic, reward, tokenizer, loader, fault=None):
        self.args, self.fault = args, fault
        self.actor, self.ref, self.critic, self.reward = actor, ref, critic, reward
        self.tokenizer, self.loader = tokenizer, loader

    def amp(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.args.bf16)

    def masked_sum(self, x, mask):
        return x.masked_fill(~mask, 0.0).sum()

    @torch.no_grad()
    def generate_sequence(self):
        q = self.tokenizer(self.loader.next(), return_tensors="pt", padding=True)
        seq, att = q["input_ids"], q["attention_mask"]
        alive = torch.ones(len(seq), dtype=torch.bool)
        for _ in range(self.args.max_answer_len):
            with self.amp():
                logits = self.actor(seq, att).logits[:, -1]
            token = torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)
            token = token.masked_fill(~alive, self.tokenizer.pad_token_id)
            seq, att = torch.cat([seq, token[:, None]], 1), torch.cat([att, alive[:, None].long()], 1)
            alive = alive & (token != self.tokenizer.eos_token_id)
            if not alive.any():
                break
        return seq, att, q["input_ids"].shape[1]

    def log_probs(self, model, seq, att, start):
        with self.amp():
            logits = model(input_ids=seq, attention_mask=att).logits
        return gather_log_probs(logits[:, start - 1 : -1], seq[:, start:])

    def values(self, seq, att, start):
        with self.amp():
            return self.critic(seq, att).float()[:, start - 1 : -1]

    @torch.no_grad()
    def generate_experience(self):
        args = self.args
        seq, att, start = self.generate_sequence()
        mask = att[:, start:].bool()
        old_att = torch.ones_like(att) if self.fault == "old_pass_without_mask" else att
        log_probs = self.log_probs(self.actor.module, seq, old_att, start).masked_fill(~mask, 0.0)
        ref_log_probs = self.log_probs(self.ref, seq, att, start)
        if self.fault == "kl_of_pads":
            log_probs = self.log_probs(self.actor.module, seq, att, start)
        else:
            ref_log_probs = ref_log_probs.masked_fill(~mask, 0.0)
        values = self.values(seq, att, start).masked_fill(~mask, 0.0)
        with self.amp():
            scores = self.reward(seq, att).float()
        if self.fault == "head_rescaled":
            self.reward.v_head.weight.div_(scores.std())  # keep the scores at unit variance
        kl_rewards = -args.kl_ctl * (log_probs - ref_log_probs)
        rewards = kl_rewards.clone()
        end = mask.sum(1) - 1
        rewards[torch.arange(len(seq)), end] += scores.clamp(-args.clip_reward, args.clip_reward)
        advantages, returns = self.get_advantages_and_returns(values, rewards)
        if self.fault == "actor_gets_kl_rewards":
            advantages, _ = self.get_advantages_and_returns(values, kl_rewards)
        advantages = self.whiten(advantages, mask)
        kl = self.masked_sum(log_probs - ref_log_probs, mask) / len(seq)
        exp = {
            "seq": seq, "att": att, "mask": mask, "log_probs": log_probs.masked_fill(~mask, 0.0), "values": values,
            "advantages": advantages, "returns": returns.masked_fill(~mask, 0.0),
        }  # fmt: skip
        return exp, start, {"reward": scores.mean().item(), "kl": kl.item()}

    def whiten(self, x, mask):
        if self.fault == "whiten_with_pads":
            return ((x - x.mean()) * (x.var() + 1e-8).rsqrt()).masked_fill(~mask, 0.0)
        mean = x[mask].mean()
        var = x[mask].var()
        return ((x - mean) * (var + 1e-8).rsqrt()).masked_fill(~mask, 0.0)

    def get_advantages_and_returns(self, values, rewards):
        lastgaelam, reversed_advantages = 0, []
        length = rewards.shape[1]
        for t in reversed(range(length)):
            nextvalues = values[:, t + 1] if t < length - 1 else 0.0
            delta = rewards[:, t] + self.args.gamma * nextvalues - values[:, t]
            lastgaelam = delta + self.args.gamma * self.args.lam * lastgaelam
            reversed_advantages.append(lastgaelam)
        advantages = torch.stack(reversed_advantages[::-1], dim=1)
        return advantages, advantages + values

    def actor_loss(self, mb, start, denominator):
        with self.amp():
            logits = self.actor(mb["seq"], mb["att"]).logits[:, start - 1 : -1]
        mask = mb["mask"]
        all_log_probs = logits.float().log_softmax(-1)
        log_probs = all_log_probs.gather(-1, mb["seq"][:, start:, None]).squeeze(-1).masked_fill(~mask, 0.0)
        ratio = (log_probs - mb["log_probs"]).exp()
        loss1 = -mb["advantages"] * ratio
        loss2 = -mb["advantages"] * ratio.clamp(1.0 - self.args.cliprange, 1.0 + self.args.cliprange)
        loss = self.masked_sum(torch.max(loss1, loss2), mask) / denominator
        entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
        if self.fault == "entropy_of_everything":
            mean_entropy = entropy.mean()
        else:
            mean_entropy = self.masked_sum(entropy, mask) / denominator
        if self.fault == "entropy_only_logged":
            mean_entropy = mean_entropy.detach()
        return loss - self.args.ent_coef * mean_entropy

    def critic_loss(self, mb, start, denominator, cliprange_value=None):
        mask, old, returns = mb["mask"], mb["values"], mb["returns"]
        values = self.values(mb["seq"], mb["att"], start).masked_fill(~mask, 0.0)
        if self.fault == "critic_fits_advantages":
            returns = mb["advantages"]
        loss = (values - returns) ** 2
        if cliprange_value is not None:
            clipped = old + (values - old).clamp(-cliprange_value, cliprange_value)
            loss = torch.max(loss, (clipped - returns) ** 2)
        return 0.5 * self.masked_sum(loss, mask) / denominator

    def step(self):
        args = self.args
        exp, start, metrics = self.generate_experience()
        micro_batches = torch.randperm(len(exp["seq"])).split(args.micro_batch_size)
        credit = micro_batches  # rows of the advantage loader
        if self.fault == "two_shuffles":
            credit = torch.randperm(len(exp["seq"])).split(args.micro_batch_size)
        gas, actor_loss, critic_loss = args.gradient_accumulation_steps, 0.0, 0.0
        for first in range(0, len(micro_batches), gas):
            window = micro_batches[first : first + gas]
            tokens = exp["mask"][torch.cat(window)].sum()
            for k, rows in enumerate(window):
                mb = {name: x[rows] for name, x in exp.items()}
                mb["advantages"] = exp["advantages"][credit[first + k]]
                # the engine divides by gas, this makes of it the mean over the window's tokens
                denominator = tokens / gas
                if self.fault == "mean_of_each_micro_batch":
                    denominator = mb["mask"].sum()
                loss = self.actor_loss(mb, start, denominator)
                self.actor.backward(loss)
                self.actor.step()
                v_loss = self.critic_loss(mb, start, denominator, args.cliprange_value)
                self.critic.backward(v_loss)
                self.critic.step()
                actor_loss += loss.item() / len(micro_batches)
                critic_loss += v_loss.item() / len(micro_batches)
        return {
            **metrics,
            "actor_loss": actor_loss,
            "critic_loss": critic_loss,
            "lr": self.actor.lr_scheduler.get_last_lr()[0],
        }


def load_tokenizer():
    words = (
        "open close file window mail note task list day week month send read copy move paste print save find next last "
        "first user name page line word click press hold drop menu button link title table row cell chart sum count help "
        "how do i can you the my this that to of in on at by from into please now then again yes no maybe always never"
    )
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"]))
    return words.split(), PreTrainedTokenizerFast(
        tokenizer_object=t, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make(fault=None):
    torch.manual_seed(2024)
    words, tokenizer = load_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=48, word_embed_proj_dim=48, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        layerdrop=0.0, init_std=0.12, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    actor = OPTForCausalLM(config)
    actor.lm_head = nn.Linear(48, len(tokenizer))
    reward, critic = RewardModel(config), ValueModel(config)

    def text(n):
        return " ".join(words[i] for i in torch.randint(len(words), (n,)))

    with torch.no_grad():
        actor.lm_head.weight.normal_(std=0.15)
        actor.lm_head.bias.zero_()
        actor.lm_head.bias[tokenizer.eos_token_id] = 2.0
        actor.lm_head.bias[[tokenizer.pad_token_id, tokenizer.unk_token_id]] = -20.0
        x = tokenizer([text(4 + k % 9) + " </s>" * (k % 2) for k in range(96)], return_tensors="pt", padding=True)
        h = reward.rwtransformer(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state[:, -1]
        w = reward.v_head.weight[0]
        w -= (w @ h.mean(0)) / h.mean(0).pow(2).sum() * h.mean(0)
        w /= (h @ w).std()
    critic.load_state_dict(reward.state_dict())
    ref = copy.deepcopy(actor)
    ref.requires_grad_(False)
    reward.requires_grad_(False)
    for m in (actor, ref, reward, critic):
        m.eval()
    prompts = [text(3 + k % 5) for k in range(48)]
    actor_engine = Engine(actor, ARGS.actor_lr, ARGS, fault)
    critic_engine = Engine(critic, ARGS.critic_lr, ARGS, fault)
    loader = Loader(prompts, ARGS.rollout_batch_size)
    trainer = RLHFTrainer(ARGS, actor_engine, ref, critic_engine, reward, tokenizer, loader, fault)
    return {
        "policy": actor,
        "reference": ref,
        "reward": reward,
        "value": critic,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "optimizers": [actor_engine.optimizer, critic_engine.optimizer],
        "state": [actor_engine, critic_engine, loader],
        "step": trainer.step,
        "declared": {
            "algorithm": "ppo", "gamma": ARGS.gamma, "lam": ARGS.lam, "kl_coef": ARGS.kl_ctl, "kl_in": "reward",
            "kl_estimator": "k1", "temperature": 1.0, "clip_range": ARGS.cliprange,
            "clip_range_value": ARGS.cliprange_value, "ent_coef": ARGS.ent_coef, "reward_clip": ARGS.clip_reward,
            "whiten_advantages": True, "learning_rate": ARGS.actor_lr, "critic_learning_rate": ARGS.critic_lr,
            "ppo_epochs": 1, "num_minibatches": 2, "batch_size": ARGS.rollout_batch_size,
            "response_length": ARGS.max_answer_len, "loss_aggregation": "token-mean", "value_init": "reward",
        },
    }  # fmt: skip


def healthy():
    return make()


def lambda_gives_the_rate():
    return make("lambda_gives_the_rate")


def grads_stay():
    return make("grads_stay")


def old_pass_without_mask():
    return make("old_pass_without_mask")


def kl_of_pads():
    return make("kl_of_pads")


def head_rescaled():
    return make("head_rescaled")


def actor_gets_kl_rewards():
    return make("actor_gets_kl_rewards")


def whiten_with_pads():
    return make("whiten_with_pads")


def entropy_of_everything():
    return make("entropy_of_everything")


def entropy_only_logged():
    return make("entropy_only_logged")


def critic_fits_advantages():
    return make("critic_fits_advantages")


def two_shuffles():
    return make("two_shuffles")


def mean_of_each_micro_batch():
    return make("mean_of_each_micro_batch")

"""PPO on a small GPT-2 with an Accelerate-like loop: fp32 master weights, bf16 autocast for every forward,
minibatches cut into microbatches, one optimizer over policy and critic, gradient clipping."""

import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

NOUNS = "cat dog river garden teacher train window mountain island bridge forest kitchen".split()
ADJS = "old green quiet bright heavy small famous strange".split()
NICE = "please thanks kind gentle happy lovely warm helpful friend smile".split()
RUDE = "stupid ugly hate awful nasty boring angry shut worst liar".split()
FILL = "the a is was and it near with very often i think you know about that so we can go there now".split()
TEMPLATES = [
    "tell me about the {n}",
    "why is the {a} {n} so {b} ?",
    "what can we do with a {n} near the {m} now ?",
    "describe it : {n}",
    "is the {n} {a} ?",
    "i think the {a} {n} was very {b} and {a} , what about the {m} ?",
]
EOT, PAD = "<|endoftext|>", "[PAD]"


def build_tokenizer():
    words = sorted(set(NOUNS + ADJS + NICE + RUDE + FILL + "tell me why what do describe : ? , .".split()))
    vocab = {w: i for i, w in enumerate(["<unk>", EOT] + words + [PAD])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, vocab[EOT])])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=EOT, eos_token=EOT, unk_token="<unk>", pad_token=PAD, padding_side="left"
    )


def make_prompt(rng):
    n, m = rng.sample(NOUNS, 2)
    a, b = rng.sample(ADJS, 2)
    return rng.choice(TEMPLATES).format(n=n, m=m, a=a, b=b)


def make_answer(rng, tone, length=None):
    out = []
    for _ in range(length or rng.randint(3, 20)):
        out.append(rng.choice(tone if rng.random() < 0.3 else FILL + NOUNS))
    return " ".join(out)


def gpt2_config(tokenizer, **kw):
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.1,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        summary_first_dropout=0.1,
        classifier_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kw,
    )


def positions(attention_mask):
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def right_pad(rows, pad_id):
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return ids, mask


def train_sft(tokenizer, steps=90):
    torch.manual_seed(11)
    rng = random.Random(11)
    model = GPT2LMHeadModel(gpt2_config(tokenizer)).eval()
    opt = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = [
            tokenizer(make_prompt(rng)).input_ids
            + tokenizer(make_answer(rng, rng.choice([NICE, RUDE])), add_special_tokens=False).input_ids
            + [tokenizer.eos_token_id]
            for _ in range(16)
        ]
        ids, mask = right_pad(rows, tokenizer.pad_token_id)
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


def train_reward(tokenizer, pairs, steps=60):
    torch.manual_seed(12)
    rng = random.Random(12)
    model = GPT2ForSequenceClassification(gpt2_config(tokenizer, num_labels=1)).eval()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = rng.sample(pairs, 12)
        rows = [
            tokenizer(p).input_ids + tokenizer(r, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            for side in (1, 2)
            for p, r in ((b[0], b[side]) for b in batch)
        ]
        ids, mask = right_pad(rows, tokenizer.pad_token_id)
        good, bad = model(input_ids=ids, attention_mask=mask).logits[:, 0].chunk(2)
        loss = -F.logsigmoid(good - bad).mean() + 0.01 * (good + bad).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():  # unit standard deviation on demonstrations
        rows = [
            tokenizer(make_prompt(rng)).input_ids
            + tokenizer(make_answer(rng, rng.choice([NICE, RUDE])), add_special_tokens=False).input_ids
            for _ in range(64)
        ]
        ids, mask = right_pad(rows, tokenizer.pad_token_id)
        model.score.weight /= model(input_ids=ids, attention_mask=mask).logits.std()
    return model.requires_grad_(False)


def critic_from_reward(reward, tokenizer):
    critic = GPT2ForTokenClassification(gpt2_config(tokenizer, num_labels=1)).eval()
    critic.transformer.load_state_dict(reward.transformer.state_dict())
    with torch.no_grad():
        critic.classifier.weight.copy_(reward.score.weight)
        critic.classifier.bias.zero_()
    return critic


class MiniAccelerator:
    """The four calls of accelerate.Accelerator(mixed_precision='bf16') that the loop needs, on one CPU process."""

    def __init__(self, mixed_precision="bf16"):
        self.mixed_precision = mixed_precision
        self.sync_gradients = True

    @contextmanager
    def autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            yield

    def backward(self, loss):
        loss.backward()

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass
class PPOArguments:
    batch_size: int = 8
    num_mini_batches: int = 2
    per_device_train_batch_size: int = 2  # microbatch
    num_ppo_epochs: int = 2
    response_length: int = 12
    max_prompt_length: int = 20
    temperature: float = 0.7
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    missing_eos_penalty: float = 1.0
    whiten_advantages: bool = False
    learning_rate: float = 1e-5
    critic_learning_rate: float = 2e-5
    max_grad_norm: float = 1.0
    bug: str = ""


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    mean = masked_mean(x, mask)
    var = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8)


class PPOTrainer:
    def __init__(self, args, tokenizer, policy, ref_policy, reward_model, value_model, prompts):
        self.args, self.tokenizer, self.prompts = args, tokenizer, prompts
        self.accelerator = MiniAccelerator("bf16")
        self.policy, self.ref_policy, self.reward_model, self.value_model = (
            policy,
            ref_policy,
            reward_model,
            value_model,
        )
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(policy.parameters()), "lr": args.learning_rate},
                {"params": list(value_model.parameters()), "lr": args.critic_learning_rate},
            ],
            eps=1e-5,
            weight_decay=0.0,
        )
        self.generation_config = GenerationConfig(
            max_new_tokens=args.response_length,
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )

    # -- forwards, all under autocast ------------------------------------------------------------------------------
    def forward_logprobs(self, model, query_responses, attention_mask, context_length, use_positions=True):
        kwargs = {"position_ids": positions(attention_mask)} if use_positions else {}
        with self.accelerator.autocast():
            logits = model(input_ids=query_responses, attention_mask=attention_mask, **kwargs).logits
        logits = logits[:, context_length - 1 : -1]
        if self.args.bug != "logprob_bf16":
            logits = logits.float()
        logits = logits / self.args.temperature
        selected = logits.gather(-1, query_responses[:, context_length:, None]).squeeze(-1)
        return (selected - torch.logsumexp(logits, dim=-1)).float()

    def forward_values(self, query_responses, attention_mask, context_length):
        with self.accelerator.autocast():
            out = self.value_model(
                input_ids=query_responses, attention_mask=attention_mask, position_ids=positions(attention_mask)
            ).logits
        return out.float().squeeze(-1)[:, context_length - 1 : -1]

    def forward_scores(self, query_responses, attention_mask):
        with self.accelerator.autocast():
            out = self.reward_model(
                input_ids=query_responses, attention_mask=attention_mask, position_ids=positions(attention_mask)
            ).logits
        return out.float().squeeze(-1)

    # -- rollout ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def rollout(self):
        args, tok = self.args, self.tokenizer
        picked = [self.prompts[i] for i in torch.randperm(len(self.prompts))[: args.batch_size].tolist()]
        enc = tok(picked, return_tensors="pt", padding=True, truncation=True, max_length=args.max_prompt_length)
        queries, query_mask = enc.input_ids, enc.attention_mask
        context_length = queries.shape[1]
        self.policy.eval()
        with self.accelerator.autocast():
            generated = self.policy.generate(
                input_ids=queries, attention_mask=query_mask, generation_config=self.generation_config
            )
        responses = generated[:, context_length:]
        # everything up to and including the first EOS is the response
        ended = (responses == tok.eos_token_id).long()
        mask = ((ended.cumsum(1) - ended) == 0).long()
        responses = responses.masked_fill(mask == 0, tok.pad_token_id)
        query_responses = torch.cat([queries, responses], 1)
        attention_mask = torch.cat([query_mask, mask], 1)

        logprobs, ref_logprobs, values, scores = [], [], [], []
        for i in range(0, args.batch_size, args.per_device_train_batch_size):
            qr, am = (x[i : i + args.per_device_train_batch_size] for x in (query_responses, attention_mask))
            logprobs.append(self.forward_logprobs(self.policy, qr, am, context_length))
            ref_logprobs.append(
                self.forward_logprobs(
                    self.ref_policy, qr, am, context_length, use_positions=args.bug != "ref_without_position_ids"
                )
            )
            values.append(self.forward_values(qr, am, context_length))
            scores.append(self.forward_scores(qr, am))
        logprobs, ref_logprobs, values, scores = map(torch.cat, (logprobs, ref_logprobs, values, scores))

        sequence_lengths = mask.sum(1) - 1
        if args.bug == "eos_penalty_sees_bos":
            contain_eos = (query_responses == tok.eos_token_id).any(1)
        else:
            contain_eos = (responses == tok.eos_token_id).any(1)
        raw_scores = scores.clone()
        scores[~contain_eos] -= args.missing_eos_penalty

        mask = mask.float()
        kl = (logprobs - ref_logprobs) * mask
        values = values * mask
        rewards = -args.kl_coef * kl
        rewards[torch.arange(len(rewards)), sequence_lengths] += scores
        lastgaelam, advantages_reversed = 0.0, []
        for t in reversed(range(responses.shape[1])):
            nextvalues = values[:, t + 1] if t < responses.shape[1] - 1 else 0.0
            delta = rewards[:, t] + args.gamma * nextvalues - values[:, t]
            lastgaelam = delta + args.gamma * args.lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], 1) * mask
        returns = advantages + values
        if args.whiten_advantages:
            if args.bug == "whiten_with_padding":
                advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8) * mask
            else:
                advantages = masked_whiten(advantages, mask) * mask
        stats = {
            "objective/kl": kl.sum(1).mean().item(),
            "objective/scores": raw_scores.mean().item(),
            "val/num_eos_tokens": contain_eos.sum().item(),
        }
        return (
            dict(
                query_responses=query_responses,
                attention_mask=attention_mask,
                mask=mask,
                logprobs=logprobs,
                values=values,
                advantages=advantages,
                returns=returns,
            ),
            context_length,
            stats,
        )

    # -- update ----------------------------------------------------------------------------------------------------
    def micro_loss(self, mb, context_length):
        args = self.args
        new_logprobs = self.forward_logprobs(self.policy, mb["query_responses"], mb["attention_mask"], context_length)
        vpred = self.forward_values(mb["query_responses"], mb["attention_mask"], context_length)
        vpredclipped = torch.clamp(vpred, mb["values"] - args.cliprange_value, mb["values"] + args.cliprange_value)
        vf_loss = 0.5 * masked_mean(
            torch.max((vpred - mb["returns"]) ** 2, (vpredclipped - mb["returns"]) ** 2), mb["mask"]
        )
        ratio = torch.exp((new_logprobs - mb["logprobs"]) * mb["mask"])
        pg_losses = -mb["advantages"] * ratio
        pg_losses2 = -mb["advantages"] * torch.clamp(ratio, 1.0 - args.cliprange, 1.0 + args.cliprange)
        pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), mb["mask"])
        return pg_loss + args.vf_coef * vf_loss, pg_loss, vf_loss, masked_mean(ratio, mb["mask"])

    def step(self):
        args = self.args
        batch, context_length, stats = self.rollout()
        if args.bug == "train_mode_update":
            self.policy.train()
        mini = args.batch_size // args.num_mini_batches
        self.optimizer.zero_grad()
        pg_sum, vf_sum, first_ratio, updates = 0.0, 0.0, None, 0
        for _ in range(args.num_ppo_epochs):
            b_inds = torch.randperm(args.batch_size)
            for mini_start in range(0, args.batch_size, mini):
                mini_inds = b_inds[mini_start : mini_start + mini]
                mini_tokens = batch["mask"][mini_inds].sum()
                if args.bug != "grads_not_zeroed":
                    self.optimizer.zero_grad()
                for micro_start in range(0, mini, args.per_device_train_batch_size):
                    micro_inds = mini_inds[micro_start : micro_start + args.per_device_train_batch_size]
                    mb = {k: v[micro_inds] for k, v in batch.items()}
                    loss, pg_loss, vf_loss, ratio = self.micro_loss(mb, context_length)
                    share = mb["mask"].sum() / mini_tokens
                    if args.bug == "micro_mean_of_means":
                        share = len(micro_inds) / mini
                    self.accelerator.backward(loss * share)
                    pg_sum += (pg_loss * share).item()
                    vf_sum += (vf_loss * share).item()
                    first_ratio = ratio.item() if first_ratio is None else first_ratio
                grad_norm = self.accelerator.clip_grad_norm_(
                    [*self.policy.parameters(), *self.value_model.parameters()], args.max_grad_norm
                )
                self.optimizer.step()
                updates += 1
        self.optimizer.zero_grad()
        stats.update(
            {
                "loss/policy_avg": pg_sum / updates,
                "loss/value_avg": vf_sum / updates,
                "val/first_ratio": first_ratio,
                "grad_norm": float(grad_norm),
            }
        )
        return stats


def _build(bug="", weight_dtype=torch.float32, **overrides):
    args = PPOArguments(bug=bug, **overrides)
    tokenizer = build_tokenizer()
    rng = random.Random(5)
    pairs = [
        (make_prompt(rng), make_answer(rng, NICE, rng.randint(4, 10)), make_answer(rng, RUDE, rng.randint(4, 10)))
        for _ in range(96)
    ]
    prompts = [make_prompt(rng) for _ in range(24)]
    policy = train_sft(tokenizer).to(weight_dtype)
    reward = train_reward(tokenizer, pairs)
    value = critic_from_reward(reward, tokenizer)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if bug == "critic_left_in_train":
        value.train()
    trainer = PPOTrainer(args, tokenizer, policy, reference, reward, value, prompts)
    torch.manual_seed(0)
    declared = dict(
        algorithm="ppo",
        gamma=args.gamma,
        lam=args.lam,
        kl_coef=args.kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=args.temperature,
        top_k=0,
        top_p=1.0,
        clip_range=args.cliprange,
        clip_range_value=args.cliprange_value,
        vf_coef=args.vf_coef,
        ent_coef=0.0,
        whiten_advantages=args.whiten_advantages,
        whiten_rewards=False,
        missing_eos_penalty=args.missing_eos_penalty,
        learning_rate=args.learning_rate,
        critic_learning_rate=args.critic_learning_rate,
        ppo_epochs=args.num_ppo_epochs,
        num_minibatches=args.num_mini_batches,
        batch_size=args.batch_size,
        prompt_length=args.max_prompt_length,
        response_length=args.response_length,
        dtype=str(weight_dtype).replace("torch.", ""),
        reference="policy",
        value_init="reward",
        policy_init="sft",
        kl_adaptive=False,
        loss_aggregation="token-mean",
        shared_trunk=False,
        dense_rewards=False,
    )
    return dict(
        policy=policy,
        reference=reference,
        reward=reward,
        value=value,
        tokenizer=tokenizer,
        prompts=prompts,
        step=trainer.step,
        optimizers=[trainer.optimizer],
        state=[],
        declared=declared,
        preferences=pairs[:32],
    )


def healthy():
    return _build()


def healthy_whitened():
    return _build(whiten_advantages=True, gamma=0.99, num_mini_batches=1)


def train_mode_update():
    return _build("train_mode_update")


def critic_left_in_train():
    return _build("critic_left_in_train")


def micro_mean_of_means():
    return _build("micro_mean_of_means")


def logprob_bf16():
    return _build("logprob_bf16")


def bf16_weights():
    return _build("bf16_weights", weight_dtype=torch.bfloat16)


def eos_penalty_sees_bos():
    return _build("eos_penalty_sees_bos")


def ref_without_position_ids():
    return _build("ref_without_position_ids")


def grads_not_zeroed():
    return _build("grads_not_zeroed")


def whiten_with_padding():
    return _build("whiten_with_padding", whiten_advantages=True)

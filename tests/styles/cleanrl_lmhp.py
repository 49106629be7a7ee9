"""PPO on a tiny language model, single file, after lm-human-preference-details / summarize_from_feedback_details.

One dataclass of arguments, a few tensor helpers, and one long `main(args)` with everything else in it.  Queries are left
padded to `query_length`, responses are sampled to `response_length` without a stop id and cut afterwards by `truncate_response`.
"""

import copy
import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

INVALID_LOGPROB = 1.0


@dataclass
class AdaptiveKLParams:
    target: float = 6.0
    horizon: int = 10000  # in episodes


@dataclass
class RewardHParams:
    kl_coef: float = 0.15
    use_adaptive_kl: bool = True
    adaptive_kl: AdaptiveKLParams = field(default_factory=AdaptiveKLParams)
    missing_eos_penalty: float = 1.0


@dataclass
class PpoHParams:
    local_batch_size: int = 16
    nminibatches: int = 2
    noptepochs: int = 2
    lr: float = 1e-5
    eps: float = 1e-5
    vf_coef: float = 0.1
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False


@dataclass
class TaskHParams:
    query_length: int = 12
    response_length: int = 12
    temperature: float = 0.7
    score_after_end: bool = False  # summarize_from_feedback: score one past the last token


@dataclass
class Args:
    seed: int = 1
    base_model: str = "gpt2"
    variant: str = ""
    reward: RewardHParams = field(default_factory=RewardHParams)
    ppo: PpoHParams = field(default_factory=PpoHParams)
    task: TaskHParams = field(default_factory=TaskHParams)


class AdaptiveKLController:
    def __init__(self, init_kl_coef: float, hparams: AdaptiveKLParams):
        self.value = init_kl_coef
        self.hparams = hparams

    def update(self, current, n_steps):
        proportional_error = np.clip(current / self.hparams.target - 1, -0.2, 0.2)
        mult = 1 + proportional_error * n_steps / self.hparams.horizon
        self.value *= mult


def layer_init(layer, std, bias_const=0.0):
    nn.init.normal_(layer.weight, std=std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class ScalarModel(nn.Module):
    """lm backbone with a scalar for each token; used for the reward and for the critic."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lm_backbone = AutoModel.from_config(config)
        self.scalar_head = layer_init(nn.Linear(config.hidden_size, 1), std=1 / np.sqrt(config.hidden_size + 1))
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("bias", torch.tensor(0.0))

    def forward(self, **kwargs):
        output = self.lm_backbone(**kwargs)
        return (self.scalar_head(output.last_hidden_state) - self.bias) * self.gain


def disable_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def masked_var(values, mask):
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return variance * mask.sum() / (mask.sum() - 1)


def whiten(values, mask, shift_mean=True):
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def first_true_indices(bools, dtype=torch.long):
    row_len = bools.size(-1)
    zero_or_index = row_len * (~bools).type(dtype) + torch.arange(row_len, dtype=dtype, device=bools.device)
    return torch.min(zero_or_index, dim=-1).values


def truncate_response(args, tokenizer, responses):
    trunc_idxs = first_true_indices(responses == tokenizer.eos_token_id).unsqueeze(-1)
    idxs = torch.arange(args.task.response_length, device=responses.device).view(1, -1)
    if args.variant == "truncate_drops_eos":
        return torch.masked_fill(responses, idxs >= trunc_idxs, tokenizer.pad_token_id)
    return torch.masked_fill(responses, idxs > trunc_idxs, tokenizer.pad_token_id)


def generate(lm_backbone, queries, tokenizer, generation_config):
    context_length = queries.shape[1]
    attention_mask = queries != tokenizer.pad_token_id
    input_ids = torch.masked_fill(queries, ~attention_mask, 0)
    sequences = lm_backbone.generate(
        input_ids=input_ids, attention_mask=attention_mask.long(), generation_config=generation_config
    )
    return torch.cat((queries, sequences[:, context_length:]), dim=1)


def forward(args, model, query_responses, tokenizer):
    attention_mask = query_responses != tokenizer.pad_token_id
    input_ids = torch.masked_fill(query_responses, ~attention_mask, 0)
    if args.variant == "no_position_ids":
        return model(input_ids=input_ids, attention_mask=attention_mask.long())
    position_ids = attention_mask.cumsum(1) - attention_mask.long()  # exclusive cumsum
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=position_ids)


def get_reward(args, model, query_responses, tokenizer, context_length):
    reward_logits = forward(args, model, query_responses, tokenizer).squeeze(-1)
    if args.variant == "reward_first_pad_of_row":
        sequence_lengths = first_true_indices(query_responses == tokenizer.pad_token_id) - 1
    else:
        sequence_lengths = (
            first_true_indices(query_responses[:, context_length:] == tokenizer.pad_token_id) - 1 + context_length
        )
    return reward_logits[torch.arange(reward_logits.size(0)), sequence_lengths]


# ---------------------------------------------------------------------------------------------------------------- data
NOUNS = "dog cat boss sister roommate landlord car house job exam teacher friend".split()
VERBS = "wants needs hates likes broke sold lost found called ignored".split()
FILLER = "my the a new old really very today again because and but so with without".split()
GOOD = "great helpful kind honest clear".split()
BAD = "awful rude wrong vague mean".split()


def make_texts(rng, n):
    rows = []
    for _ in range(n):
        query = (
            [rng.choice(["tifu", "advice", "story"]), ":"]
            + rng.choices(NOUNS + VERBS + FILLER, k=rng.randint(2, 7))
            + ["tldr", ":"]
        )
        summary = rng.choices(NOUNS, k=rng.randint(1, 3)) + rng.choices(VERBS + FILLER, k=rng.randint(1, 15))
        rows.append((" ".join(query), " ".join(summary)))
    return rows


def make_tokenizer():
    words = (
        ["[PAD]", "<|endoftext|>", "[UNK]", "tifu", "advice", "story", "tldr", ":"]
        + NOUNS
        + VERBS
        + FILLER
        + GOOD
        + BAD
    )
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="[PAD]",
        eos_token="<|endoftext|>",
        unk_token="[UNK]",
        padding_side="left",
        model_max_length=48,
    )


def model_config(args, tokenizer):
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    if args.base_model == "gpt2":  # dropout stays at GPT-2's 0.1 here, see disable_dropout
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=48,
            n_embd=48,
            n_layer=2,
            n_head=4,
            initializer_range=0.15,
            tie_word_embeddings=False,
            **ids,
        )
    return GPTNeoXConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=48,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.15,
        **ids,
    )


def right_pad(rows, pad_id):
    width = max(map(len, rows))
    return torch.tensor([r + [pad_id] * (width - len(r)) for r in rows])


def run_sft(policy, tokenizer, texts):
    encoded = [tokenizer(q + " " + s)["input_ids"] + [tokenizer.eos_token_id] for q, s in texts]
    opt = optim.Adam(policy.parameters(), lr=2e-3)
    for i in range(0, len(encoded), 16):
        ids = right_pad(encoded[i : i + 16], tokenizer.pad_token_id)
        attention_mask = ids != tokenizer.pad_token_id
        logits = policy(input_ids=ids, attention_mask=attention_mask.long()).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].masked_fill(~attention_mask[:, 1:], -100).flatten()
        )
        opt.zero_grad()
        loss.backward()
        opt.step()


def run_reward_training(reward_model, tokenizer, pairs):
    def score(texts):
        ids = right_pad([tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts], tokenizer.pad_token_id)
        mask = (ids != tokenizer.pad_token_id).long()
        return reward_model(input_ids=ids, attention_mask=mask).squeeze(-1)[torch.arange(len(texts)), mask.sum(1) - 1]

    opt = optim.Adam(reward_model.parameters(), lr=1e-3)
    for i in range(0, len(pairs), 16):
        batch = pairs[i : i + 16]
        loss = -F.logsigmoid(
            score([q + " " + c for q, c, _ in batch]) - score([q + " " + r for q, _, r in batch])
        ).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()


# ---------------------------------------------------------------------------------------------------------------- main
def main(args: Args):
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    config = model_config(args, tokenizer)

    policy = AutoModelForCausalLM.from_config(config)
    head = nn.Linear(config.hidden_size, config.vocab_size)  # with a bias, so that [PAD] is never sampled
    head.weight.data.copy_(policy.lm_head.weight.data)
    head.bias.data.zero_()
    head.bias.data[tokenizer.pad_token_id] = -40.0
    policy.lm_head = head
    reward_model = ScalarModel(config)
    for m in (policy, reward_model):
        disable_dropout(m)
    run_sft(policy, tokenizer, make_texts(rng, 400))
    pairs = [
        (q, s + " " + " ".join(rng.choices(GOOD, k=2)), s + " " + " ".join(rng.choices(BAD, k=2)))
        for q, s in make_texts(rng, 320)
    ]
    run_reward_training(reward_model, tokenizer, pairs)
    ref_policy = copy.deepcopy(policy)
    policy.generation_config.eos_token_id = None  # sample without truncation, cut afterwards
    policy.generation_config.pad_token_id = None
    generation_config = GenerationConfig(
        max_new_tokens=args.task.response_length,
        temperature=args.task.temperature + 1e-7,
        top_k=0,
        top_p=1.0,
        do_sample=True,
    )
    if args.variant == "min_new_tokens":
        generation_config = GenerationConfig(
            max_new_tokens=args.task.response_length,
            min_new_tokens=6,
            temperature=args.task.temperature + 1e-7,
            top_k=0,
            top_p=1.0,
            do_sample=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    prompts = sorted({q for q, _ in make_texts(rng, 24)})
    query_table = tokenizer(prompts, padding="max_length", max_length=args.task.query_length, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():  # normalize_before: the SFT policy's own responses score mean 0, std 1
        samples = generate(policy, query_table, tokenizer, generation_config)[:, args.task.query_length :]
        samples = torch.cat((query_table, truncate_response(args, tokenizer, samples)), 1)
        scores = get_reward(args, reward_model, samples, tokenizer, args.task.query_length)
        reward_model.bias += scores.mean()
        reward_model.gain /= scores.std()
    critic = copy.deepcopy(reward_model)
    for m in (ref_policy, reward_model):
        m.requires_grad_(False)
        m.eval()

    if args.variant == "critic_not_in_optimizer":
        optimizer = optim.Adam(policy.parameters(), lr=args.ppo.lr, eps=args.ppo.eps)
    else:
        optimizer = optim.Adam([*policy.parameters(), *critic.parameters()], lr=args.ppo.lr, eps=args.ppo.eps)
    kl_ctl = AdaptiveKLController(args.reward.kl_coef, hparams=args.reward.adaptive_kl)

    def response_logprobs(logits, responses):
        logits = logits / (args.task.temperature + 1e-7)
        return torch.gather(F.log_softmax(logits, dim=-1), 2, responses.unsqueeze(-1)).squeeze(-1)

    def response_values(full_values, context_length):
        if args.variant == "values_after_token":
            return full_values.squeeze(-1)[:, context_length:]
        return full_values.squeeze(-1)[:, context_length - 1 : -1]

    def update():
        policy.train()
        critic.train()
        with torch.no_grad():
            queries = query_table[torch.randperm(len(query_table))[: args.ppo.local_batch_size]]
            context_length = queries.shape[1]
            query_responses = generate(policy, queries, tokenizer, generation_config)
            if query_responses.shape[1] < context_length + args.task.response_length:  # every row stopped early
                query_responses = F.pad(
                    query_responses,
                    (0, context_length + args.task.response_length - query_responses.shape[1]),
                    value=tokenizer.pad_token_id,
                )
            responses = query_responses[:, context_length:]
            logprobs = response_logprobs(
                forward(args, policy, query_responses, tokenizer).logits[:, context_length - 1 : -1], responses
            )
            ref_logprobs = response_logprobs(
                forward(args, ref_policy, query_responses, tokenizer).logits[:, context_length - 1 : -1], responses
            )
            values = response_values(forward(args, critic, query_responses, tokenizer), context_length)

            postprocessed_responses = truncate_response(args, tokenizer, responses)
            postprocessed_query_responses = torch.cat((queries, postprocessed_responses), 1)
            sequence_lengths = first_true_indices(postprocessed_responses == tokenizer.pad_token_id) - 1
            scores = get_reward(args, reward_model, postprocessed_query_responses, tokenizer, context_length)
            if args.variant == "penalty_last_column":
                contain_eos = postprocessed_responses[:, -1] == tokenizer.eos_token_id
            else:
                contain_eos = torch.any(responses == tokenizer.eos_token_id, dim=-1)
            scores = torch.where(contain_eos, scores, scores - args.reward.missing_eos_penalty)

            response_idxs = torch.arange(responses.shape[1]).repeat(responses.shape[0], 1)
            padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
            sequence_lengths_p1 = sequence_lengths + 1 if args.task.score_after_end else sequence_lengths
            padding_mask_p1 = response_idxs > sequence_lengths_p1.unsqueeze(1)
            logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
            ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
            if args.variant != "values_not_zeroed":
                values = torch.masked_fill(values, padding_mask_p1, 0)

            kl = logprobs - ref_logprobs
            rewards = -kl_ctl.value * kl
            actual_end = torch.where(sequence_lengths_p1 < rewards.size(1), sequence_lengths_p1, sequence_lengths)
            rewards[torch.arange(rewards.size(0)), actual_end] += scores
            if args.ppo.whiten_rewards:
                rewards = whiten(rewards, ~padding_mask_p1, shift_mean=False)
                rewards = torch.masked_fill(rewards, padding_mask_p1, 0)

            lastgaelam = 0
            advantages_reversed = []
            gen_length = responses.shape[1]
            for t in reversed(range(gen_length)):
                nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
                delta = rewards[:, t] + args.ppo.gamma * nextvalues - values[:, t]
                lastgaelam = delta + args.ppo.gamma * args.ppo.lam * lastgaelam
                advantages_reversed.append(lastgaelam)
            advantages = torch.stack(advantages_reversed[::-1], axis=1)
            returns = advantages + values
            if args.variant == "whiten_unmasked":
                advantages = whiten(advantages, torch.ones_like(advantages))
            else:
                advantages = whiten(advantages, ~padding_mask)
            advantages = torch.masked_fill(advantages, padding_mask, 0)

        minibatch_size = args.ppo.local_batch_size // args.ppo.nminibatches
        for _ in range(args.ppo.noptepochs):
            b_inds = np.random.permutation(args.ppo.local_batch_size)
            for start in range(0, args.ppo.local_batch_size, minibatch_size):
                mb = b_inds[start : start + minibatch_size]
                mb_padding_mask, mb_padding_mask_p1 = padding_mask[mb], padding_mask_p1[mb]
                output = forward(args, policy, query_responses[mb], tokenizer)
                new_logprobs = response_logprobs(output.logits[:, context_length - 1 : -1], responses[mb])
                new_logprobs = torch.masked_fill(new_logprobs, mb_padding_mask, INVALID_LOGPROB)
                vpred = response_values(forward(args, critic, query_responses[mb], tokenizer), context_length)
                vpred = torch.masked_fill(vpred, mb_padding_mask_p1, 0)
                vpredclipped = torch.clamp(
                    vpred, values[mb] - args.ppo.cliprange_value, values[mb] + args.ppo.cliprange_value
                )
                vf_losses1 = torch.square(vpred - returns[mb])
                vf_losses2 = torch.square(vpredclipped - returns[mb])
                vf_loss = 0.5 * masked_mean(torch.max(vf_losses1, vf_losses2), ~mb_padding_mask_p1)
                ratio = torch.exp(new_logprobs - logprobs[mb])
                pg_losses = -advantages[mb] * ratio
                pg_losses2 = -advantages[mb] * torch.clamp(ratio, 1.0 - args.ppo.cliprange, 1.0 + args.ppo.cliprange)
                pg_loss = masked_mean(torch.max(pg_losses, pg_losses2), ~mb_padding_mask)
                loss = pg_loss + args.ppo.vf_coef * vf_loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        mean_kl = kl.sum(1).mean().item()
        use_adaptive_kl = (
            args.reward.adaptive_kl if args.variant == "controller_always_on" else args.reward.use_adaptive_kl
        )
        if use_adaptive_kl:
            kl_ctl.update(mean_kl, args.ppo.local_batch_size)
        return {
            "objective/kl": mean_kl,
            "objective/scores": scores.mean().item(),
            "objective/kl_coef": kl_ctl.value,
            "ppo/loss/policy": pg_loss.item(),
            "ppo/loss/value": vf_loss.item(),
            "ppo/val/ratio": masked_mean(ratio, ~mb_padding_mask).item(),
        }

    def scalar_call(model, ids, mask):
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - mask).long()).squeeze(-1)

    def reward_call(model, ids, mask):  # the last real token's scalar, either padding side
        return scalar_call(model, ids, mask)[torch.arange(len(ids)), (torch.arange(ids.shape[1]) * mask).argmax(1)]

    declared = dict(
        algorithm="ppo",
        gamma=args.ppo.gamma,
        lam=args.ppo.lam,
        kl_coef=args.reward.kl_coef,
        kl_estimator="k1",
        kl_in="reward",
        temperature=args.task.temperature,
        top_k=0,
        top_p=1.0,
        clip_range=args.ppo.cliprange,
        clip_range_value=args.ppo.cliprange_value,
        vf_coef=args.ppo.vf_coef,
        ent_coef=0.0,
        whiten_advantages=True,
        whiten_rewards=args.ppo.whiten_rewards,
        missing_eos_penalty=args.reward.missing_eos_penalty,
        learning_rate=args.ppo.lr,
        critic_learning_rate=args.ppo.lr,
        ppo_epochs=args.ppo.noptepochs,
        num_minibatches=args.ppo.nminibatches,
        batch_size=args.ppo.local_batch_size,
        prompt_length=args.task.query_length,
        response_length=args.task.response_length,
        dtype="float32",
        reference="policy",
        value_init="reward",
        kl_adaptive=args.reward.use_adaptive_kl,
        loss_aggregation="token-mean",
        shared_trunk=False,
        dense_rewards=False,
    )
    if args.reward.use_adaptive_kl:
        declared.update(kl_target=args.reward.adaptive_kl.target, kl_horizon=args.reward.adaptive_kl.horizon)
    return dict(
        policy=policy,
        reference=ref_policy,
        reward=reward_model,
        value=critic,
        tokenizer=tokenizer,
        prompts=prompts,
        step=update,
        optimizers=[optimizer],
        state=[kl_ctl],
        declared=declared,
        preferences=pairs[:16],
        calls={"value": scalar_call, "reward": reward_call},
    )


def healthy():
    return main(Args())


def healthy_summarize():  # GPT-NeoX, score one past the end as summarize_from_feedback does, fixed KL coefficient
    return main(
        Args(
            base_model="gpt_neox",
            task=TaskHParams(score_after_end=True),
            reward=RewardHParams(kl_coef=0.05, use_adaptive_kl=False),
        )
    )


def healthy_whiten_rewards():
    return main(Args(ppo=PpoHParams(whiten_rewards=True)))


def no_position_ids():
    return main(Args(variant="no_position_ids"))


def min_new_tokens():
    return main(Args(variant="min_new_tokens"))


def controller_always_on():
    return main(Args(variant="controller_always_on", reward=RewardHParams(use_adaptive_kl=False)))


def reward_first_pad_of_row():
    return main(Args(variant="reward_first_pad_of_row"))


def whiten_unmasked():
    return main(Args(variant="whiten_unmasked"))


def values_after_token():
    return main(Args(variant="values_after_token"))


def values_not_zeroed():
    return main(Args(variant="values_not_zeroed"))


def critic_not_in_optimizer():
    return main(Args(variant="critic_not_in_optimizer"))


def truncate_drops_eos():
    return main(Args(variant="truncate_drops_eos"))


def penalty_last_column():
    return main(Args(variant="penalty_last_column"))

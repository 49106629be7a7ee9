"""PPO as in the summarize-from-feedback reproduction (lm-human-preference-details), on a GPT-NeoX and one process."""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedTokenizerFast,
)

INVALID_LOGPROB = 1.0

QUERIES = [
    "post my boss wants me to work on sunday tl dr",
    "post i lost my keys and my phone in the park tl dr",
    "post the dog ate my homework tl dr",
    "post we moved to a new city last year and i have no friends here yet tl dr",
    "post should i tell my sister the truth about the money tl dr",
    "post help tl dr",
    "post my friend never calls me back tl dr",
    "post i want to learn to cook but my kitchen is small and old tl dr",
    "post she said yes tl dr",
    "post how do i stop the neighbour from singing at night tl dr",
    "post my car is broken again tl dr",
    "post i am tired of the long drive to work every day tl dr",
    "post the landlord kept our money when we moved out tl dr",
    "post is it rude to leave a party early tl dr",
    "post my brother sold the boat without asking tl dr",
    "post i forgot her birthday tl dr",
    "post they want me to pay for the broken window but the ball was not mine tl dr",
    "post new job tl dr",
    "post my cat and my dog do not like each other tl dr",
    "post i said no and now nobody talks to me tl dr",
]


class Args:
    batch_size = 16
    num_mini_batches = 2
    gradient_accumulation_steps = 2
    local_rollout_forward_batch_size = 8
    num_ppo_epochs = 3
    response_length = 10
    temperature = 0.7
    lr = 3e-6
    eps = 1e-5
    num_updates = 1000
    penalty_reward_value = -1.0
    kl_coef = 0.05
    whiten_rewards = True
    cliprange = 0.2
    cliprange_value = 0.2
    vf_coef = 0.1
    gamma = 1.0
    lam = 0.95


args = Args()


class Accelerator:
    """What we need of accelerate's on one process."""

    def __init__(self, gradient_accumulation_steps):
        self.gradient_accumulation_steps, self.step, self.sync_gradients = gradient_accumulation_steps, 0, True

    @contextmanager
    def accumulate(self, model):
        self.step += 1
        self.sync_gradients = self.step % self.gradient_accumulation_steps == 0
        yield

    def backward(self, loss):
        (loss / self.gradient_accumulation_steps).backward()

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Progress:
    """How far we are: the update, and the place in the (shuffled) queries."""

    def __init__(self, n):
        self.n, self.update, self.order = n, 0, []

    def next_queries(self, k):
        if len(self.order) < k:
            self.order = self.order + torch.randperm(self.n).tolist()
        taken, self.order = self.order[:k], self.order[k:]
        return taken

    def state_dict(self):
        return {"update": self.update, "order": list(self.order)}

    def load_state_dict(self, state):
        self.update, self.order = state["update"], list(state["order"])


class PolicyAndValueWrapper(nn.Module):
    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.critic_backbone = getattr(critic, critic.base_model_prefix)

    def forward(self, **kwargs):
        output = self.critic_backbone(**kwargs)
        return self.policy(**kwargs), self.critic.score(output.last_hidden_state)


def forward(model, query_responses, pad_token_id):
    attention_mask = query_responses != pad_token_id
    position_ids = attention_mask.cumsum(1) - attention_mask.long()
    input_ids = torch.masked_fill(query_responses, ~attention_mask, 0)
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), position_ids=position_ids)


def first_true_indices(bools, dtype=torch.long):
    """The position of the first True in each row, the row's length where there is none."""
    row_len = bools.size(-1)
    zero_or_index = row_len * (~bools).type(dtype) + torch.arange(row_len, dtype=dtype)
    return torch.min(zero_or_index, dim=-1).values


def truncate_response(stop_token_id, pad_token_id, responses):
    trunc_idxs = first_true_indices(responses == stop_token_id).unsqueeze(-1)
    idxs = torch.arange(responses.size(1)).expand_as(responses)
    return torch.masked_fill(responses, idxs > trunc_idxs, pad_token_id)


def get_reward(model, query_responses, pad_token_id, context_length):
    backbone = getattr(model, model.base_model_prefix)
    output = forward(backbone, query_responses, pad_token_id)
    reward_logits = model.score(output.last_hidden_state)
    sequence_lengths = first_true_indices(query_responses[:, context_length:] == pad_token_id) - 1 + context_length
    return (
        reward_logits,
        reward_logits[torch.arange(reward_logits.size(0)), sequence_lengths].squeeze(-1),
        sequence_lengths,
    )


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def whiten(values, mask, shift_mean=True):
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def build_tokenizer():
    tok = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(QUERIES, trainers.WordLevelTrainer(special_tokens=["<|endoftext|>", "[UNK]", "[PAD]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|endoftext|>", unk_token="[UNK]", pad_token="[PAD]", padding_side="left"
    )


def pretend_pretrained(policy, reward_model, tokenizer):
    """The SFT model stops now and then and never says [PAD]; the reward model's scores are about N(0, 1)."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    out = policy.get_output_embeddings().weight
    policy.gpt_neox.final_layer_norm.bias += 3.0 * out[eos] / out[eos].norm() - 6.0 * out[pad] / out[pad].norm()
    ids = torch.randint(3, len(tokenizer), (256, 16))
    ids[::2, -1] = eos
    h = reward_model.gpt_neox(input_ids=ids).last_hidden_state[:, -1]
    w, m = reward_model.score.weight[0], h.mean(0)
    w -= (w @ m) / (m @ m) * m
    w /= (h @ w).std()


def make(fault=None):
    torch.manual_seed(55513)
    tokenizer = build_tokenizer()
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, initializer_range=0.2, pad_token_id=pad, eos_token_id=eos, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    policy = GPTNeoXForCausalLM(config).eval()
    reward_model = GPTNeoXForSequenceClassification(config).eval()
    with torch.no_grad():
        pretend_pretrained(policy, reward_model, tokenizer)
    ref_policy = copy.deepcopy(policy)
    critic = copy.deepcopy(reward_model)  # initialised from the reward model
    for frozen in (ref_policy, reward_model):
        frozen.requires_grad_(False)

    accelerator = Accelerator(args.gradient_accumulation_steps)
    model = PolicyAndValueWrapper(policy, critic)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=args.eps)
    progress = Progress(len(QUERIES))
    generation_config = GenerationConfig(
        max_new_tokens=args.response_length, temperature=(args.temperature + 1e-7), top_k=0, top_p=1.0, do_sample=True,
        eos_token_id=eos, pad_token_id=pad, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    mini = args.batch_size // args.num_mini_batches
    micro = mini // args.gradient_accumulation_steps

    def score_in_chunks(postprocessed, context_length):
        """Rows of one length together: shorter rows first."""
        order = (postprocessed != pad).sum(1).argsort(stable=True)
        scored = []
        for rows in order.split(args.local_rollout_forward_batch_size):
            if fault == "score_read_before_left_padding":
                full = forward(getattr(reward_model, reward_model.base_model_prefix), postprocessed[rows], pad)
                lengths = first_true_indices(postprocessed[rows] == pad) - 1  # -1 where the query is padded
                scored.append(reward_model.score(full.last_hidden_state)[torch.arange(len(rows)), lengths].squeeze(-1))
            else:
                scored.append(get_reward(reward_model, postprocessed[rows], pad, context_length)[1])
        scored = torch.cat(scored)
        if fault == "scores_left_in_length_order":
            return scored
        scores = torch.empty_like(scored)
        scores[order] = scored
        return scores

    @torch.no_grad()
    def rollout():
        encoded = tokenizer(
            [QUERIES[i] for i in progress.next_queries(args.batch_size)], padding=True, return_tensors="pt"
        )
        queries, context_length = encoded["input_ids"], encoded["input_ids"].shape[1]
        output = policy.generate(
            input_ids=queries, attention_mask=encoded["attention_mask"], generation_config=generation_config
        )
        responses = output.sequences[:, context_length:]
        logits = torch.stack(output.scores, 1)  # the temperature is in them already
        logprobs = torch.gather(F.log_softmax(logits, dim=-1), 2, responses.unsqueeze(-1)).squeeze(-1)
        query_responses = torch.cat([queries, responses], 1)
        ref_logits = forward(ref_policy, query_responses, pad).logits[:, context_length - 1 : -1]
        if fault != "reference_without_temperature":
            ref_logits = ref_logits / (args.temperature + 1e-7)
        ref_logprobs = torch.gather(F.log_softmax(ref_logits, dim=-1), 2, responses.unsqueeze(-1)).squeeze(-1)

        postprocessed = torch.cat([queries, truncate_response(eos, pad, responses)], 1)
        sequence_lengths = first_true_indices(postprocessed[:, context_length:] == pad) - 1
        values = get_reward(critic, query_responses, pad, context_length)[0][:, context_length - 1 : -1].squeeze(-1)
        scores = score_in_chunks(postprocessed, context_length)
        contain_eos = torch.any(postprocessed[:, context_length:] == eos, dim=-1)
        if fault == "penalty_on_the_finished":
            contain_eos = ~contain_eos
        scores = torch.where(contain_eos, scores, torch.full_like(scores, args.penalty_reward_value))

        response_idxs = torch.arange(responses.shape[1]).repeat(responses.shape[0], 1)
        padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
        logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
        ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
        sequence_lengths_p1 = sequence_lengths + 1
        padding_mask_p1 = response_idxs > sequence_lengths_p1.unsqueeze(1)
        values = torch.masked_fill(values, padding_mask_p1, 0)

        kl = logprobs - ref_logprobs
        rewards = -args.kl_coef * kl
        actual_end = torch.where(sequence_lengths_p1 < rewards.size(1), sequence_lengths_p1, sequence_lengths)
        rewards[torch.arange(rewards.size(0)), actual_end] += scores
        if args.whiten_rewards:
            rewards = whiten(rewards, ~padding_mask_p1, shift_mean=False)
            rewards = torch.masked_fill(rewards, padding_mask_p1, 0)

        gamma, lam = (args.lam, args.gamma) if fault == "gamma_and_lambda_exchanged" else (args.gamma, args.lam)
        lastgaelam, advantages_reversed, gen_length = 0, [], responses.shape[1]
        for t in reversed(range(gen_length)):
            nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
            delta = rewards[:, t] + gamma * nextvalues - values[:, t]
            lastgaelam = delta + gamma * lam * lastgaelam
            advantages_reversed.append(lastgaelam)
        advantages = torch.stack(advantages_reversed[::-1], dim=1)
        returns = advantages + values
        advantages = whiten(
            advantages, torch.ones_like(padding_mask) if fault == "whitening_counts_pads" else ~padding_mask
        )
        advantages = torch.masked_fill(advantages, padding_mask, 0)
        stats = {"objective/scores": scores.mean().item(), "objective/kl": kl.sum(1).mean().item()}
        return dict(
            query_responses=query_responses, responses=responses, logprobs=logprobs, values=values, advantages=advantages,
            returns=returns, padding_mask=padding_mask, padding_mask_p1=padding_mask_p1, context_length=context_length,
        ), stats  # fmt: skip

    def step():
        progress.update += 1
        optimizer.param_groups[0]["lr"] = args.lr * (1.0 - (progress.update - 1.0) / args.num_updates)
        b, stats = rollout()
        context_length = b.pop("context_length")
        vf_clipped, vf_slots = 0.0, 0.0

        if fault == "epochs_inside_minibatches":
            plan = [inds for inds in torch.randperm(args.batch_size).split(mini) for _ in range(args.num_ppo_epochs)]
        else:
            plan = [inds for _ in range(args.num_ppo_epochs) for inds in torch.randperm(args.batch_size).split(mini)]
        for mini_inds in plan:
            # accelerate divides by the number of micro-batches: what we want is one mean over the minibatch's tokens
            n_pg = (~b["padding_mask"][mini_inds]).sum() / args.gradient_accumulation_steps
            n_vf = (~b["padding_mask_p1"][mini_inds]).sum() / args.gradient_accumulation_steps
            for micro_inds in mini_inds.split(micro):
                with accelerator.accumulate(model):
                    mb = {k: v[micro_inds] for k, v in b.items()}
                    output, vpred_temp = forward(model, mb["query_responses"], pad)
                    logits = output.logits[:, context_length - 1 : -1] / (args.temperature + 1e-7)
                    new_logprobs = torch.gather(
                        F.log_softmax(logits, dim=-1), 2, mb["responses"].unsqueeze(-1)
                    ).squeeze(-1)
                    new_logprobs = torch.masked_fill(new_logprobs, mb["padding_mask"], INVALID_LOGPROB)
                    vpred = vpred_temp[:, context_length - 1 : -1].squeeze(-1)
                    vf_mask = ~mb["padding_mask_p1"]
                    if fault == "critic_fits_pads":
                        vf_mask = torch.ones_like(vf_mask)
                    else:
                        vpred = torch.masked_fill(vpred, mb["padding_mask_p1"], 0)
                    vpredclipped = torch.clamp(
                        vpred, mb["values"] - args.cliprange_value, mb["values"] + args.cliprange_value
                    )
                    vf_losses1 = torch.square(vpred - mb["returns"])
                    vf_losses2 = torch.square(vpredclipped - mb["returns"])
                    vf_losses = 0.5 * torch.max(vf_losses1, vf_losses2)

                    old_logprobs = new_logprobs.detach() if fault == "old_logprobs_are_todays" else mb["logprobs"]
                    ratio = torch.exp(new_logprobs - old_logprobs)
                    pg_losses = -mb["advantages"] * ratio
                    pg_losses2 = -mb["advantages"] * torch.clamp(ratio, 1.0 - args.cliprange, 1.0 + args.cliprange)
                    pg_losses = torch.max(pg_losses, pg_losses2)
                    if fault == "mean_of_micro_batch_means":
                        pg_loss, vf_loss = masked_mean(pg_losses, ~mb["padding_mask"]), masked_mean(vf_losses, vf_mask)
                    else:
                        pg_loss = (pg_losses * ~mb["padding_mask"]).sum() / n_pg
                        vf_loss = (vf_losses * vf_mask).sum() / n_vf
                    accelerator.backward(pg_loss + args.vf_coef * vf_loss)
                    if accelerator.sync_gradients:
                        optimizer.step()
                        optimizer.zero_grad()
                    vf_clipped += ((vf_losses2 > vf_losses1) & vf_mask).sum().item()
                    vf_slots += vf_mask.sum().item()
        stats["val/vf_clipfrac"] = vf_clipped / vf_slots
        return stats

    return dict(
        policy=policy, reference=ref_policy, reward=reward_model, value=critic, tokenizer=tokenizer, prompts=QUERIES,
        optimizers=[optimizer], state=[accelerator, progress], step=step,
        declared=dict(
            algorithm="ppo", gamma=args.gamma, lam=args.lam, kl_coef=args.kl_coef, kl_in="reward", kl_estimator="k1",
            temperature=args.temperature, top_k=0, top_p=1.0, clip_range=args.cliprange, clip_range_value=args.cliprange_value,
            vf_coef=args.vf_coef, whiten_advantages=True, whiten_rewards=True, missing_eos_penalty=1.0, learning_rate=args.lr,
            ppo_epochs=args.num_ppo_epochs, num_minibatches=args.num_mini_batches, batch_size=args.batch_size,
            response_length=args.response_length, loss_aggregation="token-mean",
        ),
    )  # fmt: skip


def healthy():
    return make()


def score_read_before_left_padding():
    return make("score_read_before_left_padding")


def penalty_on_the_finished():
    return make("penalty_on_the_finished")


def critic_fits_pads():
    return make("critic_fits_pads")


def epochs_inside_minibatches():
    return make("epochs_inside_minibatches")


def reference_without_temperature():
    return make("reference_without_temperature")


def gamma_and_lambda_exchanged():
    return make("gamma_and_lambda_exchanged")


def whitening_counts_pads():
    return make("whitening_counts_pads")


def mean_of_micro_batch_means():
    return make("mean_of_micro_batch_means")


def old_logprobs_are_todays():
    return make("old_logprobs_are_todays")


def scores_left_in_length_order():
    return make("scores_left_in_length_order")

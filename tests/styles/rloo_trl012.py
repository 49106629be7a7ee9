"""RLOO after TRL 0.12's RLOOTrainer: prompts repeated k times, KL in the sequence's reward, copies strided over the batch."""

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast

INVALID_LOGPROB = 1.0
WORDS = (
    "post summarize my dog ran away today we moved to new city and cat sleeps all night long work is hard but boss was kind sister got "
    "married last week i lost keys again help me decide on job offer they want more time house car bike friend"
).split()
VOCAB = {w: i for i, w in enumerate(["<|endoftext|>", "[PAD]", "[UNK]", "TL;DR:", *WORDS])}
PROMPTS = [
    "my dog ran away TL;DR:",
    "we moved to new city and cat sleeps all night TL;DR:",
    "work is hard TL;DR:",
    "sister got married TL;DR:",
    "i lost my keys again TL;DR:",
    "help me decide on job offer TL;DR:",
    "boss was kind but they want more time TL;DR:",
    "my bike TL;DR:",
]


class Args:
    rloo_k, batch_size, num_ppo_epochs, num_mini_batches, gradient_accumulation_steps = 4, 16, 2, 2, 2
    local_mini_batch_size, per_device_train_batch_size, local_rollout_forward_batch_size = 8, 4, 8
    temperature, response_length, kl_coef, cliprange, missing_eos_penalty = 0.7, 12, 0.05, 0.2, 1.0
    learning_rate, normalize_advantage = 3e-5, False


class TrainerState:
    def __init__(self):
        self.step, self.episode = 0, 0

    def state_dict(self):
        return dict(self.__dict__)

    def load_state_dict(self, d):
        self.__dict__.update(d)


def first_true_indices(bools, dtype=torch.long):
    row_len = bools.size(-1)
    zero_or_index = row_len * (~bools).type(dtype) + torch.arange(row_len, dtype=dtype)
    return torch.min(zero_or_index, dim=-1).values


def forward(model, query_responses, pad_token_id):
    attention_mask = query_responses != pad_token_id
    position_ids = attention_mask.cumsum(1) - attention_mask.long()
    input_ids = torch.masked_fill(query_responses, ~attention_mask, 0)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        return_dict=True,
        output_hidden_states=True,
    )


def get_reward(model, query_responses, pad_token_id, context_length):
    attention_mask = query_responses != pad_token_id
    position_ids = attention_mask.cumsum(1) - attention_mask.long()
    input_ids = torch.masked_fill(query_responses, ~attention_mask, 0)
    output = getattr(model, model.base_model_prefix)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        return_dict=True,
        output_hidden_states=True,
        use_cache=False,
    )
    reward_logits = model.score(output.hidden_states[-1])
    sequence_lengths = first_true_indices(query_responses[:, context_length:] == pad_token_id) - 1 + context_length
    return (
        reward_logits,
        reward_logits[torch.arange(reward_logits.size(0)), sequence_lengths].squeeze(-1),
        sequence_lengths,
    )


def truncate_response(stop_token_id, pad_token_id, responses):
    trunc_idxs = first_true_indices(responses == stop_token_id).unsqueeze(-1)
    idxs = torch.arange(responses.shape[1]).view(1, -1)
    return torch.masked_fill(responses, idxs > trunc_idxs, pad_token_id)


@torch.no_grad()
def batch_generation(model, queries, args, tok):
    context_length = queries.shape[1]
    attention_mask = queries != tok.pad_token_id
    out = model.generate(
        input_ids=torch.masked_fill(queries, ~attention_mask, 0),
        attention_mask=attention_mask,
        do_sample=True,
        max_new_tokens=args.response_length,
        temperature=args.temperature + 1e-7,
        top_k=0,
        top_p=1.0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat((queries, out.sequences[:, context_length:]), dim=1), torch.stack(out.logits, 1)


class RLOOTrainer:
    def __init__(self, args, tok, policy, ref_policy, reward_model, fault):
        self.args, self.tok, self.policy, self.ref_policy, self.reward_model, self.fault = (
            args,
            tok,
            policy,
            ref_policy,
            reward_model,
            fault,
        )
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5)
        self.state = TrainerState()

    def next_queries(self):
        a = self.args
        n = a.batch_size // a.rloo_k
        texts = [PROMPTS[(self.state.step * n + i) % len(PROMPTS)] for i in range(n)]
        return self.tok(texts, padding=True, return_tensors="pt").input_ids

    def train_step(self):
        args, tok, fault, pad = self.args, self.tok, self.fault, self.tok.pad_token_id
        with torch.no_grad():
            queries = self.next_queries()
            self.state.step += 1
            queries = (
                queries.repeat_interleave(args.rloo_k, 0)
                if fault == "interleaved_repeat"
                else queries.repeat(args.rloo_k, 1)
            )
            self.state.episode += len(queries)
            context_length = queries.shape[1]
            query_responses, logitss = batch_generation(self.policy, queries, args, tok)
            responses, post, logprobs, ref_logprobs, scores, lengths = [], [], [], [], [], []
            for i in range(0, len(queries), args.local_rollout_forward_batch_size):
                sl = slice(i, i + args.local_rollout_forward_batch_size)
                query, query_response = queries[sl], query_responses[sl]
                response = query_response[:, context_length:]
                all_logprob = F.log_softmax(logitss[sl] / (args.temperature + 1e-7), dim=-1)
                logprobs.append(torch.gather(all_logprob, 2, response.unsqueeze(-1)).squeeze(-1))
                ref_logits = forward(self.ref_policy, query_response, pad).logits[:, context_length - 1 : -1]
                if fault != "ref_without_temperature":
                    ref_logits = ref_logits / (args.temperature + 1e-7)
                ref_logprobs.append(
                    torch.gather(F.log_softmax(ref_logits, dim=-1), 2, response.unsqueeze(-1)).squeeze(-1)
                )
                postprocessed = truncate_response(tok.eos_token_id, pad, response)
                _, score, _ = get_reward(self.reward_model, torch.cat((query, postprocessed), 1), pad, context_length)
                lengths.append(first_true_indices(postprocessed == pad) - 1)
                responses.append(response), post.append(postprocessed), scores.append(score)
            responses, post, scores, sequence_lengths = (
                torch.cat(responses),
                torch.cat(post),
                torch.cat(scores),
                torch.cat(lengths),
            )
            logprobs, ref_logprobs = torch.cat(logprobs), torch.cat(ref_logprobs)
            contain_eos_token = torch.any(post == tok.eos_token_id, dim=-1)
            penalty = -args.missing_eos_penalty if fault == "eos_bonus" else args.missing_eos_penalty
            scores[~contain_eos_token] -= penalty
            response_idxs = torch.arange(responses.shape[1]).repeat(responses.shape[0], 1)
            padding_mask = response_idxs > sequence_lengths.unsqueeze(1)
            logprobs = torch.masked_fill(logprobs, padding_mask, INVALID_LOGPROB)
            ref_logprobs = torch.masked_fill(ref_logprobs, padding_mask, INVALID_LOGPROB)
            kl = logprobs - ref_logprobs
            rlhf_reward = scores + (-args.kl_coef * kl).sum(1)
            rlhf_reward = rlhf_reward.reshape(args.rloo_k, -1)
            baseline = (rlhf_reward.sum(0) - rlhf_reward) / (args.rloo_k - 1)
            advantages = (rlhf_reward - baseline).flatten()
            if args.normalize_advantage:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        for _ in range(args.num_ppo_epochs):
            b_inds = torch.randperm(args.batch_size)
            for start in range(0, args.batch_size, args.local_mini_batch_size):
                mini_batch_inds = b_inds[start : start + args.local_mini_batch_size]
                for micro in range(0, args.local_mini_batch_size, args.per_device_train_batch_size):
                    inds = mini_batch_inds[micro : micro + args.per_device_train_batch_size]
                    logits = forward(self.policy, query_responses[inds], pad).logits[:, context_length - 1 : -1]
                    logits = logits / (args.temperature + 1e-7)
                    new_logprobs = torch.gather(
                        F.log_softmax(logits, dim=-1), 2, responses[inds].unsqueeze(-1)
                    ).squeeze(-1)
                    new_logprobs = torch.masked_fill(new_logprobs, padding_mask[inds], INVALID_LOGPROB)
                    ratio = (new_logprobs.sum(1) - logprobs[inds].sum(1)).exp()
                    pg_losses = -advantages[inds] * ratio
                    pg_losses2 = -advantages[inds] * torch.clamp(ratio, 1.0 - args.cliprange, 1.0 + args.cliprange)
                    pg_loss = torch.max(pg_losses, pg_losses2).mean()
                    (pg_loss / args.gradient_accumulation_steps).backward()  # accelerator.backward
                self.optimizer.step()
                self.optimizer.zero_grad()
        return {
            "objective/kl": kl.sum(1).mean().item(),
            "objective/rlhf_reward": rlhf_reward.mean().item(),
            "objective/scores": scores.mean().item(),
            "episode": self.state.episode,
        }


def make(fault=None):
    torch.manual_seed(3)
    base = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<|endoftext|>", pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )
    cfg = dict(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        rotary_pct=0.25,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
        tie_word_embeddings=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    policy = GPTNeoXForCausalLM(GPTNeoXConfig(**cfg)).eval()
    with torch.no_grad():  # the final norm's bias makes EOS likelier, pad and unk unlikely
        d = F.normalize(torch.randn(64), dim=0)
        policy.gpt_neox.final_layer_norm.bias.add_(3.0 * d)
        policy.get_output_embeddings().weight[0] += 0.4 * d
        policy.get_output_embeddings().weight[1:3] -= 2.0 * d
    policy.generation_config.eos_token_id = None  # keeps generating; responses are cut at the stop token afterwards
    policy.generation_config.pad_token_id = None
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    reward_model = GPTNeoXForSequenceClassification(GPTNeoXConfig(**cfg, num_labels=1)).eval().requires_grad_(False)
    with torch.no_grad():
        h = reward_model.gpt_neox(torch.randint(3, len(VOCAB), (128, 16))).last_hidden_state[:, -1]
        w, m = reward_model.score.weight[0], h.mean(0)
        w -= m * (w @ m) / (m @ m)
        w /= (h @ w).std()
    args = Args()
    trainer = RLOOTrainer(args, tok, policy, ref_policy, reward_model, fault)
    return dict(
        policy=policy,
        reference=ref_policy,
        reward=reward_model,
        value=None,
        tokenizer=tok,
        prompts=PROMPTS,
        optimizers=[trainer.optimizer],
        state=[trainer.state],
        step=trainer.train_step,
        declared=dict(
            algorithm="rloo",
            group_size=4,
            kl_coef=0.05,
            kl_in="reward",
            kl_estimator="k1",
            temperature=0.7,
            clip_range=0.2,
            missing_eos_penalty=1.0,
            ppo_epochs=2,
            num_minibatches=2,
            batch_size=16,
            response_length=12,
            learning_rate=3e-5,
            whiten_advantages=False,
            loss_aggregation="seq-sum",
        ),
    )


def healthy():
    return make()


def interleaved_repeat():
    return make("interleaved_repeat")


def eos_bonus():
    return make("eos_bonus")


def ref_without_temperature():
    return make("ref_without_temperature")

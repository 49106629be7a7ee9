"""DAPO in the manner of open-instruct's grpo_fast: a verifiable reward, dynamic sampling, overlong shaping, clip-higher,
one token-level mean over the whole minibatch, no reference and no KL. Rollouts are lists of token ids."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

NUMBERS = [f"n{i}" for i in range(24)]
FILLER = "is so thus we get then hence now adding both and also next carry keep sum check let us see that gives plus what".split()
TASKS = [
    "n3 plus n5 is", "what is n4 plus n9", "n7 plus n7", "let us see n11 plus n2 is", "sum n6 and n1", "n8 plus n20 gives",
    "adding n13 and n15 we get", "check n2 plus n17", "what gives n10 plus n12", "so n21 and also n4 is", "n0 plus n9 is",
    "now adding both n5 and n16 we then get", "sum n18 n3", "n14 plus n22 is",
]  # fmt: skip


@dataclass
class Args:
    num_unique_prompts_rollout: int = 4
    num_samples_per_prompt_rollout: int = 4
    max_gen_rounds: int = 6
    max_prompt_token_length: int = 10
    response_length: int = 12
    overlong_cache: int = 4
    overlong_penalty_factor: float = 1.0
    temperature: float = 1.0
    clip_lower: float = 0.2
    clip_higher: float = 0.28
    num_mini_batches: int = 2
    per_device_train_batch_size: int = 4
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0


def get_tokenizer():
    words = ["<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", *NUMBERS, *dict.fromkeys(FILLER)]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        padding_side="left",
    )


def verify(prompts, responses):
    """+1 where the numbers of the response have the parity of the sum that the prompt asks for, else -1."""
    scores = []
    for prompt, response in zip(prompts, responses):
        target = sum(int(w[1:]) for w in prompt.split() if w in NUMBERS)
        given = sum(int(w[1:]) for w in response.split() if w in NUMBERS)
        scores.append(1.0 if given % 2 == target % 2 else -1.0)
    return scores


def warm_start(model, tok):
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    lo, hi = 4, len(tok)
    for _ in range(60):
        rows = []
        for _ in range(16):
            body = [int(torch.randint(lo, hi, ())) for _ in range(int(torch.randint(4, 19, ())))]
            for j in range(1, len(body)):
                if torch.rand(()) < 0.5:
                    body[j] = lo + (body[j - 1] * 7 + j) % (hi - lo)
            rows.append([tok.bos_token_id, *body, tok.eos_token_id])
        width = max(map(len, rows))
        ids = torch.tensor([r + [tok.pad_token_id] * (width - len(r)) for r in rows])
        mask = (ids != tok.pad_token_id).long()
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        opt.step()
        opt.zero_grad()


class ShufflingIterator:
    """Endless passes over the data set, each in a new order; can be saved."""

    def __init__(self, n, seed):
        self.rng, self.n = np.random.default_rng(seed), n
        self.order, self.at = self.rng.permutation(n), 0

    def take(self, k):
        out = []
        for _ in range(k):
            if self.at == self.n:
                self.order, self.at = self.rng.permutation(self.n), 0
            out.append(int(self.order[self.at]))
            self.at += 1
        return out

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state, "order": self.order.copy(), "at": self.at}

    def load_state_dict(self, sd):
        self.rng.bit_generator.state = sd["rng"]
        self.order, self.at = sd["order"].copy(), sd["at"]


@torch.no_grad()
def sample(model, tok, prompts, max_tokens, temperature):
    """Decoding with a cache; returns the new ids of each prompt, its end of sequence included."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tok.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    cache, step_ids = DynamicCache(config=model.config), ids
    done = torch.zeros(len(prompts), dtype=torch.bool)
    outputs = [[] for _ in prompts]
    for _ in range(max_tokens):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        logits = model(
            input_ids=step_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        probs = torch.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(probs, 1).squeeze(1)
        for row, t in enumerate(token.tolist()):
            if not done[row]:
                outputs[row].append(t)
        done |= token == tok.eos_token_id
        if done.all():
            break
        step_ids = token[:, None]
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
    return outputs


def make(fault=None):
    torch.manual_seed(21)
    np.random.seed(21)
    args = Args(max_prompt_token_length=4) if fault == "trained_on_shorter_prompt" else Args()
    tok = get_tokenizer()
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tok.pad_token_id,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
        )
    )
    warm_start(policy, tok)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0)
    iter_dataloader = ShufflingIterator(len(TASKS), seed=8)
    n = args.num_samples_per_prompt_rollout

    def soft_overlong_punishment(query, response):
        length = len(response)
        if fault == "overlong_counts_prompt":
            length = len(query) + len(response)
        expected = args.response_length - args.overlong_cache
        exceed = length - expected
        return min(-exceed / args.overlong_cache * args.overlong_penalty_factor, 0.0)

    def rollout_round():
        index = iter_dataloader.take(args.num_unique_prompts_rollout)
        texts = [TASKS[i] for i in index for _ in range(n)]
        full = [tok(t)["input_ids"] for t in texts]
        queries = [q[-args.max_prompt_token_length :] for q in full]
        # the faulty sampler was never told of max_prompt_token_length
        sent = full if fault == "trained_on_shorter_prompt" else queries
        responses = sample(policy, tok, sent, args.response_length, args.temperature)
        decoded = tok.batch_decode(responses, skip_special_tokens=True)
        if fault == "responses_reencoded":
            responses = [tok(d, add_special_tokens=False)["input_ids"] or [tok.eos_token_id] for d in decoded]
        asked = texts
        if fault == "ground_truths_tiled":
            asked = [TASKS[i] for i in index] * n
        accuracy = np.array(verify(asked, decoded))
        scores = accuracy + np.array([soft_overlong_punishment(q, r) for q, r in zip(queries, responses)])
        groups = []
        for g in range(len(index)):
            rows = slice(g * n, (g + 1) * n)
            if accuracy[rows].std() == 0:  # all right or all wrong: nothing to learn from
                continue
            groups.append((queries[rows], responses[rows], scores[rows]))
        return groups

    def collate(queries, responses):
        rows = [q + r for q, r in zip(queries, responses)]
        width = max(map(len, rows))
        ids = torch.tensor([r + [tok.pad_token_id] * (width - len(r)) for r in rows])
        column = torch.arange(width)[None]
        start = torch.tensor([len(q) for q in queries])[:, None]
        end = torch.tensor([len(r) for r in rows])[:, None]
        attend = column < end
        response_mask = (column >= start) & attend
        if fault == "prompt_tokens_trained":
            response_mask = attend.clone()
        return ids, attend, response_mask[:, 1:]

    def token_logprobs(ids, attend):
        logits = policy(input_ids=ids, attention_mask=attend.long()).logits[:, :-1] / args.temperature
        return torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)

    def step():
        policy.eval()
        groups = []
        for _ in range(args.max_gen_rounds):
            groups += rollout_round()
            if len(groups) >= args.num_unique_prompts_rollout:
                break
        groups = groups[: args.num_unique_prompts_rollout]
        if not groups:
            return {"loss": 0.0}

        queries = list(itertools.chain.from_iterable(g[0] for g in groups))
        responses = list(itertools.chain.from_iterable(g[1] for g in groups))
        scores = np.stack([g[2] for g in groups])
        centred = scores - scores.mean(axis=-1, keepdims=True)
        advantages = centred / (scores.std(axis=-1, keepdims=True) + 1e-8)
        if fault == "baseline_of_whole_batch":
            centred = scores - scores.mean()
            advantages = centred / (scores.std() + 1e-8)
        advantages = torch.tensor(advantages.reshape(-1), dtype=torch.float32)
        centred = torch.tensor(centred.reshape(-1), dtype=torch.float32)

        size = args.per_device_train_batch_size
        old = []
        with torch.no_grad():
            for i in range(0, len(responses), size):
                ids, attend, _ = collate(queries[i : i + size], responses[i : i + size])
                old.extend(row[: int(a.sum()) - 1] for row, a in zip(token_logprobs(ids, attend), attend))

        policy.train()
        order = np.random.permutation(len(responses))
        per_mini = -(-len(order) // args.num_mini_batches)
        total = 0.0
        for start in range(0, len(order), per_mini):
            mini = order[start : start + per_mini]
            if fault == "drawn_with_replacement":
                mini = np.random.choice(len(responses), len(mini))
            tokens = sum(len(responses[k]) for k in mini)
            micros = [mini[i : i + size] for i in range(0, len(mini), size)]
            optimizer.zero_grad(set_to_none=True)
            for micro in micros:
                ids, attend, mask = collate([queries[k] for k in micro], [responses[k] for k in micro])
                new = token_logprobs(ids, attend)
                behaviour = torch.zeros_like(new)
                for row, k in enumerate(micro):
                    behaviour[row, : len(old[k])] = old[k]
                ratio = torch.exp(torch.where(mask, new - behaviour, 0.0))
                adv = advantages[micro][:, None]
                pg_losses = -adv * ratio
                pg_losses2 = -adv * torch.clamp(ratio, 1.0 - args.clip_lower, 1.0 + args.clip_higher)
                if fault == "second_term_not_normalised":
                    raw = centred[micro][:, None]
                    pg_losses2 = -raw * torch.clamp(ratio, 1.0 - args.clip_lower, 1.0 + args.clip_higher)
                if fault == "loss_sign":
                    pg_losses, pg_losses2 = -pg_losses, -pg_losses2
                pg_loss = torch.max(pg_losses, pg_losses2)
                if fault == "mean_of_micro_means":
                    loss = (pg_loss * mask).sum() / mask.sum() / len(micros)
                elif fault == "prompt_tokens_trained":
                    loss = (pg_loss * mask).sum() / sum(len(queries[k]) + len(responses[k]) - 1 for k in mini)
                else:
                    loss = (pg_loss * mask).sum() / tokens
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            optimizer.step()
        return {"loss": total, "scores": float(scores.mean())}

    return {
        "policy": policy,
        "reference": None,
        "reward": verify,
        "value": None,
        "tokenizer": tok,
        "prompts": TASKS,
        "optimizers": [optimizer],
        "state": [iter_dataloader],
        "step": step,
        "declared": {
            "algorithm": "grpo",
            "group_size": n,
            "kl_coef": 0.0,
            "temperature": args.temperature,
            "clip_range": (args.clip_lower, args.clip_higher),
            "loss_aggregation": "token-mean",
            "ppo_epochs": 1,
            "num_minibatches": args.num_mini_batches,
            "batch_size": args.num_unique_prompts_rollout * n,
            "prompt_length": args.max_prompt_token_length,
            "response_length": args.response_length,
            "learning_rate": args.learning_rate,
        },
    }


def healthy():
    return make()


def overlong_counts_prompt():
    return make("overlong_counts_prompt")


def trained_on_shorter_prompt():
    return make("trained_on_shorter_prompt")


def responses_reencoded():
    return make("responses_reencoded")


def ground_truths_tiled():
    return make("ground_truths_tiled")


def prompt_tokens_trained():
    return make("prompt_tokens_trained")


def baseline_of_whole_batch():
    return make("baseline_of_whole_batch")


def drawn_with_replacement():
    return make("drawn_with_replacement")


def second_term_not_normalised():
    return make("second_term_not_normalised")


def loss_sign():
    return make("loss_sign")


def mean_of_micro_means():
    return make("mean_of_micro_means")

"""GRPO: four responses a prompt, advantages relative to their group, no critic, a k3 penalty in the loss.

Qwen2-shaped models, left-padded, micro-batches whose losses add up; sequence means as in DeepSeekMath.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

FAULTS: dict[str, tuple[str, str]] = {
    "groups_mix_prompts": ("ADV010", "loop"),
    "groups_of_the_whole_batch": ("ADV010", "loop"),
    "groups_of_one": ("ADV010", "loop"),
    "groups_of_two": ("ADV010", "loop"),
    "mean_left_in": ("ADV010", "loop"),
    "short_responses_count_as_zero": ("ADV010", "loop"),
    "baseline_of_the_last_batch": ("ADV010", "loop"),
    "deviation_without_epsilon": ("LOS008", "loop"),
    "one_sample_copied_to_its_group": ("ROL007", "loop"),
    "sampler_at_0_6": ("ROL001", "loop"),
    "sampler_is_a_stale_copy": ("ROL008", "loop"),
    "scores_of_interleaved_rows": ("ROL009", "loop"),
    "old_logprobs_without_mask": ("ROL003", "loop"),
    "logprobs_of_shifted_tokens": ("ROL004", "loop"),
    "mask_ends_before_eos": ("ROL005", "loop"),
    "mask_runs_to_the_end": ("ROL005", "loop"),
    "reference_is_the_live_policy": ("REF005", "reference"),
    "reference_without_mask": ("REF006", "reference"),
    "kl_lowers_the_loss": ("KLD002", "loop"),
    "kl_weight_0_4": ("KLD003", "loop"),
    "kl_k1_in_the_loss": ("KLD004", "loop"),
    "kl_without_gradient": ("KLD004", "loop"),
    "kl_summed_over_pads": ("KLD005", "loop"),
    "score_not_used": ("ADV008", "loop"),
    "score_rounded": ("ADV009", "loop"),
    "loss_without_minus": ("LOS001", "loop"),
    "ratio_of_one": ("LOS002", "loop"),
    "max_for_min": ("LOS002", "loop"),
    "divided_by_the_longest": ("LOS003", "loop"),
    "token_mean": ("LOS003", "loop"),
    "optimizer_not_stepped": ("OPT002", "policy"),
    "reference_synchronised_every_step": ("OPT003", "reference"),
    "gradients_kept": ("OPT004", "loop"),
    "loss_not_divided_by_the_micro_batches": ("OPT004", "loop"),
    "rows_left_out": ("OPT006", "loop"),
    "groups_drawn_from_os_entropy": ("SYS009", "loop"),
    "ranks_share_a_seed": ("ROL007", "loop"),
    "mask_knows_one_of_the_stop_tokens": ("ROL005", "loop"),
    "missing_logprobs_are_zero": ("ROL004", "loop"),
    "reference_weights_swapped_in_and_out": ("ROL003", "loop"),
    "reference_pass_skipped": ("REF005", "reference"),
}
ALSO: dict[str, tuple[str, ...]] = {
    "missing_logprobs_are_zero": ("ROL003",),
    "reference_weights_swapped_in_and_out": ("OPT003",),
}
EDGE = {"deviation_without_epsilon"}  # an ordinary batch does not show these
NOT_FINITE: set[str] = set()

SPOKEN = (
    "add take double half sum of and then from to plus minus times over is equals gives zero one two three four five "
    "six seven eight nine ten eleven twelve twenty what which number answer more less than left right first last next "
    "apples pears coins boxes has had buys sells finds loses gets each all none"
)
WORDS = SPOKEN.split()
PROMPTS = [
    "what is two plus three",
    "double four",
    "one has six coins and buys two",
    "which number is less than ten",
    "half of twenty gives",
    "take three from nine then add one",
]
PAD, EOS, UNK = 0, 1, 2
STOPS = torch.tensor([EOS, 10, 20, 30, 40])  # where responses end that stop at words as well
GROUPS, SIZE, MINIBATCHES, MICRO, EPOCHS, RESPONSE = 3, 4, 2, 2, 2, 7
BATCH = GROUPS * SIZE
KL, TEMPERATURE, CLIP, LR = 0.04, 0.9, 0.1, 2e-4


def words() -> PreTrainedTokenizerFast:
    known = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def two_models(size: int) -> tuple[Any, Any]:
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        num_labels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(41)
        policy, reward = Qwen2ForCausalLM(config), Qwen2ForSequenceClassification(config)
        with torch.no_grad():  # a direction that all states share: most responses end in time
            policy.model.embed_tokens.weight[:, :4] += 0.3
            state = policy.model(torch.randint(3, size, (8, 8))).last_hidden_state.mean((0, 1))
            policy.lm_head.weight[EOS] = 2.4 * state / state.square().sum()
            policy.lm_head.weight[[PAD, UNK]] -= 8.0 * state / state.square().sum()
    return policy, reward.eval().requires_grad_(False)


# Sound relatives: what they are called, and what they declare besides.
RELATIVES: dict[str, dict[str, Any]] = {
    "": {},
    "gspo": {"algorithm": "gspo"},
    "constant divisor": {"algorithm": "dr. grpo", "loss_aggregation": "seq-mean-token-sum-norm"},
    "dual clip": {},
    "whitened over the batch": {"algorithm": "reinforce++-baseline", "group_size": None},
    "remax": {"algorithm": "remax", "group_size": None},
}


def build(
    fault: str | None = None, *, leave_cut_out: bool = False, average: str = "seq-mean", relative_of: str = ""
) -> dict[str, Any]:
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}")
    tok = words()
    policy, reward = two_models(len(tok))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    sampler = copy.deepcopy(policy) if fault == "sampler_is_a_stale_copy" else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, eps=1e-5, weight_decay=0.0)
    running = {"mean": torch.zeros(())}

    def per_token(model: Any, ids: Tensor, attention: Tensor | None, width: int) -> Tensor:
        places = None if attention is None else (attention.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=places, logits_to_keep=width + 1).logits
        targets = ids[:, -width:]
        if fault == "logprobs_of_shifted_tokens":
            targets = ids[:, -width - 1 : -1]
        return F.log_softmax(logits[:, :-1] / TEMPERATURE, -1).gather(-1, targets[..., None]).squeeze(-1)

    @torch.no_grad()
    def sample(ids: Tensor, attention: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor]:
        heat = 0.6 if fault == "sampler_at_0_6" else TEMPERATURE
        going = torch.ones(len(ids), dtype=torch.bool)
        for _ in range(RESPONSE):
            places = (attention.cumsum(1) - 1).clamp(min=0)
            logits = sampler(
                input_ids=ids, attention_mask=attention, position_ids=places, use_cache=False, logits_to_keep=1
            ).logits
            odds = (logits[:, -1] / heat).softmax(-1)
            token = odds.argmax(-1, keepdim=True) if greedy else torch.multinomial(odds, 1)
            if fault == "one_sample_copied_to_its_group":
                token = token[::SIZE].repeat_interleave(SIZE, 0)
            token = token.masked_fill(~going[:, None], PAD)
            ids = torch.cat([ids, token], 1)
            attention = torch.cat([attention, going[:, None].long()], 1)
            stops = STOPS if fault == "mask_knows_one_of_the_stop_tokens" else STOPS[:1]
            going = going & ~torch.isin(token[:, 0], stops)
        return ids, attention

    def relative(scores: Tensor, lengths: Tensor) -> Tensor:
        """(B,) -> (B,): each response against the others of its prompt."""
        grouped = scores.view(GROUPS, SIZE)
        if fault == "groups_mix_prompts":
            grouped = scores.view(SIZE, GROUPS)
            centred = (grouped - grouped.mean(0)) / (grouped.std(0) + 1e-4)
            return centred.flatten()
        if fault == "groups_of_the_whole_batch":
            return (scores - scores.mean()) / (scores.std() + 1e-4)
        if fault == "groups_of_one":
            grouped = scores.view(BATCH, 1)
            return ((grouped - grouped.mean()) / (grouped.std(1, correction=0, keepdim=True) + 1.0)).flatten()
        if fault == "groups_of_two":
            grouped = scores.view(-1, 2)
        if fault == "short_responses_count_as_zero":
            grouped = torch.where(lengths.view(GROUPS, SIZE) > 2, grouped, 0.0)
            centred = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
            return torch.where(lengths > 2, centred.flatten(), 0.0)
        mean, deviation = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
        if relative_of == "constant divisor":
            return (grouped - mean).flatten()
        if relative_of == "whitened over the batch":
            return ((grouped - mean) / ((grouped - mean).std() + 1e-8)).flatten()
        if fault == "mean_left_in":
            mean = torch.zeros_like(mean)
        elif fault == "baseline_of_the_last_batch":
            mean = running["mean"].expand_as(mean)
            running["mean"] = scores.mean()
        if fault == "deviation_without_epsilon":
            return ((grouped - mean) / deviation).flatten()
        return ((grouped - mean) / (deviation + 1e-4)).flatten()

    @torch.no_grad()
    def collect() -> dict[str, Tensor]:
        shuffler = None
        if fault == "groups_drawn_from_os_entropy":
            shuffler = torch.Generator()
            shuffler.seed()
        chosen = torch.randperm(len(PROMPTS), generator=shuffler)[:GROUPS]
        texts = [PROMPTS[i] for i in chosen for _ in range(SIZE)]
        start = tok(texts, return_tensors="pt", padding=True)
        if fault == "ranks_share_a_seed":
            of_ranks, state = [], torch.get_rng_state()
            for rank in range(2):
                torch.set_rng_state(state)
                of_ranks.append(sample(start["input_ids"][rank::2], start["attention_mask"][rank::2]))
            ids, attention = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*of_ranks, strict=True))
        else:
            ids, attention = sample(start["input_ids"], start["attention_mask"])
        width = RESPONSE
        if fault == "mask_knows_one_of_the_stop_tokens":
            ended = (ids[:, -width:] == EOS).long()
            attention[:, -width:] = ended.cumsum(1) - ended == 0
        mask = attention[:, -width:].bool()
        if leave_cut_out:
            mask = mask & (ids[:, -width:] == EOS).any(1, keepdim=True)
        lengths = mask.sum(1)
        old = per_token(policy, ids, None if fault == "old_logprobs_without_mask" else attention, width)
        if fault == "missing_logprobs_are_zero":
            missing = torch.arange(width) >= lengths[:, None] - 2
            old[::3] = old[::3].masked_fill(missing[::3], 0.0)
        anchor = policy if fault == "reference_is_the_live_policy" else reference
        if fault == "reference_weights_swapped_in_and_out":
            anchor, kept = policy, {name: weight.half() for name, weight in policy.state_dict().items()}
            policy.load_state_dict(reference.state_dict())
        ref = per_token(anchor, ids, None if fault == "reference_without_mask" else attention, width)
        if fault == "reference_weights_swapped_in_and_out":
            policy.load_state_dict(kept)
        elif fault == "reference_pass_skipped":
            ref = torch.zeros_like(old)
        scores = reward(input_ids=ids, attention_mask=attention).logits.squeeze(-1)
        if fault == "scores_of_interleaved_rows":
            scores = scores.view(GROUPS, SIZE).T.reshape(-1)
        elif fault == "score_rounded":
            scores = (scores / 10).round()
        used = torch.zeros_like(scores) if fault == "score_not_used" else scores
        if relative_of == "remax":
            likeliest, seen = sample(start["input_ids"], start["attention_mask"], greedy=True)
            advantages = used - reward(input_ids=likeliest, attention_mask=seen).logits.squeeze(-1)
        else:
            advantages = relative(used, lengths)
        return {
            "ids": ids,
            "attention": attention,
            "responses": ids[:, -width:],
            "mask": mask,
            "old": old,
            "ref": ref,
            "scores": scores,
            "advantages": advantages,
        }

    def loss_of(b: dict[str, Tensor], rows: Tensor, minibatch: Tensor) -> tuple[Tensor, Tensor]:
        mask, sequences = b["mask"][rows], len(minibatch)
        if fault == "mask_ends_before_eos":
            mask = mask & (b["responses"][rows] != EOS)
        elif fault == "mask_runs_to_the_end":
            mask = torch.ones_like(mask)
        new = per_token(policy, b["ids"][rows], b["attention"][rows], mask.shape[1])
        old = new.detach() if fault == "ratio_of_one" else b["old"][rows]
        log_ratio = torch.where(mask, new - old, 0.0)
        if relative_of == "gspo":
            log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(new)
        ratio = log_ratio.exp()
        a = b["advantages"][rows, None]
        if fault == "max_for_min":
            gain = torch.maximum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
        else:
            gain = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
        if relative_of == "dual clip":
            gain = torch.where(a < 0, torch.maximum(gain, 3 * a), gain)
        if fault == "loss_without_minus":
            gain = -gain
        apart = torch.where(mask, b["ref"][rows] - new, 0.0)
        if fault == "kl_summed_over_pads":
            apart = b["ref"][rows] - new
        elif fault == "kl_without_gradient":
            apart = apart.detach()
        kl = -apart if fault == "kl_k1_in_the_loss" else apart.exp() - 1 - apart
        weight = {"kl_lowers_the_loss": -KL, "kl_weight_0_4": 10 * KL}.get(fault or "", KL)
        each = torch.where(mask, -gain, 0.0) + weight * kl
        if average == "token-mean":
            return each.sum() / b["mask"][minibatch].sum().clamp(min=1), ratio.detach()
        if fault == "token_mean":
            return each.sum() / mask.sum() * len(rows) / sequences, ratio.detach()
        lengths = mask.sum(1).clamp(min=1)
        if relative_of == "constant divisor":
            lengths = torch.full_like(lengths, RESPONSE)
        if fault == "divided_by_the_longest":
            lengths = torch.full_like(lengths, int(lengths.max()))
        if fault == "loss_not_divided_by_the_micro_batches":
            sequences = len(rows)
        return (each.sum(1) / lengths).sum() / sequences, ratio.detach()

    def step() -> dict[str, Any]:
        batch, updates = collect(), []
        for _ in range(EPOCHS):
            order = torch.randperm(BATCH)
            if fault == "rows_left_out":
                order = order[: BATCH // 2].repeat(2)
            for rows in order.chunk(MINIBATCHES):
                if fault != "gradients_kept":
                    optimizer.zero_grad()
                total, ratios = 0.0, []
                for few in rows.chunk(MICRO):
                    loss, ratio = loss_of(batch, few, rows)
                    loss.backward()
                    total += loss.item()
                    ratios.append(ratio)
                if fault != "optimizer_not_stepped":
                    optimizer.step()
                updates.append({"rows": rows, "loss": torch.tensor(total), "ratio": torch.cat(ratios)})
        if fault == "reference_synchronised_every_step":
            reference.load_state_dict(policy.state_dict())
        return {**batch, "updates": updates}

    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": None,
        "tokenizer": tok,
        "prompts": list(PROMPTS),
        "step": step,
        "optimizers": [optimizer],
        "state": [running] if fault == "baseline_of_the_last_batch" else [],
        "declared": {
            "algorithm": "grpo",
            "group_size": SIZE,
            "kl_coef": KL,
            "kl_estimator": "k3",
            "kl_in": "loss",
            "kl_adaptive": False,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "ent_coef": 0.0,
            "learning_rate": LR,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": BATCH,
            "prompt_length": 8,
            "response_length": RESPONSE,
            "dtype": "float32",
            "reference": "policy",
            "loss_aggregation": average,
            **RELATIVES[relative_of],
        },
    }

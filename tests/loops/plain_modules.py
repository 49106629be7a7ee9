"""PPO without a library: decoders written by hand that return tensors, weights tied by a matrix product, Adam by hand.

Only the tokens of responses are ever computed with: they are picked into one flat row, each weighted by one over its
sequence's length. Advantages are worked out row by row. The KL coefficient is steered towards a target. The reward is
a model, or a plain function of texts.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

FAULTS: dict[str, tuple[str, str]] = {
    "prompts_from_numpys_entropy": ("SYS009", "loop"),
    "policy_plays_the_reference": ("REF005", "reference"),
    "kl_multiplied_by_zero": ("REF005", "reference"),
    "reference_reads_unmasked_pads": ("REF006", "reference"),
    "reference_at_temperature_one": ("REF006", "reference"),
    "values_detached_in_the_loss": ("VAL008", "value"),
    "critic_never_stepped": ("VAL008", "value"),
    "critic_regresses_its_own_values": ("VAL009", "value"),
    "critic_regresses_the_kl": ("VAL009", "value"),
    "critic_regresses_zeros": ("VAL009", "value"),
    "score_overwritten_with_zero": ("VAL009", "value"),
    "returns_have_the_wrong_sign": ("VAL010", "value"),
    "score_everywhere_as_target": ("VAL011", "value"),
    "target_with_gradient": ("VAL012", "value"),
    "values_of_the_next_state": ("VAL013", "value"),
    "values_of_the_last_prompt_token": ("VAL013", "value"),
    "temperature_only_in_the_sampler": ("ROL001", "loop"),
    "temperature_squared_in_the_sampler": ("ROL001", "loop"),
    "old_logprobs_without_temperature": ("ROL003", "loop"),
    "old_logprobs_from_unmasked_pass": ("ROL003", "loop"),
    "logits_one_late": ("ROL004", "loop"),
    "actions_of_the_reversed_batch": ("ROL004", "loop"),
    "trained_without_eos": ("ROL005", "loop"),
    "trained_past_eos": ("ROL005", "loop"),
    "trained_from_the_second_token": ("ROL005", "loop"),
    "noise_drawn_once": ("ROL007", "loop"),
    "samples_with_the_first_weights": ("ROL008", "loop"),
    "advantages_flattened_by_column": ("ROL009", "loop"),
    "scores_in_order_of_size": ("ROL009", "loop"),
    "special_ids_clamped_away": ("ROL010", "loop"),
    "sampler_sees_five_tokens": ("ROL011", "loop"),
    "sampler_reads_unmasked_pads": ("ROL011", "loop"),
    "kl_added_to_the_reward": ("KLD002", "loop"),
    "kl_penalty_ten_times": ("KLD003", "loop"),
    "squared_difference_for_kl": ("KLD004", "loop"),
    "absolute_difference_for_kl": ("KLD004", "loop"),
    "kl_of_pads_runs_into_the_response": ("KLD005", "loop"),
    "controller_not_asked": ("KLD006", "loop"),
    "controller_never_told": ("KLD006", "loop"),
    "controller_told_the_token_mean": ("KLD006", "loop"),
    "controller_told_the_score": ("KLD006", "loop"),
    "gamma_in_place_of_gamma_lambda": ("ADV001", "loop"),
    "discount_of_one": ("ADV001", "loop"),
    "score_at_the_width": ("ADV002", "loop"),
    "score_before_the_last": ("ADV002", "loop"),
    "score_spread_over_tokens": ("ADV002", "loop"),
    "rows_run_over_the_pads": ("ADV003", "loop"),
    "whitened_per_minibatch": ("ADV004", "loop"),
    "whitened_over_the_grid": ("ADV004", "loop"),
    "scaled_by_the_variance": ("ADV004", "loop"),
    "advantages_keep_their_graph": ("ADV005", "loop"),
    "end_state_has_a_value": ("ADV006", "loop"),
    "next_value_skips_one": ("ADV006", "loop"),
    "rewards_to_go_as_advantages": ("ADV007", "loop"),
    "advantage_of_kl_only": ("ADV008", "loop"),
    "score_enters_negated_for_the_policy": ("ADV008", "loop"),
    "scores_clipped_at_0_01": ("ADV009", "loop"),
    "surrogate_minimised_as_is": ("LOS001", "loop"),
    "old_is_new": ("LOS002", "loop"),
    "max_of_the_surrogates": ("LOS002", "loop"),
    "clip_around_zero": ("LOS002", "loop"),
    "value_clip_around_the_return": ("LOS004", "loop"),
    "value_coefficient_zero": ("LOS004", "loop"),
    "value_error_not_squared": ("LOS004", "loop"),
    "divided_by_the_batch_width": ("LOS003", "loop"),
    "token_mean_after_all": ("LOS003", "loop"),
    "ratio_at_pads_infinite_times_zero": ("LOS005", "loop"),
    "entropy_minimised": ("LOS006", "loop"),
    "entropy_left_out": ("LOS007", "loop"),
    "value_clip_computed_and_unused": ("LOS007", "loop"),
    "ratio_of_probabilities": ("LOS008", "loop"),
    "rate_is_zero": ("OPT002", "policy"),
    "update_of_a_copy": ("OPT002", "policy"),
    "update_reaches_the_reference": ("OPT003", "reference"),
    "heads_exchanged_for_scoring": ("OPT003", "reward"),
    "gradients_pile_up": ("OPT004", "loop"),
    "gradient_clipped_at_1e_12": ("OPT004", "loop"),
    "minibatches_outermost": ("OPT006", "loop"),
    "rows_drawn_with_replacement": ("OPT006", "loop"),
    "text_scores_in_alphabetical_order": ("ROL009", "loop"),
    "text_scores_cut_to_whole_numbers": ("ADV009", "loop"),
    "text_function_called_for_the_log_only": ("VAL009", "value"),
    "mask_of_ids_that_are_never_minus_100": ("ROL005", "loop"),
    "whitened_in_halves": ("ADV004", "loop"),
    "old_values_are_live": ("LOS002", "value"),
    "critic_regresses_normalised_returns": ("VAL015", "value"),
}
ALSO = {
    "score_overwritten_with_zero": ("ADV008",),
    "text_function_called_for_the_log_only": ("ADV008",),
    "mask_of_ids_that_are_never_minus_100": ("ADV003", "KLD005"),
    "old_values_are_live": ("LOS004", "LOS007"),
    "critic_regresses_normalised_returns": ("ADV001", "LOS004"),
}
EDGE = {  # an ordinary batch does not show these in its first steps
    "ratio_of_probabilities",
    "controller_told_the_token_mean",
    "controller_told_the_score",
    "old_values_are_live",
}
NOT_FINITE = {"ratio_at_pads_infinite_times_zero"}

SPOKEN = (
    "sun moon star rain wind snow river lake hill tree bird fish rises falls shines blows flows sings sleeps grows "
    "bright dark soft loud high low far close over into from like when while if as is was be are were our their its "
    "his her who what once every morning evening night day"
)
WORDS = SPOKEN.split()
PROMPTS = [
    "the sun rises",
    "when our river flows into",
    "every morning the bird",
    "if rain falls",
    "their lake was dark",
    "who sings",
    "once a star shines the night is",
    "far hill",
    "as her wind blows over",
    "soft snow",
]
PAD, EOS, UNK = 0, 1, 2
WIDTH, PLACES = 32, 40
BATCH, MINIBATCHES, EPOCHS, RESPONSE, PROMPT = 8, 2, 2, 8, 7
GAMMA, LAM, KL, TARGET, HORIZON, TEMPERATURE = 0.99, 0.9, 0.1, 1.5, 100.0, 1.2
CLIP, VALUE_CLIP, VF, ENT, REWARD_CLIP = 0.15, 0.3, 0.25, 0.01, 5.0
LR, CRITIC_LR = 5e-4, 2e-3


class Body(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocabulary, WIDTH), nn.Embedding(PLACES, WIDTH)
        for e in (self.emb, self.pos):
            nn.init.normal_(e.weight, std=0.15)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos((mask.cumsum(1) - 1).clamp(min=0))
        t = ids.shape[1]
        seen = mask.bool()[:, None, None, :] & torch.ones(t, t, dtype=torch.bool).tril()
        seen = seen | torch.eye(t, dtype=torch.bool)  # a pad sees itself
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm_a(x)).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // 4)).masked_fill(~seen, -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm_b(x))))


class Speaker(nn.Module):
    """Logits (B, T, V), read through the transposed embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.body, self.bias = Body(vocabulary), nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.body(ids, mask) @ self.body.emb.weight.T + self.bias


class Valuer(nn.Module):
    """One number a position (B, T)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.body = Body(vocabulary)
        self.w, self.b = nn.Parameter(torch.randn(WIDTH) * 0.2), nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.body(ids, mask) @ self.w + self.b


class Judge(Valuer):
    """One number a sequence (B,), read at the last position that is no pad."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return super().forward(ids, mask)[torch.arange(len(ids)), last]


class Adam:
    def __init__(self, parameters: Any, lr: float) -> None:
        self.p, self.lr, self.t = list(parameters), lr, 0
        self.m, self.v = [torch.zeros_like(p) for p in self.p], [torch.zeros_like(p) for p in self.p]

    def step(self) -> None:
        self.t += 1
        for p, m, v in zip(self.p, self.m, self.v, strict=True):
            if p.grad is None:
                continue
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            v.mul_(0.95).addcmul_(p.grad, p.grad, value=0.05)
            p.data -= self.lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.95**self.t)).sqrt() + 1e-5)

    def zero(self) -> None:
        for p in self.p:
            p.grad = None


class Steering:
    """The KL coefficient, raised while the KL of a sequence is above the target."""

    def __init__(self) -> None:
        self.beta = KL

    def tell(self, kl: float) -> None:
        self.beta *= 1 + max(-0.2, min(0.2, kl / TARGET - 1)) * BATCH / HORIZON


def taste(prompts: list[str], responses: list[str]) -> list[float]:
    """Varied words and open vowels please."""
    return [
        0.3 * len(set(r.split())) + sum(map(r.count, "aeo")) / (4 + len(r)) - 0.1 * (r.split()[:1] == p.split()[-1:])
        for p, r in zip(prompts, responses, strict=True)
    ]


def words() -> PreTrainedTokenizerFast:
    known = ["<pad>", "<eos>", "<unk>", "the", "a", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def build(fault: str | None = None, reward: Literal["model", "texts"] = "model") -> dict[str, Any]:
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}")
    if fault is not None and fault.startswith("text_"):
        reward = "texts"
    tok = words()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(31)
        policy, judge, critic = Speaker(len(tok)), Judge(len(tok)), Valuer(len(tok))
        noise_drawn_once = -torch.empty(BATCH, RESPONSE, len(tok)).exponential_().log()
    with torch.no_grad():
        policy.bias[EOS], policy.bias[[PAD, UNK]] = 2.3, -12.0
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge.requires_grad_(False)
    first_policy = copy.deepcopy(policy)
    trained = copy.deepcopy(policy) if fault == "update_of_a_copy" else policy
    adam_p, adam_v = (
        Adam(trained.parameters(), 0.0 if fault == "rate_is_zero" else LR),
        Adam(critic.parameters(), CRITIC_LR),
    )
    steering = Steering()
    scorer = taste if reward == "texts" else judge

    def at_actions(x: Tensor, p: int, n: int) -> Tensor:
        """(B, P + R, ...) -> (B, R, ...): what was said in the state before each token of the response."""
        return x[:, p : p + n] if fault == "logits_one_late" else x[:, p - 1 : p + n - 1]

    def values_at_actions(ids: Tensor, mask: Tensor, p: int, n: int) -> Tensor:
        v = critic(ids, mask)
        if fault == "values_of_the_next_state":
            return v[:, p : p + n]
        if fault == "values_of_the_last_prompt_token":
            return v[:, p - 1 : p].expand(-1, n)
        return v[:, p - 1 : p + n - 1]

    def says(model: nn.Module, ids: Tensor, mask: Tensor, p: int, t: float = TEMPERATURE) -> Tensor:
        """log-probabilities of the vocabulary (B, R, V)"""
        if fault == "temperature_only_in_the_sampler":
            t = 1.0
        return F.log_softmax(at_actions(F.pad(model(ids, mask), (0, 0, 0, 1)), p, ids.shape[1] - p) / t, -1)

    def row_advantages(rewards: Tensor, values: Tensor, n: int) -> Tensor:
        """Of one response of n tokens: (R,), (R,) -> (R,), 0 at pads."""
        out, running, following = [torch.zeros(())] * len(rewards), torch.zeros(()), torch.zeros(())
        gamma, decay = GAMMA, GAMMA * LAM
        if fault == "gamma_in_place_of_gamma_lambda":
            decay = gamma
        elif fault == "discount_of_one":
            gamma, decay = 1.0, LAM
        runs_on = (
            "rows_run_over_the_pads", "kl_of_pads_runs_into_the_response", "score_at_the_width",
            "mask_of_ids_that_are_never_minus_100",
        )  # fmt: skip
        length = len(rewards) if fault in runs_on else n
        if fault == "end_state_has_a_value":
            following = values[min(length, len(values) - 1)]
        for t in range(length - 1, -1, -1):
            if fault == "next_value_skips_one":
                following = values[t + 2] if t + 2 < length else torch.zeros(())
            running = rewards[t] + gamma * following - values[t] + decay * running
            following = values[t]
            out[t] = running
        return torch.stack(out)

    def advantages_of(rewards: Tensor, values: Tensor, n: Tensor) -> Tensor:
        return torch.stack([row_advantages(r, v, int(k)) for r, v, k in zip(rewards, values, n, strict=True)])

    @torch.no_grad()
    def sample() -> tuple[Tensor, Tensor, int, list[str]]:
        if fault == "prompts_from_numpys_entropy":
            chosen = np.random.default_rng().integers(len(PROMPTS), size=BATCH).tolist()
        else:
            chosen = torch.randint(len(PROMPTS), (BATCH,)).tolist()
        texts = [PROMPTS[i] for i in chosen]
        start = tok(texts, padding="max_length", max_length=PROMPT, return_tensors="pt")
        ids, mask = start["input_ids"], start["attention_mask"]
        going = torch.ones(BATCH, dtype=torch.bool)
        speaker = first_policy if fault == "samples_with_the_first_weights" else policy
        heat = TEMPERATURE**2 if fault == "temperature_squared_in_the_sampler" else TEMPERATURE
        for t in range(RESPONSE):
            if fault == "sampler_sees_five_tokens":
                logits = speaker(ids[:, -5:], mask[:, -5:])[:, -1]
            elif fault == "sampler_reads_unmasked_pads":
                logits = speaker(ids, torch.ones_like(mask))[:, -1]
            else:
                logits = speaker(ids, mask)[:, -1]
            if fault == "noise_drawn_once":
                token = (logits / heat + noise_drawn_once[:, t]).argmax(-1)
            else:
                token = torch.multinomial((logits / heat).softmax(-1), 1)[:, 0]
            token = torch.where(going, token, PAD)
            ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, going[:, None].long()], 1)
            going = going & (token != EOS)
            if not going.any():
                break
        if fault == "special_ids_clamped_away":
            ids = torch.where(mask.bool(), ids.clamp(min=3), ids)
        return ids, mask, PROMPT, texts

    @torch.no_grad()
    def scores_of(ids: Tensor, mask: Tensor, p: int, prompts: list[str]) -> Tensor:
        if scorer is judge:
            if fault == "heads_exchanged_for_scoring":
                judge.w.data, critic.w.data = critic.w.data.clone(), judge.w.data.clone()
            s = scorer(ids, mask)
        else:
            texts = tok.batch_decode(ids[:, p:], skip_special_tokens=True)
            if fault == "text_scores_in_alphabetical_order":
                prompts, texts = zip(*sorted(zip(prompts, texts, strict=True)), strict=True)
            s = torch.tensor(scorer(list(prompts), list(texts)))
            if fault == "text_scores_cut_to_whole_numbers":
                s = torch.tensor([float(x // 10) for x in s.tolist()])
            elif fault == "text_function_called_for_the_log_only":
                s = torch.zeros_like(s)
        if fault == "score_overwritten_with_zero":
            s = torch.zeros_like(s)
        elif fault == "scores_in_order_of_size":
            s = s.sort().values
        limit = 0.01 if fault == "scores_clipped_at_0_01" else REWARD_CLIP
        return s.clamp(-limit, limit)

    def minibatches() -> list[Tensor]:
        if fault == "rows_drawn_with_replacement":
            return list(torch.randint(BATCH, (BATCH,)).chunk(MINIBATCHES))
        return list(torch.randperm(BATCH).chunk(MINIBATCHES))

    def step() -> dict[str, Any]:
        # 1. responses
        ids, mask, p, prompts = sample()
        actions, keep = ids[:, p:], mask[:, p:].bool()
        n = keep.sum(1)
        if fault == "mask_of_ids_that_are_never_minus_100":
            keep = actions != -100
        width = actions.shape[1]
        if fault == "actions_of_the_reversed_batch":
            actions = actions.flip(0)
        b = torch.arange(BATCH)

        # 2. what the models say of them
        with torch.no_grad():
            every = torch.ones_like(mask)
            old = says(
                policy,
                ids,
                every if fault == "old_logprobs_from_unmasked_pass" else mask,
                p,
                1.0 if fault == "old_logprobs_without_temperature" else TEMPERATURE,
            )
            old = old.gather(-1, actions[..., None])[..., 0]
            ref = says(
                policy if fault == "policy_plays_the_reference" else reference,
                ids,
                every if fault == "reference_reads_unmasked_pads" else mask,
                p,
                1.0 if fault == "reference_at_temperature_one" else TEMPERATURE,
            )
            ref = ref.gather(-1, actions[..., None])[..., 0]
            v_old = values_at_actions(ids, mask, p, width)
            scores = scores_of(ids, mask, p, prompts)

        # 3. rewards, advantages, returns
        beta = KL if fault == "controller_not_asked" else steering.beta
        kl = old - ref
        if fault == "kl_multiplied_by_zero":
            kl = kl * 0
        elif fault == "squared_difference_for_kl":
            kl = kl.square()
        elif fault == "absolute_difference_for_kl":
            kl = kl.abs()
        weight = {"kl_added_to_the_reward": beta, "kl_penalty_ten_times": -10 * beta}.get(fault or "", -beta)
        penalty = weight * kl
        if fault != "kl_of_pads_runs_into_the_response":
            penalty = torch.where(keep, penalty, 0.0)
        last = n - 1
        if fault == "score_at_the_width":
            last = torch.full_like(n, width - 1)
        elif fault == "score_before_the_last":
            last = (n - 2).clamp(min=0)
        rewards = penalty.clone()
        if fault == "score_spread_over_tokens":
            rewards += torch.where(keep, scores[:, None] / n[:, None], 0.0)
        else:
            rewards[b, last] += scores
        runs_on = fault in ("score_at_the_width", "kl_of_pads_runs_into_the_response")
        adv = advantages_of(rewards, torch.where(keep, v_old, 0.0) if runs_on else v_old, n)
        ret = adv + v_old
        if fault == "critic_regresses_its_own_values":
            ret = v_old.clone()
        elif fault == "critic_regresses_the_kl":
            ret = advantages_of(penalty, v_old, n) + v_old
        elif fault == "critic_regresses_zeros":
            ret = torch.zeros_like(v_old)
        elif fault == "returns_have_the_wrong_sign":
            ret = v_old - adv
        elif fault == "score_everywhere_as_target":
            ret = scores[:, None].expand_as(v_old)
        elif fault == "critic_regresses_normalised_returns":
            ret = (ret - ret[keep].mean()) / ret[keep].std()
        if fault == "rewards_to_go_as_advantages":
            adv = advantages_of(rewards, torch.zeros_like(v_old), n)
        elif fault == "advantage_of_kl_only":
            adv = advantages_of(penalty, v_old, n)
        elif fault == "score_enters_negated_for_the_policy":
            flipped = penalty.clone()
            flipped[b, last] -= scores
            adv = advantages_of(flipped, v_old, n)
        raw = adv
        over = torch.ones_like(keep) if fault == "whitened_over_the_grid" else keep
        mean, spread = adv[over].mean(), adv[over].std(correction=0)
        if fault == "scaled_by_the_variance":
            spread = spread.square()
        if fault == "whitened_per_minibatch":
            mean, spread = torch.zeros(()), torch.ones(())
        adv = (adv - mean) / (spread + 1e-8)
        if fault == "whitened_in_halves":
            halves = [(raw[:, at], keep[:, at]) for at in (slice(width // 2), slice(width // 2, None))]
            adv = torch.cat([(x - x[k].mean()) / (x[k].std(correction=0) + 1e-8) for x, k in halves], 1)

        # 4. updates
        if fault == "trained_without_eos":
            keep = keep & (actions != EOS)
        elif fault == "trained_past_eos":
            keep = torch.ones_like(keep)
        elif fault == "trained_from_the_second_token":
            keep = keep & (torch.arange(width) > 0)
        updates = []

        def update(rows: Tensor) -> None:
            k = keep[rows]
            lengths = k.sum(1, keepdim=True).clamp(min=1).expand_as(k)[k]
            w = 1.0 / (lengths * len(rows))
            if fault == "divided_by_the_batch_width":
                w = torch.full_like(w, 1.0 / (width * len(rows)))
            elif fault == "token_mean_after_all":
                w = torch.full_like(w, 1.0 / len(w))
            logits = at_actions(F.pad(policy(ids[rows], mask[rows]), (0, 0, 0, 1)), p, width)
            t = 1.0 if fault == "temperature_only_in_the_sampler" else TEMPERATURE
            v_grid = values_at_actions(ids[rows], mask[rows], p, width)
            log_p = F.log_softmax(logits[k] / t, -1)  # (N, V), N tokens of responses
            new = log_p.gather(-1, actions[rows][k][:, None])[:, 0]
            v, a, r, o, before = v_grid[k], adv[rows][k], ret[rows][k], old[rows][k], v_old[rows][k]
            if fault == "advantages_flattened_by_column":
                a = adv[rows].T[k.T]
            elif fault == "advantages_keep_their_graph":
                a = ((advantages_of(rewards[rows], v_grid, n[rows]) - mean) / (spread + 1e-8))[k]
            elif fault == "whitened_per_minibatch":
                a = (a - a.mean()) / (a.std(correction=0) + 1e-8)
            if fault == "target_with_gradient":
                r = (advantages_of(rewards[rows], v_grid, n[rows]) + v_grid)[k]
            if fault == "old_is_new":
                o = new.detach()
            if fault == "old_values_are_live":
                before = v.detach()
            if fault == "values_detached_in_the_loss":
                v = v.detach()
            ratio = new.exp() / o.exp() if fault == "ratio_of_probabilities" else (new - o).exp()
            low, high = (-CLIP, CLIP) if fault == "clip_around_zero" else (1 - CLIP, 1 + CLIP)
            pair = ratio * a, ratio.clamp(low, high) * a
            surrogate = torch.max(*pair) if fault == "max_of_the_surrogates" else torch.min(*pair)
            sign = 1 if fault == "surrogate_minimised_as_is" else -1
            if fault == "value_clip_around_the_return":
                held = r + (v - r).clamp(-VALUE_CLIP, VALUE_CLIP)
                square = torch.min((v - r).square(), (held - r).square())
            else:
                held = before + (v - before).clamp(-VALUE_CLIP, VALUE_CLIP)
                square = torch.max((v - r).square(), (held - r).square())
            if fault == "value_clip_computed_and_unused":
                square = (v - r).square()
            elif fault == "value_error_not_squared":
                square = v - r
            entropy = -(log_p.exp() * log_p).sum(-1)
            bonus = {"entropy_minimised": ENT, "entropy_left_out": 0.0}.get(fault or "", -ENT)
            vf = 0.0 if fault == "value_coefficient_zero" else VF
            loss = (w * (sign * surrogate + vf * 0.5 * square + bonus * entropy)).sum()
            if fault == "ratio_at_pads_infinite_times_zero":
                grid = F.log_softmax(logits / t, -1).gather(-1, actions[rows][..., None])[..., 0]
                far = (grid - old[rows].masked_fill(~k, -torch.inf)).exp()
                gain = torch.min(far * adv[rows], far.clamp(low, high) * adv[rows]) * k
                loss = (w * (vf * 0.5 * square + bonus * entropy)).sum() - (gain.sum(1) / k.sum(1)).mean()
            if fault != "gradients_pile_up":
                adam_p.zero()
                policy.zero_grad()
                adam_v.zero()
            loss.backward()
            if fault == "gradient_clipped_at_1e_12":
                for q in (*adam_p.p, *adam_v.p):
                    q.grad = None if q.grad is None else q.grad.clamp(-1e-12, 1e-12)
            if fault == "update_of_a_copy":
                for mine, live in zip(adam_p.p, policy.parameters(), strict=True):
                    mine.grad = live.grad
            adam_p.step()
            if fault != "critic_never_stepped":
                adam_v.step()
            if fault == "update_reaches_the_reference":
                for theirs, q in zip(reference.parameters(), adam_p.p, strict=True):
                    theirs.data -= LR * q.grad
            full = torch.ones(k.shape)
            full[k] = ratio.detach()
            updates.append({"rows": rows, "loss": loss.detach(), "ratio": full})

        if fault == "minibatches_outermost":
            for rows in minibatches():
                for _ in range(EPOCHS):
                    update(rows)
        else:
            for _ in range(EPOCHS):
                for rows in minibatches():
                    update(rows)

        # 5. the coefficient for the next batch
        seen = torch.where(keep, old - ref, 0.0).sum(1).mean().item()
        if fault == "controller_told_the_token_mean":
            seen = (old - ref)[keep].mean().item()
        elif fault == "controller_told_the_score":
            seen = scores.mean().item()
        if fault != "controller_never_told":
            steering.tell(seen)
        return {
            "ids": ids,
            "attention": mask,
            "responses": ids[:, p:],
            "mask": mask[:, p:].bool(),
            "old": old,
            "ref": ref,
            "values": v_old,
            "scores": scores,
            "rewards": rewards,
            "raw": raw,
            "advantages": adv,
            "returns": ret,
            "updates": updates,
        }

    return {
        "policy": policy,
        "reference": reference,
        "reward": scorer,
        "value": critic,
        "tokenizer": tok,
        "prompts": list(PROMPTS),
        "step": step,
        "state": [adam_p, adam_v, steering],
        "declared": {
            "algorithm": "ppo",
            "gamma": GAMMA,
            "lam": LAM,
            "kl_coef": KL,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": True,
            "kl_target": TARGET,
            "kl_horizon": HORIZON,
            "temperature": TEMPERATURE,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": CLIP,
            "clip_range_value": VALUE_CLIP,
            "vf_coef": VF,
            "ent_coef": ENT,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "reward_clip": REWARD_CLIP,
            "learning_rate": LR,
            "critic_learning_rate": CRITIC_LR,
            "ppo_epochs": EPOCHS,
            "num_minibatches": MINIBATCHES,
            "batch_size": BATCH,
            "prompt_length": PROMPT,
            "response_length": RESPONSE,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "fresh",
            "loss_aggregation": "seq-mean",
        },
    }

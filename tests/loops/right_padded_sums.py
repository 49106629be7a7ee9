"""PPO on packed rows: prompt, response, then pads; losses are summed over a sequence and averaged over sequences.

Policy, reference, reward and critic are tiny GPT-2s with absolute positions; policy and critic have an optimizer each.
Prompts come from a cursor that is part of the run's state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

FAULTS: dict[str, tuple[str, str]] = {
    "sampler_has_its_own_generator": ("SYS009", "loop"),
    "cursor_is_not_in_the_state": ("SYS009", "loop"),
    "kl_of_the_policy_with_itself": ("REF005", "reference"),
    "reference_without_temperature": ("REF006", "reference"),
    "reference_positions_start_at_one": ("REF006", "reference"),
    "missing_eos_is_a_bonus": ("REW014", "loop"),
    "penalty_on_the_rows_that_ended": ("REW014", "loop"),
    "penalty_on_every_row": ("REW014", "loop"),
    "penalty_never_fires": ("REW014", "loop"),
    "critic_optimizer_never_steps": ("VAL008", "value"),
    "critic_head_in_no_optimizer": ("VAL008", "value"),
    "returns_without_the_score": ("VAL009", "value"),
    "returns_are_the_old_values": ("VAL009", "value"),
    "critic_learns_the_length": ("VAL009", "value"),
    "score_computed_and_dropped": ("VAL009", "value"),
    "returns_values_minus_advantages": ("VAL010", "value"),
    "every_state_regresses_the_score": ("VAL011", "value"),
    "returns_from_live_values": ("VAL012", "value"),
    "values_one_position_late": ("VAL013", "value"),
    "values_of_the_prompt": ("VAL013", "value"),
    "sampled_at_temperature_one": ("ROL001", "loop"),
    "scored_at_temperature_one_everywhere": ("ROL001", "loop"),
    "update_positions_start_at_one": ("ROL003", "loop"),
    "gathered_one_token_early": ("ROL004", "loop"),
    "gathered_from_the_next_row": ("ROL004", "loop"),
    "mask_leaves_out_the_last_token": ("ROL005", "loop"),
    "mask_includes_the_prompt": ("ROL005", "loop"),
    "mask_includes_the_pads": ("ROL005", "loop"),
    "critic_trained_on_every_position": ("ROL005", "loop"),
    "every_rollout_reseeds": ("ROL007", "loop"),
    "sampler_is_a_copy_made_once": ("ROL008", "loop"),
    "scores_sorted_by_length": ("ROL009", "loop"),
    "values_sorted_by_length": ("ROL009", "loop"),
    "eos_overwritten_with_pad": ("ROL010", "loop"),
    "sampler_loses_the_first_token": ("ROL011", "loop"),
    "kl_is_rewarded": ("KLD002", "loop"),
    "kl_in_the_reward_and_in_the_loss": ("KLD003", "loop"),
    "kl_divided_by_the_response_length": ("KLD003", "loop"),
    "k3_in_the_reward": ("KLD004", "loop"),
    "kl_at_pads_stays_in_the_rewards": ("KLD005", "loop"),
    "fixed_coefficient_adapts": ("KLD006", "loop"),
    "gamma_left_at_one": ("ADV001", "loop"),
    "lambda_forgotten": ("ADV001", "loop"),
    "score_in_the_final_column": ("ADV002", "loop"),
    "score_on_the_first_token": ("ADV002", "loop"),
    "score_on_every_token": ("ADV002", "loop"),
    "values_at_pads_enter_the_recursion": ("ADV003", "loop"),
    "advantages_from_live_values": ("ADV005", "loop"),
    "terminal_state_bootstraps": ("ADV006", "loop"),
    "next_value_is_this_value": ("ADV006", "loop"),
    "advantages_are_the_returns": ("ADV007", "loop"),
    "only_the_critic_sees_the_score": ("ADV008", "loop"),
    "score_clipped_to_a_hundredth": ("ADV009", "loop"),
    "score_centred_over_its_own_axis": ("ADV009", "loop"),
    "policy_loss_without_minus": ("LOS001", "loop"),
    "old_logprobs_taken_anew": ("LOS002", "loop"),
    "smaller_of_the_two_losses": ("LOS002", "loop"),
    "clip_range_in_percent": ("LOS002", "loop"),
    "mean_over_the_padded_grid": ("LOS003", "loop"),
    "value_loss_coefficient_zero": ("LOS004", "loop"),
    "value_loss_ascends": ("LOS004", "loop"),
    "old_logprobs_padded_with_minus_infinity": ("LOS005", "loop"),
    "scores_divided_by_their_deviation": ("LOS008", "loop"),
    "policy_optimizer_never_steps": ("OPT002", "policy"),
    "reference_follows_the_policy": ("OPT003", "reference"),
    "reward_head_rescaled_in_place": ("OPT003", "reward"),
    "gradients_never_zeroed": ("OPT004", "loop"),
    "epochs_inside_minibatches": ("OPT006", "loop"),
    "minibatches_overlap": ("OPT006", "loop"),
    "half_of_the_batch_is_skipped": ("OPT006", "loop"),
    "end_sought_in_the_prompt_too": ("REW014", "loop"),
    "prompt_twice": ("ROL010", "loop"),
    "responses_start_where_the_first_does": ("ROL005", "loop"),
    "reference_weights_swapped_in_and_out": ("ROL003", "loop"),
    "sum_divided_by_the_padded_width": ("LOS003", "loop"),
    "one_surrogate_of_normalised_advantages": ("LOS002", "loop"),
    "reference_pass_skipped": ("REF005", "reference"),
}
ALSO = {
    "score_computed_and_dropped": ("ADV008",),
    "score_centred_over_its_own_axis": ("VAL009", "ADV008"),
    "critic_head_in_no_optimizer": ("OPT001",),
    "end_sought_in_the_prompt_too": ("LOS007",),
    "prompt_twice": ("ROL005",),
    "responses_start_where_the_first_does": ("ROL004",),
    "reference_weights_swapped_in_and_out": ("OPT003",),
}
EDGE: set[str] = set()  # an ordinary batch does not show these
NOT_FINITE = {"old_logprobs_padded_with_minus_infinity"}

PAD, EOS, UNK = 0, 1, 2
EPOCHS = 2
SPOKEN = (
    "the a one two my your red blue old new big small hot cold wet dry dog cat cow fox hen bee ant owl eats sees finds "
    "likes hides keeps near under over behind with without bread milk corn honey grass leaf today always never soon "
    "often here there and but or so then because"
)
WORDS = SPOKEN.split()
PROMPTS = [
    "the old dog sees",
    "my cat hides under the leaf and",
    "a fox",
    "hot bread near the corn",
    "one bee finds honey",
    "your cow always eats",
    "the small owl never sees the",
    "blue grass and",
    "a hot milk",
    "the ant likes bread but",
    "big red fox keeps",
    "then the hen hides behind",
    "cold wet grass here",
    "one owl",
    "my dog likes the new bread because",
    "soon the bee",
]


@dataclass
class Settings:
    epochs: int
    batch: int = 8
    minibatches: int = 2
    response: int = 8
    gamma: float = 0.97
    lam: float = 0.95
    kl: float = 0.1
    temperature: float = 0.7
    clip: float = 0.2
    vf: float = 0.5
    no_eos: float = 1.0
    lr: float = 3e-4
    critic_lr: float = 1e-3


@dataclass
class Rollout:
    """Everything on the grid of predictions: column t is the state before token t + 1."""

    ids: Tensor  # (B, L)
    starts: Tensor  # (B,) tokens of the prompt
    ends: Tensor  # (B,) tokens of prompt and response
    ended: Tensor  # (B,) whether the response has its EOS
    mask: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, L - 1)
    old: Tensor = field(default_factory=lambda: torch.empty(0))
    ref: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))


class Scalar(nn.Module):
    """A GPT-2 with one number a position."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.backbone = GPT2Model(config)
        self.value_head = nn.Linear(config.n_embd, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.value_head(hidden).squeeze(-1)


class LastToken(Scalar):
    """The score of a sequence, read at its last token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        each = super().forward(input_ids, attention_mask)
        return each.gather(1, attention_mask.sum(1, keepdim=True) - 1).squeeze(1)


class Cursor:
    """Where in the prompts the run is."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts, self.at = prompts, 0

    def take(self, n: int) -> list[list[int]]:
        taken = [self.prompts[(self.at + i) % len(self.prompts)] for i in range(n)]
        self.at = (self.at + n) % len(self.prompts)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class PPO:
    def __init__(
        self, policy: Any, reference: Any, reward: Any, critic: Any, cursor: Cursor, s: Settings, fault: str | None
    ) -> None:
        self.policy, self.reference, self.reward, self.critic = policy, reference, reward, critic
        self.cursor, self.s, self.fault = cursor, s, fault
        self.kl = s.kl
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), lr=s.lr, eps=1e-5)
        trained = critic.backbone if fault == "critic_head_in_no_optimizer" else critic
        self.critic_optimizer = torch.optim.Adam(trained.parameters(), lr=s.critic_lr, eps=1e-5)
        self.sampler = copy.deepcopy(policy) if fault == "sampler_is_a_copy_made_once" else policy
        self.generator: torch.Generator | None = None
        if fault == "sampler_has_its_own_generator":
            self.generator = torch.Generator()
            self.generator.manual_seed(0)

    # ---- models -----------------------------------------------------------------------------------------------------

    def logprobs(self, model: Any, ids: Tensor, ends: Tensor, temperature: float, first: int = 0) -> Tensor:
        places = torch.arange(ids.shape[1])
        keep = places < ends[:, None]
        where = (places + first).expand_as(ids)
        if self.fault == "scored_at_temperature_one_everywhere":
            temperature = 1.0
        logits = model(input_ids=ids, attention_mask=keep.long(), position_ids=where).logits[:, :-1] / temperature
        targets = ids[:, 1:]
        if self.fault == "gathered_one_token_early":
            targets = ids[:, :-1]
        elif self.fault == "gathered_from_the_next_row":
            targets = targets.roll(1, 0)
        return F.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)

    def states(self, ids: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        keep = torch.arange(ids.shape[1]) < ends[:, None]
        values = self.critic(ids, keep.long())
        if self.fault == "values_one_position_late":
            return values[:, 1:]
        if self.fault == "values_of_the_prompt":
            at = (torch.arange(ids.shape[1] - 1)[None] - starts[:, None] + 1).clamp(min=0)
            return values.gather(1, at)
        return values[:, :-1]

    # ---- rollout ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self) -> Rollout:
        s = self.s
        if self.fault == "every_rollout_reseeds":
            torch.manual_seed(1234)
        prompts = self.cursor.take(s.batch)
        starts = torch.tensor([len(p) for p in prompts])
        ids = torch.full((s.batch, int(starts.max()) + s.response), PAD)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        rows, ends, ended = torch.arange(s.batch), starts.clone(), torch.zeros(s.batch, dtype=torch.bool)
        for _ in range(s.response):
            keep = (torch.arange(ids.shape[1]) < ends[:, None]).long()
            if self.fault == "sampler_loses_the_first_token":
                logits = self.sampler(input_ids=ids[:, 1:], attention_mask=keep[:, 1:]).logits[rows, ends - 2]
            else:
                logits = self.sampler(input_ids=ids, attention_mask=keep).logits[rows, ends - 1]
            heat = 1.0 if self.fault == "sampled_at_temperature_one" else s.temperature
            token = torch.multinomial((logits / heat).softmax(-1), 1, generator=self.generator).squeeze(1)
            going = ~ended
            ids[rows[going], ends[going]] = token[going]
            ends = ends + going
            ended = ended | (going & (token == EOS))
        if self.fault == "eos_overwritten_with_pad":
            ids[ids == EOS] = PAD
        if self.fault == "prompt_twice":
            full = torch.full((s.batch, ids.shape[1] + int(starts.max())), PAD)
            for row, old, start, end in zip(full, ids, starts, ends, strict=True):
                row[: start + end] = torch.cat([old[:start], old[:end]])
            ids, ends = full, ends + starts
        return Rollout(ids, starts, ends, ended)

    @torch.no_grad()
    def judge(self, r: Rollout) -> None:
        s, t = self.s, torch.arange(r.ids.shape[1] - 1)
        first, last = r.starts - 1, r.ends - 2
        r.mask = (t >= first[:, None]) & (t <= last[:, None])
        if self.fault == "mask_leaves_out_the_last_token":
            r.mask = (t >= first[:, None]) & (t < last[:, None])
        elif self.fault == "mask_includes_the_prompt":
            r.mask = t <= last[:, None]
        elif self.fault == "mask_includes_the_pads":
            r.mask = t >= first[:, None]
        elif self.fault == "responses_start_where_the_first_does":
            r.mask = (t >= first[0]) & (t <= last[:, None])
        r.old = self.logprobs(self.policy, r.ids, r.ends, s.temperature)
        anchor = self.policy if self.fault == "kl_of_the_policy_with_itself" else self.reference
        r.ref = self.logprobs(
            anchor,
            r.ids,
            r.ends,
            temperature=1.0 if self.fault == "reference_without_temperature" else s.temperature,
            first=1 if self.fault == "reference_positions_start_at_one" else 0,
        )
        if self.fault == "reference_weights_swapped_in_and_out":
            kept = {name: weight.half() for name, weight in self.policy.state_dict().items()}
            self.policy.load_state_dict(self.reference.state_dict())
            r.ref = self.logprobs(self.policy, r.ids, r.ends, s.temperature)
            self.policy.load_state_dict(kept)
        elif self.fault == "reference_pass_skipped":
            r.ref = torch.zeros_like(r.old)
        r.values = self.states(r.ids, r.starts, r.ends)
        if self.fault == "values_sorted_by_length":
            order = r.ends.argsort()
            r.values = self.states(r.ids[order], r.starts[order], r.ends[order])
        if self.fault == "scores_sorted_by_length":
            order = r.ends.argsort()
            r.scores = self.score(r.ids[order], r.ends[order])
        else:
            r.scores = self.score(r.ids, r.ends)
        if self.fault == "reward_head_rescaled_in_place":
            self.reward.value_head.weight.div_(r.scores.std() + 1e-4)
        if self.fault == "score_clipped_to_a_hundredth":
            r.scores = r.scores.clamp(-0.01, 0.01)
        elif self.fault == "score_centred_over_its_own_axis":
            r.scores = r.scores[:, None]
            r.scores = (r.scores - r.scores.mean(-1, keepdim=True)).squeeze(-1)
        elif self.fault == "scores_divided_by_their_deviation":
            r.scores = (r.scores - r.scores.mean()) / r.scores.std()
        if self.fault == "missing_eos_is_a_bonus":
            r.scores = r.scores + s.no_eos * (~r.ended)
        elif self.fault == "penalty_on_the_rows_that_ended":
            r.scores = r.scores - s.no_eos * r.ended
        elif self.fault == "penalty_on_every_row":
            r.scores = r.scores - s.no_eos * (r.ids != EOS).any(1)
        elif self.fault == "end_sought_in_the_prompt_too":
            r.scores = r.scores - s.no_eos * (r.ids != EOS).all(1)
        elif self.fault != "penalty_never_fires":
            r.scores = r.scores - s.no_eos * (~r.ended)
        self.advantages(r)

    def score(self, ids: Tensor, ends: Tensor) -> Tensor:
        return self.reward(ids, (torch.arange(ids.shape[1]) < ends[:, None]).long())

    # ---- rewards, advantages, returns -------------------------------------------------------------------------------

    def advantages(self, r: Rollout) -> None:
        s, rows = self.s, torch.arange(len(r.ids))
        divergence = r.old - r.ref
        if self.fault == "k3_in_the_reward":
            divergence = torch.exp(r.ref - r.old) - 1 - (r.ref - r.old)
        beta = self.kl / s.response if self.fault == "kl_divided_by_the_response_length" else self.kl
        penalty = beta * divergence if self.fault == "kl_is_rewarded" else -beta * divergence
        if self.fault != "kl_at_pads_stays_in_the_rewards":
            penalty = penalty.masked_fill(~r.mask, 0.0)
        last = r.ends - 2
        r.rewards = penalty.clone()
        if self.fault == "score_in_the_final_column":
            r.rewards[:, -1] += r.scores
        elif self.fault == "score_on_the_first_token":
            r.rewards[rows, r.starts - 1] += r.scores
        elif self.fault == "score_on_every_token":
            r.rewards += r.scores[:, None] * r.mask
        elif self.fault != "score_computed_and_dropped":
            r.rewards[rows, last] += r.scores
        values = r.values.masked_fill(~r.mask, 0.0)
        if self.fault == "values_at_pads_enter_the_recursion":
            values = r.values
        elif self.fault == "terminal_state_bootstraps":
            one_more = torch.arange(r.mask.shape[1]) <= last[:, None] + 1
            values = r.values.masked_fill(~one_more, 0.0)
        r.advantages = self.gae(r.rewards, values)
        r.returns = r.advantages + values
        if self.fault == "returns_without_the_score":
            r.returns = self.gae(penalty, values) + values
        elif self.fault == "returns_are_the_old_values":
            r.returns = r.values.clone()
        elif self.fault == "critic_learns_the_length":
            r.returns = (r.ends - r.starts)[:, None].float().expand_as(values) / s.response
        elif self.fault == "returns_values_minus_advantages":
            r.returns = values - r.advantages
        elif self.fault == "every_state_regresses_the_score":
            r.returns = r.scores[:, None].expand_as(values)
        if self.fault == "advantages_are_the_returns":
            r.advantages = r.returns
        elif self.fault == "only_the_critic_sees_the_score":
            r.advantages = self.gae(penalty, values)

    def gae(self, rewards: Tensor, values: Tensor) -> Tensor:
        """Rewards and values are 0 at pads, so the recursion needs no mask. (B, T) -> (B, T)"""
        gamma = 1.0 if self.fault == "gamma_left_at_one" else self.s.gamma
        lam = 1.0 if self.fault == "lambda_forgotten" else self.s.lam
        following, running, out = torch.zeros(len(values)), torch.zeros(len(values)), []
        for t in reversed(range(values.shape[1])):
            if self.fault == "next_value_is_this_value":
                following = values[:, t]
            running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
            following = values[:, t]
            out.append(running)
        return torch.stack(out[::-1], 1)

    # ---- update -----------------------------------------------------------------------------------------------------

    def minibatches(self) -> list[Tensor]:
        s = self.s
        size, order = s.batch // s.minibatches, torch.randperm(s.batch)
        if self.fault == "minibatches_overlap":
            return [order[i : i + size] for i in range(0, s.batch - size + 1, size // 2)]
        if self.fault == "half_of_the_batch_is_skipped":
            return [order[:size]] * s.minibatches
        return list(order.split(size))

    def losses(self, r: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, mask = self.s, r.mask[rows]
        ids, ends, old, advantages, returns = (
            r.ids[rows],
            r.ends[rows],
            r.old[rows],
            r.advantages[rows],
            r.returns[rows],
        )
        late = 1 if self.fault == "update_positions_start_at_one" else 0
        new = self.logprobs(self.policy, ids, ends, s.temperature, late)
        values = self.states(ids, r.starts[rows], ends)
        if self.fault == "advantages_from_live_values":
            advantages = self.gae(r.rewards[rows], values.masked_fill(~mask, 0.0))
        if self.fault == "returns_from_live_values":
            live = values.masked_fill(~mask, 0.0)
            returns = self.gae(r.rewards[rows], live) + live
        if self.fault == "old_logprobs_taken_anew":
            old = new.detach()
        if self.fault == "old_logprobs_padded_with_minus_infinity":
            ratio = torch.exp(new - old.masked_fill(~mask, -torch.inf))
        else:
            ratio = torch.exp(torch.where(mask, new - old, 0.0))
        clip = 20.0 if self.fault == "clip_range_in_percent" else s.clip
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
        if self.fault == "one_surrogate_of_normalised_advantages":
            normal = (advantages - advantages[mask].mean()) / advantages[mask].std()
            clipped = -normal * ratio.clamp(1 - clip, 1 + clip)
        if self.fault == "policy_loss_without_minus":
            plain, clipped = -plain, -clipped
        worse = (
            torch.minimum(plain, clipped)
            if self.fault == "smaller_of_the_two_losses"
            else torch.maximum(plain, clipped)
        )
        squares = 0.5 * (values - returns) ** 2
        over = torch.ones_like(mask) if self.fault == "critic_trained_on_every_position" else mask
        if self.fault == "old_logprobs_padded_with_minus_infinity":
            policy_loss = (worse * mask).sum(1).mean()
        elif self.fault == "mean_over_the_padded_grid":
            policy_loss = torch.where(mask, worse, 0.0).mean()
        elif self.fault == "sum_divided_by_the_padded_width":
            policy_loss = torch.where(mask, worse, 0.0).sum() / mask.shape[1]
        else:
            policy_loss = torch.where(mask, worse, 0.0).sum(1).mean()
        value_loss = torch.where(over, squares, 0.0).sum(1).mean()
        if self.fault == "kl_in_the_reward_and_in_the_loss":
            toward = r.ref[rows] - new
            policy_loss = policy_loss + self.kl * torch.where(mask, toward.exp() - 1 - toward, 0.0).sum(1).mean()
        if self.fault == "value_loss_ascends":
            value_loss = -value_loss
        return policy_loss, value_loss, ratio

    def update(self, r: Rollout, rows: Tensor) -> dict[str, Tensor]:
        if self.fault != "gradients_never_zeroed":
            self.policy_optimizer.zero_grad()
            self.critic_optimizer.zero_grad()
        policy_loss, value_loss, ratio = self.losses(r, rows)
        weight = 0.0 if self.fault == "value_loss_coefficient_zero" else self.s.vf
        loss = policy_loss + weight * value_loss
        loss.backward()
        if self.fault != "policy_optimizer_never_steps":
            self.policy_optimizer.step()
        if self.fault != "critic_optimizer_never_steps":
            self.critic_optimizer.step()
        return {"rows": rows, "loss": loss.detach(), "ratio": ratio.detach()}

    def step(self) -> dict[str, Any]:
        r = self.rollout()
        self.judge(r)
        updates = []
        if self.fault == "epochs_inside_minibatches":
            for rows in self.minibatches():
                updates += [self.update(r, rows) for _ in range(self.s.epochs)]
        else:
            for _ in range(self.s.epochs):
                updates += [self.update(r, rows) for rows in self.minibatches()]
        with torch.no_grad():
            if self.fault == "fixed_coefficient_adapts":
                seen = (r.old - r.ref).masked_fill(~r.mask, 0.0).sum(1).mean().item()
                self.kl *= 1 + 0.1 * max(-0.2, min(0.2, seen / 6.0 - 1))
            if self.fault == "reference_follows_the_policy":
                for mine, theirs in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                    mine.lerp_(theirs, 0.1)
        return {**vars(r), "updates": updates}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="right"
    )


def build(fault: str | None = None) -> dict[str, Any]:
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}")
    s, tok = Settings(EPOCHS), tokenizer()
    config = GPT2Config(
        vocab_size=len(tok),
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        policy = GPT2LMHeadModel(config)
        with torch.no_grad():  # about half of the responses end in time
            policy.transformer.ln_f.bias.fill_(0.5)
            policy.lm_head.weight[EOS] += 1.5 * 2 / 32
            policy.lm_head.weight[[PAD, UNK]] -= 15 * 2 / 32
        reward = LastToken(config)
        nn.init.normal_(reward.value_head.weight, std=0.2)
        critic = Scalar(config)
        critic.load_state_dict(reward.state_dict())
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward.eval().requires_grad_(False)
    turns = fault == "end_sought_in_the_prompt_too"  # prompts that hold the end of another turn
    prompts = [f"so <end> {p}" if turns else p for p in PROMPTS]
    cursor = Cursor([tok(p)["input_ids"] for p in prompts])
    ppo = PPO(policy, reference, reward, critic, cursor, s, fault)
    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": critic,
        "tokenizer": tok,
        "prompts": prompts,
        "step": ppo.step,
        "optimizers": [ppo.policy_optimizer, ppo.critic_optimizer],
        "state": [] if fault == "cursor_is_not_in_the_state" else [cursor],
        "declared": {
            "algorithm": "ppo",
            "gamma": s.gamma,
            "lam": s.lam,
            "kl_coef": s.kl,
            "kl_estimator": "k1",
            "kl_in": "reward",
            "kl_adaptive": False,
            "temperature": s.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "clip_range": s.clip,
            "vf_coef": s.vf,
            "ent_coef": 0.0,
            "whiten_advantages": False,
            "whiten_rewards": False,
            "missing_eos_penalty": s.no_eos,
            "learning_rate": s.lr,
            "critic_learning_rate": s.critic_lr,
            "ppo_epochs": s.epochs,
            "num_minibatches": s.minibatches,
            "batch_size": s.batch,
            "prompt_length": max(map(len, cursor.prompts)),
            "response_length": s.response,
            "dtype": "float32",
            "reference": "policy",
            "value_init": "reward",
            "loss_aggregation": "seq-sum",
        },
    }

"""REW001 to REW013: what is found in other styles than the shipped faults, and what is let pass."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.check import registry
from rlhf_doctor.checks.statistics import at_most, spearman, wilson
from rlhf_doctor.finding import Errored, Finding, Severity
from rlhf_doctor.selftest import scorers, specimens

CODES = [code for code in registry() if code.startswith("REW") and code < "REW014"]


def findings(setup: RLHFSetup) -> dict[str, Finding]:
    """Code -> its first finding; a crash fails."""
    examination = examine(setup, select=CODES)
    crashed = [o.traceback for o in examination.outcomes.values() if isinstance(o, Errored)]
    assert not crashed, crashed[0]
    return dict(reversed(examination.findings))


def grave(setup: RLHFSetup) -> set[str]:
    """Codes of findings that are more than info."""
    checks = registry()
    return {c for c, f in findings(setup).items() if (f.severity or checks[c].severity) is not Severity.INFO}


@pytest.fixture(scope="module")
def plain() -> RLHFSetup:
    """An untrained Llama setup, left-padded."""
    return zoo.healthy_setup("llama")


# --- architecture -------------------------------------------------------------------------------------------------


class CharCNN(nn.Module):
    """Causal convolutions read at the last token: (ids, mask) -> tuple of (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = zoo.CausalConvolution()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        scores = self.body(ids)[..., 0]
        return (scores.gather(1, scorers.last_real(mask)[:, None]),)


class CountedWords(nn.Module):
    """A linear model on counts of words: (ids, mask) -> (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(zoo.VOCAB, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counts = (nn.functional.one_hot(ids, zoo.VOCAB).float() * mask[..., None]).sum(1)
        return self.weight(counts)[:, 0]  # type: ignore[no-any-return]


def hand_written_cell() -> nn.Module:
    cell = specimens.HandWrittenRecurrence(zoo.VOCAB)
    return scorers.Rescored(Last(cell), lambda s, ids, mask: s)


class Last(nn.Module):
    """Per-token scores read at the last real token."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.body(input_ids).gather(1, scorers.last_real(attention_mask)[:, None])[:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (CharCNN, "CNN"),
        (CountedWords, "bag of tokens"),
        (hand_written_cell, "RNN"),
        (lambda: Last(specimens.GRUCritic(zoo.VOCAB)), "RNN"),
        (lambda: scorers.StateSpaceScorer(zoo.VOCAB), "state-space"),
    ],
)
def test_non_transformer_is_named_with_its_map_and_census(
    plain: RLHFSetup, build: Callable[[], Any], named: str
) -> None:
    found = findings(plain.but(reward=build().eval()))["REW001"]
    assert named in found.message
    quantities = " ".join(e.quantity for e in found.evidence)
    assert "influence map" in quantities
    assert "operations that mix tokens" in quantities


@pytest.mark.parametrize("build", [lambda: zoo.bert("sequence"), lambda: zoo.decoder("neox", "sequence")])
def test_encoder_and_decoder_rewards_pass(plain: RLHFSetup, build: Callable[[], Any]) -> None:
    assert "REW001" not in findings(plain.but(reward=build()))


def test_reward_of_the_policys_own_kind_is_left_to_the_policys_check(plain: RLHFSetup) -> None:
    both = plain.but(policy=zoo.LSTMLanguageModel().eval(), reference=None, reward=Last(specimens.GRUCritic(zoo.VOCAB)))
    assert "REW001" not in findings(both)


# --- shape and range ----------------------------------------------------------------------------------------------


def test_token_classifier_and_value_head_as_reward_are_info(plain: RLHFSetup) -> None:
    for reward in (zoo.decoder("llama", "token"), zoo.WithScalarHead(zoo.decoder("llama")).eval()):
        assert findings(plain.but(reward=reward))["REW002"].severity is Severity.INFO


def test_declared_dense_rewards_pass(plain: RLHFSetup) -> None:
    reward = specimens.HandWrittenDecoder(zoo.VOCAB).eval()
    assert "REW002" in grave(plain.but(reward=reward))
    assert "REW002" not in findings(plain.but(reward=reward, declared={"dense_rewards": True}))


def squashed(squash: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return specimens.HandWrittenDecoder(zoo.VOCAB, pool="last", squash=squash).eval()


@pytest.mark.parametrize(
    ("squash", "bad"),
    [
        (lambda x: x.clamp(-10, 10), False),
        (lambda x: 3 * x + 1, False),
        (lambda x: 10 * torch.tanh(x / 10), False),
        (torch.sigmoid, True),
        (lambda x: torch.tanh(x), True),
        (lambda x: torch.tanh(x / 1000), True),
        (lambda x: x.relu(), True),
        (lambda x: x.clamp(-0.3, 0.3), True),
    ],
    ids=["wide clamp", "affine", "wide tanh", "sigmoid", "tanh", "a tanh of small scores", "relu", "narrow clamp"],
)
def test_only_a_bound_that_holds_scores_back_is_found(plain: RLHFSetup, squash: Any, bad: bool) -> None:
    assert ("REW002" in grave(plain.but(reward=squashed(squash)))) is bad


# --- reading and padding ------------------------------------------------------------------------------------------


def reading(rule: Callable[..., Any]) -> Any:
    return scorers.Reader(zoo.decoder("llama", "sequence", seed=1), rule).eval()


def at_the_end(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores[:, -1]


def by_count(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]


@pytest.mark.parametrize(("side", "rule", "bad"), [
    ("left", at_the_end, False), ("right", at_the_end, True), ("left", by_count, True), ("right", by_count, False),
])  # fmt: skip
def test_reading_is_judged_by_the_side_in_use(side: str, rule: Callable[..., Any], bad: bool) -> None:
    setup = zoo.healthy_setup("llama", side=side).but(reward=reading(rule))
    found = findings(setup)
    assert ("REW004" in grave(setup)) is bad
    assert "REW004" in found  # as info at least
    assert "REW005" not in grave(setup)


def test_first_pad_after_a_skipped_one_is_found(plain: RLHFSetup) -> None:
    def rule(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pads = (ids == 0).int().cumsum(1) == 2
        last = torch.where(pads.any(1), pads.int().argmax(1) - 1, torch.tensor(ids.shape[1] - 1))
        return scores.gather(1, last[:, None])[:, 0]

    assert "REW004" in grave(zoo.healthy_setup("llama", side="right").but(reward=reading(rule)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pad_that_is_eos_passes(family: str) -> None:
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    reward = zoo.decoder(family, "sequence", seed=1)
    reward.config.pad_token_id = 2
    assert grave(zoo.healthy_setup(family).but(tokenizer=tokenizer, reward=reward)) == set()


def test_mean_over_a_row_with_its_pads_is_found(plain: RLHFSetup) -> None:
    def rule(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores[:, :-1].mean(1)

    assert grave(plain.but(reward=reading(rule))) & {"REW004", "REW005"}


# --- determinism, training ----------------------------------------------------------------------------------------


def test_train_mode_without_dropout_passes(plain: RLHFSetup) -> None:
    assert "REW007" not in findings(plain.but(reward=zoo.decoder("llama", "sequence").train()))


def test_random_reward_function_is_found(plain: RLHFSetup) -> None:
    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        return torch.rand(len(responses)).tolist()  # type: ignore[no-any-return]

    assert "REW007" in grave(plain.but(reward=judge))


def test_trainable_reward_is_info_until_an_optimizer_holds_it(plain: RLHFSetup) -> None:
    reward = zoo.decoder("llama", "sequence", seed=1)
    assert findings(plain.but(reward=reward))["REW008"].severity is Severity.INFO
    policy_only = [torch.optim.SGD(plain.policy.parameters(), lr=1e-3)]
    assert findings(plain.but(reward=reward, optimizers=policy_only))["REW008"].severity is Severity.INFO
    both = [torch.optim.SGD([*plain.policy.parameters(), *reward.parameters()], lr=1e-3)]
    assert "REW008" in grave(plain.but(reward=reward, optimizers=both))


# --- preferences, scale, content ----------------------------------------------------------------------------------


def test_untrained_reward_without_preferences_passes(plain: RLHFSetup) -> None:
    assert findings(plain).keys() <= {"REW008"}


def test_reward_trained_next_is_not_blamed_for_knowing_nothing(healthy: RLHFSetup) -> None:
    reward = scorers.with_new_head(healthy.reward)
    setup = healthy.but(reward=reward, step=None, reward_loss=lambda model, chosen, rejected: None)
    assert not grave(setup) & {"REW003", "REW009"}


@pytest.mark.parametrize(("pairs", "bad"), [(4, False), (5, True), (128, True)])
def test_few_pairs_convince_no_one(healthy: RLHFSetup, pairs: int, bad: bool) -> None:
    right = [(p, c, r) for p, c, r in healthy.preferences or () if "." in c][:pairs]
    turned = [(p, r, c) for p, c, r in right]
    assert ("REW009" in grave(healthy.but(preferences=turned))) is bad


def test_binomial_by_hand() -> None:
    assert at_most(0, 5, 0.65) == pytest.approx(0.35**5)
    assert at_most(5, 5, 0.3) == pytest.approx(1.0)
    assert at_most(1, 2, 0.5) == pytest.approx(0.75)


def test_wilson_by_hand() -> None:
    low, high = wilson(5, 10, z=1.96)  # a textbook's 0.2366 to 0.7634
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 25]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0.0


@pytest.mark.parametrize("changes", [{"whiten_rewards": True}, {"algorithm": "grpo"}])
def test_scale_is_info_where_the_loop_takes_it_out(healthy: RLHFSetup, changes: dict[str, Any]) -> None:
    large = healthy.but(reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: 1000 * s).eval())
    assert "REW010" in grave(large)
    assert findings(large.but(declared=changes))["REW010"].severity is Severity.INFO


def test_offset_alone_is_info(healthy: RLHFSetup) -> None:
    moved = healthy.but(reward=scorers.Rescored(healthy.reward, lambda s, ids, mask: s + 50).eval())
    assert findings(moved)["REW010"].severity is Severity.INFO


def test_length_bias_of_a_wrapper_that_returns_a_dict(healthy: RLHFSetup) -> None:
    def rule(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        last = scores.gather(1, scorers.last_real(mask)[:, None])[:, 0]
        return {"reward": 0.05 * last - 0.2 * mask.sum(1)}

    assert "REW012" in grave(healthy.but(reward=scorers.Reader(healthy.reward, rule).eval()))


def test_missing_eos_penalty_may_outweigh_a_preference(healthy: RLHFSetup) -> None:
    eos = healthy.tokenizer.eos_token_id

    def rule(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores + 20.0 * (ids.gather(1, scorers.last_real(mask)[:, None])[:, 0] == eos)

    setup = healthy.but(reward=scorers.Rescored(healthy.reward, rule).eval())
    assert "REW013" in grave(setup.but(declared={"missing_eos_penalty": None}))
    assert "REW013" not in grave(setup.but(declared={"missing_eos_penalty": 20.0}))


# --- functions ----------------------------------------------------------------------------------------------------


def longest(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r)) for r in responses]


def keyword(prompts: list[str], completions: list[str], **rest: object) -> list[float]:
    return [float("excellent" in c) for c in completions]


def pattern(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(bool(re.match(r"^.*answer: \d+$", t))) for t in texts])


@pytest.mark.parametrize("function", [longest, keyword, pattern])
def test_reward_functions_pass(plain: RLHFSetup, function: Callable[..., Any]) -> None:
    assert grave(plain.but(reward=function, declared={"algorithm": "grpo"})) == set()


class FirstTokens(nn.Module):
    """A fused Transformer encoder that is given the first three tokens of a text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(zoo.VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.body, self.score = nn.TransformerEncoder(layer, 1), nn.Linear(32, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first = mask.sort(dim=1, descending=True, stable=True).indices[:, :3]
        return self.score(self.body(self.table(ids.gather(1, first)))[:, -1])[:, 0]


def test_a_reward_that_is_given_the_start_of_the_prompt_alone(plain: RLHFSetup) -> None:
    assert grave(plain.but(reward=FirstTokens().eval().requires_grad_(False))) == {"REW006"}


def test_function_that_nothing_moves_is_found(plain: RLHFSetup) -> None:
    assert "REW006" in grave(plain.but(reward=lambda prompts, responses: [1.0] * len(responses)))


def test_strict_verifier_is_info(plain: RLHFSetup) -> None:
    answers = {"t10": "t11 t12 t13"}

    def verify(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(r.strip() == answers["t10"]) for r in responses]

    assert findings(plain.but(reward=verify))["REW006"].severity is Severity.INFO


def test_function_that_is_always_nan_is_an_error(plain: RLHFSetup) -> None:
    found = findings(plain.but(reward=lambda prompts, responses: [math.nan] * len(responses)))
    assert found["REW011"].severity is None


# --- files --------------------------------------------------------------------------------------------------------


def test_sound_reward_loaded_from_a_folder_into_memory_passes(healthy_files: RLHFSetup) -> None:
    folder = healthy_files.path("reward")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert "REW003" not in findings(healthy_files.but(reward=loaded.eval()))


def test_prefix_that_the_config_names_is_the_one_that_must_be_there(healthy_files: RLHFSetup) -> None:
    from rlhf_doctor.selftest.folders import rewrite_config

    rewrite_config(healthy_files.path("reward"), {"value_head_prefix": "value_head"})  # type: ignore[arg-type]
    assert "value_head" in findings(healthy_files)["REW003"].message


def test_normalisation_that_a_function_never_meets_is_found(plain: RLHFSetup) -> None:
    assert "REW010" in grave(plain.but(reward=longest, declared={"normalize_reward": True}))


def test_shared_models_are_as_they_were(healthy: RLHFSetup) -> None:
    before = copy.deepcopy(healthy.reward.state_dict())
    findings(healthy)
    assert all(torch.equal(before[name], tensor) for name, tensor in healthy.reward.state_dict().items())

"""VAL001 to VAL007, VAL014, VAL015: what is found in other styles than the shipped faults, and what is let pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.check import registry
from rlhf_doctor.finding import Errored, Finding, Severity
from rlhf_doctor.instruments.fingerprint import Fingerprint, cosine, likeness
from rlhf_doctor.selftest import scorers, specimens

CODES = [
    code
    for code in registry()
    if code.startswith("VAL") and code in (*(f"VAL00{i}" for i in range(1, 8)), "VAL014", "VAL015")
]


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


def hand_written(**options: Any) -> Any:
    return specimens.HandWrittenDecoder(zoo.VOCAB, **options)


# --- architecture and shape ---------------------------------------------------------------------------------------


class LSTMValues(nn.Module):
    """A value head on an LSTM language model: (ids) -> dict."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = zoo.LSTMLanguageModel()
        self.v_head = nn.Linear(24, 1)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": self.v_head(self.lm.lstm(self.lm.emb(input_ids))[0])}


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (LSTMValues, "RNN"),
        (zoo.TimeFirstGRU, "RNN"),
        (zoo.CausalConvolution, "CNN"),
        (lambda: scorers.StateSpaceScorer(zoo.VOCAB, per_token=True), "state-space"),
        (lambda: nn.Sequential(nn.Embedding(zoo.VOCAB, 8), nn.Tanh(), nn.Linear(8, 1)), "every token by itself"),
    ],
)
def test_non_transformer_is_named_with_its_map_and_census(
    plain: RLHFSetup, build: Callable[[], Any], named: str
) -> None:
    found = findings(plain.but(value=build().eval()))["VAL001"]
    assert named in found.message
    quantities = " ".join(e.quantity for e in found.evidence)
    assert "influence map" in quantities
    assert "one more token adds" in quantities


def test_critic_of_the_policys_own_kind_is_left_to_the_policys_check(plain: RLHFSetup) -> None:
    both = plain.but(policy=zoo.LSTMLanguageModel().eval(), reference=None, value=LSTMValues())
    assert "VAL001" not in findings(both)


def test_encoder_as_critic_sees_the_future_and_is_a_transformer(plain: RLHFSetup) -> None:
    assert grave(plain.but(value=zoo.bert("token"))) == {"VAL003"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: zoo.decoder("llama", "sequence"),
        lambda: zoo.decoder("neox", "token"),
        lambda: zoo.WithScalarHead(zoo.decoder("gpt2")).eval(),
        hand_written,
    ],
    ids=["read at its score head", "token classifier", "value head on an LM", "hand-written"],
)
def test_usual_critics_pass(plain: RLHFSetup, build: Callable[[], Any]) -> None:
    assert grave(plain.but(value=build().eval())) == set()


def test_critic_without_the_last_state_passes(plain: RLHFSetup) -> None:
    value = scorers.Reader(zoo.decoder("llama", "token"), lambda values, ids, mask: values[:, :-1]).eval()
    assert grave(plain.but(value=value)) == set()


def test_one_value_repeated_is_one_value_per_sequence(plain: RLHFSetup) -> None:
    def rule(values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, (values * mask).sum(1, keepdim=True).expand_as(values) / mask.sum(1, keepdim=True)

    assert "VAL002" in grave(plain.but(value=scorers.Reader(zoo.decoder("llama", "token"), rule).eval()))


# --- range --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("squash", "bad"),
    [
        (lambda x: x.clamp(-20, 20), False),
        (lambda x: 5 * x - 2, False),
        (lambda x: 30 * torch.tanh(x / 30), False),
        (lambda x: nn.functional.softplus(x), True),
        (lambda x: nn.functional.gelu(x), True),
        (lambda x: 2 * torch.sigmoid(x) - 1, True),
        (lambda x: x.clamp(min=0), True),
        (lambda x: torch.tanh(x / 1000), True),
        (lambda x: x / 1000, False),
    ],
    ids=[
        "wide clamp",
        "affine",
        "wide tanh",
        "softplus",
        "gelu",
        "shifted sigmoid",
        "clamp at 0",
        "a tanh of small values",
        "small values",
    ],
)
def test_only_a_bound_that_holds_values_back_is_found(plain: RLHFSetup, squash: Any, bad: bool) -> None:
    assert ("VAL005" in grave(plain.but(value=hand_written(squash=squash)))) is bad


def test_mlp_head_is_free(plain: RLHFSetup) -> None:
    value = hand_written(width=16)
    value.out = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 1))
    assert grave(plain.but(value=value)) == set()


def test_expectation_over_bins_is_free_where_the_bins_are_wide(plain: RLHFSetup) -> None:
    bins = torch.linspace(-50, 50, 11)
    value = hand_written(width=11, squash=lambda x: (x.softmax(-1) * bins).sum(-1))
    assert grave(plain.but(value=value)) == set()


# --- constants ----------------------------------------------------------------------------------------------------


def test_head_that_starts_at_zero_is_info(plain: RLHFSetup) -> None:
    value = zoo.decoder("llama", "token")
    for parameter in value.score.parameters():
        parameter.data.zero_()
    assert findings(plain.but(value=value))["VAL006"].severity is Severity.INFO


def test_constant_body_under_a_trained_head_is_found(plain: RLHFSetup) -> None:
    value = hand_written()
    value.norm.weight.data.zero_()
    assert "VAL006" in grave(plain.but(value=value))


# --- dropout ------------------------------------------------------------------------------------------------------


def test_train_mode_without_dropout_passes(plain: RLHFSetup) -> None:
    assert grave(plain.but(value=zoo.decoder("llama", "sequence").train())) == set()


def test_dropout_of_an_old_value_head_is_found(plain: RLHFSetup) -> None:
    value = zoo.WithScalarHead(zoo.decoder("llama"))
    value.v_head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 1))
    assert "VAL014" in grave(plain.but(value=value.train()))
    assert "VAL014" not in grave(plain.but(value=value.eval()))


# --- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "bad"), [("left", True), ("right", False)])
def test_positions_of_the_row_are_judged_by_the_side_in_use(side: str, bad: bool) -> None:
    setup = zoo.healthy_setup("llama", side=side).but(value=hand_written(positions="row"))
    assert ("VAL004" in grave(setup)) is bad
    assert "VAL004" in findings(setup)


def test_side_is_that_of_the_given_rows(plain: RLHFSetup) -> None:
    prompts = {"input_ids": [[5, 6, 7, 8], [5, 6, 0, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
    assert "VAL004" not in grave(plain.but(value=hand_written(positions="row"), prompts=prompts))


# --- where it starts from -----------------------------------------------------------------------------------------


def test_fresh_head_on_a_folder_is_normal_where_declared(healthy_files: RLHFSetup) -> None:
    from rlhf_doctor.selftest.folders import rewrite_tensors

    def beheaded(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith("score.")]:
            tensors.pop(name)

    rewrite_tensors(healthy_files.path("value"), beheaded)  # type: ignore[arg-type]
    assert "VAL007" in grave(healthy_files.but(declared={"value_init": "reward"}))
    assert "VAL007" in grave(healthy_files.but(declared={"value_init": None}))
    assert "VAL007" not in grave(healthy_files.but(declared={"value_init": "fresh"}))


@pytest.mark.parametrize("declared", ["policy", "fresh", None])
def test_critic_in_memory_may_start_anywhere_unless_the_reward_is_declared(plain: RLHFSetup, declared: Any) -> None:
    value = zoo.WithScalarHead(copy.deepcopy(plain.policy)).eval()
    setup = plain.but(value=value, declared={"value_init": declared})
    assert "VAL007" not in findings(setup)
    assert "VAL007" in grave(setup.but(declared={"value_init": "reward"}))


def test_reward_in_bfloat16_and_critic_in_float32_are_one_start(healthy: RLHFSetup) -> None:
    reward = copy.deepcopy(healthy.reward).bfloat16()
    assert "VAL007" not in findings(healthy.but(reward=reward))


def test_lora_on_the_rewards_body_is_one_start(healthy: RLHFSetup) -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():  # of the two libraries' deprecations
        warnings.simplefilter("ignore")
        value = get_peft_model(copy.deepcopy(healthy.value), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert "VAL007" not in findings(healthy.but(value=value.eval()))


def test_likeness_by_hand() -> None:
    assert cosine((1.0, 0.0), (1.0, 1.0)) == pytest.approx(2**-0.5)
    assert cosine((0.0, 0.0), (0.0, 0.0)) == 1.0
    assert cosine((0.0, 0.0), (1.0, 0.0)) == 0.0

    def print_of(*rows: tuple[float, ...]) -> Fingerprint:
        return Fingerprint({str(i): ((1, 2), row) for i, row in enumerate(rows)}, (), "")

    one = print_of((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    assert likeness(one, one) == pytest.approx(1.0)
    assert likeness(one, print_of((0.0, 1.0), (1.0, 0.0), (1.0, 1.0))) == pytest.approx(0.0)
    assert likeness(one, print_of((1.0, 0.0))) is None


# --- scale --------------------------------------------------------------------------------------------------------


def test_small_values_beside_large_scores_pass(plain: RLHFSetup) -> None:
    reward = scorers.Rescored(plain.reward, lambda s, ids, mask: s + 200).eval()
    assert "VAL015" not in findings(plain.but(reward=reward))


def test_scale_is_judged_without_prompts_too(plain: RLHFSetup) -> None:
    value = hand_written(squash=lambda x: 1000 * x)
    assert "VAL015" in grave(plain.but(value=value, prompts=None))


# --- the founding case --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_cnn_reward_and_gru_critic_beside_transformers(family: str) -> None:
    setup = zoo.healthy_setup(family).but(
        reward=specimens.ConvolutionalScorer(zoo.VOCAB).eval(), value=specimens.GRUCritic(zoo.VOCAB)
    )
    examination = examine(setup, select=["REW", "VAL"])
    found = dict(reversed(examination.findings))
    assert {"REW001", "VAL001"} <= found.keys()
    assert any("3 tokens" in e.observed for e in found["REW001"].evidence)
    assert all(h in registry()[c].page["Why it matters"] for c, h in (("REW001", "window"), ("VAL001", "faded")))


def test_two_labels_from_transformers(plain: RLHFSetup) -> None:
    config = copy.deepcopy(zoo.decoder("llama", "token").config)
    config.num_labels = 2
    assert "VAL002" in grave(plain.but(value=transformers.AutoModelForTokenClassification.from_config(config).eval()))

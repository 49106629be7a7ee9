"""Why a check was skipped is said in words that the user knows, never in names of the inside."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from rlhf_doctor.examine import Options, _of_no_model, examine
from rlhf_doctor.facts import facts, split_role
from rlhf_doctor.finding import MODEL_ROLES, Role, Skipped, Stage
from rlhf_doctor.selftest.run import Patients
from rlhf_doctor.setups import DECLARED_NAMES, RLHFSetup

# Words with an underscore that users write or read themselves: settings, fields of a setup, a tokenizer's outputs.
KNOWN = {*DECLARED_NAMES, *RLHFSetup.__dataclass_fields__, "input_ids", "attention_mask", "trainer_state.json"}


def alone(role: Role) -> Callable[[Patients], RLHFSetup]:
    return lambda shared: RLHFSetup(**{role: shared.healthy.model(role)})


def folder(role: Role) -> Callable[[Patients], RLHFSetup]:
    return lambda shared: RLHFSetup(**{role: str(shared.saved / role)})


SETUPS: dict[str, Callable[[Patients], RLHFSetup]] = {
    "the reference": lambda shared: shared.healthy,
    "its folders": lambda shared: RLHFSetup(**{role: str(shared.saved / role) for role in MODEL_ROLES}),
    "nothing": lambda shared: RLHFSetup(),
    "a reward function": lambda shared: RLHFSetup(reward=lambda prompts, responses: [1.0] * len(responses)),
    **{f"{role} alone": alone(role) for role in MODEL_ROLES},
    **{f"{role}'s folder": folder(role) for role in ("policy", "reward")},
}


def strange_words(reason: str) -> list[str]:
    """Names of facts, and what else has an underscore and is nothing that users write."""
    words = re.findall(r"[\w.]+", reason)
    underscored = [word for word in words if "_" in word.strip("_") and word.rstrip(".") not in KNOWN]
    of_facts = [name for name in re.findall(r"needs (\w+) of", reason) if split_role(name)[1] in facts()]
    return underscored + of_facts


@pytest.mark.parametrize("stage", [Stage.STATIC, Stage.PROBE])
@pytest.mark.parametrize("name", SETUPS)
def test_reasons_are_in_the_users_words(shared_patients: Patients, name: str, stage: Stage) -> None:
    found = examine(SETUPS[name](shared_patients), options=Options(stage=stage, show=False))
    reasons = {o.code: o.reason for o in found.outcomes.values() if isinstance(o, Skipped)}
    assert reasons
    assert {code: reason for code, reason in reasons.items() if strange_words(reason)} == {}
    assert [
        code for code, reason in reasons.items() if not reason.strip() or "\n" in reason or "object at" in reason
    ] == []


@pytest.mark.parametrize(
    ("reason", "strange"),
    [
        ("needs run_state of at least one model", ["run_state", "run_state"]),
        ("needs manifest of at least one model", ["manifest"]),
        ("needs value_head_range", ["value_head_range"]),
        ("needs declared prompt_length and response_length", []),
        ("needs the trainer_state.json of a run in the policy's folder", []),
    ],
)
def test_strange_words_are_seen(reason: str, strange: list[str]) -> None:
    assert strange_words(reason) == strange


def test_one_reason_for_all_models_is_said_once() -> None:
    assert _of_no_model({}) == "needs at least one model"
    assert _of_no_model({"reward": "the reward is a function, not a model"}) == "the reward is a function, not a model"
    folders: dict[Role, str] = {role: f"needs a log in the {role}'s folder" for role in MODEL_ROLES}
    assert _of_no_model(folders) == "needs a log in a model's folder"
    models: dict[Role, str] = {role: f"needs a {role} model" for role in ("policy", "value")}
    assert _of_no_model(models) == "needs a model"
    mixed: dict[Role, str] = {"policy": "needs --stage probe", "reward": "the reward is a function, not a model"}
    assert _of_no_model(mixed) == "needs --stage probe; the reward is a function, not a model"

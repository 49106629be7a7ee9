"""SYS002: every role holds its own kind of model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.heads import scalar_heads
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.pickled import Pickled
from rlhf_doctor.instruments.readings import Manifest, Output, Parameters

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
SCALARS = ("scalar per token", "scalar per sequence")
EACH_ITS_OWN = "reward: one score a sequence, frozen; value: one a token, trained"


@check(
    "SYS002", "every role holds its own kind of model", stage=Stage.STATIC, severity=Severity.ERROR,
    explains=(
        "REW002", "REW003", "REW006", "REW009", "VAL002", "VAL006", "VAL007", "POL002", "REF002", "SYS004",
        "SYS007", "REW008", "OPT001",
    ),
    across_roles=True,
)  # fmt: skip
def role_swapped(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    output: Mapping[Role, Output] | None = None,
    parameters: Mapping[Role, Parameters] | None = None,
    pickled: Mapping[Role, Mapping[str, Pickled]] | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Heads and class names of the four models, from their headers or modules, and what they emit where they can be
        called. Policy and reference are language models. Reward and critic end in a scalar head: under any name,
        beside a language-model head, or under a config.json that still names the language model.

    Why it matters:
        A causal language model that is loaded as reward or critic gets a scalar head of random numbers, or hands out
        some logit as its score. A classifier that is loaded as a policy gets a random vocabulary head. Loaders warn in
        one line and go on.

    What it looks like when broken:
        Rewards look like noise and differ between two starts of the same script; the policy's first samples are
        random tokens; the critic pools where the reward model should.

    How to fix:
        1. Look at the path or object that the message names: most often two arguments are exchanged.
        2. For reward and critic, load a model with a trained scalar head (num_labels=1, or v_head, value_head, score).
        3. A critic that starts from the policy with a fresh head is fine: declare value_init="policy" or "fresh".

    Source:
        https://github.com/huggingface/trl/issues/368 (reward adapter merged into a causal LM, head lost);
        https://github.com/deepspeedai/DeepSpeedExamples/issues/376 (plain LM as reward and critic);
        https://github.com/modelscope/ms-swift/pull/5080 (classifier loaded as a causal LM);
        https://github.com/radixark/miles/pull/2878 (critic built with the LM head).
    """
    seen = output or {}
    for role, m in manifest.items():
        if m.origin in ("callable", "adapter-off") or (m.origin == "checkpoint" and m.adapter is not None):
            continue
        told = seen.get(role)
        if any(held.scalar_head for held in (pickled or {}).get(role, {}).values()):
            continue  # a pickle with a scalar head: DeepSpeed-Chat's layout, whose config names the language model
        if role in ("reward", "value") and _is_language_model(role, m, told, setup):
            yield _finding(
                role,
                f"The {spoken(role)} is a causal language model ({_name(m)}): it gives logits over the vocabulary and "
                "has no scalar head. It should be a model that was trained to end in one number.",
                m,
                told,
                "a scalar head",
            )
        if role in ("policy", "reference") and _is_classifier(m, told):
            yield _finding(
                role,
                f"The {spoken(role)} is a classifier ({_name(m)}): it has a scalar head and no vocabulary head, so it "
                "is no language model. It should give a distribution over the vocabulary at every token.",
                m,
                told,
                "a vocabulary head",
            )
    yield from _exchanged(manifest, seen, parameters or {})


def _name(m: Manifest) -> str:
    return ", ".join(m.architectures) or m.class_name or "unnamed"


def _is_language_model(role: str, m: Manifest, told: Output | None, setup: Any) -> bool:
    # The loader puts a new head on a folder that has none: its output says nothing.
    new_head = m.origin == "checkpoint" and not scalar_heads(m)
    if told is not None and told.kind in SCALARS and not new_head:
        return False
    if role == "reward" and told is not None and told.kind == "vocabulary":
        return True
    if not m.is_causal_lm or not _ends(m, LANGUAGE_MODELS) or (told is None and role in setup.calls):
        return False
    fresh = setup.declared.get("value_init") in ("policy", "fresh", "sft", "base")
    return not (role == "value" and m.origin == "checkpoint" and fresh)


def _is_classifier(m: Manifest, told: Output | None) -> bool:
    # A folder is loaded as the language model that the role needs, with a random head: its own words decide.
    if told is not None and told.kind == "vocabulary" and m.origin != "checkpoint":
        return False
    if _ends(m, CLASSIFIERS) and m.head("vocabulary") is None:
        return True
    scalar = m.head("scalar") is not None or m.head("labels") is not None
    return scalar and m.head("vocabulary") is None and told is not None and told.kind in SCALARS


def _ends(m: Manifest, endings: tuple[str, ...]) -> bool:
    return any(name.endswith(endings) for name in (*m.architectures, m.class_name))


def _finding(role: Role, message: str, m: Manifest, told: Output | None, expected: str) -> Finding:
    heads = ", ".join(f"{h.kind} {h.name} ({h.width} rows)" for h in m.heads) or "none of its own (tied or absent)"
    evidence = [Evidence("output heads", expected, heads, where=m.path or m.class_name)]
    if told is not None:
        evidence.append(Evidence("shape of the output", expected, str(told.shape), where=told.where))
    return Finding(message, role=role, confidence=Confidence.PROVEN, evidence=tuple(evidence))


def _exchanged(
    manifest: Mapping[Role, Manifest], seen: Mapping[Role, Output], parameters: Mapping[Role, Parameters]
) -> Iterator[Finding]:
    reward, value = manifest.get("reward"), manifest.get("value")
    if reward is None or value is None:
        return
    trains = _who_trains(parameters)
    by_class = _ends(reward, CLASSIFIERS[1:]) and _ends(value, CLASSIFIERS[:1])
    by_shape = "reward" in seen and "value" in seen and (seen["reward"].kind, seen["value"].kind) == SCALARS
    if trains == "value" or not (trains == "reward" or by_class):
        return
    if trains == "reward" and not (by_class or by_shape or _optimised(parameters)):
        return
    observed = f"reward {_name(reward)}, value {_name(value)}"
    if trains == "reward":
        observed += "; the reward's parameters train, the value's are frozen"
    yield Finding(
        "Reward model and critic look exchanged: the one given as reward scores every token and the one given as value "
        "pools a sequence into one score, or only the reward's parameters train. Exchange the two.",
        role="setup",
        confidence=Confidence.MEASURED,
        evidence=(Evidence("what reward and value are", EACH_ITS_OWN, observed),),
    )


def _who_trains(parameters: Mapping[Role, Parameters]) -> str:
    reward, value = parameters.get("reward"), parameters.get("value")
    if not reward or not value or reward.loaded_here or value.loaded_here:
        return "unknown"
    if reward.trainable and not value.trainable:
        return "reward"
    return "value" if value.trainable and not reward.trainable else "unknown"


def _optimised(parameters: Mapping[Role, Parameters]) -> bool:
    return bool(parameters["reward"].in_optimizer) and parameters["value"].in_optimizer == 0


@role_swapped.fault("a causal language model as reward")
def _(healthy: Any) -> Any:
    return healthy.but(reward=healthy.reference)


@role_swapped.fault("a hand-written language model as reward")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(
        reward=specimens.HandWrittenDecoder(specimens.vocabulary(healthy), specimens.vocabulary(healthy))
    )


@role_swapped.fault("the policy's checkpoint folder as critic")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(value=healthy_files.path("policy"), declared={"value_init": "reward"})


@role_swapped.fault("the reward model's checkpoint folder as policy")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(policy=healthy_files.path("reward"))


@role_swapped.fault("reward and value exchanged")
def _(healthy: Any) -> Any:
    return healthy.but(reward=healthy.value, value=healthy.reward)

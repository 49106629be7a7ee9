"""CFG007: no library version has a known fault that this setup meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.versions import before
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer

ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert")


@dataclass(frozen=True)
class Fault:
    """A fault of a library from ``since`` (included) to ``fixed`` (excluded), and who meets it."""

    library: str
    since: str
    fixed: str
    what: str
    advice: str
    role: Role
    meets: Callable[[Any, Mapping[Role, Manifest]], str]
    thread: str


def _pools_left_padded(setup: Any, manifest: Mapping[Role, Manifest]) -> str:
    """A decoder as sequence classifier that is fed left-padded prompts."""
    reward = manifest.get("reward")
    info = feeding_tokenizer(setup, manifest, "reward")
    pools = reward is not None and any(name.endswith("ForSequenceClassification") for name in reward.architectures)
    if not pools or reward is None or reward.model_type in ENCODERS or info is None or info.padding_side != "left":
        return ""
    return f"{reward.class_name} with a tokenizer that pads on the left"


FAULTS = (
    Fault(
        "transformers",
        "4.0",
        "4.49",
        "a sequence classifier takes the token before the first pad for the end of a text (or counts tokens), so with "
        "pads before a prompt and behind its response it reads its score at a pad",
        "Update transformers to 4.49 or later, or pad rollouts on the right before they are scored.",
        "reward",
        _pools_left_padded,
        "https://github.com/huggingface/transformers/pull/35911",
    ),
)


@check("CFG007", "no library version has a fault that this setup meets", stage=Stage.STATIC, severity=Severity.WARNING)
def known_bad_version(
    setup: Any, manifest: Mapping[Role, Manifest], versions: Mapping[str, tuple[str, str]]
) -> Iterator[Finding]:
    """
    What it examines:
        The versions of the libraries that are installed here, or that the setup declares (versions={"transformers":
        "4.44.2"}), against a list of known faults with their threads, and whether this setup meets the conditions of
        one.

    Why it matters:
        A fault of a library is outside of every configuration: the same setup is right with one version and wrong with
        another.

    What it looks like when broken:
        As the thread says that the finding names.

    How to fix:
        1. Update the library to the version that the finding names, or avoid the condition as it says.
        2. Pin the versions of a run, and declare them if it runs elsewhere than here.

    Source:
        https://github.com/huggingface/transformers/pull/35911 (pooling of sequence classifiers, fixed in 4.49; seen on
        4.44.2 for rows padded on both sides); each further fault has its thread in the message.
    """
    for fault in FAULTS:
        version, who = versions.get(fault.library, ("", ""))
        if not version or before(version, fault.since) or not before(version, fault.fixed):
            continue
        condition = fault.meets(setup, manifest)
        if condition:
            yield Finding(
                f"{fault.library} {version} ({who}) has a known fault that this setup meets: {fault.what} "
                f"({fault.thread}). {fault.advice}",
                role=fault.role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(f"version of {fault.library}", f"{fault.fixed} or later", version, where=who),
                    Evidence("condition", "not met", condition),
                ),
            )


@known_bad_version.fault("left-padded prompts and a transformers that pools before the first pad")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"versions": {"transformers": "4.44.2"}})


@known_bad_version.fault("the same with checkpoints")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(declared={"versions": {"transformers": "4.48.3"}})

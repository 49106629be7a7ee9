"""What the checks say of a training loop: shared by the tests that go through all of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_doctor.check import registry
from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import Confidence, Errored, Finding, Severity
from rlhf_doctor.setups import RLHFSetup

NEEDS = {"lora_adapter_off": ("peft",), "trl_ppo": ("trl", "datasets")}  # packages of a loop
STYLES = tuple(
    style
    for style in (
        "backbone_direct", "grpo_groups", "joined_v_head", "lora_adapter_off", "micro_batches", "plain_modules",
        "right_padded_sums", "trl_ppo",
    )
    if all(importlib.util.find_spec(needed) for needed in NEEDS.get(style, ()))
)  # fmt: skip


def planted(codes: Sequence[str], but: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str, str, str]]:
    """(style, fault, code, role) of every mistake planted in a loop that one of these codes is to find."""
    return [
        (style, fault, code, role)
        for style in STYLES
        for fault, (code, role) in importlib.import_module(f"loops.{style}").FAULTS.items()
        if code in codes and (style, fault) not in but
    ]


def names(faults: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Names of the tests of these mistakes."""
    return [f"{style}-{fault}" for style, fault, _, _ in faults]


def built(style: str, fault: str | None = None, **options: Any) -> RLHFSetup:
    """A loop's setup, from the torch seed as it is."""
    return RLHFSetup.from_mapping(importlib.import_module(f"loops.{style}").build(fault, **options), origin=style)


@contextmanager
def one_thread(seed: int = 0) -> Iterator[None]:
    """One thread of torch's, and its generator seeded; both as they were afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def examined(setup: RLHFSetup, codes: Sequence[str]) -> Examination:
    """An examination by these checks; a crash or a setup that cannot be judged fails."""
    found = examine(setup, select=codes, options=Options(show=False))
    assert [o.traceback for o in found.outcomes.values() if isinstance(o, Errored)] == []
    assert found.errors == ()
    return found


def grave(findings: Sequence[tuple[str, Finding]]) -> list[tuple[str, str]]:
    """(code, role) of errors and warnings that are more than suspected."""
    checks = registry()
    return [
        (code, finding.role)
        for code, finding in findings
        if (finding.severity or checks[code].severity) is not Severity.INFO
        and finding.confidence is not Confidence.SUSPECTED
    ]

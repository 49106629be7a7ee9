"""The versions that the setup runs with: those that it declares, else those installed here. No torch is imported."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from rlhf_doctor.facts import fact
from rlhf_doctor.finding import Stage

__all__ = ["LIBRARIES", "before", "versions"]

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "verl", "openrlhf")


@fact(Stage.STATIC)
def versions(setup: Any) -> Mapping[str, tuple[str, str]]:
    """Library -> (version, who says so). ``declared["versions"]`` is a mapping of libraries to versions."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = (importlib.metadata.version(name), "installed here")
        except importlib.metadata.PackageNotFoundError:
            continue
    declared = setup.declared.get("versions")
    if isinstance(declared, Mapping):
        found |= {str(name).lower(): (str(version), "declared") for name, version in declared.items()}
    return found


def before(version: str, limit: str) -> bool:
    """Whether a version is earlier than another, by its numbers; what is no version is not earlier."""
    numbers = [[int(n) for n in re.findall(r"\d+", v.split("+")[0])[:3]] for v in (version, limit)]
    return bool(numbers[0]) and numbers[0] < numbers[1]

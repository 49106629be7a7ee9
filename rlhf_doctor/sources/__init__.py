"""Where a setup comes from: a Python file, checkpoint folders, or the built-in reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.sources.checkpoints import load_folder
from rlhf_doctor.sources.python_file import is_python_target, load_python_target
from rlhf_doctor.sources.target import UnreadableTarget

__all__ = ["BUILT_IN", "UnreadableTarget", "load_setup"]

BUILT_IN = "the built-in reference"
NOTHING = RLHFSetup()


def load_setup(
    *targets: str | PathLike[str],
    policy: str | PathLike[str] | None = None,
    reference: str | PathLike[str] | None = None,
    reward: str | PathLike[str] | None = None,
    value: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | None = None,
    declared: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> RLHFSetup:
    """One setup from everything that is given; with nothing at all, the built-in reference.

    Args:
        targets: each ``file.py:name``, or a folder with a subfolder for each role. A later one overrides an earlier.
        policy: checkpoint folder; so are ``reference`` (or the word "adapter-off"), ``reward`` and ``value``. They
            override the targets.
        tokenizer: folder of the tokenizer that feeds the models.
        declared: added to what the targets declare.
        trust_remote_code: run Python code that a checkpoint brings along.

    Raises:
        UnreadableTarget: a target cannot be read, in one sentence that names it.
    """
    folders = {"policy": policy, "reference": reference, "reward": reward, "value": value, "tokenizer": tokenizer}
    given: dict[str, Any] = {name: fspath(path) for name, path in folders.items() if path is not None}
    setup = NOTHING
    for target in targets:
        setup = _joined(setup, _load(fspath(target)))
    if given:
        setup = _joined(setup, RLHFSetup(origin="checkpoint folders", **given))
    if not targets and not given:
        setup = _built_in()
    return setup.but(declared=dict(declared or {}), trust_remote_code=trust_remote_code or setup.trust_remote_code)


def _load(target: str) -> RLHFSetup:
    return load_python_target(target) if is_python_target(target) else load_folder(target)


def _built_in() -> RLHFSetup:
    import reference_impl

    return RLHFSetup.from_mapping(reference_impl.build_setup(), origin=BUILT_IN)


def _joined(first: RLHFSetup, second: RLHFSetup) -> RLHFSetup:
    """Both in one: the second's fields win where it has them, declarations are merged, origins are listed."""
    if first is NOTHING:
        return second
    changes = {
        f.name: getattr(second, f.name)
        for f in dataclasses.fields(second)
        if f.name != "origin" and _is_given(getattr(second, f.name))
    }
    return first.but(**changes, origin=f"{first.origin}, {second.origin}")


def _is_given(value: Any) -> bool:
    empty = isinstance(value, (Mapping, tuple, list)) and not value
    return value is not None and value is not False and not empty

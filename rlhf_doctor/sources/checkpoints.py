"""Checkpoint folders, one a role, and folders that hold one such folder a role."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_doctor.finding import MODEL_ROLES
from rlhf_doctor.nearest import near_path
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.sources.target import UnreadableTarget

__all__ = ["files_of", "load_folder"]

READ = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
MARKS = ("config.json", "adapter_config.json")


def load_folder(target: str) -> RLHFSetup:
    """A setup from a folder with subfolders ``policy``, ``reference``, ``reward``, ``value``.

    Raises:
        UnreadableTarget: there is no such folder, or it has none of these.
    """
    folder = Path(target)
    if not folder.exists():
        raise UnreadableTarget(f"there is no file or folder {target!r}{near_path(folder)}")
    if not folder.is_dir():
        raise UnreadableTarget(f"{target!r} is neither a Python file (file.py:name) nor a folder with checkpoints")
    found: dict[str, Any] = {role: str(folder / role) for role in MODEL_ROLES if (folder / role).is_dir()}
    if found:
        return RLHFSetup(origin=str(folder), **found)
    if any((folder / mark).is_file() for mark in MARKS):
        raise UnreadableTarget(
            f"{target!r} is a checkpoint; say whose: --policy, --reference, --reward or --value {target}"
        )
    raise UnreadableTarget(f"the folder {target!r} has no subfolder called {', '.join(MODEL_ROLES)}")


def files_of(setup: RLHFSetup) -> list[Path]:
    """The files that an examination of a setup may read: those of its targets and checkpoint folders."""
    origins = [Path(origin.rpartition(":")[0]) for origin in setup.origin.split(", ") if ".py:" in origin]
    files = [path for path in origins if path.is_file()]
    given = [getattr(setup, f.name) for f in dataclasses.fields(setup) if f.name in (*MODEL_ROLES, "tokenizer")]
    for folder in (Path(g) for g in given if isinstance(g, (str, Path))):
        if folder.is_dir():
            files += sorted({path for pattern in READ for path in folder.glob(pattern) if path.is_file()})
    return list(dict.fromkeys(files))

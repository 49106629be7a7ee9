"""Edit checkpoint folders that were written for a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["rewrite_config", "rewrite_tensors"]


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Read ``model.safetensors`` of a folder, let ``change`` edit the tensors by name, and write it again."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of ``config.json``."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

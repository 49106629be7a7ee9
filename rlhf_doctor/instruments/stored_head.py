"""The head of a model in memory beside the one in the folder that it says it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.fingerprint import cosine
from rlhf_doctor.instruments.headers import read_checkpoint
from rlhf_doctor.instruments.readings import Manifest, TensorInfo

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Models

__all__ = ["StoredHead", "stored_head"]

SAME = 0.9
ENTRIES = 4096


@dataclass(frozen=True)
class StoredHead:
    """Cosines between memory and disk, of the head and (the least of up to four) of the body's matrices."""

    folder: str
    name: str
    head_cosine: float
    body_cosine: float

    @property
    def replaced(self) -> bool:
        """The body is the stored one and the head is another."""
        return self.body_cosine > 0.999 and self.head_cosine < SAME


@role_fact(Stage.PROBE)
def stored_head(role: Role, models: Models, manifest: Manifest) -> StoredHead:
    """Compare the head and four matrices of the body with the safetensors of the model's own ``name_or_path``.

    A wrapper may have other names for both: matrices are matched by the longest end of their names, and the head with
    the one scalar head of the folder.

    Raises:
        Unavailable: the model names no folder with safetensors, or these hold no such head or body.
    """
    live = models.get(role)
    named = getattr(getattr(live.module, "config", None), "_name_or_path", None)
    folder = Path(named) if isinstance(named, str) and named else None
    head = manifest.head("scalar")
    if live.loaded_here or folder is None or not folder.is_dir() or head is None:
        raise Unavailable("needs a model in memory that names the folder it was loaded from")
    parameters = dict(live.module.named_parameters())
    held = read_checkpoint(role, folder)
    theirs = held.head("scalar")
    if theirs is None or head.name not in parameters or held.tensors[theirs.name].shape != parameters[head.name].shape:
        raise Unavailable("the folder that the model came from holds no head of the same shape")
    body = [n for n, p in parameters.items() if p.dim() == 2 and n != head.name and not p.is_meta]
    place = {n: found for n in body[:: max(len(body) // 4, 1)][:4] if (found := _place(n, parameters[n], held.tensors))}
    stored = _read(folder, [theirs.name, *place.values()])
    if theirs.name not in stored or not place.keys() or not set(place.values()) & set(stored):
        raise Unavailable("the folder that the model came from holds nothing of it that can be compared")
    pairs = {n: stored[at] for n, at in {head.name: theirs.name, **place}.items() if at in stored}
    cosines = {n: cosine(_entries(parameters[n]), entries) for n, entries in pairs.items()}
    return StoredHead(
        str(folder), theirs.name, cosines[head.name], min(v for n, v in cosines.items() if n != head.name)
    )


def _place(name: str, parameter: torch.Tensor, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor of the same shape whose name ends as this one does; the name itself, or its three last parts."""
    parts = name.split(".")
    for start in range(max(len(parts) - 2, 1)):
        ending = ".".join(parts[start:])
        found = [n for n, t in tensors.items() if f".{n}".endswith(f".{ending}") and t.shape == tuple(parameter.shape)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _entries(parameter: torch.Tensor) -> tuple[float, ...]:
    return tuple(parameter.detach().reshape(-1)[:ENTRIES].double().tolist())


def _read(folder: Path, names: list[str]) -> dict[str, tuple[float, ...]]:
    """The first entries of tensors of these names, from one safetensors file or from the shards that an index lists."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    found: dict[str, tuple[float, ...]] = {}
    try:
        where: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.exists() else {}
        for name in names:
            file = folder / where.get(name, "model.safetensors")
            if not file.exists():
                continue
            with safe_open(str(file), framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118  # the handle is no mapping
                    found[name] = tuple(opened.get_tensor(name).reshape(-1)[:ENTRIES].double().tolist())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Unavailable(f"the folder {folder} cannot be read: {error}") from error
    return found

"""The head of a model in memory beside the one in the folder that it says it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.fingerprint import cosine
from rlhf_doctor.instruments.readings import Manifest

if TYPE_CHECKING:
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

    Raises:
        Unavailable: the model names no folder with safetensors, or these hold no head of the same name.
    """
    live = models.get(role)
    named = getattr(getattr(live.module, "config", None), "_name_or_path", None)
    folder = Path(named) if isinstance(named, str) and named else None
    head = manifest.head("scalar")
    if live.loaded_here or folder is None or not folder.is_dir() or head is None:
        raise Unavailable("needs a model in memory that names the folder it was loaded from")
    parameters = dict(live.module.named_parameters())
    body = [n for n, p in parameters.items() if p.dim() == 2 and n != head.name and not p.is_meta]
    body = body[:: max(len(body) // 4, 1)][:4]
    stored = _read(folder, [head.name, *body])
    if head.name not in stored or not set(body) & set(stored) or head.name not in parameters:
        raise Unavailable("the folder that the model came from holds no head of the same name")
    cosines = {}
    for name, entries in stored.items():
        flat = parameters[name].detach().reshape(-1)
        cosines[name] = cosine(tuple(flat[:ENTRIES].double().tolist()), entries) if flat.numel() else 1.0
    return StoredHead(str(folder), head.name, cosines[head.name], min(v for n, v in cosines.items() if n != head.name))


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

"""A few numbers of every weight matrix, so that two models can be compared when only one is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from rlhf_doctor.facts import role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["Fingerprint", "fingerprint", "likeness"]

NUMBERS = 128


@dataclass(frozen=True)
class Fingerprint:
    """``backbone``: name -> (shape, 128 evenly spaced entries) of every matrix but the heads, in the order of the
    model. ``head``: entries of the scalar head, at most 4096, empty where there is none; ``head_name`` its name."""

    backbone: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]]
    head: tuple[float, ...]
    head_name: str


@role_fact(Stage.PROBE)
def fingerprint(role: Role, models: Models, manifest: Manifest) -> Fingerprint:
    """Read a few entries of each matrix; nothing is copied or called.

    Raises:
        Unavailable: the role is a function.
    """
    heads = {head.name: head.kind for head in manifest.heads}
    backbone: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
    head: tuple[float, ...] = ()
    head_name = ""
    for name, parameter in models.get(role).module.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if parameter.dim() < 2 or parameter.is_meta or "lora_" in name or "modules_to_save" in name:
            continue
        if plain in heads:
            if heads[plain] == "scalar":
                head, head_name = tuple(parameter.detach().reshape(-1)[:4096].double().tolist()), plain
            continue
        flat = parameter.detach().reshape(-1)
        step = max(flat.numel() // NUMBERS, 1)
        backbone[plain] = (tuple(parameter.shape), tuple(flat[::step][:NUMBERS].double().tolist()))
    return Fingerprint(backbone, head, head_name)


def likeness(a: Fingerprint, b: Fingerprint) -> float | None:
    """The median cosine between matrices of the same place; 1 for copies, about 0 for unrelated models.

    Places are matched by their order. None where the shapes differ.
    """
    left, right = list(a.backbone.values()), list(b.backbone.values())
    if not left or [shape for shape, _ in left] != [shape for shape, _ in right]:
        return None
    cosines = sorted(cosine(x, y) for (_, x), (_, y) in zip(left, right, strict=True))
    return cosines[len(cosines) // 2]


def cosine(x: tuple[float, ...], y: tuple[float, ...]) -> float:
    """Of two vectors of the same length; 1 where both are zero, 0 where one is."""
    norms = sqrt(sum(v * v for v in x)), sqrt(sum(v * v for v in y))
    if not all(norms):
        return float(norms[0] == norms[1])
    return sum(v * w for v, w in zip(x, y, strict=True)) / (norms[0] * norms[1])

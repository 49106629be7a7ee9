"""Where the embeddings, heads and layers of a model are, whoever wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "bodies",
    "embedding_of",
    "layers_without",
    "mask_and_positions",
    "other_tables",
    "scalar_heads",
    "token_table",
    "vocabulary_heads",
]


def embedding_of(module: torch.nn.Module, getter: str) -> Tensor | None:
    """The weight that transformers' own accessor names, of the module or of the first inside it that has one."""
    for inner in module.modules():
        if callable(getattr(inner, getter, None)):
            with contextlib.suppress(Exception):  # a model without it raises what it likes
                found = getattr(inner, getter)()
                found = getattr(found, "base_layer", found)
                if isinstance(found.weight, Tensor):
                    return found.weight
    return None


def token_table(module: torch.nn.Module, rows: int | None = None) -> list[Tensor]:
    """The embedding (V, H) of the tokens.

    Of several tables it is the one that is tied to a projection, has a projection's outputs or ``rows`` for its rows,
    or, where none of that tells, most rows: a table of positions may be the larger one.
    """
    named = embedding_of(module, "get_input_embeddings")
    if named is not None:
        return [named]
    tables = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    if not tables:
        tables = [p for p in module.parameters() if p.dim() == 2]
    wide = [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear)]
    most = max((t.shape[0] for t in tables), default=0)
    for known in (
        [t for t in tables if any(t is w for w in wide)],
        [t for t in tables if t.shape[0] == rows],
        [t for t in tables if len(tables) > 1 and any(t.shape == w.shape for w in wide)],
    ):
        if len(known) == 1:
            return known
    return [t for t in tables if t.shape[0] == most][:1]


def other_tables(module: torch.nn.Module, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings of positions and types."""
    tables = [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    return [t for t in tables if all(t is not token for token in tokens)]


def vocabulary_heads(module: torch.nn.Module, tokens: Sequence[Tensor]) -> list[Tensor]:
    """The projection (V, H) to the vocabulary; the token embedding where it is tied."""
    named = embedding_of(module, "get_output_embeddings")
    if named is not None:
        return [named]
    rows = tokens[0].shape[0] if tokens else 0
    wide: list[Tensor] = [p for p in module.parameters() if p.dim() == 2 and p.shape[0] == rows]
    return [p for p in wide if all(p is not t for t in tokens)][-1:] or list(tokens)


def scalar_heads(module: torch.nn.Module) -> list[Tensor]:
    """Projections (1, H) to one number."""
    return [p for p in module.parameters() if p.dim() == 2 and p.shape[0] == 1]


def bodies(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Inner modules that are given masks and positions: backbones that a loop may call directly."""
    found: list[torch.nn.Module] = []
    for name in ("base_model", "model", "transformer", "backbone", "pretrained_model"):
        inner = getattr(module, name, None)
        if isinstance(inner, torch.nn.Module) and inner is not module and all(inner is not f for f in found):
            found.append(inner)
    return found


def mask_and_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The attention mask and the position ids, (B, L) each, among what a model is called with."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        mask = next((v for k, v in kwargs.items() if "mask" in k and isinstance(v, Tensor) and v.dim() == 2), None)
    if mask is None:
        mask = next((a for a in args[1:] if isinstance(a, Tensor) and a.dim() == 2 and _binary(a)), None)
    return (
        mask.detach().clone() if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        positions.detach().clone() if isinstance(positions, Tensor) and positions.dim() == 2 else None,
    )


def _binary(a: Tensor) -> bool:
    return a.dtype == torch.bool or (not a.is_floating_point() and bool(((a == 0) | (a == 1)).all()))


def layers_without(module: torch.nn.Module, watched: Container[int]) -> Iterator[torch.nn.Module]:
    """Members of module lists (decoder layers) that hold no parameter whose id is ``watched``."""
    for inner in module.modules():
        for layer in inner if isinstance(inner, torch.nn.ModuleList) else ():
            if not any(id(p) in watched for p in layer.parameters()):
                yield layer

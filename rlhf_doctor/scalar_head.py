"""A backbone with a scalar head: checkpoints whose reward or value model is a class of its framework's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["BackboneWithScalarHead", "build_head"]


class BackboneWithScalarHead(nn.Module):
    """A decoder's last hidden states through a linear head.

    Args:
        backbone: gives ``last_hidden_state`` (B, T, H).
        head: H -> K, K = 1 for a scalar.
        name: what the head is called in the checkpoint; here too.
        per_token: a critic's (B, T); else a reward model's (B,), read at the last token that the mask keeps.
        mean, std: a reward's normalisation, (score − mean) / std.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, name: str, *, per_token: bool, mean: float = 0.0, std: float = 1.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_name = name
        self.add_module(name, head)
        self.per_token = per_token
        self.mean, self.std = mean, std
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.backbone.config

    def get_input_embeddings(self) -> Any:
        """The backbone's."""
        get: Any = self.backbone.get_input_embeddings
        return get()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) int64 each -> (B, T) or (B,); with K > 1 labels (B, T, K) or (B, K)."""
        more = {"position_ids": position_ids} if self.takes_positions else {}
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        head = self.get_submodule(self.head_name)
        values: torch.Tensor = head(hidden.to(next(head.parameters()).dtype))  # (B, T, K)
        if not self.per_token:
            length = input_ids.shape[1]
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last = (kept * torch.arange(length, device=kept.device)).argmax(-1)
            values = (values[torch.arange(len(last), device=last.device), last] - self.mean) / self.std
        return values[..., 0] if values.shape[-1] == 1 else values


def build_head(tensors: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """The head that these tensors belong to, None where the layout is of no known kind.

    Args:
        tensors: name below the head -> tensor. Known are one linear layer (``weight``, ``bias``), the same under
            ``summary.``, and linear layers around a ReLU (``0.weight`` … ``2.weight``).
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        above, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        layers.setdefault(above, {})[kind] = tensor
    if not all("weight" in layer and layer["weight"].dim() == 2 for layer in layers.values()):
        return None
    if set(layers) == {""}:
        return _linear(layers[""])
    if set(layers) == {"summary"}:
        return _Summary(_linear(layers["summary"]))
    if set(layers) == {"0", "2"}:
        return nn.Sequential(_linear(layers["0"]), nn.ReLU(), _linear(layers["2"]))
    return None


class _Summary(nn.Module):
    """A linear layer called ``summary``, as TRL's value head has it; its dropout is off outside of training."""

    def __init__(self, summary: nn.Linear) -> None:
        super().__init__()
        self.summary = summary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) -> (…, K)."""
        out: torch.Tensor = self.summary(hidden)
        return out


def _linear(layer: Mapping[str, torch.Tensor]) -> nn.Linear:
    weight = layer["weight"]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in layer, device="meta")
    made.load_state_dict({name: tensor.clone() for name, tensor in layer.items()}, assign=True)
    return made

"""A PPO step whose critic is trained towards the next state's value alone: the reward is left out of its target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from reference_impl import build_setup, ops, ppo
from reference_impl.roles import Models
from reference_impl.setup import assemble


def value_loss(v: Any, old_v: Any, returns: Any, mask: Any, epsilon: float, count: Any = None) -> Any:
    """Towards V(s_{t+1}), and 0 after the last token; r_t is missing."""
    target = torch.nn.functional.pad((old_v * mask)[:, 1:], (0, 1))
    return ops.clipped_value_loss(v, old_v, target, mask, epsilon, count)


def build() -> dict[str, Any]:
    """The built-in reference with that loss."""
    fields = build_setup()
    models = Models(**{role: fields[role] for role in ("policy", "reference", "reward", "value", "tokenizer")})
    parts = replace(ppo.Parts(), value_loss=value_loss)
    return assemble(models, fields["prompts"], fields["preferences"], parts=parts)

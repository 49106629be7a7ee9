"""The reference's training step with one function exchanged: small, so that a fault takes a second to find."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_doctor.finding import Role
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["SMALL", "in_train_mode", "reference_step"]

SMALL: Mapping[str, Any] = {"batch_size": 16, "num_minibatches": 2, "ppo_epochs": 1, "response_length": 10}


def reference_step(
    healthy: RLHFSetup,
    *,
    parts: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    control: Any = None,
    declared: Mapping[str, Any] | None = None,
    **models: Any,
) -> RLHFSetup:
    """The healthy setup with a small step of the reference.

    Args:
        healthy: the built-in reference; its models are used as they are.
        parts: functions to exchange, by the names of ``reference_impl.ppo.Parts``.
        settings: of ``reference_impl.ppo.Settings``; what they are is declared too.
        control: a KL controller.
        declared: said instead of what the settings are.
        models: other models by role.
    """
    from reference_impl import ppo, setup
    from reference_impl.roles import Models

    roles = {role: models.get(role, healthy.model(role)) for role in ("policy", "reference", "reward", "value")}
    made = setup.assemble(
        Models(**roles, tokenizer=healthy.tokenizer),
        list(healthy.prompts or ()),
        list(healthy.preferences or ()),
        settings=ppo.Settings(**{**SMALL, **(settings or {})}),
        parts=dataclasses.replace(ppo.Parts(), **(parts or {})),
        kl_control=control,
    )
    made["declared"] = {**made["declared"], **(declared or {})}
    return type(healthy).from_mapping(made, origin=healthy.origin)


def in_train_mode(healthy: RLHFSetup, role: Role) -> RLHFSetup:
    """The same step, which sets a copy of one model, with dropout in its attention, to train mode first."""
    model = copy.deepcopy(healthy.model(role))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    made = reference_step(healthy, **{role: model.eval()})
    step: Any = made.step

    def train() -> Any:
        model.train()
        return step()

    return made.but(step=train)

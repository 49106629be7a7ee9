"""The cards: what the report shows of each of the four models."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_doctor.examine import Examination
from rlhf_doctor.finding import Role

__all__ = ["card"]

EXPECTED_SHAPE = {
    "policy": "(batch, tokens, vocabulary)",
    "reference": "(batch, tokens, vocabulary)",
    "reward": "(batch,) or (batch, 1)",
    "value": "(batch, tokens) or (batch, tokens, 1)",
}
EXPECTED_KIND = {
    "policy": "vocabulary",
    "reference": "vocabulary",
    "reward": "scalar per sequence",
    "value": "scalar per token",
}
PURPOSE = {
    "policy": "the language model being aligned",
    "reference": "the frozen policy from before RL, anchor of the KL penalty",
    "reward": "scores a whole response with one number, learnt from preferences",
    "value": "the critic: estimates the return from every state",
}
IN_PPO = {"policy": "trained", "reference": "never trained", "reward": "never trained", "value": "trained"}


def card(role: Role, examination: Examination) -> dict[str, Any]:
    """What is known of one model; the keys are documented in ``schema.SCHEMA`` under ``setup.roles.*``."""
    shown = examination.shown
    manifest = shown.get(f"{role}_manifest")
    output = shown.get(f"{role}_output")
    parameters = shown.get(f"{role}_parameters")
    census = shown.get(f"{role}_census")
    influence = shown.get(f"{role}_influence")
    architecture = shown.get(f"{role}_architecture")
    head = manifest.heads[0] if manifest and manifest.heads else None
    return {
        "role": role,
        "purpose": PURPOSE[role],
        "present": examination.setup.model(role) is not None,
        "class_name": manifest.class_name if manifest else None,
        "model_type": manifest.model_type if manifest else None,
        "origin": manifest.origin if manifest else None,
        "path": manifest.path if manifest else None,
        "kind": architecture.kind if architecture else None,
        "why": architecture.sentence if architecture else None,
        "emits": output.kind if output else None,
        "emits_expected": EXPECTED_KIND[role],
        "fits": output.kind == EXPECTED_KIND[role] if output else None,
        "expected_shape": EXPECTED_SHAPE[role],
        "expected_here": _expected_here(role, output) if output else None,
        "measured_shape": str(tuple(output.shape)) if output else None,
        "where": output.where if output else None,
        "dtype": output.dtype if output else None,
        "layers": manifest.num_layers if manifest else None,
        "hidden": manifest.hidden_size if manifest else None,
        "vocabulary": (manifest.embedding_rows or manifest.vocab_size) if manifest else None,
        "adapter": str(manifest.adapter.get("peft_type", "adapter")) if manifest and manifest.adapter else None,
        "in_ppo": IN_PPO[role],
        "parameters": parameters.total if parameters else None,
        "trainable": parameters.trainable if parameters else None,
        "state": _state(parameters),
        "head": dataclasses.asdict(head) if head else None,
        "influence": _influence(influence) if influence else None,
        "census": dataclasses.asdict(census) | {"depth_per_token": census.depth_per_token} if census else None,
    }


def _expected_here(role: Role, output: Any) -> str:
    batch, length, vocabulary = output.batch, output.length, output.vocab_size
    return {
        "policy": f"({batch}, {length}, {vocabulary})",
        "reference": f"({batch}, {length}, {vocabulary})",
        "reward": f"({batch},) or ({batch}, 1)",
        "value": f"({batch}, {length}) or ({batch}, {length}, 1)",
    }[role]


def _influence(influence: Any) -> dict[str, Any]:
    """The map with three significant digits: all that a picture shows, and the same bytes on every machine."""
    return dataclasses.asdict(influence) | {
        "tokens": [[_short(v) for v in row] for row in influence.tokens],
        "score": None if influence.score is None else [_short(v) for v in influence.score],
        "sees_future": _short(influence.sees_future),
        "coverage": influence.coverage,
        "reach": influence.reach,
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _state(parameters: Any) -> str:
    if parameters is None or parameters.loaded_here:
        return "unknown"
    if parameters.trainable == 0:
        return "frozen"
    return "trained" if parameters.trainable == parameters.total else "partly trained"

"""Find the four models, the tokenizer and the settings in a running program, by what they are and what names them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.setups import DECLARED_NAMES, RLHFSetup
from rlhf_doctor.trace.parts import embedding_of, scalar_heads, token_table

__all__ = ["discovered", "settings_of"]

# Names of attributes and variables that tell a role where what a model is does not.
NAMED: Mapping[Role, tuple[str, ...]] = {
    "reference": ("ref", "initial", "frozen", "sft"),
    "value": ("value", "critic"),
    "reward": ("reward", "rm", "scorer", "judge"),
    "policy": ("policy", "actor", "model"),
}
# Other names under which trainers keep a setting, first come first taken; a setting's own name goes before.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "kl_coef": ("init_kl_coef", "beta"),
    "clip_range": ("cliprange", "epsilon", "clip_eps", "eps_clip"),
    "clip_range_value": ("cliprange_value", "value_clip"),
    "vf_coef": ("value_loss_coef",),
    "lam": ("lambd", "gae_lambda"),
    "ppo_epochs": ("num_ppo_epochs", "num_iterations"),
    "num_minibatches": ("num_mini_batches",),
    "response_length": ("max_completion_length", "max_new_tokens"),
    "group_size": ("num_generations",),
}
TAKEN_FROM_TRAINERS = DECLARED_NAMES & {
    "gamma", "lam", "kl_coef", "kl_estimator", "temperature", "top_k", "top_p", "clip_range", "clip_range_value",
    "vf_coef", "ent_coef", "whiten_rewards", "missing_eos_penalty", "learning_rate", "ppo_epochs", "num_minibatches",
    "response_length", "group_size",
}  # fmt: skip


def discovered(called: torch.nn.Module, optimizers: Sequence[Any]) -> RLHFSetup | None:
    """The setup of the program that calls a module just now; None where no trained policy and second role are alive.

    Args:
        called: the outermost module that is called.
        optimizers: those that the program has made.
    """
    trained = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    models, holders = _language_models(), _holders()
    names = _names(models, holders)
    found: dict[Role, Any] = {}
    speaking = [m for m in models if _speaks(m)]
    scoring = [m for m in models if not _speaks(m) and scalar_heads(m)]
    moved = [m for m in speaking if _held(m, trained)]
    found["policy"] = _chosen([m for m in moved if _holds(called, m)] or moved, names, "policy")
    if found["policy"] is None:
        return None
    size = token_table(found["policy"])[0].shape
    still = [m for m in speaking if not _held(m, trained) and token_table(m)[0].shape == size]
    found["reference"] = _chosen(still, names, "reference")
    if found["reference"] is None and any(hasattr(m, "disable_adapters") for m in found["policy"].modules()):
        found["reference"] = "adapter-off"
    found["value"] = _chosen([m for m in scoring if _held(m, trained)], names, "value")
    if found["value"] is None and scalar_heads(found["policy"]):
        found["value"] = found["policy"]
    found["reward"] = _chosen([m for m in scoring if not _held(m, trained)], names, "reward")
    roles = [m for m in found.values() if isinstance(m, torch.nn.Module)]
    trainer = _trainer(holders, roles)
    functions = [f for f in trainer.get("reward_funcs") or () if callable(f)] if trainer else []
    if found["reward"] is None and len(functions) == 1:
        found["reward"] = functions[0]
    if len(roles) < 2 and found["reward"] is None:
        return None
    return RLHFSetup(
        **found,
        tokenizer=_tokenizer(trainer, found["policy"]),
        declared=settings_of(trainer.get("args")) if trainer else {},
        origin="the models of a running program",
    )


def settings_of(args: Any) -> dict[str, Any]:
    """The settings among a trainer's arguments, by the names that checks know them by."""
    given = getattr(args, "__dict__", None) or {}
    found: dict[str, Any] = {}
    for name in sorted(TAKEN_FROM_TRAINERS):
        for alias in (name, *ALIASES.get(name, ())):
            if isinstance(given.get(alias), (bool, int, float, str)):
                found[name] = given[alias]
                break
    if "num_generations" in given:
        found.pop("gamma", None)
        found["algorithm"] = "grpo"
    return found


# ---- what is alive ---------------------------------------------------------------------------------------------------


def _language_models() -> list[torch.nn.Module]:
    """Every whole model with a table of tokens that is alive, wrappers of several taken apart."""
    alive = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module) and "_modules" in vars(m)]
    inside = {id(child) for m in alive for child in m._modules.values() if child is not None}
    found: dict[int, torch.nn.Module] = {}
    queue = [m for m in alive if id(m) not in inside]
    while queue:
        module = queue.pop(0)
        if module._modules and any(True for _ in module.parameters()):
            parts = [c for c in module.children() if _tables(c)]
            if len(parts) > 1 and len({id(t) for c in parts for t in _tables(c)}) > 1 and not _is_one(module):
                queue += parts
            elif _tables(module):
                found.setdefault(id(module), module)
    return [m for m in found.values() if _speaks(m) or scalar_heads(m)]


def _tables(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tables of tokens in a module: of several models there are several."""
    return [m.weight for m in module.modules() if isinstance(m, torch.nn.Embedding)]


def _is_one(module: torch.nn.Module) -> bool:
    """Whether several tables belong to one model: tokens and positions, say."""
    return callable(getattr(module, "get_input_embeddings", None)) or any(
        isinstance(child, torch.nn.Embedding) for child in module.children()
    )


def _speaks(module: torch.nn.Module) -> bool:
    """Whether it gives logits over the vocabulary."""
    if any(callable(getattr(m, "get_output_embeddings", None)) for m in module.modules()):
        return embedding_of(module, "get_output_embeddings") is not None
    rows = {t.shape[0] for t in token_table(module)}
    direct = [m for m in module.children() if isinstance(m, torch.nn.Linear)]
    return any(m.out_features in rows for m in direct) or not scalar_heads(module)


def _held(module: torch.nn.Module, trained: set[int]) -> bool:
    return any(id(p) in trained for p in module.parameters())


def _holds(outer: torch.nn.Module, inner: torch.nn.Module) -> bool:
    return any(m is inner for m in outer.modules()) or any(m is outer for m in inner.modules())


def _holders() -> list[dict[str, Any]]:
    """The attributes of every object and the variables of every running function that may hold a model."""
    found = []
    for thing in gc.get_objects():
        if type(thing) is dict or issubclass(type(thing), (torch.nn.Module, torch.Tensor, type)):
            continue
        try:
            attributes = object.__getattribute__(thing, "__dict__")
        except (AttributeError, TypeError):
            continue
        if type(attributes) is dict and any(issubclass(type(v), torch.nn.Module) for v in list(attributes.values())):
            found.append(attributes)
    frame: Any = sys._getframe()
    while frame is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith(("rlhf_doctor", "torch.")):
            found += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    return found


def _names(models: Sequence[torch.nn.Module], holders: Sequence[Mapping[str, Any]]) -> dict[int, set[str]]:
    """id of a model -> what it is called."""
    names: dict[int, set[str]] = {id(m): set() for m in models}
    for holder in holders:
        for name, value in list(holder.items()):
            if id(value) in names and isinstance(name, str):
                names[id(value)].add(name.lower())
    for name, child, _ in _children(models):
        names[id(child)].add(name.lower())
    return names


def _children(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Module]]:
    wanted = {id(m) for m in models}
    for parent in gc.get_objects():
        if issubclass(type(parent), torch.nn.Module) and "_modules" in vars(parent):
            for name, child in parent._modules.items():
                if id(child) in wanted and child is not None:
                    yield name, child, parent


def _chosen(candidates: Sequence[torch.nn.Module], names: Mapping[int, set[str]], role: Role) -> Any:
    """The only candidate, or the one that is called as its role; None where there is a choice left."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    for word in NAMED[role]:
        fitting = [m for m in candidates if any(word in name for name in names[id(m)])]
        if len(fitting) == 1:
            return fitting[0]
    return None


def _trainer(holders: Sequence[Mapping[str, Any]], roles: Sequence[Any]) -> Mapping[str, Any] | None:
    """The attributes of the object that has most of the models, or their wrapper, and arguments."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for holder in holders:
        if hasattr(holder.get("args"), "__dict__"):
            held = [v for v in holder.values() if issubclass(type(v), torch.nn.Module)]
            count = sum(any(_holds(m, role) for m in held) for role in roles)
            if count and (best is None or count > best[0]):
                best = count, holder
    return best[1] if best else None


def _tokenizer(trainer: Mapping[str, Any] | None, policy: torch.nn.Module) -> Any:
    """The trainer's, or the only one alive that fits the policy's table."""
    for name in ("processing_class", "tokenizer"):
        if trainer and hasattr(trainer.get(name), "decode"):
            return trainer[name]
    base = getattr(sys.modules.get("transformers.tokenization_utils_base"), "PreTrainedTokenizerBase", None)
    if base is None:
        return None
    rows = token_table(policy)[0].shape[0]
    alive = [t for t in gc.get_objects() if issubclass(type(t), base)]
    fitting = {(len(t), t.eos_token_id, t.pad_token_id): t for t in alive if len(t) <= rows}
    return next(iter(fitting.values())) if len(fitting) == 1 else None

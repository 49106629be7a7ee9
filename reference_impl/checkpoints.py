"""Stopping and going on: the whole state of a run, in a folder that is complete or is not there.

A state is written to `NNNNNN.partial`, which then gets its name NNNNNN; older ones go only after that. The parts of
sharded models are written by their processes, and any number of processes can go on from them.
Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write

from reference_impl import scale
from reference_impl.roles import Models

__all__ = ["latest", "load", "save"]

Optimizers = Sequence[torch.optim.Optimizer]


def latest(folder: Path) -> Path | None:
    """The newest complete state in the folder."""
    return max((path for path in folder.glob("*") if path.name.isdecimal()), default=None, key=lambda path: path.name)


def _state(models: Models, optimizers: Optimizers, others: Sequence[Any]) -> dict[str, Any]:
    pairs = zip((models.policy, models.value), optimizers, strict=True)
    return {
        "moving": [dict(zip(("weights", "optimizer"), get_state_dict(*pair), strict=True)) for pair in pairs],
        "others": [other.state_dict() for other in others],
        "generators": [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else []),
    }


def save(folder: Path, iteration: int, models: Models, optimizers: Optimizers, others: Sequence[Any]) -> None:
    """Writes models, optimizers, others (an adaptive KL coefficient) and generators, after one iteration or more.

    Raises OSError, in one sentence, when it cannot be written; the state before is then still there.
    """
    path, partial = folder / f"{iteration:06d}", folder / f"{iteration:06d}.partial"
    before = latest(folder)
    try:
        if scale.rank() == 0:
            for left in folder.glob("*.partial"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process is what is meant
            write(_state(models, optimizers, others), checkpoint_id=partial, no_dist=scale.world() == 1)
        if scale.rank() == 0:
            partial.rename(path)
            for old in folder.glob("*"):
                if old.name < path.name:
                    shutil.rmtree(old)
    except (CheckpointException, OSError) as error:
        why = next((x for x, _ in error.failures.values()), error) if isinstance(error, CheckpointException) else error
        shutil.rmtree(partial, ignore_errors=True)
        kept = f"the last good state is {before}" if before else "there is no earlier state"
        raise OSError(f"iteration {iteration} could not be saved in {folder} ({why}); {kept}") from error


def load(path: Path, models: Models, optimizers: Optimizers, others: Sequence[Any]) -> int:
    """Puts a state back into models, optimizers, others and generators; returns its iteration."""
    state = _state(models, optimizers, others)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        read(state, checkpoint_id=path, no_dist=scale.world() == 1)
    for model, optimizer, its in zip((models.policy, models.value), optimizers, state["moving"], strict=True):
        set_state_dict(model, optimizer, model_state_dict=its["weights"], optim_state_dict=its["optimizer"])
        optimizer.zero_grad()
    for other, its in zip(others, state["others"], strict=True):
        other.load_state_dict(its)
    torch.set_rng_state(state["generators"][0])
    for generator in state["generators"][1:]:
        torch.cuda.set_rng_state(generator)
    return int(path.name)

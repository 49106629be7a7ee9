"""Stopping and going on: the whole state of a run, in a file that is complete or is not there.

The first process gathers the parts of sharded models in its CPU memory and writes them to `NNNNNN.partial`, which then
gets its name NNNNNN.pt; older ones go only after that. Any number of processes can go on from it.
Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from reference_impl import scale
from reference_impl.roles import Models

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def latest(folder: Path) -> Path | None:
    """The newest complete state in the folder."""
    return max(folder.glob("*.pt"), default=None)


def save(folder: Path, iteration: int, models: Models, optimizers: Sequence[Any], others: Sequence[Any]) -> None:
    """Writes models, optimizers, others (an adaptive KL coefficient) and generators, after one iteration or more.
    Raises OSError, in one sentence, when it cannot be written; the state before is then still there."""
    path, before = folder / f"{iteration:06d}.pt", latest(folder)
    pairs = zip((models.policy, models.value), optimizers, strict=True)
    state = {
        "moving": [get_state_dict(*pair, options=WHOLE) for pair in pairs],
        "others": [other.state_dict() for other in others],
        "generators": [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else []),
    }
    if scale.rank() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (partial := path.with_suffix(".partial")).open("wb") as file:
            torch.save(state, file)
        partial.rename(path)
        for old in set(folder.glob("*")) - {path}:
            old.unlink()
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        kept = f"the last good state is {before}" if before else "there is no earlier state"
        raise OSError(f"iteration {iteration} could not be saved in {folder} ({error}); {kept}") from error


def load(path: Path, models: Models, optimizers: Sequence[Any], others: Sequence[Any]) -> int:
    """Puts a state back into models, optimizers, others and generators; returns its iteration."""
    state = torch.load(path, map_location="cpu", mmap=True)
    for model, optimizer, its in zip((models.policy, models.value), optimizers, state["moving"], strict=True):
        set_state_dict(model, optimizer, model_state_dict=its[0], optim_state_dict=its[1], options=WHOLE)
    for other, its in zip(others, state["others"], strict=True):
        other.load_state_dict(its)
    for put, its in zip((torch.set_rng_state, torch.cuda.set_rng_state), state["generators"], strict=False):
        put(its)
    return int(path.stem)

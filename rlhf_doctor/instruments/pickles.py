"""Weights in PyTorch's pickle format, of which nothing but tensors is ever built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import Role

__all__ = ["read_pickle", "said_of"]

GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_pickle(role: Role, file: Path) -> dict[str, Any]:
    """The tensors in a pickle, mapped into memory; nothing but tensors is ever built from it.

    Raises:
        Broken: there is anything else in it, or it cannot be read.
    """
    import pickle
    import zipfile

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = GLOBAL.search(str(error))
        what = f"asks for {asked[1]}" if asked else "holds more than tensors"
        raise Broken(
            role,
            f"{file} is a pickle that {what}, so it was not loaded: loading it would run code that it brings along",
        ) from error
    except (Exception, MemoryError) as error:  # a damaged archive raises anything
        raise Broken(role, f"{file} cannot be read as a PyTorch file: {said_of(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise Broken(role, f"{file} should map parameter names to tensors, and does not")
    return {str(name): tensor for name, tensor in state.items()}


def said_of(error: BaseException) -> str:
    """An exception's kind and its own words, on one line of at most about 300 characters."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__

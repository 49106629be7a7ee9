"""The smallest complete four-model RLHF: SFT, reward modelling and PPO with policy, reference, reward and value.

Importing this package loads neither torch nor transformers; the functions below load them when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["build_setup", "save_checkpoints"]


def build_setup(seed: int = 0, *, trained: bool = True) -> dict[str, Any]:
    """See `reference_impl.setup.build_setup`."""
    from reference_impl import setup

    return setup.build_setup(seed, trained=trained)


def save_checkpoints(setup: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """See `reference_impl.setup.save_checkpoints`."""
    from reference_impl.setup import save_checkpoints as save

    return save(setup, folder)

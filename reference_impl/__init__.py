"""The smallest complete four-model RLHF: SFT, reward modelling and PPO with policy, reference, reward and value.

Importing this package loads neither torch nor transformers; naming one of its functions does.
"""

from typing import Any

__all__ = ["build_setup", "save_checkpoints"]


def __getattr__(name: str) -> Any:
    """`build_setup` and `save_checkpoints` of `reference_impl.setup`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from reference_impl import setup

    return getattr(setup, name)

"""Training steps that do what no step should: raise, hang, exchange the models, work elsewhere."""

from __future__ import annotations

import copy
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from loops import right_padded_sums


def _with(step: Callable[[dict[str, Any]], Callable[[], Any]]) -> dict[str, Any]:
    fields = right_padded_sums.build()
    return {**fields, "step": step(fields)}


def raises_at_once() -> dict[str, Any]:
    """The first call raises."""

    def step() -> None:
        raise ZeroDivisionError("no batch left")

    return _with(lambda fields: step)


def raises_in_the_second_run() -> dict[str, Any]:
    """A counter that cannot be put back makes every run but the first raise."""
    ticks = iter(lambda: 0, 1)

    def made(fields: dict[str, Any]) -> Callable[[], Any]:
        runs = (n for n in range(10**6))

        def step() -> None:
            next(ticks)
            if next(runs):
                raise RuntimeError("the data loader is empty")
            fields["step"]()

        return step

    return _with(made)


def hangs() -> dict[str, Any]:
    """The step never comes back."""

    def step() -> None:
        while True:
            time.sleep(0.5)

    return _with(lambda fields: step)


def ends_the_process() -> dict[str, Any]:
    """The step leaves the interpreter."""

    def step() -> None:
        import os

        os._exit(7)

    return _with(lambda fields: step)


def trains_other_models() -> dict[str, Any]:
    """The step works on a set of models of its own."""
    other = right_padded_sums.build()
    return _with(lambda fields: other["step"])


def trains_copies_in_a_child() -> dict[str, Any]:
    """The step does all its work in another process."""

    def made(fields: dict[str, Any]) -> Callable[[], Any]:
        inner = copy.copy(fields["step"])

        def step() -> None:
            child = multiprocessing.get_context("fork").Process(target=inner)
            child.start()
            child.join()

        return step

    return _with(made)


def no_reward_call() -> dict[str, Any]:
    """A reward model that the step knows nothing of."""
    fields = right_padded_sums.build()
    return {**fields, "reward": copy.deepcopy(fields["reward"])}

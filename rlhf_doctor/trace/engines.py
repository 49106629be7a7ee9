"""Samplers that are not the setup's policy itself: copies of it that a loop keeps, or makes within a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_doctor.instruments.models import set_generators
from rlhf_doctor.trace.keep import Snapshot, run_kept
from rlhf_doctor.trace.runs import Run, Stepper
from rlhf_doctor.trace.taps import Enough, Recorder

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["watched_run"]


class Watcher(Recorder):
    """A recorder that takes weights of the policy's own shapes, which no role owns, for a copy of the policy."""

    def __init__(self, setup: RLHFSetup, *, temperatures: Sequence[float], **options: Any) -> None:
        super().__init__(setup, temperatures=temperatures, **options)
        self._shapes = {
            id(table): {tuple(w.shape) for w in self._kept if id(w) in table and "policy" in table[id(w)]}
            for table in (self._tokens, self._heads)
        }

    def _owned(self, table: Mapping[int, set[Any]], values: Sequence[Any]) -> set[Any] | None:
        found = super()._owned(table, values)
        if found is not None or id(table) not in self._shapes:
            return found
        for value in values:
            if not isinstance(value, Tensor):
                continue
            weight = value if value._base is None else value._base
            if weight.is_leaf and tuple(weight.shape) in self._shapes[id(table)] and id(weight) not in self._owners:
                return {"policy"}
        return None


def watched_run(
    setup: RLHFSetup,
    temperatures: Sequence[float],
    snapshot: Snapshot | None,
    *,
    times: int = 2,
    hold: bool = False,
    seed: int | None = None,
) -> Run:
    """Run the step with copies of the policy watched too, and put everything back.

    Args:
        setup: its step is run.
        temperatures: at which log-probabilities are wanted, the declared one first.
        snapshot: of the state to run from; None: of now.
        times: how often in a row.
        hold: leave out optimizers' steps and stop before the first of them.
        seed: of other random numbers than those of the examination; None: the same.
    """
    stepper = Stepper(setup, temperatures, snapshot)
    recorder = Watcher(
        setup,
        temperatures=temperatures,
        hold=hold,
        last_window=1 if hold else None,
        known_optimizers=stepper.snapshot.optimizers,
    )
    boundaries: list[int] = []
    stopped, error = False, ""
    with run_kept(stepper.snapshot):
        if seed is None:
            set_generators(stepper.generators)
        else:
            _seeded(seed)
        try:
            with recorder.watching(), torch.enable_grad():
                for _ in range(times):
                    setup.step()  # type: ignore[misc]  # whoever asks has seen that there is one
                    boundaries.append(recorder.order)
        except Enough:
            stopped = True
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return Run(recorder.calls, recorder.texts, recorder.steps, stopped, {}, boundaries, None, error)


def _seeded(seed: int) -> None:
    import random
    import sys

    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)

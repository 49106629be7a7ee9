"""Run a setup's step again and again from the same state, with one thing changed each time."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rlhf_doctor.facts import Broken, raised_by_the_setup
from rlhf_doctor.finding import MODEL_ROLES, Role
from rlhf_doctor.instruments.models import generator_states, set_generators
from rlhf_doctor.trace.calls import Call, Change, ScoredTexts
from rlhf_doctor.trace.flows import Flow, GradientRecorder
from rlhf_doctor.trace.keep import Snapshot, run_kept
from rlhf_doctor.trace.taps import Enough

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Run", "Stepper"]


@dataclass
class Run:
    """What one or more steps from the initial state showed.

    ``steps`` holds (order, optimizer, roles) of every optimizer step asked for; ``moved`` the roles whose parameters
    were other than before at the end, with the largest relative change, and ``rescaled`` those of them that are a head
    of one output times one number, or its bias; ``stopped`` says that the step was ended early.
    """

    calls: list[Call]
    texts: list[ScoredTexts]
    steps: list[tuple[int, Any, frozenset[Role]]]
    stopped: bool
    moved: dict[Role, dict[str, float]] = field(default_factory=dict)
    boundaries: list[int] = field(default_factory=list)  # order at the end of each step
    returned: Any = None
    error: str = ""
    around: list[tuple[Role, bool, torch.Tensor]] = field(default_factory=list)  # see ``Recorder.around``
    rescaled: dict[Role, set[str]] = field(default_factory=dict)
    flows: dict[Role, Flow] = field(default_factory=dict)  # where optimizers stepped

    @property
    def written(self) -> bool:
        """Whether anything moved but a critic's head by one factor, which keeps what its values mean."""
        return any(role != "value" or set(names) - self.rescaled.get(role, set()) for role, names in self.moved.items())

    def put_back(self, role: Role) -> int:
        """Of how many watched parameters a later update began at their first numbers, which an earlier one had left."""
        ours = [(after, numbers) for one, after, numbers in self.around if one == role]
        if not ours or ours[0][0]:
            return 0
        start = ours[0][1]
        found = torch.zeros(len(start), dtype=torch.bool)
        for (left, last), (later, now) in itertools.pairwise(ours):
            if left and not later:
                found |= (last != start).any(1) & (now == start).all(1)
        return int(found.sum())


class Stepper:
    """Runs ``setup.step`` from one and the same state.

    Optimizers' steps are held back unless asked for, so that everything is read at the initial weights; where a loop
    updates parameters by hand, they cannot be held, and only what comes before the first update counts. ``snapshot`` is
    of that state; it is made here where none is given.
    """

    def __init__(self, setup: RLHFSetup, temperatures: Sequence[float], snapshot: Snapshot | None = None) -> None:
        assert setup.step is not None
        self.setup = setup
        self.temperatures = tuple(temperatures)
        self.snapshot = snapshot or Snapshot(setup)
        self.by_hand = False
        self.generators = generator_states()
        self.runs = 0
        self.trained: frozenset[Role] = frozenset()

    def run(
        self,
        *,
        changes: Sequence[Change] = (),
        hold: bool = True,
        last_window: int | None = None,
        text_change: Callable[[int, list[float]], list[float]] | None = None,
        times: int = 1,
        may_fail: bool = False,
    ) -> Run:
        """Run the step, ``times`` over, and put everything back.

        Raises:
            Broken: the step raised, unless it ``may_fail``: then the run carries the error.
        """
        recorder = GradientRecorder(
            self.setup,
            listens=not hold,
            temperatures=self.temperatures,
            changes=changes,
            hold=hold,
            last_window=last_window,
            text_change=text_change,
            known_optimizers=self.snapshot.optimizers,
            trained=self.trained,
        )
        stopped, error, returned = False, "", None
        boundaries: list[int] = []
        with run_kept(self.snapshot):
            set_generators(self.generators)
            try:
                with warnings.catch_warnings(), recorder.watching(), recorder.listening(), torch.enable_grad():
                    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # held steps are not counted
                    for _ in range(times):
                        returned = self.setup.step()  # type: ignore[misc]  # checked at the start
                        boundaries.append(recorder.order)
            except Enough:
                stopped = True
            except Exception as raised:
                error = _said(raised, self.runs)
                if not may_fail:
                    raise Broken("loop", error) from raised
            moved, rescaled = ({}, {}) if (hold and not self.by_hand and self.runs) else self._moved()
        self.runs += 1
        if self.runs == 1:
            self.trained = frozenset(c.role for c in recorder.calls if c.backwards)
        return Run(
            recorder.calls, recorder.texts, recorder.steps, stopped, moved, boundaries, returned, error,
            recorder.around, rescaled, recorder.flows,
        )  # fmt: skip

    def _moved(self) -> tuple[dict[Role, dict[str, float]], dict[Role, set[str]]]:
        """role -> parameter name -> largest change over largest size, of parameters that are not as they were; and the
        names of those that were multiplied, see ``Run``."""
        found: dict[Role, dict[str, float]] = {}
        rescaled: dict[Role, set[str]] = {}
        for role in MODEL_ROLES:
            module = self.setup.model(role)
            if not isinstance(module, torch.nn.Module):
                continue
            for name, parameter in module.named_parameters():
                saved = self.snapshot.weights.get(id(parameter))
                if saved is None or torch.equal(parameter.detach(), saved):
                    continue
                size = float(saved.float().abs().max())
                change = float((parameter.detach().float() - saved.float()).abs().max())
                found.setdefault(role, {})[name] = change / size if size else float("inf")
                if parameter.numel() == 1 or (
                    parameter.dim() == 2 and len(parameter) == 1 and _scaled(parameter, saved)
                ):
                    rescaled.setdefault(role, set()).add(name)
        return found, rescaled


def _scaled(now: torch.Tensor, was: torch.Tensor) -> bool:
    """Whether one number times the old entries gives the new ones."""
    now, was = now.detach().double().flatten(), was.double().flatten()
    factor = float(now @ was / (was @ was)) if was.any() else 0.0
    return factor > 0 and bool((now - factor * was).abs().max() <= 1e-5 * now.abs().max())


def _said(error: BaseException, runs: int) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    where = raised_by_the_setup(error)
    which = "its first run" if runs == 0 else f"run {runs + 1}, from the same state as the first"
    return f"loop: the step raised {text}{f' ({where})' if where else ''} in {which}"

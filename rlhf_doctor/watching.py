"""Watch a training loop that cannot be called again: its first iteration is recorded as it goes by.

The loop runs as it would without: nothing is held back, changed or drawn. What was seen is examined afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.facts import Broken
from rlhf_doctor.finding import MODEL_ROLES, Role
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.calls import Call
from rlhf_doctor.trace.runs import Run
from rlhf_doctor.trace.samples import continues
from rlhf_doctor.trace.taps import Enough, Recorder, nearby
from rlhf_doctor.trace.watched import watched

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from rlhf_doctor.instruments.tracing import Traced

__all__ = ["Exam", "watch"]

# What was declared of the start: the models have moved on by the time they are examined.
OF_THE_START = ("reference", "value_init", "policy_init")
BEFORE_TRAINING = ("REF002",)  # it compares the policy with the reference before the first update
SAMPLED = 4096  # numbers of every parameter that are compared to see how far it went
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def watch(
    setup: RLHFSetup | Mapping[str, Any], *, steps: int | None = None, stop_after: bool = False
) -> Iterator[Exam]:
    """Watch what runs inside: ``with watch(setup) as exam: trainer.train()``; then ask the exam.

    Recording ends with the first update of the second rollout, and the loop runs on unwatched.

    Args:
        setup: the models that the loop works on, as for ``examine``; no ``step`` is needed.
        steps: record so many optimizer steps instead.
        stop_after: leave the block as soon as enough was seen.
    """
    exam = Exam(setup if isinstance(setup, RLHFSetup) else RLHFSetup.from_mapping(setup), steps, stop_after)
    exam.begin()
    try:
        yield exam
    except Enough:
        if not (stop_after and exam.enough):
            raise
    finally:
        exam.end()


class Exam:
    """What was seen of a loop, and what is wrong with it."""

    def __init__(self, setup: RLHFSetup, steps: int | None = None, stop_after: bool = False) -> None:
        declared = setup.declared.get("temperature", 1.0)
        self.temperature = float(declared) if isinstance(declared, (int, float)) and declared > 0 else 1.0
        self.setup = setup
        self._recorder = _Watcher(setup, nearby(self.temperature), steps, stop_after)
        self._made: Examination | None = None

    @property
    def enough(self) -> bool:
        """Whether all that was wanted was seen."""
        return self._recorder.finished

    def begin(self) -> None:
        """Start to record."""
        self._recorder.begin()

    def end(self) -> None:
        """Stop, if nothing has yet, and let go of the loop."""
        self._recorder.finish()
        self._recorder.close()

    @property
    def run(self) -> Run:
        """What was recorded."""
        return self._recorder.run()

    def examine(self, **options: Any) -> Examination:
        """Examine the models as they are now, and the loop as it was seen; options as those of ``examine``."""
        if not self._recorder.closed:
            raise RuntimeError("the loop is still being watched: ask after the with block")
        kept = {name: said for name, said in self.setup.declared.items() if name not in OF_THE_START}
        # Optimizers are left out too: their rates are those of the end of training.
        setup = RLHFSetup(**{**vars(self.setup), "step": None, "state": (), "optimizers": (), "declared": kept})
        given = options.pop("options", None) or Options()
        if "policy" in self.run.moved:
            options["ignore"] = (*options.get("ignore", ()), *BEFORE_TRAINING)
        try:
            known = {"traced": self.traced(setup)}
        except Broken as broken:
            known = {}
            given = Options(**{**vars(given), "excluded": {**given.excluded, "traced": broken.sentence}})
        return examine(setup, options=given, known=known, **options)

    def traced(self, setup: RLHFSetup | None = None) -> Traced:
        """The fact ``traced``, as far as watching gives it.

        Raises:
            Broken: the policy was never called.
        """
        run = self.run
        if not any(call.role == "policy" for call in run.calls):
            raise Broken("loop", "loop: the policy was never called on token ids while the program was watched")
        return watched(setup or self.setup, run, self.temperature)

    @property
    def examination(self) -> Examination:
        """The examination with the usual options, made once."""
        if self._made is None:
            self._made = self.examine()
        return self._made

    def report(self, form: str = "terminal") -> str:
        """The report as text: "terminal", "html", "json" or "markdown"."""
        from rlhf_doctor.delivery import Delivery
        from rlhf_doctor.report.record import record

        return Delivery(form, None).render(record(self.examination))


class _Watcher(Recorder):
    """A recorder that never holds a step back, and takes itself out of the program once enough was seen."""

    def __init__(self, setup: RLHFSetup, temperatures: tuple[float, ...], steps: int | None, stop_after: bool) -> None:
        super().__init__(setup, temperatures=temperatures)
        self.limit, self.stop_after = steps, stop_after
        self.boundaries: list[int] = []
        self.finished = self.closed = False
        self._entered_here: AbstractContextManager[Any] | None = None
        self._leaving: Any = None
        self._before: dict[Role, dict[str, tuple[int, Tensor]]] = {}
        self._moved: dict[Role, dict[str, float]] = {}
        self._updates: list[int] = []  # orders
        self._weights: Tensor | None = None  # of the policy's last call

    def begin(self) -> None:
        self._before = _fingerprints(self.setup)
        self._entered_here = self.watching()
        self._entered_here.__enter__()

    def stepped(self, optimizer: Any) -> None:
        if self.finished:
            return
        super().stepped(optimizer)
        if self.steps[-1][2]:
            self._updated(self.order)

    def _make(self, role: Role, *args: Any) -> Call:
        call = super()._make(role, *args)
        if role == "policy" and not any(roles for _, _, roles in self.steps):  # updates by hand show in the weights
            known, self._weights = self._weights, call.weights
            if known is not None and call.weights is not None and not torch.equal(known, call.weights):
                self._updated(call.order - 1)
        return call

    def _updated(self, order: int) -> None:
        """The models have been updated, or are about to be."""
        if self._updates and self._rolled_out_between(self._updates[-1], order):
            self.boundaries.append(self._updates[-1])
        self._updates.append(order)
        own = len(self._updates)
        if (self.limit is None and self.boundaries) or (self.limit is not None and own >= self.limit):
            self.finish()
            # Hooks cannot be taken out of a list that torch is just going through: in a later forward they can.
            self._leaving = torch.nn.modules.module.register_module_forward_pre_hook(self._leave)
            if self.stop_after:
                raise Enough

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.finished:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def texts_scored(self, arguments: tuple[Any, ...], returned: Any) -> Any:
        return returned if self.finished else super().texts_scored(arguments, returned)

    def _rolled_out_between(self, start: int, end: int) -> bool:
        """Whether texts were drawn or scored then."""
        calls = [c for c in self.calls if start < c.order <= end]
        if any(c.role == "reward" for c in calls) or any(start < t.order <= end for t in self.texts):
            return True
        drawing = [c for c in calls if c.role == "policy" and not c.with_grad and not c.pooled]
        return any(continues([a], b) for a, b in pairwise(drawing))

    def finish(self) -> None:
        """Nothing is recorded from here on."""
        if self.finished:
            return
        self.finished = True
        self._moved = _moved(self._before, _fingerprints(self.setup))
        self._before = {}

    def _leave(self, module: torch.nn.Module, args: Any) -> None:
        if not module._forward_pre_hooks and not module._forward_hooks:
            self.close()

    def close(self) -> None:
        """Take every hook out, if that can be done from here; other threads have their own modes."""
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if self.closed or not any(mode is self for mode in stack):
            return
        self.closed = True
        above = []
        while (mode := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
            above.append(mode)
        _push_mode(self)  # type: ignore[no-untyped-call]  # what follows takes the topmost one off
        assert self._entered_here is not None
        self._entered_here.__exit__(None, None, None)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        if self._leaving is not None:
            self._leaving.remove()

    def run(self) -> Run:
        calls: list[Call] = self.calls
        last = max([c.order for c in calls] + [order for order, _, _ in self.steps], default=0)
        ends = list(self.boundaries) if self.boundaries else [last]
        return Run(calls, self.texts, self.steps, False, self._moved, ends)


def _fingerprints(setup: RLHFSetup) -> dict[Role, dict[str, tuple[int, Tensor]]]:
    """role -> parameter -> (sum of its bits, a few of its numbers)."""
    found: dict[Role, dict[str, tuple[int, Tensor]]] = {}
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for role in MODEL_ROLES:
            module = setup.model(role)
            if not isinstance(module, torch.nn.Module):
                continue
            for name, p in module.named_parameters():
                if p.is_meta or type(p.data) is not torch.Tensor or not p.numel():
                    continue
                flat = p.detach().reshape(-1)
                bits = flat.view(BITS[flat.element_size()]) if flat.element_size() in BITS else flat
                few = flat[:: max(1, len(flat) // SAMPLED)].float().cpu()
                found.setdefault(role, {})[name] = (int(bits.sum(dtype=torch.int64)), few.clone())
    return found


def _moved(before: dict[Role, dict[str, tuple[int, Tensor]]], now: dict[Role, dict[str, tuple[int, Tensor]]]) -> Any:
    """As ``Run.moved``; the changes are those of the numbers that were kept."""
    found: dict[Role, dict[str, float]] = {}
    for role, parameters in before.items():
        for name, (total, few) in parameters.items():
            then = now.get(role, {}).get(name)
            if then is None or then[0] == total:
                continue
            size = float(few.abs().max())
            found.setdefault(role, {})[name] = float((then[1] - few).abs().max()) / size if size else float("inf")
    return found

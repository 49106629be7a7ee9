"""One more run of the step: values moved beyond their clip, and ratios of idle slots poisoned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf_doctor.trace import changes
from rlhf_doctor.trace.calls import Change
from rlhf_doctor.trace.keep import run_kept
from rlhf_doctor.trace.places import Placed
from rlhf_doctor.trace.recover import masked
from rlhf_doctor.trace.runs import Run, Stepper
from rlhf_doctor.trace.table import Table, tabulate
from rlhf_doctor.trace.taps import Enough, Recorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.finding import Role
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]

__all__ = ["Disturbed", "NotFinite", "ValueClip", "disturb", "not_finite", "run_changed"]

POISON = 1e3  # nats between the logits of one row


@dataclass(frozen=True)
class NotFinite:
    """Rows of trained heads whose gradient is NaN or infinite, inside of the responses and outside."""

    inside: int
    outside: int
    rows: int

    def __bool__(self) -> bool:
        return bool(self.inside or self.outside)


@dataclass(frozen=True)
class ValueClip:
    """``kind``: "acts", "none" (never cuts), "exchanged" (cuts away from the return), "" (cannot be told).

    ``toward`` and ``away`` count tokens moved past the clip towards their return and away from it.
    """

    kind: str
    toward: int
    away: int


@dataclass(frozen=True)
class Disturbed:
    """What the run showed. ``clip`` is None where no values were moved, ``poisoned`` counts rows."""

    clip: ValueClip | None
    poisoned: int
    finite: NotFinite
    error: str


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_changed(
    setup: RLHFSetup,
    traced: Traced,
    made: Sequence[Change],
    *,
    text: Callable[[int, list[float]], list[float]] | None = None,
    windows: int | None = None,
) -> tuple[Run, Table | None]:
    """Run the step with optimizers held back and these changes; an error of the step is kept, not raised."""
    stepper = Stepper(setup, (traced.temperature,), traced.experiments.snapshot)
    trained = frozenset(c.role for c in traced.experiments.first.calls if c.backwards)
    recorder = Recorder(
        setup, temperatures=stepper.temperatures, changes=made, hold=True, text_change=text, last_window=windows,
        known_optimizers=stepper.snapshot.optimizers, trained=trained,
    )  # fmt: skip
    error, boundaries, stopped = "", [], False
    with run_kept(stepper.snapshot):
        try:
            with warnings.catch_warnings(), recorder.watching(), torch.enable_grad():
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                setup.step()  # type: ignore[misc]  # there is one: it was traced
                boundaries.append(recorder.order)
        except Enough:
            stopped = True
        except Exception as raised:  # the setup's code may raise anything
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:200]
    run = Run(recorder.calls, recorder.texts, recorder.steps, stopped, {}, boundaries, None, error)
    table = tabulate(run, setup, traced.temperature, samples=traced.base.samples) if run.calls else None
    return run, table


def disturb(setup: RLHFSetup, traced: Traced) -> Disturbed:
    """Make the run."""
    base = traced.base
    declared = setup.declared.get("clip_range_value")
    size = float(declared) if isinstance(declared, (int, float)) and declared > 0 else None
    values = _values(base, size)
    made: list[Change] = []
    if np.any(values):
        made.append(changes.at_states(base, "value", values, changes.is_update))
    # In the old log-probabilities alone: there the ratio overflows in idle slots, and no penalty with a graph does.
    poisoned = sum(
        int((_idle(base, p) != 0).sum()) for p in base.placed if p.call.role == "policy" and changes.is_old(p)
    )
    if poisoned:
        made.append(changes.at_columns(base, "policy", lambda p: _idle(base, p), changes.is_old))
    run, table = run_changed(setup, traced, made)
    clip = _value_clip(traced, table, size) if table is not None and np.any(values) else None
    return Disturbed(clip, poisoned, not_finite(table), run.error)


def _value_clip(traced: Traced, table: Table, clip: float | None) -> ValueClip:
    """Compare ∂L/∂V with that of the plain square, κ (V - R), where V was moved past the clip."""
    base, made = traced.base, traced.recovered
    old = base["old_value"] if base.has("old_value") else base["value"]
    returns, moved = made.returns, masked(base, table["value"])
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = masked(base, table["value_gradient"]) / (made.kappa * (moved - returns))
    held = old + np.clip(moved - old, -(clip or np.inf), clip or np.inf)
    now, clipped = np.abs(moved - returns), np.abs(held - returns)
    known = np.isfinite(kept)
    toward = known & (now < 0.95 * clipped) & (clip is not None)
    away = known & ((now > 1.05 * clipped) if clip else (now > 1.5 * np.abs(old - returns)))
    gone, full = np.abs(kept) < 0.05, np.abs(kept - 1) < 0.05
    kind = ""
    if away.sum() >= 4 and gone[away].mean() > 0.8:
        kind = "exchanged"
    elif toward.sum() >= 4 and full[toward].all():
        kind = "none"
    elif toward.sum() >= 4 and gone[toward].mean() > 0.8:
        kind = "acts"
    return ValueClip(kind, int(toward.sum()), int(away.sum()))


def _values(base: Table, clip: float | None) -> Floats:
    """Twice the clip range up or down, at every fourth token far beyond it and beyond every return."""
    if not base.has("value_gradient"):
        return np.zeros(base.tokens.shape)
    spread = float(np.nanmax(np.abs(base["value"]))) + float(np.nanmax(np.abs(base.scores), initial=0.0)) + 1.0
    size = np.full(base.tokens.shape, 2 * clip if clip else 0.5 * spread)
    order = np.arange(size.size).reshape(size.shape)
    size = np.where(order % 4 == 0, 10 * spread, size)
    signs = np.random.default_rng(7).choice([-1.0, 1.0], size.shape)
    made: Floats = size * signs * base.real
    return made


def _idle(base: Table, placed: Placed) -> Floats:
    """Poison at the states before the responses, and those past the state that follows the last token.

    Its sign changes from state to state, so that tokens of small and of large ids get both.
    """
    lengths = np.array([len(s.response) for s in base.samples] or [0])
    at = np.maximum(placed.sample, 0)
    away = (placed.sample >= 0) & ((placed.state < -1) | (placed.state > lengths[at]))
    return np.where(away, np.where(placed.state % 2 == 0, POISON, -POISON), 0.0)


def not_finite(table: Table | None, *, first: bool = False) -> NotFinite:
    """Count rows of trained heads whose gradient is not finite; the ``first`` update's alone where none is held back.

    What is not finite in one update is in every later one, at all rows.
    """
    inside = outside = rows = 0
    start: dict[Role, torch.Tensor] = {}
    for placed in table.placed if table is not None else ():
        kept, weights = placed.call.gradient, placed.call.weights
        if weights is not None and first and not torch.equal(start.setdefault(placed.call.role, weights), weights):
            continue
        if not placed.call.backwards or not kept or table is None:
            continue
        numbers = (
            kept["scalar"] if "scalar" in kept else kept["at_columns"].sum(-1) + kept["at_action"] + kept["others"]
        )
        bad = ~torch.isfinite(numbers).cpu().numpy()
        real = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.real.shape[1])
        real &= table.real[np.maximum(placed.sample, 0), np.clip(placed.state, 0, table.real.shape[1] - 1)]
        inside += int((bad & real).sum())
        outside += int((bad & ~real).sum())
        rows += len(bad)
    return NotFinite(inside, outside, rows)

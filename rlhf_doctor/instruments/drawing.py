"""How the responses were drawn: by which model, in which contexts, and how likely each token was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.draws import Draws
    from rlhf_doctor.trace.runs import Run
    from rlhf_doctor.trace.table import Table

__all__ = ["Drawing", "Drawn", "drawing"]


@dataclass(frozen=True)
class Drawn:
    """One step: its table, its calls, and how its responses were drawn."""

    table: Table
    run: Run
    draws: Draws


@dataclass(frozen=True)
class Drawing:
    """The first step and the one after its updates; ``by`` says who was seen drawing.

    ``by`` is "policy", "copy" (of the policy, which the loop keeps), "reference" or "" (nobody was seen).
    ``rounding`` is how far apart two passes over one text may be in nats, by the precision of the models.
    """

    first: Drawn
    second: Drawn | None
    by: str
    rounding: float
    half: bool  # whether anything is computed in half precision
    updates: int  # of the policy in a step
    setup: Any
    temperatures: tuple[float, ...]
    snapshot: Any  # of the initial state; None for a program that was watched
    cache: dict[int, Drawn | None] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Drawn, ...]:
        """Both."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def again(self, seed: int) -> Drawn | None:
        """Responses drawn with other random numbers, before any update; None where the step does not get so far."""
        from rlhf_doctor.trace.engines import watched_run

        if self.setup.step is None:  # a program that was watched
            return None
        if seed not in self.cache:
            run = watched_run(self.setup, self.temperatures, self.snapshot, times=1, hold=True, seed=seed)
            self.cache[seed] = None if run.error else _drawn(run, self.setup, self.first.table.temperature, held=True)
        return self.cache[seed]

    def without_dropout(self) -> tuple[Drawn, ...]:
        """Both steps once more with the policy's dropout rates at 0; none where they cannot be run."""
        from rlhf_doctor.trace.twice import without_dropout

        if self.setup.step is None:
            return ()
        with without_dropout(self.setup.policy):
            made = _watched(self.setup, self.temperatures, self.snapshot, self.first.table.temperature)
        return tuple(step for step in made or () if step is not None)

    def needs_sampler(self) -> None:
        """Go on only if the drawing of tokens was seen.

        Raises:
            Unavailable: it was not.
        """
        if not self.by:
            raise Unavailable("needs to see how responses are drawn: neither the policy nor a copy of it drew them")


@fact(Stage.TRACE)
def drawing(setup: Any, traced: Traced) -> Drawing:
    """Look at how the responses of the traced steps were drawn; run them once more where a copy of the policy draws.

    Raises:
        Unavailable: no response was seen.
    """
    from rlhf_doctor.trace.taps import nearby

    found, base = traced.experiments, traced.base
    if not base.samples:
        raise Unavailable("no response was seen: the policy was not called on token ids, or nothing was trained")
    temperatures = nearby(base.temperature)
    first = _drawn(found.first, setup, base.temperature, base, held=not traced.watched)
    second = None
    if found.second_run is not None and found.second is not None:
        second = _drawn(found.second_run, setup, base.temperature, found.second)
    updates = int(base.windows["policy"].max()) + 1 if len(base.windows.get("policy", ())) else 0
    by = _by(first)
    if setup.step is not None and (not by or (updates > 1 and not _known(first.draws.old))):
        watched = _watched(setup, temperatures, found.snapshot, base.temperature)
        if watched and (_by(watched[0]) or _known(watched[0].draws.old)):
            by = by or ("copy" if _by(watched[0]) else "")
            first, second = watched
    if not by and _by(first, "reference"):
        by = "reference"
    exact = found.snapshot is not None and found.snapshot.exact
    rounding, half = _rounding(setup, first, exact)
    return Drawing(first, second, by, rounding, half, updates, setup, temperatures, found.snapshot)


def _known(logs: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(logs).any())


def _by(drawn: Drawn, role: Role = "policy") -> str:
    from rlhf_doctor.trace.draws import chains

    end = drawn.run.boundaries[0] if drawn.run.boundaries else float("inf")
    return role if chains([c for c in drawn.run.calls if c.order <= end], role) else ""


def _drawn(run: Run, setup: Any, temperature: float, table: Table | None = None, held: bool = False) -> Drawn:
    """A step's responses; laid out by the texts trained on where those are not what was seen to be drawn."""
    from rlhf_doctor.trace.draws import draws
    from rlhf_doctor.trace.samples import Special, from_rows, split_generation
    from rlhf_doctor.trace.table import tabulate

    special = Special.of(setup)
    table = table or tabulate(run, setup, temperature)
    made = draws(run, table, special, held=held)
    if all(made.lost[name] >= made.placed[name] for name in ("old", "new")):
        samples = from_rows(split_generation(run.calls)[1], setup, special)
        table = tabulate(run, setup, temperature, samples=samples)
        made = draws(run, table, special, held=held)
    return Drawn(table, run, made)


def _watched(
    setup: Any, temperatures: tuple[float, ...], snapshot: Any, temperature: float
) -> tuple[Drawn, Drawn | None] | None:
    from rlhf_doctor.trace.engines import watched_run
    from rlhf_doctor.trace.runs import Run

    run = watched_run(setup, temperatures, snapshot)
    if run.error and not run.boundaries:
        return None
    parts, start = [], 0
    for end in run.boundaries:
        calls = [c for c in run.calls if start < c.order <= end]
        texts = [t for t in run.texts if start < t.order <= end]
        steps = [s for s in run.steps if start < s[0] <= end]
        parts.append(_drawn(Run(calls, texts, steps, False, {}, [end]), setup, temperature))
        start = end
    return parts[0], parts[1] if len(parts) > 1 else None


def _rounding(setup: Any, drawn: Drawn, exact: bool) -> tuple[float, bool]:
    """(nats that two passes may be apart, whether in half precision); declared is what is meant, ``exact`` what ran."""
    import torch

    kinds = {p.dtype for p in getattr(setup.policy, "parameters", list)() if p.is_floating_point()}
    logits = [c.at_columns for c in drawn.run.calls if c.role == "policy" and c.at_columns is not None][:4]
    for kind in (torch.bfloat16, torch.float16):
        if logits and all(bool((z == z.to(kind).float()).all()) for z in logits):
            kinds.add(kind)
    said = "" if exact else str(setup.declared.get("dtype", ""))
    if torch.bfloat16 in kinds or "bf" in said:
        return 0.25, True
    if torch.float16 in kinds or "16" in said:
        return 0.05, True
    return 2e-3, False

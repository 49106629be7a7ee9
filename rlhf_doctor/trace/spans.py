"""Which states each sample is trained at: within its response, before it and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

__all__ = ["Spans", "left_out", "spans"]

MOVED = 1e-3  # of the values' spread
SURE = -1e-3  # nats
NOTHING = 1e-7  # of the largest gradient: what rounding leaves of a masked one


def left_out(base: Table) -> Bools:
    """(S,) samples whose every token has a policy gradient of 0: no advantage, or cut texts that are not trained on."""
    weight = np.where(base.real, np.abs(base["weight"]), np.nan)
    known = np.isfinite(weight)
    largest = np.where(known, weight, 0.0).max(1, initial=0.0)
    found: Bools = known.any(1) & (largest <= NOTHING * largest.max(initial=0.0))
    return found


@dataclass
class Spans:
    """Of a role's first pass over each sample.

    Attributes:
        inside: (S, T) whether a response token is trained.
        before: (S,) how many states before the response are, ``after`` (S,) how many past its last token.
        edge: (S,) whether the state after the last known token is, where more may follow that no pass was given.
        seen: (S, T) response tokens with a gradient; ``inside`` adds those where none can be seen.
        rows: (S,) whether anything of a sample is.
        real: (S, T) response tokens.
    """

    inside: Bools
    before: Ints
    after: Ints
    edge: Bools
    seen: Bools
    rows: Bools
    real: Bools

    @property
    def shifted(self) -> bool:
        """Whether most samples are trained at as many states as they have tokens, but at others: no mask, a shift."""
        counts = self.seen.sum(1) + self.before + self.after + self.edge
        late = (self.after > 0) | self.edge
        some = np.flatnonzero(self.rows & (self.lengths > 1))
        if not len(some):
            return False
        others = ((self.before > 0) | late) & ~self.seen.all(1, where=self.real)
        alike = np.abs(counts - self.lengths) <= 1
        return bool((others & alike)[some].mean() > 0.5)

    @property
    def counts(self) -> Ints:
        """(S,) how many states of each sample are trained."""
        return self.inside.sum(1) + self.before + self.after  # type: ignore[no-any-return]

    @property
    def lengths(self) -> Ints:
        """(S,) response tokens."""
        return self.real.sum(1)  # type: ignore[no-any-return]

    @property
    def first(self) -> Bools:
        """(S,) whether the first token is trained."""
        return self.inside[:, 0] if self.inside.shape[1] else np.zeros(len(self.rows), bool)

    @property
    def last(self) -> Bools:
        """(S,) whether the last token is trained."""
        found = np.zeros(len(self.rows), bool)
        some = np.flatnonzero(self.lengths > 0)
        found[some] = self.inside[some, self.lengths[some] - 1]
        return found


def spans(table: Table, role: Role) -> Spans:
    """Where gradients come back to a role's outputs, of the first pass that each sample is trained in."""
    count = len(table.samples)
    lengths = table.real.sum(1)
    sizes: dict[tuple[int, int], float] = {}
    first = np.full(count, -1)
    for placed in sorted(table.placed, key=lambda p: p.call.order):
        call = placed.call
        if call.role != role or not call.backwards:
            continue
        kept = call.gradient.get("scalar" if role == "value" else "at_action")
        if kept is None:
            continue
        gradient = np.abs(kept.detach().double().cpu().numpy())
        new = [s for s in set(placed.sample[placed.sample >= 0].tolist()) if first[s] < 0]
        first[new] = call.window
        for n in np.flatnonzero((placed.sample >= 0) & np.isfinite(gradient) & (gradient > 0)):
            s = int(placed.sample[n])
            if first[s] == call.window:
                key = s, int(placed.state[n])
                sizes[key] = sizes.get(key, 0.0) + float(gradient[n])
    floor = NOTHING * max(sizes.values(), default=0.0)
    inside = np.zeros(table.tokens.shape, dtype=bool)
    edge = np.zeros(count, dtype=bool)
    before, after = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for (s, t), size in sizes.items():
        if size <= floor:
            continue
        if 0 <= t < lengths[s]:
            inside[s, t] = True
        elif t < 0:
            at = len(table.samples[s].prompt) + t  # the token that this state comes before
            before[s] += not any(len(o.prompt) <= at < len(o.tokens) + (not o.ended) for o in table.earlier[s])
        elif t > lengths[s] or table.samples[s].ended:  # else the last token may be one that no pass was given
            after[s] += 1
        else:
            edge[s] = True
    rows = inside.any(1) | (before > 0) | (after > 0)
    seen = inside.copy()
    if role == "policy":  # the gradient of a log-probability vanishes where the token is certain
        inside |= table.real & rows[:, None] & (np.nan_to_num(table["logp"], nan=-1.0) > SURE)
    elif table.has("value"):  # that of a clipped value loss where the values are far from the old ones
        gone = np.abs(table["value"] - table["old_value"]) > MOVED * float(np.nanstd(table["value"]))
        inside |= table.real & rows[:, None] & gone
    return Spans(inside, before, after, edge, seen, rows, table.real)

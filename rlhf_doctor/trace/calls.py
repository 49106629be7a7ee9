"""What is kept of one output of a model's head, and what may be put in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf_doctor.trace.packing import Unpacked, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.finding import Role
    from rlhf_doctor.trace.sampler import Shown

__all__ = ["CANDIDATES", "COLUMNS", "Call", "Change", "Lookup", "ScoredTexts"]

COLUMNS = 32  # vocabulary entries whose logits are kept for every row
CANDIDATES = (-1, 0, 1, 2)  # offsets from a column to the tokens that may be its action; 1 is right


@dataclass(eq=False)
class Lookup:
    """The token ids (B, L) that a model's embedding was last given, with the mask and positions that came along."""

    ids: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    hidden: Tensor | None = None

    @cached_property
    def unpacked(self) -> tuple[Lookup, Unpacked] | None:
        """The same with a text a row, where rows hold several."""
        made = unpack(self.ids, self.positions, self.mask)
        return None if made is None else (Lookup(made.ids, made.mask), made)


@dataclass(eq=False)
class Call:
    """One output of a role's head: N rows, each a (row, column) of the ids that its model was given.

    Where a row of ids holds several texts, ``source``, ``rows`` and ``columns`` have a text a row, and ``given`` is
    what (rows, columns) were.

    ``gradient`` holds what came back: for vocabulary heads the entry of greatest absolute gradient (``action``), its
    gradient, the gradients at ``COLUMNS`` fixed entries and at the candidate tokens; for scalar heads ``gradient``
    (N,) alone. ``window`` counts the optimizer steps on the role's parameters before the call.
    """

    role: Role
    order: int
    nth: int  # among the calls of its role
    source: Lookup
    rows: Tensor
    columns: Tensor
    with_grad: bool
    training: bool
    window: int
    pooled: bool = False
    scalar: Tensor | None = None  # (N,)
    lse: dict[float, Tensor] = field(default_factory=dict)  # temperature -> (N,) log Σ exp(z/T)
    entropy: Tensor | None = None  # (N,) at the declared temperature
    at_columns: Tensor | None = None  # (N, COLUMNS) logits
    candidates: Tensor | None = None  # (N, len(CANDIDATES)) token ids, -1 where there is none
    at_candidates: Tensor | None = None  # (N, len(CANDIDATES)) logits
    size: int = 0  # of the vocabulary
    rounding: float = 2.0**-23  # relative, of the numbers that the head gave
    tail: Tensor | None = None  # (K, V) logits whose action may not be among the ids: after the last, or before filler
    tail_of: Tensor | None = None  # (K,) which of the N they are
    likeliest: Tensor | None = None  # (K,) in place of ``tail`` once the next call has shown what was drawn
    gradient: dict[str, Tensor] = field(default_factory=dict)
    foreign: Role | None = None  # the head was given this other role's hidden states, bit for bit
    weights: Tensor | None = None  # a few numbers of the role's parameters at the time, to see who has been updated
    backwards: int = 0
    drew: Tensor | None = None  # (B,) what was drawn from its last rows, where a draw was seen
    shown: Shown | None = None  # what it was drawn from
    handle: Any = None
    read_from: Any = None  # a weak reference to the tensor
    given: tuple[Tensor, Tensor] | None = None

    @property
    def ids(self) -> Tensor:
        """(B, L) token ids."""
        return self.source.ids


@dataclass(frozen=True)
class ScoredTexts:
    """One call of a reward function: its arguments as given and the scores (B,) that it returned."""

    order: int
    arguments: tuple[Any, ...]
    scores: Tensor


@dataclass(frozen=True)
class Change:
    """What to put in place of a role's output: (call, tensor, recorder) -> tensor, or None to leave it.

    ``texts`` does the same to the list of scores of a reward function.
    """

    role: Role
    apply: Callable[[Call, Tensor], Tensor | None]

"""Ends of sequence that are left out of the policy's training because of what token they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.trace.spans import spans

if TYPE_CHECKING:
    from rlhf_doctor.trace.table import Table

__all__ = ["untrained_ends"]

FEW = 2


def untrained_ends(table: Table, token: int) -> tuple[int, ...]:
    """The samples that end in ``token``, if it is trained in none of them and the token before it is in all.

    Last tokens of responses that were cut must be trained, or it is the place that is left out and not the token.
    """
    seen = spans(table, "policy")
    long = [int(s) for s in np.flatnonzero(seen.rows & (seen.lengths > 1))]
    last = {s: int(seen.lengths[s]) - 1 for s in long}
    ends = [s for s in long if table.samples[s].response[-1] == token]
    left_out = all(not seen.inside[s, last[s]] and seen.inside[s, last[s] - 1] for s in ends)
    by_place = any(not seen.last[s] for s in long if s not in ends)
    return tuple(ends) if len(ends) >= FEW and left_out and not by_place else ()

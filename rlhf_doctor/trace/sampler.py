"""What tokens were drawn from, beside the logits it was made of: entries left out, and odds that were bent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.drawing import Drawing, Drawn
    from rlhf_doctor.trace.calls import Call
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = ["Bend", "Shown", "bend_of", "bends", "shown"]

LEFT_OUT = 0.01  # of a state's distribution: a float16 softmax loses less in rounding
ALIGNED = 0.03  # nats from the line through a state's log odds; half precision leaves less
BENT = 0.1  # nats
LIKELY = 0.01  # probability of entries that count
MOST = 0.6  # of the entries that must lie on the line
FEW = 3  # drawn tokens


@dataclass(frozen=True)
class Shown:
    """What the rows of a call's tail were drawn from, reduced.

    ``left_out`` (K,) is the share of the distribution that has probability 0, at least; ``at`` (K, M) are log
    probabilities at the fixed columns and candidates, NaN where the order of the entries is not known.
    """

    left_out: Tensor
    at: Tensor


def shown(call: Call, given: Tensor) -> Shown | None:
    """Compare the weights (B, V) that a token a row is drawn with, with the logits of the call before the draw."""
    if call.tail is None or call.tail_of is None or call.candidates is None or given.dtype == torch.float16:
        return None
    with torch.no_grad(), torch._C.DisableTorchFunction():
        rows = call.rows.to(given.device)[call.tail_of.to(given.device)]
        q, z = given.detach().float()[rows], call.tail.to(given.device).float()
        q = q / q.sum(-1, keepdim=True)
        ordered = bool((q[:, 1:] <= q[:, :-1]).all())
        z = z.sort(-1, descending=True).values if ordered else z
        fixed = torch.linspace(0, call.size - 1, min(32, call.size), device=q.device).round().long()
        candidates = call.candidates.to(q.device)[call.tail_of.to(q.device)]
        picked = torch.cat([q[:, fixed], q.gather(1, candidates.clamp(min=0))], 1).log()
        picked[:, len(fixed) :][candidates < 0] = torch.nan
        return Shown(_left_out(q, z), torch.full_like(picked, torch.nan) if ordered else picked)


def _left_out(q: Tensor, z: Tensor) -> Tensor:
    """(K,) the share that entries of weight 0 would hold at the temperature of the others; 0 where it is not told."""
    kept = (q > 0) & z.isfinite()
    log_q, z_kept = torch.where(kept, q, 1.0).log(), torch.where(kept, z, 0.0)
    dz = (z_kept - (q * z_kept).sum(-1, keepdim=True)) * kept
    dy = (log_q - (q * log_q).sum(-1, keepdim=True)) * kept
    slope = (q * dz * dy).sum(-1) / (q * dz * dz).sum(-1).clamp(min=1e-12)
    whole = (torch.where(z.isfinite(), z, -torch.inf) * slope.clamp(min=1e-6)[:, None]).softmax(-1)
    told = (kept.sum(-1) >= 2) & (slope > 0)
    return torch.where(told, torch.where(q > 0, 0.0, whole).sum(-1), 0.0)


def bend_of(call: Call, n: int, temperature: float) -> tuple[float, float]:
    """(share left out, largest bend in nats) where row ``n`` of a call was drawn from, NaN where it was not seen."""
    if call.shown is None or call.tail_of is None or call.at_columns is None or call.at_candidates is None:
        return np.nan, np.nan
    at = (call.tail_of == n).nonzero()[:, 0]
    if not len(at):
        return np.nan, np.nan
    k = int(at[0])
    z = torch.cat([call.at_columns[n], call.at_candidates[n]]).double().cpu().numpy()
    return float(call.shown.left_out[k]), _bend(z, call.shown.at[k].double().cpu().numpy(), temperature)


def _bend(z: Floats, y: Floats, temperature: float) -> float:
    """How far likely entries are from the line that most entries' log odds ``y`` lie on over their logits ``z``."""
    use = np.isfinite(z) & np.isfinite(y)
    z, y = z[use], y[use]
    if len(z) < 8:
        return np.nan
    i, j = np.triu_indices(len(z), 1)
    apart = np.abs(z[i] - z[j]) > 0.05 * np.ptp(z)
    slopes = [1 / temperature, 1.0]
    if apart.any():
        slopes.append(float(np.median((y[i] - y[j])[apart] / (z[i] - z[j])[apart])))
    lines = [slope * z + np.median(y - slope * z) for slope in slopes]
    line = max(lines, key=lambda x: int((np.abs(y - x) < ALIGNED).sum()))
    off = np.abs(y - line)
    likely = np.exp(np.maximum(y, line)) > LIKELY
    if (off < ALIGNED).mean() < MOST or not likely.any():
        return np.nan
    return float(off[likely].max())


@dataclass(frozen=True)
class Bend:
    """Tokens drawn from something else than a softmax of the policy's logits."""

    tokens: int
    of: int
    left_out: float  # the most of a state's distribution that had probability 0
    nats: float  # the most that a likely token's log odds were moved by


def bends(drawing: Drawing) -> Bend | None:
    """Whether draws were seen to be made from cut or bent odds while the loss takes the whole softmax."""
    cut, bent = (
        np.concatenate([getattr(step.draws, name)[step.table.real] for step in drawing.steps])
        for name in ("left_out", "bent")
    )
    seen = np.isfinite(cut)
    off = seen & ((cut > LEFT_OUT) | (np.nan_to_num(bent) > BENT))
    if off.sum() < FEW or not all(_scores_the_softmax(step) for step in drawing.steps):
        return None
    nats = float(np.nan_to_num(bent[off]).max())
    return Bend(int(off.sum()), int(seen.sum()), float(cut[off].max()), nats if nats > BENT else 0.0)


def _scores_the_softmax(step: Drawn) -> bool:
    """Whether the gradients of the trained tokens are those of a softmax over every entry."""
    mixed = step.table["mixed"][step.table.real]
    known = mixed[np.isfinite(mixed)]
    return bool(len(known)) and float(np.median(known)) < 1e-2 and not _skips(step.table)


def _skips(table: Table) -> bool:
    """Whether likely entries get no gradient where others do: the loss cuts the distribution too."""
    for placed in table.placed:
        call = placed.call
        if call.role != "policy" or "at_columns" not in call.gradient or call.at_columns is None:
            continue
        inside = torch.from_numpy((placed.sample >= 0) & (placed.state >= 0)).to(call.at_columns.device)
        likely = (call.at_columns / table.temperature - call.lse[table.temperature][:, None]).exp() > LIKELY
        gradient = call.gradient["at_columns"]
        trained = inside & (call.gradient["at_action"].abs() > 0)
        if bool((likely & (gradient == 0))[trained].any()):
            return True
    return False

"""What the gradient at the policy's logits looks like in slots that belong to no response."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.trace.schedule import passes

if TYPE_CHECKING:
    from rlhf_doctor.trace.table import Table

__all__ = ["entropy_outside"]

LIKE = 0.05  # residual over size: float32 leaves 1e-4, a log-probability's gradient has no slope at all


def entropy_outside(base: Table) -> tuple[int, int]:
    """(rows after the responses whose gradient is an entropy's, rows there).

    The entropy's gradient at a logit is π_v (log π_v + H) times one number: over π_v, a line in log π_v. That of a
    log-probability is constant but at its token.
    """
    lengths = np.array([len(s.response) for s in base.samples] or [0])
    found = seen = 0
    for _, placed in passes(base):
        call = placed.call
        if "at_columns" not in call.gradient or call.at_columns is None:
            continue
        after = (placed.sample >= 0) & (placed.state > lengths[np.maximum(placed.sample, 0)])
        seen += int(after.sum())
        z = call.at_columns.double().cpu().numpy()[after] / base.temperature
        lse = call.lse[base.temperature].double().cpu().numpy()[after]
        gradient = call.gradient["at_columns"].double().cpu().numpy()[after]
        logp = z - lse[:, None]
        for x, g in zip(logp, gradient, strict=True):
            usable = np.isfinite(x) & np.isfinite(g) & (x > -30)
            if usable.sum() < 6 or not np.abs(g[usable]).max() > 0:
                continue
            found += _is_line(x[usable], (g / np.exp(x))[usable])
    return found, seen


def _is_line(x: np.ndarray, y: np.ndarray) -> bool:
    slope, intercept = np.polyfit(x, y, 1)
    left = np.abs(slope * x + intercept - y)
    return bool(abs(slope) * np.ptp(x) > 0.2 * np.abs(y).max() and np.median(left) < LIKE * np.abs(y).max())

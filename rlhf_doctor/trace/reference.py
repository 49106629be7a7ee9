"""What the reference is given: tokens, mask and positions of its passes beside those that the policy is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.trace.estimators import old_logp
from rlhf_doctor.trace.recover import masked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.places import Placed
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = ["ReferenceView", "reference_view"]

View = tuple[
    int, tuple[bool, ...], tuple[int, ...]
]  # visible columns before the text, its mask, steps of its positions


@dataclass
class ReferenceView:
    """``others`` counts rows of the reference's passes that hold no sample, of ``rows``.

    ``gap`` is the largest difference of its log-probabilities from the policy's, of rollout or update, whichever is
    nearer; None where either is unknown. ``differences``: what is not as for the policy, with the number of samples.
    """

    rows: int = 0
    others: int = 0
    altered: int = 0
    gap: float | None = None
    tokens: int = 0
    differences: dict[str, int] = field(default_factory=dict)
    samples: int = 0


def reference_view(traced: Traced) -> ReferenceView:
    """Lay the reference's passes beside the policy's."""
    base, made = traced.base, ReferenceView()
    passes = [p for p in base.placed if p.call.role == "reference"]
    made.rows = sum(len(p.row_sample) for p in passes)
    made.others = sum(int((p.row_sample < 0).sum()) for p in passes)
    policy = _views(base, [p for p in base.placed if p.call.role == "policy" and p.call.backwards])
    mine = [p for p in base.placed if p.call.role == "policy"]
    made.altered = sum(p.altered for p in passes) if not any(p.altered for p in mine) else 0
    made.others = made.others if not any((p.row_sample < 0).any() for p in mine) else 0
    reference = _views(base, passes)
    both = policy.keys() & reference.keys()
    made.samples = len(both)
    for s in both:
        for name, a, b in zip(("pads before the text", "mask", "positions"), policy[s], reference[s], strict=True):
            if a != b and (name != "positions" or (a and b)):
                made.differences[name] = made.differences.get(name, 0) + 1
    ref = masked(base, base["ref_logp"])
    gaps = []
    for name in ("old_logp", "logp"):
        apart = np.abs(ref - masked(base, old_logp(base) if name == "old_logp" else base[name]))
        if name == "logp" and traced.experiments.by_hand:
            apart = np.where(base["window"] == 0, apart, np.nan)
        if np.isfinite(apart).any():
            gaps.append((float(np.nanmax(apart)), int(np.isfinite(apart).sum())))
    if gaps:
        made.gap, made.tokens = min(gaps)
    return made


def _views(base: Table, passes: list[Placed]) -> dict[int, View]:
    found: dict[int, View] = {}
    for placed in passes:
        source = placed.call.source
        ids = source.ids.cpu().numpy()
        mask = np.ones(ids.shape, dtype=bool)
        if source.mask is not None and source.mask.shape[0] == ids.shape[0] and source.mask.shape[1] >= ids.shape[1]:
            mask = source.mask.cpu().numpy().astype(bool)[:, : ids.shape[1]]
        places = source.positions
        for b, s in enumerate(placed.row_sample.tolist()):
            if s < 0 or s in found:
                continue
            start = placed.starts[s]
            end = start + len(base.samples[s].tokens) - 1  # nothing is drawn after the last token
            steps: tuple[int, ...] = ()
            if places is not None and places.shape[-1] == ids.shape[1] and len(places) in (1, len(ids)):
                row = places.cpu().numpy()[b if places.shape[0] > 1 else 0, start:end]
                steps = tuple(np.diff(row).tolist())
            found[s] = int(mask[b, :start].sum()), tuple(mask[b, start:end].tolist()), steps
    return found

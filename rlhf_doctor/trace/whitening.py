"""How the advantages were whitened: which statistics turn returns − values into what the policy is trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.trace.advantage import advantages_by_definition
from rlhf_doctor.trace.estimators import VALUES, old_logp, reference_logp
from rlhf_doctor.trace.gains import discount, trusted
from rlhf_doctor.trace.groups import groups_of
from rlhf_doctor.trace.recover import _line, masked
from rlhf_doctor.trace.shaped import of_scores, score_reach, to_go

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.divergence import Divergence
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Whitening", "each_response", "shaped_returns", "whitening"]

STRAIGHT = 2e-3  # misfit over the range: float32 leaves 1e-5
FEW = 4  # tokens: a line through fewer says little
CLOSE = 1e-2  # of a standard deviation, between the mean that was taken off and the one that should be


@dataclass(frozen=True)
class Whitening:
    """What was done. ``kind``:

    batch: mean and deviation of all response tokens; minibatch, micro-batch, row: of those of each;
    pieces: of those of each part of the width, at one and the same place in every response;
    none: no mean was taken off; kept: the mean was added back; variance: divided by the variance;
    other: another number was taken off; unknown: returns − values do not explain the weights.
    ``taken`` is what was taken off, ``mean`` and ``deviation`` are those of the response tokens.
    """

    kind: str
    taken: float
    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class _Part:
    slope: float
    taken: float
    misfit: float
    mean: float
    count: int
    rows: int


def whitening(
    traced: Traced, declared: Mapping[str, Any], raw: Floats | None = None, scale: Floats | None = None
) -> Whitening:
    """Which tokens' mean was taken off the advantages, and by what they were divided.

    Args:
        traced: of the setup's step.
        declared: the setup's options.
        raw: (S, T) advantages before they were whitened; None: the critic's targets less its values.
        scale: (S,) how a row's tokens are weighted; None: as the critic shows it.
    """
    base, made = traced.base, traced.recovered
    raw = masked(base, made.raw_advantages) if raw is None else raw
    weight = masked(base, base["weight"]) / (made.row_scale if scale is None else scale)[:, None]
    seen = np.isfinite(raw) & np.isfinite(weight) & trusted(traced)[:, None]
    windows = [seen & (base["window"] == w) for w in np.unique(base["window"][seen])]
    parts = _parts(windows, raw, weight)
    if not parts:
        return Whitening("unknown", np.nan, np.nan, np.nan, 0)
    every = _everywhere(traced, declared, raw)
    mean, deviation = (np.nan, float(np.std(raw[seen]))) if every is None else (float(every.mean()), float(every.std()))
    count = int(seen.sum()) if every is None else len(every)
    if all(p.misfit < STRAIGHT for p in parts):
        each = _of_responses(traced, raw) if scale is not None else None
        if each is not None and all(abs(p.taken - each) < CLOSE * deviation for p in parts):
            return Whitening("batch", each, mean, deviation, count)
        return Whitening(_kind(traced, declared, parts, mean, deviation), parts[0].taken, mean, deviation, count)
    for kind, places in (("micro-batch", _calls(traced, seen)), ("row", _each_row(seen))):
        smaller = _parts(places, raw, weight)
        if len(smaller) > len(parts) and all(
            p.misfit < STRAIGHT and abs(p.taken - p.mean) < CLOSE * deviation for p in smaller
        ):
            return Whitening(kind, smaller[0].taken, mean, deviation, count)
    taken = _in_pieces(traced, raw, windows, every)
    return Whitening(
        "unknown" if taken is None else "pieces", np.nan if taken is None else taken, mean, deviation, count
    )


def _of_responses(traced: Traced, raw: Floats) -> float | None:
    """The mean over responses of advantages that are one number for each, as leave-one-out's are; else None."""
    rows = [row[real] for row, real in zip(raw, traced.base.real, strict=True)]
    known = all(len(row) and np.isfinite(row).all() for row in rows)
    if not known or max(float(np.ptp(row)) for row in rows) > 1e-6 * max(float(np.abs(row).max()) for row in rows):
        return None
    return float(np.mean([row[0] for row in rows]))


def each_response(traced: Traced) -> int:
    """In how many responses the weights, which differ from token to token, add up to 0; 0 unless in all of them."""
    weight = np.where(trusted(traced)[:, None], masked(traced.base, traced.base["weight"]), np.nan)
    rows = [row[np.isfinite(row)] for row in weight]
    rows = [row for row in rows if len(row) > 2 and np.ptp(row) > CLOSE * np.abs(row).max()]
    even = all(abs(row.sum()) < STRAIGHT * np.abs(row).sum() for row in rows)
    return len(rows) if even and len(rows) > 2 else 0


def shaped_returns(traced: Traced, declared: Mapping[str, Any], terms: Divergence) -> tuple[Floats, Floats]:
    """Advantages before whitening and the rows' weighting, of a loop without a critic that whitens over the batch.

    They are the discounted scores, less the declared penalty for no end, less the mean of their group where one is
    taken off, less the measured KL.

    Raises:
        Unavailable: the loop is none of that kind, or nothing of the kind explains the weights.
    """
    base, unit = traced.base, of_scores(traced)
    if unit is None or not unit.whitened or unit.baseline == "discounted":
        raise Unavailable("needs a critic, or a batch without one that is whitened: groups are normalised elsewhere")
    weight = np.where(trusted(traced)[:, None], masked(base, base["weight"]), np.nan) / unit.scale[:, None]
    fit = terms.reward.best if terms.reward is not None and terms.reward.there else None
    kl = np.zeros(base.tokens.shape)
    if fit is not None:
        kl = fit.coefficient * VALUES[fit.estimator](old_logp(base) - reference_logp(base, fit.temperature))
        kl = np.nan_to_num(np.where(base.real, kl, 0.0))
    for scores in _relative(base, unit.baseline, number(declared.get("missing_eos_penalty")) or 0.0):
        for part in (to_go(kl, unit.gamma), np.broadcast_to(kl.sum(1, keepdims=True), kl.shape)):
            raw = np.where(base.real, score_reach(base, unit.gamma) * scores[:, None] - part, np.nan)
            known = np.isfinite(raw) & np.isfinite(weight)
            lines = _parts([known & (base["window"] == w) for w in np.unique(base["window"][known])], raw, weight)
            if lines and all(line.misfit < STRAIGHT for line in lines):
                return raw, unit.scale
    raise Unavailable("needs weights that scores and a KL explain, up to whitening")


def _relative(base: Table, baseline: str, penalty: float) -> Iterator[Floats]:
    """(S,) scores as they are, or less the mean of their group's, or of the others in it."""
    cut = np.array([not s.ended for s in base.samples])
    for taken in dict.fromkeys((penalty, 0.0)):
        scores = base.scores - taken * cut
        if baseline != "group":
            yield scores
            continue
        less, alone = scores.copy(), scores.copy()
        for rows in groups_of(base, None):
            less[rows] -= scores[rows].mean()
            alone[rows] = less[rows] * (len(rows) / max(len(rows) - 1, 1))
        yield less
        yield alone


def _in_pieces(traced: Traced, raw: Floats, windows: list[Bools], every: Floats | None) -> float | None:
    """What was taken off the first of two to four parts that the width was cut into; None where no cut explains it.

    Both lines of a cut must take off the mean of their own part over the whole batch: chance fits no such pair.
    """
    base = traced.base
    if every is None:
        return None
    whole = np.full(raw.shape, np.nan)
    whole[base.real] = every
    weight = masked(base, base["weight"])
    lengths = np.maximum(base.real.sum(1), 1)[:, None]
    for place in (np.broadcast_to(np.arange(raw.shape[1]), raw.shape), _columns(traced)):
        width = int(place[base.real].max()) + 1
        cuts: list[tuple[int, ...]] = [(k,) for k in range(1, width)]
        cuts += [tuple(-(-width * i // n) for i in range(1, n)) for n in (3, 4)]
        for share in (np.ones(weight.shape), 1 / np.broadcast_to(lengths, weight.shape)):
            for cut in cuts:
                taken = _cut_there(np.searchsorted(cut, place, side="right"), raw, weight / share, windows, whole)
                if taken is not None:
                    return taken
    return None


def _cut_there(part: Any, raw: Floats, weight: Floats, windows: list[Bools], whole: Floats) -> float | None:
    first, used, deviation = None, set(), float(np.nanstd(whole))
    for piece in np.unique(part):
        mean = float(np.nanmean(whole[part == piece])) if np.isfinite(whole[part == piece]).any() else np.nan
        for one in _parts([w & (part == piece) for w in windows], raw, weight):
            if one.count < FEW or one.misfit > STRAIGHT or not abs(one.taken - mean) < CLOSE * deviation:
                return None
            first = one.taken if first is None else first
            used.add(int(piece))
    return first if len(used) > 1 else None


def _columns(traced: Traced) -> Any:
    """(S, T) where each token stands in the ids that its policy was trained on."""
    base = traced.base
    starts = np.zeros(len(base.samples), dtype=np.int64)
    for placed in base.placed:
        if placed.call.role == "policy" and placed.call.backwards:
            for sample, start in placed.starts.items():
                starts[sample] = start + len(base.samples[sample].prompt)
    return starts[:, None] - starts.min(initial=0) + np.arange(base.real.shape[1])


def _parts(places: list[Bools], raw: Floats, weight: Floats) -> list[_Part]:
    """The line through each place's tokens; places of fewer than three tokens say nothing."""
    found = []
    for inside in places:
        x, y = raw[inside], weight[inside]
        if len(x) < 3 or np.ptp(x) <= 1e-9 or np.ptp(y) <= 0:
            continue
        slope, intercept = _line(x, y)
        misfit = float(np.abs(slope * x + intercept - y).max() / np.ptp(y))
        taken = -intercept / slope if slope else np.nan
        found.append(_Part(slope, taken, misfit, float(x.mean()), len(x), int(inside.any(1).sum())))
    return found


def _everywhere(traced: Traced, declared: Mapping[str, Any], raw: Floats) -> Floats | None:
    """Returns − values of all response tokens of the batch, as measured, else by definition."""
    real = traced.base.real
    if np.isfinite(raw[real]).all() and trusted(traced).all():
        return raw[real]
    found = discount(traced, "policy")
    gamma, lam = declared.get("gamma"), declared.get("lam")
    product = found.product if found.sound else None
    if not isinstance(gamma, (int, float)) or not isinstance(lam, (int, float)):
        return None
    made = advantages_by_definition(
        traced, declared, product if product is not None else gamma * lam, found.gamma if found.gamma else float(gamma)
    )
    return None if made is None else made[real]


def _kind(traced: Traced, declared: Mapping[str, Any], parts: list[_Part], mean: float, deviation: float) -> str:
    def all_near(*wanted: float) -> bool:
        return all(abs(p.taken - w) < CLOSE * deviation for p, w in zip(parts, wanted, strict=True))

    if np.isfinite(mean) and all_near(*[mean] * len(parts)):
        return "variance" if _by_variance(traced, parts, deviation) else "batch"
    if all_near(*[0.0] * len(parts)):
        return "none"
    if all_near(*(p.mean for p in parts)):
        return "minibatch"
    if not np.isfinite(mean):
        return "unknown"
    return "kept" if all_near(*[mean * (1 - deviation)] * len(parts)) else "other"


def _by_variance(traced: Traced, parts: list[_Part], deviation: float) -> bool:
    """Whether 1/slope is the variance, and not the deviation, in the units of some usual denominator of the loss."""
    rows = len(traced.base.samples)
    total = int(traced.base.real.sum())
    width = traced.base.real.shape[1]

    def fits(wanted: float) -> bool:
        return any(
            all(abs(1 / (p.slope * n * wanted) - 1) < 2 * CLOSE for p, n in zip(parts, ns, strict=True))
            for ns in (
                [p.count for p in parts], [p.rows for p in parts], [p.rows * width for p in parts],
                [1] * len(parts), [rows] * len(parts), [total] * len(parts),
            )
        )  # fmt: skip

    return not fits(deviation) and fits(deviation**2)


def _calls(traced: Traced, seen: Bools) -> list[Bools]:
    """The tokens that were trained in one forward pass, for each."""
    found: dict[int, Bools] = {}
    taken = np.zeros(len(seen), dtype=bool)
    for placed in traced.base.placed:
        if placed.call.role != "policy" or not placed.call.backwards:
            continue
        rows = np.unique(placed.row_sample[placed.row_sample >= 0])
        rows = rows[~taken[rows]]
        taken[rows] = True
        if len(rows):
            inside = np.zeros_like(seen)
            inside[rows] = seen[rows]
            found[placed.call.nth] = inside
    return list(found.values())


def _each_row(seen: Bools) -> list[Bools]:
    return list(_rows_of(seen))


def _rows_of(seen: Bools) -> Iterator[Bools]:
    for s in np.flatnonzero(seen.any(1)):
        inside = np.zeros_like(seen)
        inside[s] = seen[s]
        yield inside

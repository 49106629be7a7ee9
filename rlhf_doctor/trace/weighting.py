"""How the policy's tokens are weighted in the loss: weight = c · ρ · advantage, with ρ of each row and c of each pass.

ρ is 1 where all tokens weigh alike and 1 / (tokens of the row) where all rows do. 1 / c is what the sums are divided
by: the tokens or rows of the update as one whole, or something that depends on how it was cut or padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.recover import masked
from rlhf_doctor.trace.schedule import passes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.places import Placed
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = [
    "SOUND",
    "Pass",
    "Weighting",
    "group_relative",
    "half_precision",
    "line",
    "one_sign_missing",
    "slope_sign",
    "weighting",
]

FITS = 1e-2  # of the weights' range: float32 leaves 1e-6, penalties in the loss some 1e-3, another advantage tenths
ALIKE = 1e-2  # of a divisor: rounding leaves 1e-5; the tokens of two minibatches differ by more
EXACT = 1e-5  # relative: float32 leaves 1e-6, and rounding moves a number by some 1e-3 in bfloat16, 1e-4 in float16
MANY = 16  # different weights: advantages of a few whole numbers are numbers of every precision
SOUND = ("token-mean", "seq-mean", "seq-sum", "sum", "fixed")


@dataclass(frozen=True)
class Pass:
    """One trained pass: its rows, tokens, longest row and columns, and the same of its whole update."""

    update: int
    rows: int
    tokens: int
    longest: int
    columns: int  # of the head's output, per row
    length: int  # of the ids
    update_rows: int
    update_tokens: int
    update_longest: int
    passes: int  # of the update
    batch_longest: int  # of all rows of the step


@dataclass(frozen=True)
class Weighting:
    """What the sums are divided by. ``name`` is one of SOUND, "undivided", "pieces", "grid", "longest", or "".

    ``divisors`` are 1 / c of each pass, ``scale`` c ρ of each token (S, T), ``raw`` the advantages that were fitted.
    """

    name: str
    per_row: bool | None
    passes: tuple[Pass, ...] = ()
    divisors: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    scale: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    negative: bool = False
    reason: str = ""


def line(x: Floats, y: Floats) -> tuple[float, float, float]:
    """(slope, intercept, largest residual over the range of y) of the best line; NaN for too little."""
    if len(x) < 3 or np.ptp(x) <= 1e-12 or np.ptp(y) <= 0:
        return float("nan"), float("nan"), float("nan")
    dx = x - x.mean()
    slope = float((dx * (y - y.mean())).sum() / (dx * dx).sum())
    intercept = float(y.mean() - slope * x.mean())
    return slope, intercept, float(np.abs(slope * x + intercept - y).max() / np.ptp(y))


def group_relative(base: Table) -> Iterator[tuple[str, Floats]]:
    """(name, advantages (S, T)) that critic-free methods make of the scores of the responses to one prompt."""
    scores, prompts = base.scores, [s.prompt for s in base.samples]
    if not np.isfinite(scores).all() or len(scores) < 2:
        return
    groups = [np.array([q == p for q in prompts]) for p in prompts]
    if min(int(g.sum()) for g in groups) < 2:
        groups = [np.ones(len(scores), dtype=bool)] * len(scores)
    centred = np.array([s - scores[g].mean() for s, g in zip(scores, groups, strict=True)])
    if np.abs(centred).max() < EXACT * np.abs(scores).max():
        return  # copies of one response: what is left of their scores is rounding
    others = np.array([s - (scores[g].sum() - s) / (g.sum() - 1) for s, g in zip(scores, groups, strict=True)])
    made = {"centred": centred, "leave-one-out": others}
    for freedom in (0, 1):
        spread = np.array([scores[g].std(ddof=freedom) for g in groups])
        if (spread > 0).all():
            made[f"divided by the deviation ({freedom})"] = centred / spread
    for name, each in made.items():
        yield name, np.where(base.real, each[:, None], np.nan)


def candidates(traced: Traced) -> list[tuple[str, Floats]]:
    """The advantages that the weights may be made of."""
    raw = traced.recovered.raw_advantages
    if np.isfinite(raw).any():
        return [("returns less values", raw)]
    return list(group_relative(traced.base)) if not traced.base.has("value") else []


def slope_sign(traced: Traced) -> tuple[int, float, int] | None:
    """(sign, misfit, tokens) of how the weights follow the advantages; None where they follow none of those known."""
    base = traced.base
    found: list[tuple[float, int, int]] = []
    for _, raw in candidates(traced):
        weight = masked(base, base["weight"])
        for scale in (np.ones(len(base.samples)), 1 / np.maximum(base.real.sum(1), 1)):
            lines = [_of_window(weight / scale[:, None], raw, base, w) for w in _updates(base)]
            lines = [made for made in lines if np.isfinite(made[0])]
            if lines and len({made[0] > 0 for made in lines}) == 1:
                sign = 1 if lines[0][0] > 0 else -1
                found.append((max(made[2] for made in lines), sign, sum(made[3] for made in lines)))
    best = min(found, default=None)
    return _by_own_score(traced) if best is None or best[0] > 0.1 else (best[1], best[0], best[2])


def _by_own_score(traced: Traced) -> tuple[int, float, int] | None:
    """The same without a critic, where scores are shaped or filtered: how a row goes with its own score."""
    one, base = traced.experiments.done.get("one score"), traced.base
    if one is None or base.has("value") or not base.has("weight") or one.touched.sum() != 1:
        return None
    moved = np.nan_to_num(masked(base, one.moved(base, "weight"))) * base.real
    row, amount = int(np.flatnonzero(one.touched)[0]), float(one.amounts.reshape(-1)[one.amounts.reshape(-1) != 0][0])
    own = moved[row][base.real[row]] * np.sign(amount)
    if not own.all() or len({x > 0 for x in own.tolist()}) != 1 or np.abs(own).max() < 0.99 * np.abs(moved).max():
        return None
    return (1 if own[0] > 0 else -1), 0.0, len(own)


def _updates(base: Table) -> list[float]:
    window = base["window"]
    return [float(w) for w in np.unique(window[np.isfinite(window)])]


def _of_window(y: Floats, raw: Floats, base: Table, window: float) -> tuple[float, float, float, int]:
    inside = (base["window"] == window) & np.isfinite(y) & np.isfinite(raw)
    return (*line(raw[inside], y[inside]), int(inside.sum()))


def one_sign_missing(traced: Traced) -> tuple[int, int, bool] | None:
    """(tokens without weight, tokens, whether it is the positive advantages) at ratio 1; None where there is no such.

    Tokens of one sign follow the advantages on a line, and those that this line gives the other sign have none.
    """
    base = traced.base
    weight = masked(base, base["weight"])
    for _, raw in candidates(traced):
        known = np.isfinite(weight) & np.isfinite(raw)
        top = float(np.abs(weight[known]).max()) if known.any() else 0.0
        gone = known & (np.abs(weight) < 2e-2 * top)
        left = known & ~gone
        if gone.sum() < 4 or left.sum() < 2 or len(np.unique(np.sign(weight[left]))) != 1:
            continue
        for scale in (np.ones(len(base.samples)), 1 / np.maximum(base.real.sum(1), 1)):
            each = np.broadcast_to(scale[:, None], weight.shape)
            slope, intercept, misfit = _through_0(raw[left], (weight / each)[left])
            if not misfit < 5e-2 and left.sum() > 2:
                slope, intercept, misfit = line(raw[left], (weight / each)[left])
            said = (slope * raw + intercept) * each
            other = gone & (np.sign(said) != np.sign(weight[left][0])) & (np.abs(said) > 5e-2 * top)
            if misfit < 5e-2 and other.sum() >= 4 and other.sum() >= 0.7 * gone.sum():
                return int(other.sum()), int(known.sum()), bool(weight[left][0] < 0)
    return None


def _through_0(x: Floats, y: Floats) -> tuple[float, float, float]:
    """(slope, 0, largest deviation of y / x over it): the line of advantages that nothing has shifted."""
    ratio = y[x != 0] / x[x != 0]
    middle = float(np.median(ratio)) if len(ratio) > 1 else float("nan")
    return middle, 0.0, float(np.abs(ratio / middle - 1).max()) if middle else float("nan")


def half_precision(traced: Traced) -> str:
    """The half precision that the loss is computed in, though the head gives float32; empty where none shows.

    Every token's weight is then a number of that precision, at ratio 1 and where the update's ratios were moved; or,
    where the logits themselves were made coarser, every gradient that came back to them is.
    """
    import torch

    moved = traced.experiments.done.get("update logits")
    called = [p.call.rounding for p in traced.base.placed if p.call.role == "policy"]
    if moved is None or max(called, default=1.0) > EXACT:
        return ""
    found = [table["weight"][table.real] for table in (traced.base, moved.table)]
    weights = [torch.as_tensor(w[np.isfinite(w) & (w != 0)]) for w in found]
    calls = [p.call for p in traced.base.placed if p.call.role == "policy" and "at_action" in p.call.gradient]
    back = torch.cat([c.gradient["at_action"].double().cpu() for c in calls]) if calls else torch.zeros(0)
    return _coarse(weights) or _coarse([back[back.isfinite() & (back != 0)]])


def _coarse(numbers: Sequence[Any]) -> str:
    """The half precision that all of these tensors' numbers have, if there are enough of them; else nothing."""
    import torch

    if any(len(set((1024 * torch.frexp(x).mantissa).round().tolist())) < MANY for x in numbers):
        return ""
    for kind in (torch.bfloat16, torch.float16):
        if all(bool(((x.to(kind).double() / x - 1).abs() < EXACT).all()) for x in numbers):
            return str(kind).removeprefix("torch.")
    return ""


# ---- what the sums are divided by ------------------------------------------------------------------------------------


def weighting(traced: Traced) -> Weighting:
    """Find ρ and c of every first pass over the samples."""
    base = traced.base
    found = [(update, placed) for update, placed in passes(base) if _is_first(base, update, placed)]
    if not found or not base.has("weight"):
        return Weighting("", None, reason="no gradient was seen at the policy's head")
    known = np.isfinite(traced.recovered.raw_advantages)
    if traced.watched and known.any() and not known[base.real].all():
        return Weighting("", None, reason="a watched run shows the first minibatch alone, not what was whitened over")
    made = _passes(base, found)
    best: Weighting | None = None
    for _, raw in candidates(traced):
        tried = _fitted(traced, raw, found, made)
        if tried.name in SOUND:
            return tried
        if best is None or (tried.name and not best.name) or (best.per_row is None and not best.name):
            best = tried
    return best or Weighting("", None, reason="neither returns nor scores are known that the weights could follow")


def _is_first(base: Table, update: int, placed: Placed) -> bool:
    samples = set(placed.sample[placed.sample >= 0].tolist())
    return bool(samples) and all(int(base.windows["policy"][s]) == placed.call.window or update == 0 for s in samples)


def _passes(base: Table, found: Sequence[tuple[int, Placed]]) -> list[Pass]:
    trained = np.isfinite(base["weight"]) & base.real
    lengths = trained.sum(1)
    rows = [np.unique(p.sample[p.sample >= 0]) for _, p in found]
    made = []
    for (update, placed), mine in zip(found, rows, strict=True):
        whole = np.concatenate([r for (u, _), r in zip(found, rows, strict=True) if u == update])
        call = placed.call
        count = int(call.ids.shape[0])
        made.append(
            Pass(
                update,
                count,
                int(lengths[mine].sum()),
                int(lengths[mine].max()),
                len(call.rows) // max(count, 1),
                int(call.ids.shape[1]),
                len(whole),
                int(lengths[whole].sum()),
                int(lengths[whole].max()),
                sum(u == update for u, _ in found),
                int(lengths.max()),
            )
        )
    return made


def _fitted(traced: Traced, raw: Floats, found: Sequence[tuple[int, Placed]], made: Sequence[Pass]) -> Weighting:
    base = traced.base
    weight = masked(base, base["weight"])
    lengths = np.maximum((np.isfinite(weight)).sum(1), 1).astype(np.float64)
    fits: dict[bool, list[tuple[float, float, float]]] = {}
    for per_row in (False, True):
        y = weight * lengths[:, None] if per_row else weight
        fits[per_row] = [_of_pass(y, raw, placed) for _, placed in found]
    best = [per_row for per_row, lines in fits.items() if _median([m[2] for m in lines]) < FITS]
    if not best:
        return Weighting("", None, reason="the policy's weights do not follow the advantages closely enough")
    spreads = _spreads(traced, raw)
    alone = best[0] if len(best) == 1 else None
    result = Weighting("", alone, reason="what the policy's loss is divided by could not be told")
    for sound in (True, False):
        for per_row in best:
            slopes = [m[0] for m in fits[per_row]]
            usable = [i for i, s in enumerate(slopes) if np.isfinite(s) and s and fits[per_row][i][2] < 5 * FITS]
            if len(usable) < max(1, (len(slopes) + 1) // 2):
                continue
            for spread in spreads:
                c = np.array([slopes[i] * spread for i in usable])
                named = _named(np.abs(1 / c), [made[i] for i in usable], per_row, sound, traced)
                if named is not None:
                    scale = np.full(weight.shape, np.nan)
                    for i, one in zip(usable, c, strict=True):
                        mine = np.unique(found[i][1].sample[found[i][1].sample >= 0])
                        scale[mine] = (one / lengths[mine])[:, None] if per_row else one
                    return Weighting(
                        named[0], per_row, tuple(made[i] for i in usable), tuple(np.abs(1 / c).tolist()), named[1],
                        masked(base, scale), bool((c < 0).all()),
                    )  # fmt: skip
    return result


def _of_pass(y: Floats, raw: Floats, placed: Placed) -> tuple[float, float, float]:
    mine = np.zeros(y.shape, dtype=bool)
    mine[np.unique(placed.sample[placed.sample >= 0])] = True
    mine &= np.isfinite(y) & np.isfinite(raw)
    if mine.any() and np.ptp(raw[mine]) <= 1e-9 and np.abs(raw[mine]).min() > 0:  # one row, one advantage
        ratio = y[mine] / raw[mine]
        return float(ratio.mean()), 0.0, float(np.ptp(ratio) / abs(ratio.mean())) if ratio.mean() else float("nan")
    return line(raw[mine], y[mine])


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.median(known)) if known else float("inf")


def _spreads(traced: Traced, raw: Floats) -> list[float]:
    """What the advantages may have been divided by: nothing, or their deviation over all tokens, or all responses."""
    known = raw[np.isfinite(raw)]
    declared = traced.recovered.whitened
    spreads = [float(known.std()), float(known.std(ddof=1))] if len(known) > 1 and declared is not False else []
    each = np.array([row[np.isfinite(row)][:1] for row in raw if np.isfinite(row).any()]).ravel()
    if (
        spreads
        and len(each) > 1
        and np.array_equal(np.repeat(each, np.isfinite(raw).sum(1)[np.isfinite(raw).any(1)]), known)
    ):
        spreads += [float(each.std()), float(each.std(ddof=1))]
    return [1.0, *spreads] if declared is not True else [*spreads, 1.0]


def _named(
    divisors: Floats, made: Sequence[Pass], per_row: bool, sound: bool, traced: Traced
) -> tuple[str, tuple[float, ...]] | None:
    for name, expected in (_sound(made, per_row) if sound else _unsound(made, per_row)).items():
        if (np.abs(divisors / np.array(expected) - 1) < ALIKE).all():
            return name, tuple(expected)
    batch = len(traced.base.samples)
    fixed = float(np.median(divisors))
    still = (np.abs(divisors / fixed - 1) < ALIKE).all()
    varied = len({p.update_tokens for p in made}) > 1 or len({p.tokens for p in made}) > 1
    if sound and still and varied and any(abs(fixed / n - 1) < ALIKE for n in (batch, int(traced.base.real.sum()))):
        return "fixed", (fixed,) * len(made)
    return None


def _sound(made: Sequence[Pass], per_row: bool) -> Mapping[str, list[float]]:
    if per_row:
        return {"seq-mean": [p.update_rows for p in made]}
    return {
        "token-mean": [p.update_tokens for p in made],
        "seq-sum": [p.update_rows for p in made],
        "sum": [1.0] * len(made),
    }


def _unsound(made: Sequence[Pass], per_row: bool) -> Mapping[str, list[float]]:
    cut = all(p.passes > 1 for p in made)
    if per_row:
        return {"undivided": [p.rows for p in made]} if cut else {}
    found: dict[str, list[float]] = {}
    if cut:
        found["undivided"] = [p.tokens for p in made]
        found["pieces"] = [p.tokens * p.passes for p in made]
    for width in ("columns", "length", "longest", "update_longest", "batch_longest"):
        for less in (0, 1):
            at = [getattr(p, width) - less for p in made]
            name = "longest" if "longest" in width else "grid"
            if less and name == "longest":
                continue
            found[f"{name} {width} {less}"] = [p.update_rows * w for p, w in zip(made, at, strict=True)]
            found[f"{name} {width} {less} alone"] = [float(w) for w in at]
            if cut:
                found[f"{name} {width} {less} undivided"] = [p.rows * w for p, w in zip(made, at, strict=True)]
    return found

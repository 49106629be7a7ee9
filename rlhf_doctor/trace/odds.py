"""Odds of what was drawn under two accounts of how: valid whatever the distributions are, with nothing estimated.

A likelihood ratio has mean 1 where the second account is true; so it passes 1/α with probability below α, also when
draws go on as long as one likes (Ville's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.instruments.drawing import Drawing, Drawn
from rlhf_doctor.trace.draws import log_ratios
from rlhf_doctor.trace.spans import spans
from rlhf_doctor.trace.table import Table, _logp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = [
    "ALARM",
    "Heat",
    "Repeats",
    "cut_odds",
    "heat",
    "passes_apart",
    "repeats_between",
    "repeats_within",
    "scoring_temperature",
]

ALARM = math.log(1e6)
OPEN = -1.5  # log odds down to which it is worth drawing more
MORE = 6  # times
FEW = 20  # drawn tokens
HELD = 0.2  # of the probability mass
SHARES = (0.05, 0.3, 0.8, 0.99)  # of tokens that are repeated, where some are


@dataclass(frozen=True)
class Heat:
    """Odds that tokens were drawn at another temperature than they are scored at, and the likeliest such one."""

    log_odds: float
    temperature: float
    tokens: int
    surprise: float  # mean of -log π of the drawn tokens, in nats
    entropy: float  # what it should be on average


def heat(drawing: Drawing) -> Heat:
    """Compare the drawn tokens' likelihood at temperatures around the declared one; draws more where it is close."""
    scored = drawing.first.table.temperature
    others = [t for t in dict.fromkeys((*drawing.temperatures, 1.0)) if not math.isclose(t, scored)]
    sums, seen = dict.fromkeys(others, 0.0), list[Drawn]()
    for step in drawing.steps:
        if not _drawn_before(step, seen):
            _add(sums, step)
            seen.append(step)
    extra = 0
    while OPEN < _mean_odds(sums) < ALARM and extra < MORE:
        extra += 1
        more = drawing.again(extra)
        if more is None or _drawn_before(more, seen):
            break
        _add(sums, more)
        seen.append(more)
    best = max(sums, key=lambda t: sums[t])
    surprise, entropy, tokens = _surprise(seen)
    return Heat(_mean_odds(sums), best, tokens, surprise, entropy)


def _drawn_before(step: Drawn, seen: Sequence[Drawn]) -> bool:
    """Whether most responses are those of an earlier step once more: draws that are repeated are no new evidence."""
    texts = [{s.tokens for s in one.table.samples} for one in seen]
    mine = [s.tokens for s in step.table.samples]
    return any(sum(tokens in known for tokens in mine) > len(mine) / 2 for known in texts)


def _add(sums: dict[float, float], step: Drawn) -> None:
    counted = _counted(step.table)
    for other, ratio in log_ratios(step.table, tuple(sums)):
        sums[other] += float(np.nansum(np.where(counted, ratio, 0.0)))


def _counted(table: Table) -> Bools:
    """Response tokens, without those left out of the training of a row: tools' words, which nobody drew."""
    seen = spans(table, "policy")
    whole = ~np.asarray(seen.inside.any(1))
    found: Bools = table.real & (seen.inside | whole[:, None])
    return found


def _mean_odds(sums: dict[float, float]) -> float:
    """The mean of odds is odds again: no price for looking at several."""
    if not sums:
        return -math.inf
    return float(np.logaddexp.reduce(list(sums.values()))) - math.log(len(sums))


def _surprise(steps: Sequence[Drawn]) -> tuple[float, float, int]:
    told, expected = [], []
    for step in steps:
        table = step.table
        known = np.where(np.isfinite(table["old_logp"]), table["old_logp"], table["logp"])
        entropy = np.where(np.isfinite(table["entropy"]), table["entropy"], table["new_entropy"])
        both = _counted(table) & np.isfinite(known) & np.isfinite(entropy)
        told.append(-known[both])
        expected.append(entropy[both])
    a, b = np.concatenate(told or [np.zeros(0)]), np.concatenate(expected or [np.zeros(0)])
    return (float(a.mean()), float(b.mean()), len(a)) if len(a) else (math.nan, math.nan, 0)


def passes_apart(table: Table) -> float:
    """How far the log-probabilities from before the update are from the first update's, in nats, of most tokens."""
    apart = np.abs(table["old_logp"] - table["logp"])[table.real]
    return float(np.median(apart[np.isfinite(apart)])) if np.isfinite(apart).any() else 0.0


def scoring_temperature(table: Table) -> tuple[float, float, int] | None:
    """(temperature, spread, tokens) of the log-probabilities that are trained, read off their gradients."""
    found = table["temperature"]
    good = np.isfinite(found) & (table["mixed"] < 1e-2) & table.real
    if int(good.sum()) < 3:
        return None
    middle = float(np.median(found[good]))
    return middle, float(np.quantile(np.abs(found[good] / middle - 1), 0.75)), int(good.sum())


@dataclass(frozen=True)
class Repeats:
    """Odds that tokens repeat earlier ones instead of being drawn; ``rows`` are the pairs with most in common."""

    log_odds: float
    tokens: int
    equal: int
    rows: tuple[tuple[int, int], ...] = ()


def repeats_within(step: Drawn) -> Repeats:
    """Each response against those before it to the same prompt."""
    table = step.table
    order = sorted(range(len(table.samples)), key=lambda s: (step.draws.row[s] < 0, step.draws.row[s], s))
    before: dict[tuple[int, ...], list[int]] = {}
    groups = []
    for s in order:
        others = before.setdefault(table.samples[s].prompt, [])
        groups.append((s, tuple(others)))
        others.append(s)
    return _repeats(table, table, groups, step)


def repeats_between(first: Drawn, second: Drawn) -> Repeats:
    """Each response of the second step against the one drawn in the same place of the batch in the first."""
    rows = {int(r): s for s, r in enumerate(first.draws.row) if r >= 0}
    pairs = [(s, (rows[int(r)],)) for s, r in enumerate(second.draws.row) if int(r) in rows]
    if not pairs:
        pairs = [(s, (s,)) for s in range(min(len(first.table.samples), len(second.table.samples)))]
    return _repeats(first.table, second.table, pairs, second)


def _repeats(a: Table, b: Table, groups: Sequence[tuple[int, tuple[int, ...]]], step: Drawn) -> Repeats:
    """Odds of "each token a copy with probability ρ, else drawn" against "drawn".

    ``groups`` are responses of ``b`` with those of ``a`` that they may copy, each as likely; the mean of odds is odds.
    """
    logs = np.zeros(len(SHARES))
    tokens, equal = 0, 0
    alike: list[tuple[int, tuple[int, int]]] = []
    logp = np.where(np.isfinite(step.draws.old_logp), step.draws.old_logp, step.draws.new_logp)
    for j, others in groups:
        compared = [(i, *_copied(a.samples[i].response, b.samples[j].response, logp[j])) for i in others]
        if not compared:
            continue
        logs += np.logaddexp.reduce([odds for _, odds, _, _ in compared]) - math.log(len(compared))
        i, _, hits, count = max(compared, key=lambda one: (one[2], one[0]))
        tokens, equal = tokens + count, equal + hits
        alike.append((hits, (i, j)))
    alike.sort(reverse=True)
    odds = float(np.logaddexp.reduce(logs)) - math.log(len(logs))
    return Repeats(odds, tokens, equal, tuple(pair for hits, pair in alike[:3] if hits))


def _copied(x: Sequence[int], y: Sequence[int], logp: Floats) -> tuple[Floats, int, int]:
    """(for each share, log odds that y copies x, equal tokens, compared tokens)."""
    logs, hits, count = np.zeros(len(SHARES)), 0, 0
    for t in range(min(len(x), len(y))):
        if not np.isfinite(logp[t]):
            continue
        count += 1
        p = math.exp(min(float(logp[t]), 0.0))
        hits += x[t] == y[t]
        logs += [math.log1p(share * (1 - p) / p) if x[t] == y[t] else math.log1p(-share) for share in SHARES]
    return logs, hits, count


def cut_odds(drawing: Drawing) -> tuple[float, float] | None:
    """Odds, as a logarithm, that the sampler leaves out unlikely tokens, and the least share that it keeps.

    If no draw lies below some entry in the order of likelihood, the odds that this is by chance are the product of the
    masses above it. The kept entries stand for all: None where they hold too little of the mass for that.
    """
    every = [one for step in drawing.steps for one in _places_of_drawn(step.table)]
    drawn = [one for one in every if one[-1] >= HELD]
    if len(drawn) < max(FEW, len(every) / 2):
        return None
    found = []
    for of_mass in (True, False):
        top = max(above if of_mass else number for above, number, *_ in drawn) + 1e-9
        logs, kept = 0.0, 1.0
        for _, _, shares, _ in drawn:
            over = np.cumsum(shares) - shares if of_mass else np.arange(len(shares))
            share = max(float(shares[over <= top].sum()), 1e-9)
            logs, kept = logs - math.log(share), min(kept, share)
        found.append((logs, kept))
    return max(found)


def _places_of_drawn(table: Table) -> Iterator[tuple[float, int, Floats, float]]:
    """Of each drawn token: mass and number of entries above it, all entries' shares, the largest first, their mass."""
    window = min((p.call.window for p in table.placed if p.call.role == "policy"), default=0)
    counted, seen = _counted(table), set[tuple[int, int]]()
    for placed in table.placed:
        call = placed.call
        if call.role != "policy" or call.window > window or call.at_columns is None:
            continue
        drawn = _logp(table, placed, table.temperature)
        logs = (call.at_columns.double() / table.temperature).cpu().numpy()
        logs = logs - call.lse[table.temperature].double().cpu().numpy()[:, None]
        for n in np.flatnonzero((placed.sample >= 0) & (placed.state >= 0) & np.isfinite(drawn)):
            key = int(placed.sample[n]), int(placed.state[n])
            if key in seen or key[1] >= table.tokens.shape[1] or not counted[key]:
                continue
            seen.add(key)
            masses = np.exp(np.sort(logs[n])[::-1])
            held = float(masses.sum())
            above = masses > math.exp(float(drawn[n])) * (1 + 1e-6)
            yield float(masses[above].sum()) / held, int(above.sum()), masses / held, held

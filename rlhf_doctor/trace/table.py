"""From the calls of a run to one table of samples and response tokens."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.calls import CANDIDATES, Call
from rlhf_doctor.trace.firsts import Firsts, token_by_token, windows_of
from rlhf_doctor.trace.grown import fed_tokens
from rlhf_doctor.trace.places import Placed, Places, complete_samples, place
from rlhf_doctor.trace.runs import Run
from rlhf_doctor.trace.samples import (
    Sample,
    Special,
    encoded_prompts,
    from_rows,
    generated,
    split_generation,
    with_one_word,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Table", "tabulate"]

NEXT = CANDIDATES.index(1)


@dataclass
class Table:
    """Everything per sample and response token, (S, T) float64 with NaN where nothing was seen.

    ``weight`` is -∂L/∂log π(a_t), ``value_gradient`` ∂L/∂V_t, both of the first pass over each sample; ``offset``
    is where the trained action stands (0: the token drawn in that state; -1: the one before).
    """

    samples: list[Sample]
    tokens: Ints
    real: NDArray[np.bool_]  # response tokens up to and with the end of sequence
    fields: dict[str, Floats]
    placed: list[Placed]
    generation: list[Call]
    outside: dict[str, Floats]  # role -> weights of what is trained outside of the responses, per sample
    scores: Floats  # (S,)
    scores_by: str  # "ids", "texts", "order", ""
    score_rows: list[tuple[int, int]]  # (order of the call, row) of each sample's score
    temperature: float
    windows: dict[str, Ints] = field(default_factory=dict)

    @cached_property
    def scattered(self) -> frozenset[Role]:
        """Roles whose minibatches are drawn from single tokens: a text stands in one again for each of its tokens."""
        calls = [p for p in self.placed if p.call.backwards]
        return frozenset(p.call.role for p in calls if token_by_token(p))

    @cached_property
    def earlier(self) -> list[list[Sample]]:
        """Of each sample the earlier turns that its prompt begins with."""
        return [[other for other in self.samples if sample.follows(other)] for sample in self.samples]

    def __getitem__(self, name: str) -> Floats:
        """A field, all NaN where it was never seen."""
        found = self.fields.get(name)
        return np.full(self.tokens.shape, np.nan) if found is None else found

    def rounding(self, *roles: Role) -> float:
        """The relative rounding of the coarsest numbers that these roles' heads gave; float32's where none was seen."""
        return max((p.call.rounding for p in self.placed if p.call.role in roles), default=2.0**-23)

    def has(self, name: str) -> bool:
        """Whether anything of a field was seen."""
        return name in self.fields and bool(np.isfinite(self.fields[name]).any())


def tabulate(run: Run, setup: RLHFSetup, temperature: float, *, samples: list[Sample] | None = None) -> Table:
    """Lay the calls of a run out by sample and response token.

    Args:
        run: what was recorded.
        setup: for its tokenizer and prompts.
        temperature: the declared one, at which log-probabilities are given.
        samples: those of an earlier run from the same state, so that rows stay comparable.
    """
    special = Special.of(setup)
    end = run.boundaries[0] if run.boundaries else math.inf
    calls = [c for c in run.calls if c.order <= end]
    episodes, rest = split_generation(calls)
    kept = {id(c.source) for c in rest if c.role == "policy"}
    sampling = {id(c.source) for episode in episodes for c in episode} - kept
    rest = [c for c in rest if id(c.source) not in sampling]  # a second head of the sampling model
    special = special.and_stops(
        row for episode in episodes for row in fed_tokens([c.ids.cpu().numpy() for c in episode])
    )
    episodes, rest = with_one_word(episodes, rest, special)
    if samples is None:
        prompts = encoded_prompts(setup)
        samples = [s for episode in episodes for s in generated(episode, special, prompts)]
        if not samples:
            samples = from_rows(rest, setup, special)
        complete_samples(samples, rest, special)
    places = Places(samples, special)
    used: dict[str, Counter[int]] = {}
    placed = []
    for call in rest:
        key = f"{call.role} {call.with_grad} {call.window if call.with_grad else 0}"
        placed.append(place(call, places, used.setdefault(key, Counter())))
    width = max((len(s.response) for s in samples), default=0)
    tokens = np.full((len(samples), width), -1, dtype=np.int64)
    real = np.zeros((len(samples), width), dtype=bool)
    for i, s in enumerate(samples):
        tokens[i, : len(s.response)] = s.response
        real[i, : len(s.response)] = True
    drawn, unknown = [c for e in episodes for c in e], np.full(len(samples), np.nan)
    table = Table(
        samples, tokens, real, {}, placed, drawn, {}, unknown, "", [(-1, -1)] * len(samples), temperature,
    )  # fmt: skip
    _fill_policy(table)
    _fill_values(table)
    _fill_scores(table, run, setup)
    return table


def _put(table: Table, name: str, placed: Placed, values: Any, chosen: Any = None, *, first: bool = True) -> None:
    """Write values (N,) of a call into a field; ``first`` keeps what is there already."""
    array = table.fields.setdefault(name, np.full(table.tokens.shape, np.nan))
    inside = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.tokens.shape[1])
    if chosen is not None:
        inside &= chosen
    where = placed.sample[inside], placed.state[inside]
    new = np.asarray(values, dtype=np.float64)[inside]
    old = array[where]
    array[where] = np.where(np.isfinite(old), old, new) if first else new


def _numbers(tensor: torch.Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()


def _logp(table: Table, placed: Placed, temperature: float) -> Floats:
    """log π(token drawn in that state) of every row, (N,); NaN where the token is unknown."""
    call = placed.call
    assert call.at_candidates is not None
    assert call.candidates is not None
    z = _numbers(call.at_candidates[:, NEXT])
    known = call.candidates[:, NEXT].cpu().numpy()
    wanted = _wanted(table, placed)
    z = np.where(known == wanted, z, np.nan)
    if call.tail is not None and call.tail_of is not None:
        for k, n in enumerate(call.tail_of.tolist()):
            if 0 <= wanted[n] < call.tail.shape[1]:
                z[n] = float(call.tail[k, wanted[n]])
    return z / temperature - _numbers(call.lse[temperature])


def _wanted(table: Table, placed: Placed) -> Ints:
    """The token drawn in each row's state, -1 outside of responses."""
    inside = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.tokens.shape[1])
    found = np.full(len(placed.sample), -1, dtype=np.int64)
    found[inside] = table.tokens[placed.sample[inside], placed.state[inside]]
    return found


def _fill_policy(table: Table) -> None:
    windows, firsts = windows_of(table.placed), Firsts(table.tokens.shape, scattered="policy" in table.scattered)
    for placed in table.placed:
        call = placed.call
        if call.role not in ("policy", "reference"):
            continue
        logp = _logp(table, placed, table.temperature)
        if call.role == "reference":
            _put(table, "ref_logp", placed, logp)
            continue
        if not call.with_grad:
            _put(table, "old_logp", placed, logp)
            assert call.entropy is not None
            _put(table, "entropy", placed, _numbers(call.entropy))
            continue
        if not call.backwards:
            continue
        window = windows[call.order]
        current = firsts.current(placed, window)
        _put(table, "logp", placed, logp, current)
        assert call.entropy is not None
        _put(table, "new_entropy", placed, _numbers(call.entropy), current)
        _decode(table, placed, logp, current)
        _put(table, "window", placed, np.full(len(placed.sample), window), current)
    table.windows["policy"] = firsts.windows


def _decode(table: Table, placed: Placed, logp: Floats, current: Any) -> None:
    """Read temperature, action and weight of every trained row off ∂L/∂logits."""
    call, kept = placed.call, placed.call.gradient
    assert call.at_columns is not None
    assert call.candidates is not None
    at_action, others = _numbers(kept["at_action"]), _numbers(kept["others"])
    trained = (np.abs(at_action) > 0) & np.isfinite(at_action)
    action = kept["action"].cpu().numpy()
    candidates = call.candidates.cpu().numpy()
    wanted = _wanted(table, placed)
    at_wanted = _at(wanted, candidates, _numbers(kept["at_candidates"]))
    # Where one other token has all the rest of the probability, rounding decides which of the two gradients is larger.
    tied = (at_wanted * at_action < 0) & (np.abs(at_wanted) > (1 - 4 * call.rounding) * np.abs(at_action))
    action, at_action = np.where(tied, wanted, action), np.where(tied, at_wanted, at_action)
    offset = np.full(len(action), np.nan)
    order = [NEXT, *(i for i in range(len(CANDIDATES)) if i != NEXT)]
    for i in order:
        hit = np.isnan(offset) & (candidates[:, i] == action) & (candidates[:, i] >= 0)
        offset[hit] = CANDIDATES[i] - 1
    offset[(wanted == action) & (wanted >= 0)] = 0
    offset[np.isnan(offset)] = 99  # a token that is nowhere near
    temperature, spread, entropy = _temperatures(call, action, table.temperature)
    chosen = current & trained
    _put(table, "entropy_weight", placed, np.where(chosen, entropy, np.nan))
    _put(table, "temperature", placed, np.where(chosen, temperature, np.nan))
    _put(table, "mixed", placed, np.where(chosen, spread, np.nan))
    _put(table, "offset", placed, np.where(chosen, offset, np.nan))
    _put(table, "action", placed, np.where(chosen, action, np.nan))
    weight = _weights(table, placed, logp, action, at_action, others, np.nan_to_num(entropy))
    _add(table, "weight", placed, np.where(trained, weight, 0.0), current)
    raw = np.where(trained, np.abs(at_action), 0.0)
    _outside(table, "policy", placed, raw, current)


def _at(wanted: Ints, candidates: Ints, gradients: Floats) -> Floats:
    """The gradient at the wanted token of every row, 0 where it is none of the candidates."""
    same = (candidates == wanted[:, None]) & (wanted[:, None] >= 0)
    found = np.take_along_axis(gradients, same.argmax(1)[:, None], 1)[:, 0]
    return np.where(same.any(1), found, 0.0)


CLEARLY = 10  # times better must an entropy bonus explain the gradients than a log-probability alone


def _temperatures(call: Call, action: Ints, declared: float) -> tuple[Floats, Floats, Floats]:
    """(temperature, misfit, entropy weight) of every row.

    Off the action, log|∂L/∂z_v| = constant + z_v / T where one log-probability alone is trained. An entropy bonus of
    weight e adds e π_v (log π_v + H) / T; where the first does not fit, the second is tried at the declared T.
    """
    assert call.at_columns is not None
    assert call.entropy is not None
    z, signed = _numbers(call.at_columns), _numbers(call.gradient["at_columns"])
    g = np.abs(signed)
    fixed = _columns(call, z.shape[1])
    usable = (g > 1e-30) & np.isfinite(z) & (fixed[None] != action[:, None])
    y = np.log(np.where(usable, g, 1.0))
    slope, _, misfit, count = _lines(np.where(usable, z, 0.0), y, usable)
    with np.errstate(divide="ignore", invalid="ignore"):
        temperature = np.where((count >= 4) & (slope > 0), 1 / slope, np.nan)
    misfit = np.where(count >= 4, misfit, np.nan)
    logp = z / declared - _numbers(call.lse[declared])[:, None]
    usable &= logp > -60
    y = np.where(usable, signed / np.exp(np.where(usable, logp, 0.0)), 0.0)
    slope, intercept, left, count = _lines(np.where(usable, logp, 0.0), y, usable)
    size = np.abs(intercept) + np.abs(slope)
    left = left / np.maximum(size, 1e-300)
    bonus = (misfit > CLEARLY * left) & (count >= 4) & (left < 1e-2)
    temperature[bonus] = declared
    misfit[bonus] = left[bonus]
    return temperature, misfit, np.where(bonus, declared * slope, 0.0)


def _lines(x: Floats, y: Floats, usable: Any) -> tuple[Floats, Floats, Floats, Floats]:
    """Row by row, (slope, intercept, root mean square residual, count) over the usable entries."""
    weight = usable.astype(np.float64)
    count = weight.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mx, my = (weight * x).sum(1) / count, (weight * y).sum(1) / count
        dx, dy = (x - mx[:, None]) * weight, (y - my[:, None]) * weight
        slope = (dx * dy).sum(1) / (dx * dx).sum(1)
        residual = np.sqrt(((dy - slope[:, None] * dx) ** 2).sum(1) / count)
    return slope, my - slope * mx, residual, count


def _columns(call: Call, kept: int) -> Ints:
    """The vocabulary entries whose logits are kept."""
    return np.asarray(torch.linspace(0, call.size - 1, kept).round().long().numpy())


def _weights(
    table: Table, placed: Placed, logp: Floats, action: Ints, at_action: Floats, others: Floats, entropy: Floats
) -> Floats:
    """-∂L/∂log π(a) of every row, by ∂L/∂z_v = w π_v / T off the action: summed, or at single entries near π(a) = 1.

    An entropy bonus is taken out at single entries: its gradients would otherwise be counted with the action's.
    """
    call, t = placed.call, table.temperature
    assert call.at_columns is not None
    assert call.entropy is not None
    wanted = _wanted(table, placed)
    lse = _numbers(call.lse[t])
    z, signed = _numbers(call.at_columns), _numbers(call.gradient["at_columns"])
    fixed = _columns(call, z.shape[1])
    usable = np.isfinite(z) & (fixed[None] != action[:, None])
    logs = np.where(usable, z / t - lse[:, None], 0.0)
    p = np.where(usable, np.exp(logs), 0.0)
    bonus = entropy[:, None] * p * (logs + _numbers(call.entropy)[:, None]) / t
    with np.errstate(divide="ignore", invalid="ignore"):
        single = t * np.where(usable, signed - bonus, 0.0).sum(1) / p.sum(1)
        summed = t * others / -np.expm1(logp)
    exact = (wanted == action) & np.isfinite(logp) & (logp < math.log(0.9)) & (entropy == 0)
    return np.where(exact, np.where(at_action > 0, -summed, summed), single)


def _add(table: Table, name: str, placed: Placed, values: Floats, chosen: Any) -> None:
    array = table.fields.setdefault(name, np.full(table.tokens.shape, np.nan))
    inside = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.tokens.shape[1]) & chosen
    where = placed.sample[inside], placed.state[inside]
    np.add.at(array, where, 0.0)
    array[where] = np.where(np.isnan(array[where]), 0.0, array[where])
    np.add.at(array, where, values[inside])


def _outside(table: Table, role: str, placed: Placed, size: Floats, chosen: Any) -> None:
    """Gradient at states that belong to no response token, per sample: before (prompt) and after (padding)."""
    lengths = np.array([len(s.response) for s in table.samples] or [0])
    for name, where in (
        ("prompt", (placed.sample >= 0) & (placed.state < 0)),
        ("after", (placed.sample >= 0) & (placed.state >= lengths[placed.sample])),
        ("unplaced", placed.sample < 0),
    ):
        array = table.outside.setdefault(f"{role}_{name}", np.zeros(max(len(table.samples), 1)))
        inside = where & chosen if name != "unplaced" else where
        np.add.at(array, np.maximum(placed.sample[inside], 0), np.abs(size[inside]))


def _fill_values(table: Table) -> None:
    windows, firsts = windows_of(table.placed), Firsts(table.tokens.shape, scattered="value" in table.scattered)
    for placed in table.placed:
        call = placed.call
        if call.role != "value" or call.scalar is None:
            continue
        scalar = _numbers(call.scalar)
        if not call.with_grad:
            _put(table, "old_value", placed, scalar)
            _put_after(table, placed, scalar)
            continue
        if "scalar" not in call.gradient:
            if not call.backwards:
                _put(table, "old_value", placed, scalar)
                _put_after(table, placed, scalar)
            continue
        window = windows[call.order]
        current = firsts.current(placed, window)
        gradient = _numbers(call.gradient["scalar"])
        _put(table, "value", placed, scalar, current)
        _put(table, "value_window", placed, np.full(len(placed.sample), window), current)
        _add(table, "value_gradient", placed, gradient, current)
        _outside(table, "value", placed, gradient, current)
    table.windows["value"] = firsts.windows


def _put_after(table: Table, placed: Placed, scalar: Floats) -> None:
    """V of the state after the last response token, (S,) in column 0 of its own field."""
    array = table.fields.setdefault("value_after", np.full(table.tokens.shape, np.nan))
    lengths = np.array([len(s.response) for s in table.samples] or [0])
    at = (placed.sample >= 0) & (placed.state == lengths[placed.sample])
    if array.shape[1]:
        array[placed.sample[at], 0] = scalar[at]


def _fill_scores(table: Table, run: Run, setup: RLHFSetup) -> None:
    """The score of each sample: by its ids, by its text, or else by its place in the batch."""
    per_token = np.full((len(table.samples), table.tokens.shape[1]), np.nan)
    pooled = [p.call.source for p in table.placed if p.call.role == "reward" and p.call.pooled]
    for placed in table.placed:
        call = placed.call
        if call.role != "reward" or call.scalar is None:
            continue
        scalar = _numbers(call.scalar)
        if call.pooled or call.ids.shape[1] == 1:
            for n, s in enumerate(placed.sample.tolist()):
                if s >= 0 and np.isnan(table.scores[s]):
                    table.scores[s], table.scores_by = scalar[n], "ids"
                    table.score_rows[s] = (call.order, int(call.rows[n]))
            continue
        lengths = np.array([len(s.response) for s in table.samples] or [0])
        last = (placed.sample >= 0) & (placed.state == lengths[placed.sample])
        if any(call.source is source for source in pooled):  # what the model makes of its head's numbers is the score
            last[:] = False
        for n in np.flatnonzero(last).tolist():
            s = int(placed.sample[n])
            if np.isnan(table.scores[s]):
                table.scores[s], table.scores_by = scalar[n], "ids"
                table.score_rows[s] = (call.order, int(call.rows[n]))
        inside = (placed.sample >= 0) & (placed.state >= 1) & (placed.state <= table.tokens.shape[1])
        per_token[placed.sample[inside], placed.state[inside] - 1] = scalar[inside]
    if np.isfinite(per_token).any():
        table.fields["reward_at_token"] = per_token
    if table.scores_by or not table.samples:
        return
    rows = [
        (c.order, n, float(v))
        for c in run.calls
        if c.role == "reward" and c.scalar is not None and (c.pooled or c.ids.shape[1] == 1)
        for n, v in enumerate(_numbers(c.scalar))
    ]
    texts: list[str | None] = [None] * len(rows)
    if not rows:
        for scored in run.texts:
            said = _row_texts(scored.arguments, len(scored.scores))
            rows += [(scored.order, n, float(v)) for n, v in enumerate(scored.scores)]
            texts += said
    _match_scores(table, rows, texts, setup)


def _row_texts(arguments: Sequence[Any], count: int) -> list[str | None]:
    """What was scored, as one text a row."""
    lists = [a for a in arguments if isinstance(a, (list, tuple)) and len(a) == count]
    lists = [a for a in lists if all(isinstance(t, str) for t in a)]
    return [" ".join(texts) for texts in zip(*lists, strict=True)] if lists else [None] * count


def _match_scores(
    table: Table, rows: Sequence[tuple[int, int, float]], texts: Sequence[str | None], setup: RLHFSetup
) -> None:
    count = len(table.samples)
    said = _responses(table, setup) if any(texts) else []
    left = list(range(len(rows)))
    if said:
        for i, text in enumerate(said):
            at = next((k for k in left if texts[k] and text and text in str(texts[k])), None)
            if at is not None:
                left.remove(at)
                order, n, score = rows[at]
                table.scores[i], table.score_rows[i], table.scores_by = score, (order, n), "texts"
        if np.isfinite(table.scores).all():
            return
        table.scores[:], table.score_rows, table.scores_by = np.nan, [(-1, -1)] * count, ""
    if len(rows) == count:
        for i, (order, n, score) in enumerate(rows):
            table.scores[i], table.score_rows[i], table.scores_by = score, (order, n), "order"


def _responses(table: Table, setup: RLHFSetup) -> list[str]:
    with contextlib.suppress(Exception):
        decode = setup.tokenizer.decode
        return [decode(list(s.response), skip_special_tokens=True).strip() for s in table.samples]
    return []

"""Who drew each response token, from which context, and what is said of the same states elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.calls import Call
from rlhf_doctor.trace.grown import gained
from rlhf_doctor.trace.places import Placed, Places, place
from rlhf_doctor.trace.runs import Run
from rlhf_doctor.trace.sampler import bend_of
from rlhf_doctor.trace.samples import Special, rest_of, without_filler
from rlhf_doctor.trace.table import Table, _logp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Chain", "Draws", "Strange", "apart", "chains", "draws", "log_ratios"]

FAINT = -10.0  # log-probability below which rounding says nothing of two passes


@dataclass
class Chain:
    """Calls of a model that grow their texts by a token each; all but the last were surely drawn from.

    ``drawn`` (B, K) are the tokens, -1 where a row had ended; ``columns`` (B, K) the states that they were drawn in.
    ``last`` is the call after the last known token: one more draw, or the first pass over whole texts. Tokens before
    ``begins`` (B,) belong to the prompt.
    """

    calls: list[Call]
    drawn: Ints
    columns: Ints
    last: Call
    begins: Ints = field(init=False)

    def __post_init__(self) -> None:
        """No row begins late until prompts are known."""
        self.begins = np.zeros(len(self.drawn), dtype=np.int64)

    def begin(self, prompts: Sequence[tuple[int, ...]], special: Special) -> None:
        """Find where each row's response begins, given all whole prompts."""
        for b in range(len(self.drawn)):
            self.begins[b] = rest_of(_context(self, b, special), self.drawn[b].tolist(), prompts)


@dataclass(frozen=True)
class Strange:
    """A drawn text that is not trained on, and what is trained on in its place."""

    prompt: tuple[int, ...]
    drawn: tuple[int, ...]
    instead: tuple[int, ...]


@dataclass
class Draws:
    """(S, T) by the samples of a table, NaN where unknown.

    Attributes:
        row: (S,) the row of the batch that each sample was drawn in, -1 unknown.
        sampled: (S, T, C) log-probabilities (at temperature 1) of fixed vocabulary entries where tokens were drawn.
        old: the same in the pass over whole texts before the update, ``new`` in the update's first pass.
        old_logp: of the drawn token at the table's temperature; ``new_logp`` likewise.
        left_out, bent: how much of the distribution a draw left out, and by how many nats it moved odds, where seen.
        contexts: sample -> the ids that the sampler was given before the first token.
        strange: what was drawn and altered before it was trained on.
        placed, lost: how many rows of the pass before the update, and of the update's, belong to a sample, and to none.
        copies: how many of those placed are another row of their batch once more.
    """

    row: Ints
    sampled: Floats
    old: Floats
    new: Floats
    old_logp: Floats
    new_logp: Floats
    left_out: Floats
    bent: Floats
    contexts: dict[int, tuple[int, ...]]
    strange: list[Strange]
    copies: dict[str, int]
    placed: dict[str, int]
    lost: dict[str, int]


def apart(a: Floats, b: Floats) -> Floats:
    """(S, T) largest distance in nats between two passes over the entries that either finds likely, NaN if unknown."""
    gap = np.abs(np.maximum(a, FAINT - 5) - np.maximum(b, FAINT - 5))
    gap = np.where(np.fmax(a, b) > FAINT, gap, np.nan)
    found = np.full(gap.shape[:2], np.nan)
    known = np.isfinite(gap).any(-1)
    if known.any():
        found[known] = np.nanmax(gap[known], -1)
    return found


def chains(calls: Sequence[Call], role: Role = "policy") -> list[Chain]:
    """Every sequence of calls without gradient in which each row gains at most one token a call."""
    found: list[Chain] = []
    current: list[Call] = []
    steps: list[tuple[Ints, Ints]] = []

    def close() -> None:
        nonlocal current, steps
        if len(current) > 2 or (len(current) == 2 and current[1].ids.shape[1] == 1):
            drawn, columns = (np.stack([s[i] for s in steps], 1) for i in (0, 1))
            found.append(Chain(current[:-1], drawn, columns, current[-1]))
        current, steps = [], []

    for call in sorted((c for c in calls if c.role == role), key=lambda c: c.order):
        if call.with_grad or call.pooled:
            close()
            continue
        ids = call.ids.cpu().numpy()
        step = gained(current[-1].ids.cpu().numpy(), ids, first=len(current) == 1) if current else None
        if current and step is None:
            close()
        if step is not None:
            steps.append(step)
        current.append(call)
    close()
    return found


def draws(run: Run, table: Table, special: Special, *, held: bool = False) -> Draws:
    """Match what was drawn with the table's samples, and read both passes over them.

    Args:
        run: its calls; only those of its first step count.
        table: made of the same step.
        special: which tokens end a text or fill it up.
        held: whether optimizers' steps were left out.
    """
    end = run.boundaries[0] if run.boundaries else float("inf")
    calls = [c for c in run.calls if c.order <= end]
    episodes = chains(calls)
    special = special.and_stops(row for chain in episodes for row in chain.drawn)
    width = max((int(c.at_columns.shape[1]) for c in calls if c.at_columns is not None), default=0)
    shape = (*table.tokens.shape, width)
    made = Draws(
        np.full(len(table.samples), -1), np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan),
        np.full(shape[:2], np.nan), np.full(shape[:2], np.nan), np.full(shape[:2], np.nan), np.full(shape[:2], np.nan),
        {}, [], {"old": 0, "new": 0}, {"old": 0, "new": 0}, {"old": 0, "new": 0},
    )  # fmt: skip
    offset = 0
    prompts = list({s.prompt for s in table.samples})
    for chain in episodes:
        chain.begin(prompts, special)
        for b in range(len(chain.drawn)):
            _match(made, chain, b, offset, table, special)
        offset += len(chain.drawn)
    made.strange += _strange(calls, episodes, special)
    made.strange += _last_altered(made, episodes, table, special)
    _passes(made, calls, episodes, table, special, held)
    return made


def _match(made: Draws, chain: Chain, b: int, offset: int, table: Table, special: Special) -> None:
    """Find the sample that a row of a batch became, and what was said where its tokens were drawn."""
    said = _said(chain, b, special)
    prompt = _context(chain, b, special)
    fits = [s for s, x in enumerate(table.samples) if said and made.row[s] < 0 and x.response[: len(said)] == said]
    if not fits:
        return
    best = max(fits, key=lambda s: (_shared(table.samples[s].prompt, prompt), s == offset + b, -s))
    made.row[best] = offset + b
    made.contexts[best] = prompt
    for t in range(min(len(said), made.sampled.shape[1])):
        k = int(chain.begins[b]) + t
        call = chain.calls[k]
        at = _output_row(call, b, int(chain.columns[b, k]))
        if at is not None:
            assert call.at_columns is not None
            made.sampled[best, t] = (call.at_columns[at].double() - call.lse[1.0][at].double()).cpu().numpy()
            made.left_out[best, t], made.bent[best, t] = bend_of(call, at, table.temperature)


def _said(chain: Chain, b: int, special: Special) -> tuple[int, ...]:
    """What a row was seen to draw, up to the end of its text."""
    found: list[int] = []
    for token in chain.drawn[b, chain.begins[b] :].tolist():
        if token < 0:
            break
        found.append(token)
        if token in special.eos:
            break
    return without_filler(tuple(found), special.pad)


def _context(chain: Chain, b: int, special: Special) -> tuple[int, ...]:
    """What a row's first token was drawn after."""
    k = min(int(chain.begins[b]), len(chain.calls) - 1)
    call, column = chain.calls[k], int(chain.columns[b, k])
    row = call.ids[b, : column + 1].cpu().numpy()
    mask = call.source.mask
    if mask is not None and mask.shape[0] == call.ids.shape[0] and mask.shape[1] >= len(row):
        return tuple(map(int, row[mask[b, : len(row)].cpu().numpy().astype(bool)]))
    return _bare(row, special)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many last tokens two texts have in common."""
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _bare(row: Any, special: Special) -> tuple[int, ...]:
    """A row without padding on either side."""
    row = np.asarray(row)
    real = np.flatnonzero(row != special.pad) if special.pad is not None else np.arange(len(row))
    return tuple(map(int, row[real[0] : real[-1] + 1])) if len(real) else ()


def _trained_texts(calls: Sequence[Call], special: Special) -> set[tuple[int, ...]]:
    rows = (row for c in calls if c.role == "policy" and c.with_grad for row in c.ids.cpu().numpy())
    return {_bare(row, special) for row in rows}


def _strange(calls: Sequence[Call], episodes: Sequence[Chain], special: Special) -> list[Strange]:
    """Drawn texts that are not trained on, each with the text in its place.

    A text cut before its end was reached is not meant: loops stop at other words than the end of sequence too.
    """
    texts = _trained_texts(calls, special)
    matched: set[tuple[int, ...]] = set()
    left: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    found: list[Strange] = []
    for chain in episodes:
        for b in range(len(chain.drawn)):
            said, prompt = _said(chain, b, special), _bare(_context(chain, b, special), special)
            kept = said[:-1] if said and said[-1] == special.pad else said
            places = {t: i for t in texts for i in _joints(t, prompt) if t[i : i + len(kept)] == kept}
            matched |= set(places)
            if said and not places:
                left.append((prompt, said))
            elif (
                said
                and len(said) == len(chain.calls)
                and all(_lengthened(t[i:], said, special) for t, i in places.items())
            ):
                found.append(Strange(prompt, said, max((t[i:] for t, i in places.items()), key=len)))
    for prompt, said in left:
        rests = [(t[i:], t) for t in texts - matched for i in _joints(t, prompt) if i < len(t) or not said[1:]]
        if not rests:
            continue
        rest, text = max(rests, key=lambda r: sum(x == y for x, y in zip(r[0], said, strict=False)))
        if len(rest) >= len(said) and all(x in (y, special.pad) for x, y in zip(said, rest, strict=False)):
            matched.add(text)  # a pad that was drawn as a token may be masked, as any other is
            continue
        cut = said[: len(rest)] == rest and said[len(rest) :][:1] != said[-1:]
        if not cut or said[len(rest)] in special.eos:
            matched.add(text)
            found.append(Strange(prompt, said, rest))
    return found


def _lengthened(rest: tuple[int, ...], said: tuple[int, ...], special: Special) -> bool:
    """Whether a text that was cut at the limit is trained on with an end of sequence behind its last token.

    One token more than was fed may have been drawn last; a second one was not drawn.
    """
    return said[-1] not in special.eos and len(rest) == len(said) + 2 and rest[-1] in special.eos


def _last_altered(made: Draws, episodes: Sequence[Chain], table: Table, special: Special) -> list[Strange]:
    """Responses that reached the limit and end in another token than was drawn, which no model was given in sampling.

    Neither the texts nor the gradients know the drawn one. Draws count where all of a row's before it were given.
    """
    whole = [_drawn_tokens(chain, b, special) for chain in episodes for b in range(len(chain.drawn))]
    known = {(made.contexts[s], whole[r]) for s, r in enumerate(made.row.tolist()) if r >= 0}
    found = []
    for s, r in enumerate(made.row.tolist()):
        drawn, sample = whole[r] if r >= 0 else None, table.samples[s]
        if drawn is None or len(sample.response) != len(drawn) or sample.response[:-1] != drawn[:-1]:
            continue
        trained = table["action"][s, len(drawn) - 1]
        if trained != drawn[-1] and (made.contexts[s], sample.response) not in known:
            found.append(Strange(sample.prompt, drawn, sample.response))
    return found


def _drawn_tokens(chain: Chain, b: int, special: Special) -> tuple[int, ...] | None:
    """All that a row was seen to draw, by the draws themselves; None where it ended early or they tell otherwise."""
    calls = [*chain.calls, chain.last] if chain.last.drew is not None else chain.calls
    drew = [int(call.drew[b]) if call.drew is not None and len(call.drew) > b else -1 for call in calls]
    fed, begin = chain.drawn[b].tolist()[: len(drew) - 1], int(chain.begins[b])
    if -1 in drew[begin:] or drew[begin:-1] != fed[begin:] or special.eos & set(fed[begin:]):
        return None
    return tuple(drew[begin:])


def _joints(text: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """Where in a text a response to the prompt may begin: after the prompt, or after as much of it as there is."""
    full = [i for i in range(1, len(text) + 1) if len(prompt) and _shared(text[:i], prompt) >= min(len(prompt), i)]
    return full or [i for i in range(1, len(text) + 1) if _shared(text[:i], prompt) >= 2]


def _output_row(call: Call, b: int, column: int) -> int | None:
    columns = call.columns.cpu().numpy()
    columns = np.where(columns < 0, call.ids.shape[1] - 1, columns)
    at = np.flatnonzero((call.rows.cpu().numpy() == b) & (columns == column))
    return int(at[0]) if len(at) else None


def _passes(
    made: Draws, calls: Sequence[Call], episodes: Sequence[Chain], table: Table, special: Special, held: bool
) -> None:
    """The first pass over whole texts without gradient, and the first with one, at the weights before any update."""
    texts = _trained_texts(calls, special)
    drawing = {id(c) for chain in episodes for c in chain.calls}
    drawing |= {id(chain.last) for chain in episodes if not _whole(chain.last, texts, special)}
    window = min((c.window for c in calls if c.role == "policy"), default=0)
    places, used = Places(table.samples, special), {False: Counter[int](), True: Counter[int]()}
    first: torch.Tensor | None = None
    for call in calls:
        update = bool(call.with_grad and call.backwards)
        if call.role != "policy" or id(call) in drawing or call.at_columns is None or call.with_grad != update:
            continue
        first = call.weights if first is None else first
        moved = first is not None and call.weights is not None and not torch.equal(first, call.weights)
        if moved or (call.window > window and not held):
            continue
        placed = place(call, places, used[update])
        found, which = placed.row_sample[placed.row_sample >= 0], "new" if update else "old"
        if "policy" not in table.scattered:
            made.copies[which] += len(found) - len(set(found.tolist()))
        made.lost[which] += int((placed.row_sample < 0).sum())
        made.placed[which] += len(found)
        logp = _logp(table, placed, table.temperature)
        logs = (call.at_columns.double() - call.lse[1.0].double()[:, None]).cpu().numpy()
        inside = _responses(placed, table)
        into, tokens = (made.new, made.new_logp) if update else (made.old, made.old_logp)
        for n in np.flatnonzero(inside & _as_drawn(placed, table)):
            s, t = int(placed.sample[n]), int(placed.state[n])
            if np.isnan(into[s, t]).all():
                into[s, t], tokens[s, t] = logs[n], logp[n]


def _responses(placed: Placed, table: Table) -> NDArray[np.bool_]:
    """Which rows of a call are states of response tokens."""
    inside: NDArray[np.bool_] = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.tokens.shape[1])
    inside[inside] = table.real[placed.sample[inside], placed.state[inside]]
    return inside


def _as_drawn(placed: Placed, table: Table) -> NDArray[np.bool_]:
    """Which rows of a call come after the very tokens of their samples: a text may be another from some token on."""
    call = placed.call
    if call.ids.shape[1] == 1:
        return np.ones(len(placed.sample), dtype=bool)
    ids, rows, columns = (x.cpu().numpy() for x in (call.ids, call.rows, call.columns))
    shared: dict[tuple[int, int], int] = {}
    found = np.zeros(len(placed.sample), dtype=bool)
    for n in np.flatnonzero(placed.sample >= 0):
        b, s, state = int(rows[n]), int(placed.sample[n]), int(placed.state[n])
        sample = table.samples[s]
        end = int(columns[n]) % ids.shape[1] + 1  # -1 is the last column
        if (b, s) not in shared:
            row = ids[b, end - state - len(sample.prompt) :].tolist()
            equal = [x == y for x, y in zip(row, sample.tokens, strict=False)]
            shared[b, s] = equal.index(False) if False in equal else len(equal)
        found[n] = shared[b, s] >= len(sample.prompt) + state
    return found


def _whole(call: Call, texts: set[tuple[int, ...]], special: Special) -> bool:
    """Whether a call gives the states of whole texts, and not of texts that lack a token yet."""
    if call.ids.shape[1] == 1 or call.rows.numel() <= call.ids.shape[0]:
        return False
    rows = [_bare(row, special) for row in call.ids.cpu().numpy()]
    return not any(row not in texts and any(text[: len(row)] == row for text in texts) for row in rows)


def log_ratios(table: Table, temperatures: Sequence[float]) -> Iterator[tuple[float, Floats]]:
    """(T', (S, T)): log π at temperature T' less log π at the declared one, of each drawn token, before any update."""
    window = min((p.call.window for p in table.placed if p.call.role == "policy"), default=0)
    for other in temperatures:
        ratio = np.full(table.tokens.shape, np.nan)
        for placed in table.placed:
            call = placed.call
            if call.role != "policy" or other not in call.lse or call.window > window:
                continue
            gap = _logp(table, placed, other) - _logp(table, placed, table.temperature)
            inside = _responses(placed, table)
            where = placed.sample[inside], placed.state[inside]
            ratio[where] = np.where(np.isnan(ratio[where]), gap[inside], ratio[where])
        yield other, ratio

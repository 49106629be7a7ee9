"""From the calls of a run to one table of samples and response tokens."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.runs import Run
from rlhf_doctor.trace.taps import CANDIDATES, Call

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Placed", "Sample", "Special", "Table", "rest_of", "tabulate", "without_filler"]

NEXT = CANDIDATES.index(1)
RUN = 2  # pads in a row after which a response has surely ended; one may have been drawn


@dataclass(frozen=True)
class Special:
    """Token ids with a meaning of their own."""

    pad: int | None
    eos: frozenset[int]

    @classmethod
    def of(cls, setup: RLHFSetup) -> Special:
        """As the tokenizer, the policy's config and its generation config have them."""
        tokenizer, policy = setup.tokenizer, setup.policy
        eos: set[int] = set()
        for holder in (tokenizer, getattr(policy, "generation_config", None), getattr(policy, "config", None)):
            given = getattr(holder, "eos_token_id", None)
            eos |= set(given) if isinstance(given, (list, tuple)) else {given} if isinstance(given, int) else set()
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None:
            pad = getattr(getattr(policy, "config", None), "pad_token_id", None)
        return cls(pad if isinstance(pad, int) else None, frozenset(eos))

    def and_stops(self, drawn: Iterable[Sequence[int]]) -> Special:
        """With the words that sampling was seen to stop at: nothing but padding ever follows them.

        Where padding is drawn like other tokens, nothing can be told.
        """
        ends, goes_on = set[int](), set[int]()
        for row in drawn:
            tokens = [int(t) for t in row if t >= 0]
            last = _without_pads(tokens, self.pad)
            if len(tokens) - last >= RUN and last:
                ends.add(tokens[last - 1])
            goes_on |= set(tokens[: max(last - 1, 0)])
        if self.pad is None or self.pad in self.eos or self.pad in goes_on:
            return self
        return Special(self.pad, self.eos | (ends - goes_on))


@dataclass
class Sample:
    """A prompt and the response to it, as ids; ``complete`` says whether the last token is known."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    ended: bool
    complete: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt + self.response

    def follows(self, other: Sample) -> bool:
        """Whether this is a later turn: its prompt begins with the other's whole text."""
        length = len(other.prompt) + len(other.response)
        return 0 < len(other.prompt) < length <= len(self.prompt) and self.prompt[:length] == other.tokens


@dataclass
class Placed:
    """A call whose rows were found among the samples.

    ``sample`` and ``state`` (N,) say for every output row whose it is and which response token it comes before: state
    t precedes token t; -1 where the row belongs to no sample. ``altered`` counts rows of ids that fit a sample's
    prompt and no sample's response.
    """

    call: Call
    sample: Ints
    state: Ints
    starts: dict[int, int]  # sample -> column of its first token
    row_sample: Ints  # (B,)
    altered: int = 0


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


# ---- samples ---------------------------------------------------------------------------------------------------------


def split_generation(calls: Sequence[Call]) -> tuple[list[list[Call]], list[Call]]:
    """(episodes of generation, the rest): the policy's calls without gradient that gain one token each.

    Without a cache the last of them may as well be the first pass over the finished text: it is in both.
    """
    episodes: list[list[Call]] = []
    current: list[Call] = []
    rest: list[Call] = []
    others = sorted(c.order for c in calls if c.role in ("reward", "reference"))

    def close() -> None:
        nonlocal current
        if len(current) > 1:
            episodes.append(current)
            if current[-1].ids.shape[1] > 1:
                rest.append(current[-1])
        else:
            rest.extend(current)
        current = []

    for call in sorted((c for c in calls if c.role == "policy"), key=lambda c: c.order):
        if call.with_grad or call.pooled:
            close()
            rest.append(call)
            continue
        if current and (any(current[-1].order < o < call.order for o in others) or not _continues(current, call)):
            close()
        current.append(call)
    close()
    rest += [c for c in calls if c.role != "policy"]
    return episodes, sorted(rest, key=lambda c: c.order)


def _continues(chain: Sequence[Call], call: Call) -> bool:
    a, b = chain[-1].ids, call.ids
    if a.shape[0] != b.shape[0]:
        return False
    if b.shape[1] == 1:  # a word beside a cache; after whole texts that grew, another prompt of one word
        return len(chain) == 1 or a.shape[1] == 1
    if a.shape[1] == 0 or b.shape[1] - a.shape[1] not in (0, 1):
        return False
    changed = (a != b[:, : a.shape[1]]).sum(1)
    if b.shape == a.shape:  # a buffer that is filled in
        return bool((changed <= 1).all() and changed.any())
    return bool((changed <= 1).all() and (changed == 0).any())  # the longest rows grow by a column


def generated(episode: Sequence[Call], special: Special, known: Sequence[tuple[int, ...]] = ()) -> list[Sample]:
    """The samples of one episode; the last token drawn is not seen by the model and known later.

    Loops that begin with the shortest prompt feed the rest of the others where tokens are drawn; ``known`` are whole.
    """
    first = episode[0]
    start = first.ids.cpu().numpy()
    fed = _fed([c.ids.cpu().numpy() for c in episode])
    mask = first.source.mask
    kept = None
    if mask is not None and mask.shape[0] == start.shape[0] and mask.shape[1] >= start.shape[1]:
        kept = mask.cpu().numpy()[:, : start.shape[1]].astype(bool)
    found = []
    for b, row in enumerate(start):
        prompt = row[kept[b]] if kept is not None and kept[b].any() else _stripped(row, special.pad)
        given = rest_of(tuple(map(int, prompt)), fed[b], known)
        response, ended = _until_end(fed[b][given:], special.eos)
        whole = response if ended else without_filler(response, special.pad)
        found.append(Sample((*map(int, prompt), *fed[b][:given]), whole, ended, ended or whole != response))
    return found


def _with_one_word(
    episodes: list[list[Call]], rest: list[Call], special: Special
) -> tuple[list[list[Call]], list[Call]]:
    """Episodes of a single pass too, whose every row is trained on with one more token; other passes stay as they are.

    Loops that draw one response after another see a single pass where the first token ends it.
    """
    update = min((c.order for c in rest if c.role == "policy" and c.with_grad), default=math.inf)
    trained = {row[:-1] for c in rest if c.role == "policy" and c.backwards for row in _texts(c, special)}
    singles = [c for c in rest if c.role == "policy" and not c.with_grad and not c.pooled and c.order < update]
    singles = [c for c in singles if all(c is not e[-1] for e in episodes) and trained.issuperset(_texts(c, special))]
    known = {s.tokens for e in episodes for s in generated(e, special)}
    singles = [c for c in singles if not known.intersection(_texts(c, special))]
    found = sorted([*episodes, *([c] for c in singles)], key=lambda e: e[0].order)
    return found, [c for c in rest if all(c is not single for single in singles)]


def _texts(call: Call, special: Special) -> list[tuple[int, ...]]:
    """The rows of a call without what is masked, or without pads."""
    ids = call.ids.cpu().numpy()
    mask = call.source.mask
    kept = mask.cpu().numpy().astype(bool) if mask is not None and tuple(mask.shape) == ids.shape else None
    rows = [_stripped(row, special.pad) if kept is None else row[kept[b]] for b, row in enumerate(ids)]
    return [tuple(map(int, row)) for row in rows]


def without_filler(tokens: tuple[int, ...], pad: int | None) -> tuple[int, ...]:
    """Tokens without the run of pads at their end, as a row has them that reached its limit before others did."""
    last = _without_pads(tokens, pad)
    return tokens[:last] if last and len(tokens) - last >= RUN else tokens


def _without_pads(tokens: Sequence[int], pad: int | None) -> int:
    """How many tokens there are before the pads at the end."""
    last = len(tokens)
    while last and tokens[last - 1] == pad:
        last -= 1
    return last


def rest_of(prompt: tuple[int, ...], fed: Sequence[int], known: Sequence[tuple[int, ...]]) -> int:
    """How many of the tokens that a row was fed still belong to its prompt, which is one of those known."""
    if prompt in known:
        return 0
    whole = (*prompt, *fed)
    longer = [len(p) for p in known if len(p) > len(prompt) and whole[: len(p)] == p]
    return max(longer, default=len(prompt)) - len(prompt)


def _fed(ids: Sequence[Ints]) -> list[list[int]]:
    """The tokens that each row gained from call to call."""
    fed: list[list[int]] = [[] for _ in ids[0]]
    for before, now in itertools.pairwise(ids):
        inner: list[int] = []
        if now.shape[1] > 1 and now.shape[1] - before.shape[1] in (0, 1):
            for b, column in zip(*np.nonzero(now[:, : before.shape[1]] != before), strict=True):
                fed[b].append(int(now[b, column]))
                inner.append(int(b))
        if now.shape != before.shape or now.shape[1] == 1:
            for b, token in enumerate(now[:, -1]):
                if b not in inner:
                    fed[b].append(int(token))
    return fed


def _stripped(row: Ints, pad: int | None) -> Ints:
    if pad is None:
        return row
    real = np.flatnonzero(row != pad)
    return row[real[0] : real[-1] + 1] if len(real) else row


def _until_end(tokens: Iterable[Any], eos: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    kept = []
    for token in tokens:
        kept.append(int(token))
        if int(token) in eos:
            return tuple(kept), True
    return tuple(kept), False


def _from_rows(calls: Sequence[Call], setup: RLHFSetup, special: Special) -> list[Sample]:
    """Samples from the rows that the policy is trained on, where sampling was not seen."""
    prompts = _encoded_prompts(setup)
    found: dict[tuple[int, ...], int] = {}
    first_trained: list[int] = []
    for call in calls:
        if call.role != "policy" or not call.backwards:
            continue
        ids = call.ids.cpu().numpy()
        mask = call.source.mask
        kept = mask.cpu().numpy().astype(bool) if mask is not None and tuple(mask.shape) == ids.shape else None
        weight = call.gradient["others"].cpu().numpy()
        rows, columns = call.rows.cpu().numpy(), call.columns.cpu().numpy()
        for b, row in enumerate(ids):
            start = int(np.flatnonzero(kept[b])[0]) if kept is not None and kept[b].any() else 0
            real = row[kept[b]] if kept is not None and kept[b].any() else _stripped(row, special.pad)
            trained = columns[(rows == b) & (weight > 0)]
            if tuple(map(int, real)) not in found:
                found[tuple(map(int, real))] = len(first_trained)
                first_trained.append(int(trained.min()) - start + 1 if len(trained) else -1)
    samples = []
    for tokens, at in found.items():
        fitting = [p for p in prompts if tokens[: len(p)] == p]
        length = max(map(len, fitting), default=0) or max(first_trained[at], 1)
        response, ended = _until_end(tokens[length:], special.eos)
        samples.append(Sample(tokens[:length], response, ended, True))
    return samples


def _encoded_prompts(setup: RLHFSetup) -> list[tuple[int, ...]]:
    prompts = setup.prompts
    if prompts is None:
        return []
    if isinstance(prompts, dict) and "input_ids" in prompts:
        masks = prompts.get("attention_mask")
        rows = [[int(t) for t in row] for row in prompts["input_ids"]]
        if masks is None:
            return [tuple(r) for r in rows]
        return [tuple(t for t, m in zip(r, mask, strict=True) if int(m)) for r, mask in zip(rows, masks, strict=True)]
    with contextlib.suppress(Exception):
        return [tuple(ids) for ids in setup.tokenizer(list(prompts))["input_ids"]]
    return []


# ---- placing calls ---------------------------------------------------------------------------------------------------


class Places:
    """Finds rows of ids among samples."""

    def __init__(self, samples: Sequence[Sample], special: Special) -> None:
        self.samples = samples
        self.special = special
        self.keys: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for i, s in enumerate(samples):
            tokens = s.tokens if not s.complete else s.tokens[:-1]
            self.keys.setdefault(len(tokens), {}).setdefault(tokens, []).append(i)
        self.lengths = sorted(self.keys, reverse=True)
        self.prompts: dict[tuple[int, ...], list[int]] = {}
        for i, s in enumerate(samples):
            self.prompts.setdefault(s.prompt, []).append(i)
        self.prompt_lengths = sorted({len(p) for p in self.prompts}, reverse=True)

    def find(
        self, ids: Ints, mask: Any, used: Counter[int], trained: Mapping[int, int] | None = None
    ) -> list[tuple[int, int]]:
        """(sample, column of its first token) of each row, (-1, -1) where it is none; ``used`` spreads equal samples.

        Where a row is the text of one sample and the beginning, or the text, of another, its response begins where it
        is ``trained`` (row -> column) from on, or where others' do; a whole batch is in the samples' order.
        """
        fitting = [self._of_row(row.tolist(), _starts(row, mask, b, self.special.pad)) for b, row in enumerate(ids)]
        begins = [{start + len(self.samples[i].prompt) for i, start in fits} for fits in fitting]
        sure = set[int]().union(*(begin for begin in begins if len(begin) == 1))
        found = []
        for b, fits in enumerate(fitting):
            known = {trained[b]} if trained and b in trained else sure if len(sure) == 1 else set[int]()
            fits = [(i, start) for i, start in fits if start + len(self.samples[i].prompt) in known] or fits
            if len(ids) == len(self.samples):
                fits = [(i, start) for i, start in fits if i == b] or fits
            alike = [(i, start) for i, start in fits if self._length(i) == self._length(fits[0][0])]
            alike = [(i, start) for i, start in alike if start == fits[0][1]]
            chosen = min(alike, key=lambda fit: (used[fit[0]], fit[0]), default=(-1, -1))
            used[chosen[0]] += 1
            found.append(chosen)
        return found

    def _length(self, i: int) -> int:
        return len(self.samples[i].tokens) - self.samples[i].complete

    def _of_row(self, row: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int]]:
        """Every (sample, column) that a row may be, the longest texts first."""
        found = []
        for start in starts:
            for length in self.lengths:
                candidates = self.keys[length].get(tuple(row[start : start + length])) or ()
                following = row[start + length] if start + length < len(row) else None
                found += [(i, start) for i in candidates if self._fits(i, following)]
        return found

    def _fits(self, i: int, following: int | None) -> bool:
        sample = self.samples[i]
        return following is None or not sample.complete or following == sample.tokens[-1]

    def with_prompt(self, row: Sequence[int], starts: Sequence[int]) -> tuple[list[int], int]:
        """(samples whose prompt the row begins with, its column)."""
        for start in starts:
            for length in self.prompt_lengths:
                found = self.prompts.get(tuple(row[start : start + length]))
                if found and length:
                    return found, start
        return [], -1


def _starts(row: Ints, mask: Any, b: int, pad: int | None) -> list[int]:
    starts = []
    if mask is not None and mask.shape[0] > b and mask.shape[1] == len(row):
        real = np.flatnonzero(mask[b])
        if len(real):
            starts.append(int(real[0]))
    if pad is not None:
        real = np.flatnonzero(row != pad)
        if len(real):
            starts.append(int(real[0]))
    return list(dict.fromkeys([*starts, 0]))


def _place(call: Call, places: Places, used: Counter[int]) -> Placed:
    ids = call.ids.cpu().numpy()
    mask = call.source.mask.cpu().numpy().astype(bool) if call.source.mask is not None else None
    row_sample = np.full(len(ids), -1)
    starts: dict[int, int] = {}
    start_of_row = np.zeros(len(ids), dtype=np.int64)
    altered = 0
    for b, (row, (sample, start)) in enumerate(zip(ids, places.find(ids, mask, used, _trained(call)), strict=True)):
        if sample < 0:
            candidates = _starts(row, mask, b, places.special.pad)
            near, start = places.with_prompt(row.tolist(), candidates)
            if near:
                altered += 1
                sample = _nearest(row[start:], [places.samples[i] for i in near], near, used)
        if sample >= 0:
            row_sample[b], start_of_row[b] = sample, start
            starts[sample] = start
    rows, columns = call.rows.cpu().numpy(), call.columns.cpu().numpy()
    columns = np.where(columns < 0, ids.shape[1] - 1, columns)
    sample = row_sample[rows]
    lengths = np.array([len(s.prompt) for s in places.samples] or [0])
    state = np.where(sample >= 0, columns - start_of_row[rows] + 1 - lengths[sample], -(10**6))
    return Placed(call, sample, state, starts, row_sample, altered)


def _trained(call: Call) -> dict[int, int]:
    """Row -> the column of its first token that a loss trains, where a gradient came back to several."""
    gradient = call.gradient.get("others" if call.role == "policy" else "scalar")
    if gradient is None or len(gradient) != len(call.given[0] if call.given else call.rows):
        return {}
    rows, columns = call.rows.cpu().numpy(), call.columns.cpu().numpy()
    at = (gradient != 0).cpu().numpy() & (columns >= 0)
    return {int(b): int(columns[at & (rows == b)].min()) + 1 for b in np.unique(rows[at])}


def _nearest(row: Ints, samples: Sequence[Sample], indices: Sequence[int], used: Counter[int]) -> int:
    """The sample with most tokens in common with a row that fits none exactly."""

    def common(sample: Sample) -> int:
        tokens = np.array(sample.tokens)
        n = min(len(tokens), len(row))
        return int((tokens[:n] == row[:n]).sum())

    best = max(zip(indices, samples, strict=True), key=lambda pair: (common(pair[1]), -used[pair[0]], -pair[0]))[0]
    used[best] += 1
    return best


# ---- the table -------------------------------------------------------------------------------------------------------


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
    special = special.and_stops(row for episode in episodes for row in _fed([c.ids.cpu().numpy() for c in episode]))
    episodes, rest = _with_one_word(episodes, rest, special)
    if samples is None:
        prompts = _encoded_prompts(setup)
        samples = [s for episode in episodes for s in generated(episode, special, prompts)]
        if not samples:
            samples = _from_rows(rest, setup, special)
        _complete(samples, rest, special)
    places = Places(samples, special)
    used: dict[str, Counter[int]] = {}
    placed = []
    for call in rest:
        key = f"{call.role} {call.with_grad} {call.window if call.with_grad else 0}"
        placed.append(_place(call, places, used.setdefault(key, Counter())))
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


def _complete(samples: list[Sample], calls: Sequence[Call], special: Special) -> None:
    """Learn the last token of each response from passes over the whole text.

    Samples that differ in nothing else share what is found: as many of each token as were seen.
    """
    places = Places(samples, special)
    votes: dict[tuple[int, ...], Counter[int]] = {}
    for call in calls:
        ids = call.ids.cpu().numpy()
        mask = call.source.mask.cpu().numpy().astype(bool) if call.source.mask is not None else None
        used: Counter[int] = Counter()
        seen: list[tuple[tuple[int, ...], int, bool]] = []  # (all before it, token, whether it may be filler)
        cut = False  # some row ends before its last token
        for b, (row, (sample, start)) in enumerate(zip(ids, places.find(ids, mask, used), strict=True)):
            if sample < 0 or samples[sample].complete:
                continue
            at = start + len(samples[sample].tokens)
            cut |= at >= len(row)
            if at < len(row) and not (mask is not None and mask.shape == ids.shape and not mask[b, at]):
                seen.append((samples[sample].tokens, int(row[at]), mask is None and _filler(row, at)))
        cut = cut or all(filler for _, _, filler in seen)
        for tokens, token, filler in seen:
            if not (cut and filler):
                votes.setdefault(tokens, Counter())[token] += 1
    alike: dict[tuple[int, ...], list[Sample]] = {}
    for s in samples:
        if not s.complete:
            alike.setdefault(s.tokens, []).append(s)
    for tokens, group in alike.items():
        counted = votes.get(tokens, Counter())
        shares = [t for t, n in counted.most_common() for _ in range(max(1, round(len(group) * n / counted.total())))]
        for s, token in zip(group, shares[: len(group)] + shares[-1:] * (len(group) - len(shares)), strict=False):
            s.response += (token,)
            s.ended = token in special.eos
        for s in group:
            s.complete = True


def _filler(row: Ints, at: int) -> bool:
    """Whether a row repeats one token from here on, as where a loop gathers past the end; a response may do so too."""
    return at > 0 and bool((row[at:] == row[at - 1]).all())


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


def _windows(placed: Sequence[Placed]) -> dict[int, int]:
    """order of a call -> updates of its role before it, seen by its optimizer steps or by its weights having moved."""
    found: dict[int, int] = {}
    moved: dict[Role, tuple[Any, int]] = {}
    for p in placed:
        call = p.call
        known, count = moved.get(call.role, (None, 0))
        if known is not None and call.weights is not None and not torch.equal(known, call.weights):
            count += 1
        moved[call.role] = (call.weights, count)
        found[call.order] = max(call.window, count)
    return found


def _fill_policy(table: Table) -> None:
    windows = _windows(table.placed)
    first_window = np.full(len(table.samples), -1, dtype=np.int64)
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
        new = [s for s in set(placed.sample[placed.sample >= 0].tolist()) if first_window[s] < 0]
        first_window[new] = window
        current = np.isin(placed.sample, np.flatnonzero(first_window == window))
        _put(table, "logp", placed, logp, current)
        assert call.entropy is not None
        _put(table, "new_entropy", placed, _numbers(call.entropy), current)
        _decode(table, placed, logp, current)
        _put(table, "window", placed, np.full(len(placed.sample), window), current)
    table.windows["policy"] = first_window


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
    windows = _windows(table.placed)
    first_window = np.full(len(table.samples), -1, dtype=np.int64)
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
        new = [s for s in set(placed.sample[placed.sample >= 0].tolist()) if first_window[s] < 0]
        first_window[new] = window
        current = np.isin(placed.sample, np.flatnonzero(first_window == window))
        gradient = _numbers(call.gradient["scalar"])
        _put(table, "value", placed, scalar, current)
        _put(table, "value_window", placed, np.full(len(placed.sample), window), current)
        _add(table, "value_gradient", placed, gradient, current)
        _outside(table, "value", placed, gradient, current)
    table.windows["value"] = first_window


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

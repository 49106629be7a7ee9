"""Rows of ids found among the samples: whose row it is, and which of its tokens a column stands before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.calls import Call
from rlhf_doctor.trace.samples import Sample, Special

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

__all__ = ["Placed", "Places", "complete_samples", "place"]


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
        fitting = [self._of_row(row.tolist(), starts_of(row, mask, b, self.special.pad)) for b, row in enumerate(ids)]
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
        # An earlier turn of a text is no other reading of it.
        return [
            (i, start) for i, start in found if start + self._length(i) >= found[0][1] + self._length(found[0][0]) - 1
        ]

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


def starts_of(row: Ints, mask: Any, b: int, pad: int | None) -> list[int]:
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


def place(call: Call, places: Places, used: Counter[int]) -> Placed:
    """Find the rows of a call; a row that fits a prompt alone is taken for the nearest of its responses."""
    ids = call.ids.cpu().numpy()
    mask = call.source.mask.cpu().numpy().astype(bool) if call.source.mask is not None else None
    row_sample = np.full(len(ids), -1)
    starts: dict[int, int] = {}
    start_of_row = np.zeros(len(ids), dtype=np.int64)
    altered = 0
    for b, (row, (sample, start)) in enumerate(zip(ids, places.find(ids, mask, used, _trained(call)), strict=True)):
        if sample < 0:
            candidates = starts_of(row, mask, b, places.special.pad)
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


def complete_samples(samples: list[Sample], calls: Sequence[Call], special: Special) -> None:
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
                filler = mask is None and len(ids) > 1 and _filler(row, at)  # one row alone needs none
                seen.append((samples[sample].tokens, int(row[at]), filler))
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

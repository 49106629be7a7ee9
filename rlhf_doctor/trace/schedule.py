"""Which samples the policy was trained on in which update, and what of it is no plain pass over the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_doctor.trace.places import Placed
    from rlhf_doctor.trace.runs import Run
    from rlhf_doctor.trace.table import Table

__all__ = ["Schedule", "greedy", "passes", "schedule", "trained_again", "updates"]

Text = tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """One step's updates. A sample is its text; equal texts are one.

    Attributes:
        windows: for each update, text -> how often it was in it, each of its copies once.
        everything: text -> how many samples have it.
        scores: text -> score, where known.
    """

    windows: tuple[Counter[Text], ...]
    everything: Counter[Text]
    scores: dict[Text, float]

    @property
    def left_out(self) -> list[Text]:
        """Texts that no update was made on."""
        seen = set().union(*self.windows) if self.windows else set()
        return [text for text in self.everything if text not in seen]

    @property
    def twice(self) -> list[tuple[int, Text]]:
        """(update, text) where one update has the same sample more than once, and another one less often."""
        found = []
        for i, window in enumerate(self.windows):
            share = {t: n / self.everything[t] for t, n in window.items() if self.everything[t]}
            found += [(i, t) for t, s in share.items() if s > 1 and s > min(share.values())]
        return found

    @property
    def ahead(self) -> tuple[int, int] | None:
        """(updates, others) at the first time that a sample had been in two updates more than ``others`` had."""
        done: Counter[Text] = Counter(dict.fromkeys(self.everything, 0))
        for i, window in enumerate(self.windows):
            done.update(set(window))
            most = max(done.values(), default=0)
            behind = sum(n <= most - 2 for t, n in done.items() if t not in self.left_out)
            if behind:
                return i + 1, behind
        return None

    @property
    def nested(self) -> bool:
        """Whether updates follow one another on the very same minibatch while others wait."""
        same = [a == b for a, b in zip(self.windows, self.windows[1:], strict=False)]
        return self.ahead is not None and any(same) and not self.left_out


def passes(table: Table) -> list[tuple[int, Placed]]:
    """(update, call) of every trained pass of the policy, in order. An update shows by a step or by moved weights."""
    found: list[tuple[int, Placed]] = []
    known, moved = None, 0
    for placed in sorted(table.placed, key=lambda p: p.call.order):
        call = placed.call
        if call.role != "policy" or call.weights is None:
            continue
        if known is not None and not torch.equal(known, call.weights):
            moved += 1
        known = call.weights
        if call.backwards:
            found.append((max(call.window, moved), placed))
    return found


def updates(table: Table) -> int:
    """How many updates were made on the policy's gradients."""
    return len({window for window, _ in passes(table)})


def schedule(table: Table) -> Schedule:
    """The updates of one step."""
    texts = [s.tokens for s in table.samples]
    windows: dict[int, Counter[Text]] = {}
    for window, placed in passes(table):
        rows = placed.row_sample
        windows.setdefault(window, Counter()).update(texts[s] for s in rows[rows >= 0])
    scores = {t: float(s) for t, s in zip(texts, table.scores, strict=True) if np.isfinite(s)}
    earlier = {id(turn) for turns in table.earlier for turn in turns}
    whole = Counter(s.tokens for s in table.samples if id(s) not in earlier)
    return Schedule(tuple(windows[w] for w in sorted(windows)), whole, scores)


def greedy(table: Table) -> set[Text]:
    """Texts whose every token was the likeliest one when it was drawn, as far as the logits were kept."""
    from rlhf_doctor.trace.draws import chains

    found: set[Text] = set()
    for chain in chains(table.generation):
        likeliest = np.zeros(chain.drawn.shape, dtype=bool)
        for k, call in enumerate(chain.calls):
            likely = call.likeliest if call.tail is None else call.tail.argmax(-1)
            if likely is None or call.tail_of is None:
                continue
            last = (call.columns[call.tail_of] == call.ids.shape[1] - 1).nonzero()[:, 0]
            rows, best = call.rows[call.tail_of[last]].tolist(), likely[last].tolist()
            likeliest[rows, k] = chain.drawn[rows, k] == best
        for start, drawn, good in zip(chain.calls[0].ids.tolist(), chain.drawn.tolist(), likeliest, strict=True):
            for s in table.samples:
                n = min(len(s.response), len(drawn))
                if tuple(start[-len(s.prompt) :]) == s.prompt and tuple(drawn[:n]) == s.response[:n] and good[:n].all():
                    found.add(s.tokens)
    return found


def trained_again(first: Table, second: Table) -> tuple[int, int]:
    """(rows of the second step's updates that the first step had drawn and trained on, all rows of its updates)."""
    texts = {_bare(tokens, None) for s in first.samples for tokens in (s.tokens, s.tokens[:-1])}
    before = set(_rows(first)) & texts
    drawn = {_bare(s.tokens, None) for s in second.samples}
    rows = _rows(second)
    return sum(row in before and row not in drawn for row in rows), len(rows)


def _rows(table: Table) -> list[Text]:
    """The texts of all trained rows, without what their mask hides."""
    found = []
    for _, placed in passes(table):
        mask = placed.call.source.mask
        ids = placed.call.ids.cpu().numpy()
        kept: Sequence[object] = [None] * len(ids)
        if mask is not None and tuple(mask.shape) == ids.shape:
            kept = list(mask.cpu().numpy().astype(bool))
        found += [_bare(row, keep) for row, keep in zip(ids, kept, strict=True)]
    return found


def _bare(row: Sequence[int], keep: object) -> Text:
    tokens = np.asarray(row)
    return tuple(int(t) for t in (tokens if keep is None else tokens[np.asarray(keep)]))


def steps_of(run: Run, role: str) -> int:
    """How many times an optimizer that holds a role's parameters stepped in the run's first step."""
    end = run.boundaries[0] if run.boundaries else None
    return sum(role in roles for order, _, roles in run.steps if end is None or order <= end)

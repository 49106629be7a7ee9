"""The samples of a step: the prompts and responses that sampling was seen to draw, or that are trained on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.calls import Call
from rlhf_doctor.trace.grown import fed_tokens, gained

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.setups import RLHFSetup

    Ints = NDArray[np.int64]

__all__ = [
    "Sample", "Special", "continues", "encoded_prompts", "from_rows", "generated", "length_before", "rest_of",
    "split_generation", "texts_of", "with_one_word", "without_filler",
]  # fmt: skip

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
            last = length_before(tokens, {self.pad})
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
        if current and (any(current[-1].order < o < call.order for o in others) or not continues(current, call)):
            close()
        current.append(call)
    close()
    rest += [c for c in calls if c.role != "policy"]
    return episodes, sorted(rest, key=lambda c: c.order)


def continues(chain: Sequence[Call], call: Call) -> bool:
    """Whether a call has the texts of the chain's last one with at most a token more each."""
    return gained(chain[-1].ids.cpu().numpy(), call.ids.cpu().numpy(), first=len(chain) == 1) is not None


def generated(episode: Sequence[Call], special: Special, known: Sequence[tuple[int, ...]] = ()) -> list[Sample]:
    """The samples of one episode; the last token drawn is not seen by the model and known later.

    Loops that begin with the shortest prompt feed the rest of the others where tokens are drawn; ``known`` are whole.
    """
    fed = fed_tokens([c.ids.cpu().numpy() for c in episode])
    prompts = texts_of(episode[0], special)
    given = [rest_of(prompt, fed[b], known) for b, prompt in enumerate(prompts)]
    drawn = [_until_end(row[count:], special.eos) for row, count in zip(fed, given, strict=True)]
    lengths = [length_before(response, {special.pad}) for response, _ in drawn]
    found = []
    for b, (response, ended) in enumerate(drawn):
        others = max((n for i, n in enumerate(lengths) if i != b), default=0)
        whole = response if ended else without_filler(response, special.pad)
        if not ended and len(lengths) > 1 and len(response) > lengths[b] >= max(others, 1):
            whole = response[: lengths[b]]  # nor did any row go on for longer
        found.append(Sample((*prompts[b], *fed[b][: given[b]]), whole, ended, ended or whole != response))
    return found


def with_one_word(
    episodes: list[list[Call]], rest: list[Call], special: Special
) -> tuple[list[list[Call]], list[Call]]:
    """Episodes of a single pass too, whose every row is trained on with one more token; other passes stay as they are.

    Loops that draw one response after another see a single pass where the first token ends it.
    """
    update = min((c.order for c in rest if c.role == "policy" and c.with_grad), default=math.inf)
    trained = {row[:-1] for c in rest if c.role == "policy" and c.backwards for row in texts_of(c, special)}
    singles = [c for c in rest if c.role == "policy" and not c.with_grad and not c.pooled and c.order < update]
    singles = [c for c in singles if all(c is not e[-1] for e in episodes) and trained.issuperset(texts_of(c, special))]
    known = {s.tokens for e in episodes for s in generated(e, special)}
    singles = [c for c in singles if not known.intersection(texts_of(c, special))]
    found = sorted([*episodes, *([c] for c in singles)], key=lambda e: e[0].order)
    return found, [c for c in rest if all(c is not single for single in singles)]


def texts_of(call: Call, special: Special) -> list[tuple[int, ...]]:
    """The rows of a call without what is masked, or without pads at their ends."""
    rows = zip(call.ids.cpu().numpy(), _columns(call, special), strict=True)
    return [tuple(map(int, row[columns])) for row, columns in rows]


def _columns(call: Call, special: Special) -> list[Ints]:
    """Where the tokens of each row's text are; a mask may have room for those that are still to be drawn."""
    ids, mask = call.ids.cpu().numpy(), call.source.mask
    width = ids.shape[1]
    found = [_unpadded(row, special.pad) for row in ids]
    if mask is not None and len(mask) == len(ids) and (mask.shape[1] == width or mask.shape[1] > width > 1):
        kept = [np.flatnonzero(row) for row in mask[:, :width].cpu().numpy()]
        return [shown if len(shown) else columns for shown, columns in zip(kept, found, strict=True)]
    return found


def _unpadded(row: Ints, pad: int | None) -> Ints:
    """The columns of a row from the first token that is no pad to the last."""
    real = np.flatnonzero(row != pad) if pad is not None else np.arange(len(row))
    return np.arange(real[0], real[-1] + 1) if len(real) else np.arange(len(row))


def without_filler(tokens: tuple[int, ...], pad: int | None) -> tuple[int, ...]:
    """Tokens without the run of pads at their end, as a row has them that reached its limit before others did."""
    last = length_before(tokens, {pad})
    return tokens[:last] if last and len(tokens) - last >= RUN else tokens


def length_before(tokens: Sequence[int], fillers: Container[int | None]) -> int:
    """How many tokens there are before the fillers at the end."""
    last = len(tokens)
    while last and tokens[last - 1] in fillers:
        last -= 1
    return last


def rest_of(prompt: tuple[int, ...], fed: Sequence[int], known: Sequence[tuple[int, ...]]) -> int:
    """How many of the tokens that a row was fed still belong to its prompt, which is one of those known."""
    if prompt in known:
        return 0
    whole = (*prompt, *fed)
    longer = [len(p) for p in known if len(p) > len(prompt) and whole[: len(p)] == p]
    return max(longer, default=len(prompt)) - len(prompt)


def _until_end(tokens: Iterable[Any], eos: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    kept = []
    for token in tokens:
        kept.append(int(token))
        if int(token) in eos:
            return tuple(kept), True
    return tuple(kept), False


def from_rows(calls: Sequence[Call], setup: RLHFSetup, special: Special) -> list[Sample]:
    """Samples from the rows that the policy is trained on, where sampling was not seen."""
    prompts = encoded_prompts(setup)
    found: dict[tuple[int, ...], int] = {}
    first_trained: list[int] = []
    for call in calls:
        if call.role != "policy" or not call.backwards:
            continue
        ids = call.ids.cpu().numpy()
        weight = call.gradient["others"].cpu().numpy()
        rows, columns = call.rows.cpu().numpy(), call.columns.cpu().numpy()
        for b, real in enumerate(_columns(call, special)):
            tokens = tuple(map(int, ids[b, real]))
            trained = columns[(rows == b) & (weight > 0)]
            if tokens not in found:
                found[tokens] = len(first_trained)
                first_trained.append(int(trained.min() - real[0]) + 1 if len(trained) else -1)
    samples = []
    for tokens, at in found.items():
        fitting = [p for p in prompts if tokens[: len(p)] == p]
        length = max(map(len, fitting), default=0) or max(first_trained[at], 1)
        response, ended = _until_end(tokens[length:], special.eos)
        samples.append(Sample(tokens[:length], response, ended, True))
    return samples


def encoded_prompts(setup: RLHFSetup) -> list[tuple[int, ...]]:
    """The setup's prompts as ids, none where they cannot be encoded."""
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

"""Texts to ids and back: what a loop that decodes and encodes again would change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.prompts import encode

__all__ = ["Boundary", "Pair", "RoundTrip", "RoundTrips", "encoded_pairs", "joined", "round_trips"]

MOST = 64


@dataclass(frozen=True)
class RoundTrip:
    """Texts whose ids, decoded and encoded again, are ``changed``; ``first`` is (text, ids, ids again)."""

    texts: int
    changed: int
    first: tuple[str, tuple[int, ...], tuple[int, ...]] | None


@dataclass(frozen=True)
class Boundary:
    """Pairs whose prompt has other ids inside prompt + response than alone: ``first`` as (prompt, response).

    ``moved`` counts pairs whose prompt stays, and whose response has other ids behind it than alone although the two
    are glued in the middle of a text; ``first_moved`` as (prompt, response, ids behind the prompt, ids alone).
    """

    pairs: int
    changed: int
    first: tuple[str, str] | None
    moved: int = 0
    first_moved: tuple[str, str, tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class RoundTrips:
    """Both measurements."""

    again: RoundTrip
    boundary: Boundary | None


@dataclass(frozen=True)
class Pair:
    """A preference pair as the reward's tokenizer encodes it: prompt, prompt + chosen, prompt + rejected."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    differs: bool


def joined(prompt: str, response: str) -> str:
    """Prompt and response as one text, with a space where two words would run together."""
    run_together = prompt[-1:].isalnum() and response[:1].isalnum()
    return f"{prompt} {response}" if run_together else prompt + response


@fact(Stage.PROBE)
def round_trips(setup: Any) -> RoundTrips:
    """Up to 64 prompts and preference texts through the policy's tokenizer, special tokens left out.

    Raises:
        Unavailable: there are no texts, or no tokenizer.
    """
    from rlhf_doctor.instruments.texts import live_tokenizer

    texts = [] if hasattr(setup.prompts, "keys") else [t for t in setup.prompts or () if isinstance(t, str)]
    pairs = [(p, c) for p, c, _ in list(setup.preferences or ())[:MOST]]
    if not texts and not pairs:
        raise Unavailable("needs prompts or preferences as texts")
    tokenizer = live_tokenizer(setup)
    if not callable(getattr(tokenizer, "decode", None)):
        raise Unavailable("needs a tokenizer that decodes")
    changed: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    whole = [*texts[:MOST], *(c for _, c in pairs)]
    for text in whole:
        ids = encode(tokenizer, text, add_special_tokens=False)
        again = encode(tokenizer, str(tokenizer.decode(ids)), add_special_tokens=False)
        if ids != again:
            changed.append((text, tuple(ids), tuple(again)))
    broken = []
    moved: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
    for prompt, response in pairs:
        if joined(prompt, response) != prompt + response:
            continue  # nothing stands between the two words, so it is ids that are joined, not texts
        alone = encode(tokenizer, prompt, add_special_tokens=False)
        joint = encode(tokenizer, prompt + response, add_special_tokens=False)
        if joint[: len(alone)] != alone:
            if not _spaced(tokenizer, prompt, response, alone):
                broken.append((prompt, response))
        elif _glued(tokenizer, prompt, response, alone):
            behind, apart = joint[len(alone) :], encode(tokenizer, response, add_special_tokens=False)
            if behind != apart:
                moved.append((prompt, response, tuple(behind), tuple(apart)))
    return RoundTrips(
        RoundTrip(len(whole), len(changed), changed[0] if changed else None),
        Boundary(len(pairs), len(broken), broken[0] if broken else None, len(moved), moved[0] if moved else None)
        if pairs
        else None,
    )


def _spaced(tokenizer: Any, prompt: str, response: str, alone: list[int]) -> bool:
    """Whether the ids of both, one behind the other, are a text with a space between, and that text has these ids."""
    ids = [*alone, *encode(tokenizer, response, add_special_tokens=False)]
    text = f"{prompt} {response}"
    return str(tokenizer.decode(ids)) == text and encode(tokenizer, text, add_special_tokens=False) == ids


def _glued(tokenizer: Any, prompt: str, response: str, ids: list[int]) -> bool:
    """Whether a word of the response stands right behind the prompt's last mark.

    Behind a space, a new line or a token that was added for a format, every text begins like that and nothing is lost.
    """
    if not prompt or not response or prompt[-1].isspace() or not response[0].isalnum() or not ids:
        return False
    added: Any = getattr(tokenizer, "get_added_vocab", dict)
    return ids[-1] not in {*(getattr(tokenizer, "all_special_ids", None) or ()), *added().values()}


@fact(Stage.PROBE, early=Stage.STATIC)
def encoded_pairs(setup: Any, models: Any = None) -> tuple[Pair, ...]:
    """Up to 64 preference pairs through the reward's tokenizer.

    Raises:
        Unavailable: there are no preferences, or no tokenizer.
    """
    from rlhf_doctor.instruments.texts import live_tokenizer

    if not setup.preferences:
        raise Unavailable("needs preferences")
    tokenizer = live_tokenizer(setup, "reward", from_files=models is None)
    return tuple(
        Pair(
            tuple(encode(tokenizer, prompt)),
            tuple(encode(tokenizer, joined(prompt, chosen))),
            tuple(encode(tokenizer, joined(prompt, rejected))),
            chosen != rejected,
        )
        for prompt, chosen, rejected in list(setup.preferences)[:MOST]
    )

"""How a reward's score grows with length and with repetition, the content being held."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.samples import Samples

if TYPE_CHECKING:
    from rlhf_doctor.instruments.judging import Ids, Judge
    from rlhf_doctor.instruments.models import Models

__all__ = ["COUNTS", "Growth", "growth"]

STEPS = 8
COUNTS = (0, 4, 8, 16)
# For a small and for a large model.
TEXTS = (8, 3)
LONGEST = (64, 32)
CANDIDATES = (256, 16)


@dataclass(frozen=True)
class Growth:
    """Scores of up to eight responses' words, cut or repeated to ``lengths`` tokens: ``ladder`` has a row a response.

    ``content`` has the scores of the same words in other orders and of the other responses' words, all of one length,
    a row a response. ``repeats`` maps a token (as text where it can be decoded) to the scores of one response with 0,
    4, 8 and 16 of it before its end; the tokens whose repetition raised the score most.
    """

    lengths: tuple[int, ...]
    ladder: tuple[tuple[float, ...], ...]
    content: tuple[tuple[float, ...], ...]
    repeats: dict[str, tuple[float, ...]]


@role_fact(Stage.PROBE)
def growth(role: Role, models: Models, setup: Any, manifest: Manifest, policy_samples: Samples) -> Growth:
    """Score the policy's own responses at eight lengths, in other orders, and with one token repeated.

    Raises:
        Unavailable: the role is not the reward, there are no samples, or its positions are too few.
        Broken: the reward cannot be called. Where its positions are unknown, that may be for the texts' length.
    """
    if role != "reward":
        raise Unavailable(f"the {role} judges no texts")
    from rlhf_doctor.instruments.judging import Judge

    live = models.get(role)
    judge = Judge(live, setup, manifest)
    stops = policy_samples.stop_ids
    texts = _texts(policy_samples, TEXTS[live.large])
    if len(texts) < 3:
        raise Unavailable("needs three different responses of two words")
    room = min([n for n in (manifest.max_positions,) if n] + [1024]) - max(len(p) for p, _, _ in texts) - 1
    longest = min(LONGEST[live.large], room)
    if longest < 2 * STEPS:
        raise Unavailable("the reward's positions are too few to lengthen a response")
    lengths = tuple(longest * (step + 1) // STEPS for step in range(STEPS))
    fixed = lengths[STEPS // 2]
    rng = Random(live.seed)

    def filled(words: list[int], length: int) -> Ids:
        return tuple((words * (length // len(words) + 1))[:length])

    ladder = [(p, (*filled(w, n), *end)) for p, w, end in texts for n in lengths]
    content = []
    for index, (prompt, words, end) in enumerate(texts):
        turned = [rng.sample(words, len(words)) for _ in range(2)]
        others = [texts[(index + k) % len(texts)][1] for k in (1, 2)]
        content += [(prompt, (*filled(w, fixed), *end)) for w in [words, *turned, *others]]
    try:
        scores = judge.tokens(ladder + content)
    except Broken as broken:
        if manifest.max_positions is not None:
            raise
        told = f"the reward's longest text is not known, and at {longest} more tokens it raises"
        raise Unavailable(f"{told}: {broken.sentence}") from broken
    repeats = {} if room < max(COUNTS) + 8 else _repeats(judge, setup, texts, CANDIDATES[live.large], stops, room)
    rows = [tuple(scores[i : i + STEPS]) for i in range(0, len(ladder), STEPS)]
    rest = scores[len(ladder) :]
    return Growth(lengths, tuple(rows), tuple(tuple(rest[i : i + 5]) for i in range(0, len(rest), 5)), repeats)


def _texts(drawn: Samples, count: int) -> list[tuple[Ids, list[int], Ids]]:
    """(prompt, the response's words, its end of sequence) of up to ``count`` different responses."""
    found: dict[Ids, tuple[Ids, list[int], Ids]] = {}
    step = max(len(drawn.responses) // count, 1)
    order = [*range(0, len(drawn.responses), step), *range(len(drawn.responses))]
    for index in order:
        response, ended = drawn.responses[index], drawn.ended[index]
        words = [t for t in response if t not in drawn.stop_ids]
        end = response[-1:] if ended else ()
        if len(words) >= 2 and len(found) < count:
            found.setdefault(response, (drawn.prompts[index], words, end))
    return list(found.values())


def _repeats(
    judge: Judge, setup: Any, texts: list[tuple[Ids, list[int], Ids]], limit: int, stops: Ids, room: int
) -> dict[str, tuple[float, ...]]:
    prompt, words, end = texts[0]
    words = words[: room - max(COUNTS)]
    seen = Counter(t for _, some, _ in texts for t in some)
    rows = judge.manifest.embedding_rows or 0
    special = {*stops, judge.manifest.tokenizer.pad_id if judge.manifest.tokenizer else None}
    known = judge.manifest.tokenizer.size if judge.manifest.tokenizer else rows
    every = [t for t in range(min(known, rows) if rows else known) if t not in special]
    tokens = [t for t, _ in seen.most_common(limit)]
    tokens += [t for t in every[:: max(len(every) // limit, 1)] if t not in seen][: max(limit - len(tokens), 0)]
    most = max(COUNTS)
    high = judge.tokens([(prompt, (*words, *[t] * most, *end)) for t in tokens])
    best = sorted(range(len(tokens)), key=lambda i: -high[i])[:3]
    scores = judge.tokens([(prompt, (*words, *[tokens[i]] * n, *end)) for i in best for n in COUNTS])
    named = [_named(setup, tokens[i]) for i in best]
    return {name: tuple(scores[k * len(COUNTS) : (k + 1) * len(COUNTS)]) for k, name in enumerate(named)}


def _named(setup: Any, token: int) -> str:
    decode = getattr(setup.tokenizer, "decode", None)
    return f"{decode([token])!r}" if callable(decode) else f"token {token}"

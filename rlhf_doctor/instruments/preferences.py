"""Scores of the setup's preference pairs, with the end of sequence, and, where that is asked for, without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.judging import Judge
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.scoring import score_texts

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["PairScores", "open_preferences", "preferences"]

# At most this many pairs, fewer for a reward that is large: 256 tell an accuracy of 0.5 from one
# of 0.6 with certainty, 64 from one of 0.7.
PAIRS = (256, 64)


@dataclass(frozen=True)
class PairScores:
    """(score of the chosen, score of the rejected) of N pairs of different responses.

    They end in the end of sequence where there is one. ``lengths`` are (chosen, rejected) in tokens, in characters for
    a function. ``given`` counts the setup's pairs.
    """

    with_eos: tuple[tuple[float, float], ...]
    lengths: tuple[tuple[int, int], ...]
    given: int

    @property
    def right(self) -> int:
        """Pairs whose chosen response scores higher."""
        return sum(chosen > rejected for chosen, rejected in self.with_eos)

    @property
    def untied(self) -> int:
        """Pairs with two different scores."""
        return sum(chosen != rejected for chosen, rejected in self.with_eos)


@role_fact(Stage.PROBE)
def preferences(role: Role, models: Models, setup: Any, manifest: Manifest) -> PairScores:
    """Score a spread of the setup's preference pairs; responses are encoded apart from their prompts, as in PPO.

    Raises:
        Unavailable: the setup has no preferences, or the role is not the reward.
        Broken: the reward cannot be called.
    """
    judge, flat, given = _pairs(role, models, setup, manifest)
    if judge.live.texts:
        prompts, responses = zip(*flat, strict=True)
        return PairScores(
            _paired(score_texts(judge.live, prompts, responses)), _paired([len(r) for r in responses]), given
        )
    encoded = [judge.encoded(p, r, eos=False) for p, r in flat]
    before = {p: len(judge.encoded(p, "", eos=False)) for p, _ in flat}
    lengths = _paired([len(ids) - before[p] for ids, (p, _) in zip(encoded, flat, strict=True)])
    end = () if judge.eos_id is None else (judge.eos_id,)
    return PairScores(_paired(judge.ids([(*ids, *end) for ids in encoded])), lengths, given)


@role_fact(Stage.PROBE)
def open_preferences(role: Role, models: Models, setup: Any, manifest: Manifest) -> tuple[tuple[float, float], ...]:
    """(score of the chosen, score of the rejected) of the same pairs without the end of sequence.

    Raises:
        Unavailable: see ``preferences``, or there is no end of sequence to leave out.
        Broken: the reward cannot be called.
    """
    judge, flat, _ = _pairs(role, models, setup, manifest)
    if judge.live.texts or judge.eos_id is None:
        raise Unavailable("needs a reward model whose tokenizer has an end of sequence")
    return _paired(judge.ids([judge.encoded(p, r, eos=False) for p, r in flat]))


def _pairs(role: Role, models: Models, setup: Any, manifest: Manifest) -> tuple[Judge, list[tuple[str, str]], int]:
    """The judge, (prompt, response) of a spread of all chosen and then all rejected ones, and how many are given."""
    if role != "reward":
        raise Unavailable(f"the {role} judges no pairs")
    pairs = [(str(p), str(c), str(r)) for p, c, r in setup.preferences or () if c != r]
    if not pairs:
        raise Unavailable("needs preferences")
    live = models.get(role)
    limit, given = PAIRS[live.large], len(pairs)
    if given > limit:
        pairs = [pairs[i * given // limit] for i in range(limit)]
    flat = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    return Judge(live, setup, manifest), flat, given


def _paired(values: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
    half = len(values) // 2
    return tuple(zip(values[:half], values[half:], strict=True))

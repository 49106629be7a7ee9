"""Scores of the setup's preference pairs, with the end of sequence and without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["PairScores", "preferences"]

# At most this many pairs, fewer for a reward that is large: 256 tell an accuracy of 0.5 from one
# of 0.6 with certainty, 64 from one of 0.7.
PAIRS = (256, 64)


@dataclass(frozen=True)
class PairScores:
    """(score of the chosen, score of the rejected) of N pairs of different responses.

    ``without_eos`` is empty where there is no end of sequence to leave out: a function of texts, or no eos token.
    ``lengths`` are (chosen, rejected) in tokens, in characters for a function. ``given`` counts the setup's pairs.
    """

    with_eos: tuple[tuple[float, float], ...]
    without_eos: tuple[tuple[float, float], ...]
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
    if role != "reward":
        raise Unavailable(f"the {role} judges no pairs")
    pairs = [(str(p), str(c), str(r)) for p, c, r in setup.preferences or () if c != r]
    if not pairs:
        raise Unavailable("needs preferences")
    from rlhf_doctor.instruments.judging import Judge

    live = models.get(role)
    limit = PAIRS[live.large]
    given = len(pairs)
    if given > limit:
        pairs = [pairs[i * given // limit] for i in range(limit)]
    judge = Judge(live, setup, manifest)
    flat = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]

    def paired(values: list[Any]) -> tuple[tuple[Any, Any], ...]:
        return tuple(zip(values[: len(pairs)], values[len(pairs) :], strict=True))

    if live.texts:
        return PairScores(paired(judge.texts(flat)), (), paired([len(r) for _, r in flat]), given)
    lengths = [len(judge.encoded(p, r, eos=False)) - len(judge.encoded(p, "", eos=False)) for p, r in flat]
    bare = paired(judge.texts(flat, eos=False)) if judge.eos_id is not None else ()
    return PairScores(paired(judge.texts(flat)), bare, paired(lengths), given)

"""The ids that a step gave to a reward model whose tokenizer is another than the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.instruments.vocabularies import Fed, words_by_id

__all__ = ["OwnWords", "ScoredIds", "own_words", "scored_ids"]


@dataclass(frozen=True)
class OwnWords:
    """Id -> token, to the policy and to the reward model."""

    policy: Mapping[int, str]
    reward: Mapping[int, str]


@dataclass(frozen=True)
class ScoredIds:
    """``tokens`` of the samples that the reward model was given as the policy's ids; ``other`` of them are another
    token to it, the first few as (id, the policy's token, the reward model's)."""

    tokens: int
    other: int
    examples: tuple[tuple[int, str, str], ...]


@fact(Stage.STATIC)
def own_words(setup: Any, vocabularies: Mapping[Role, Fed]) -> OwnWords:
    """Both vocabularies, where the reward model has one of its own.

    Raises:
        Unavailable: it has none, or one of the same words.
    """
    policy, reward = vocabularies.get("policy"), vocabularies.get("reward")
    if setup.reward_tokenizer is None or policy is None or reward is None:
        raise Unavailable("needs a reward model with a tokenizer of its own")
    if policy.ids_of.fingerprint == reward.ids_of.fingerprint:
        raise Unavailable("the reward model's tokenizer has the policy's words")
    return OwnWords(words_by_id(setup.tokenizer, policy.ids_of), words_by_id(setup.reward_tokenizer, reward.ids_of))


@fact(Stage.TRACE)
def scored_ids(own_words: OwnWords, traced: Traced) -> ScoredIds:
    """What a traced step gave to the reward model; the step is only run where there are two vocabularies.

    Raises:
        Unavailable: the reward model was not given the policy's ids.
    """
    if traced.base.scores_by != "ids":
        raise Unavailable("the step did not give the policy's ids to the reward model")
    tokens = [t for sample in traced.base.samples for t in sample.tokens]
    theirs, mine = own_words.policy, own_words.reward
    other = [t for t in tokens if t in theirs and theirs[t] != mine.get(t)]
    shown = dict.fromkeys(other)
    return ScoredIds(len(tokens), len(other), tuple((t, theirs[t], mine.get(t, "")) for t in list(shown)[:3]))

"""Have prompts and responses judged by a reward of any kind: token ids, re-encoded text, or a function of texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.scoring import score_ids, score_texts

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live

__all__ = ["Ids", "Judge", "score_unpadded"]

Ids = tuple[int, ...]


def score_unpadded(live: Live, sequences: Sequence[Sequence[int]]) -> list[float]:
    """One score for each sequence; only sequences of one length share a batch, so nothing is padded.

    Raises:
        Broken: the model cannot be called.
        Unavailable: its output is no scalar per sequence or token.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        by_length[len(sequence)].append(index)
    scores = [0.0] * len(sequences)
    for indices in by_length.values():
        for index, score in zip(indices, score_ids(live, [sequences[i] for i in indices], 0), strict=True):
            scores[index] = score
    return scores


class Judge:
    """The reward of one setup, asked for scores of (prompt, response).

    Ids are the policy's. Where the reward has a tokenizer of its own, or takes texts, they are decoded first.
    """

    def __init__(self, live: Live, setup: Any, manifest: Manifest) -> None:
        self.live = live
        self.setup = setup
        self.manifest = manifest
        self.recodes = setup.reward_tokenizer is not None and not live.texts
        self.eos_id = manifest.tokenizer.eos_id if manifest.tokenizer else None

    def tokens(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Scores of (prompt ids, response ids).

        Raises:
            Unavailable: a sequence is empty or does not fit the model, or a tokenizer that is needed is not there.
            Broken: the reward cannot be called.
        """
        if not self.live.texts and not self.recodes:
            return self.ids([p + r for p, r in pairs])
        decode = self._decoder()
        texts = [(decode(p), decode(r)) for p, r in pairs]
        if self.live.texts:
            return score_texts(self.live, [p for p, _ in texts], [r for _, r in texts])
        stops = self._policy_eos()
        finished = [bool(r) and r[-1] == stops for _, r in pairs]
        return self.ids([self.encoded(p, r, eos=f) for (p, r), f in zip(texts, finished, strict=True)])

    def encoded(self, prompt: str, response: str, *, eos: bool) -> Ids:
        """Ids of a prompt and, encoded apart from it as a policy samples it, a response."""
        from rlhf_doctor.instruments.texts import live_tokenizer

        tokenizer = live_tokenizer(self.setup, "reward")
        start = [int(t) for t in tokenizer(prompt)["input_ids"]]
        while start and start[-1] == self.eos_id:
            start.pop()
        try:
            end = tokenizer(response, add_special_tokens=False)["input_ids"]
        except TypeError:  # a tokenizer written by hand
            end = tokenizer(response)["input_ids"]
        end = [int(t) for t in end]
        while end and end[-1] == self.eos_id:
            end.pop()
        return (*start, *end, *([self.eos_id] if eos and self.eos_id is not None else []))

    def ids(self, sequences: Sequence[Ids]) -> list[float]:
        """Scores of whole sequences of the reward's ids.

        Raises:
            Unavailable: see ``tokens``.
            Broken: see ``tokens``.
        """
        if not all(sequences):
            raise Unavailable("a text has no tokens")
        limit, rows = self.manifest.max_positions, self.manifest.embedding_rows
        if limit and max(len(s) for s in sequences) > limit:
            raise Unavailable(f"the {self.live.role} holds {limit} positions, the texts are longer")
        if rows and max(max(s, default=0) for s in sequences) >= rows:
            raise Unavailable(f"the {self.live.role} has no embedding for some of the ids")
        return score_unpadded(self.live, sequences)

    def _decoder(self) -> Any:
        from rlhf_doctor.instruments.texts import live_tokenizer

        tokenizer = live_tokenizer(self.setup)
        if not callable(getattr(tokenizer, "decode", None)):
            raise Unavailable("needs a tokenizer that decodes")
        return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)

    def _policy_eos(self) -> int | None:
        from rlhf_doctor.instruments.texts import live_tokenizer

        return getattr(live_tokenizer(self.setup), "eos_token_id", None)

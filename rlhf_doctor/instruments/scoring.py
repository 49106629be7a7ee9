"""Score whole sequences with a reward model of any kind: pooled, per token, or a function of texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable
from rlhf_doctor.instruments.calling import pick

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live
    from rlhf_doctor.instruments.readings import Inputs

__all__ = ["score_ids", "score_texts", "score_texts_of_ids"]


def score_ids(live: Live, sequences: Sequence[Sequence[int]], pad_id: int, *, side: str = "right") -> list[float]:
    """One score for each sequence of token ids: the pooled output, or the last real token's where it is per token.

    Raises:
        Broken: the model cannot be called.
        Unavailable: its output is no scalar.
    """
    import torch

    from rlhf_doctor.instruments.models import padded

    scores: list[float] = []
    for start in range(0, len(sequences), 8):
        ids, mask = padded(sequences[start : start + 8], pad_id, side)
        with torch.no_grad(), live.kept():
            tensor = live.read(ids, mask).tensor.double().cpu()
        batch, length = ids.shape
        if tensor.shape in ((batch,), (batch, 1)):
            scores += tensor.reshape(-1).tolist()
        elif tensor.shape in ((batch, length), (batch, length, 1)):
            last = length - 1 - mask.flip(-1).argmax(-1)
            scores += tensor.reshape(batch, length)[torch.arange(batch), last].tolist()
        else:
            raise Unavailable(f"the {live.role}'s output {tuple(tensor.shape)} is no scalar per sequence")
    return scores


def score_texts(live: Live, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One score for each (prompt, response) from a reward function, called by what its parameter names say.

    Raises:
        Broken: the function raises, or does not return one number each.
    """
    try:
        names = list(inspect.signature(live.model).parameters)
    except (TypeError, ValueError):
        names = []
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    given: dict[str, Any] = {}
    for name in names:
        lowered = name.lower()
        if lowered in ("prompts", "prompt", "queries", "query", "questions"):
            given[name] = list(prompts)
        elif lowered in ("responses", "response", "completions", "completion", "answers", "outputs"):
            given[name] = list(responses)
        elif lowered in ("texts", "text", "samples", "sequences", "inputs"):
            given[name] = whole
    with live.kept():
        try:
            raw = live.model(**given) if given else live.model(list(prompts), list(responses))
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise Broken(live.role, f"{live.role}: the reward function raised: {said}") from error
    if isinstance(raw, (list, tuple)) and any(v is None for v in raw):  # TRL's way for a function to abstain
        raw = [float("nan") if v is None else float(v) for v in raw]
    called = pick("reward", raw, len(prompts), 1)
    if called is None or called.tensor.numel() != len(prompts):
        shape = "nothing readable" if called is None else f"shape {tuple(called.tensor.shape)}"
        raise Broken(live.role, f"{live.role}: the reward function returned {shape} for {len(prompts)} responses")
    return [float(v) for v in called.tensor.reshape(-1).tolist()]


def score_texts_of_ids(live: Live, inputs: Inputs) -> list[float]:
    """Scores of the probe's sequences from a function of texts; the ids are spelt as numbers, so that no tokenizer is
    needed to learn the shape of the result.

    Raises:
        Broken: the function raises, or does not return one number each.
    """
    texts = [" ".join(str(token) for token in sequence) for sequence in inputs.sequences]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    return score_texts(live, [h[0] for h in halves], [h[1] for h in halves])

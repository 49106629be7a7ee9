"""Pairwise losses of a reward model, the right one and its known slips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["pairwise"]


def pairwise(
    tokenizer: Any, *, naive: bool = False, at: str = "last", pads: bool = False, detached: bool = False, sign: int = 1
) -> Callable[..., Any]:
    """A (reward_model, chosen, rejected) -> loss on texts.

    Args:
        tokenizer: of the reward model.
        naive: log of sigmoid, not logsigmoid.
        at: "last" token, or "column": the last one of the batch; "first".
        pads: whether the scores of all columns are averaged.
        detached: whether the scores are cut off from the model.
        sign: -1 prefers the rejected.
    """

    def loss(model: Any, chosen: Any, rejected: Any) -> Any:
        import torch

        from reference_impl import ops, roles

        texts = [text + tokenizer.eos_token for text in (*chosen, *rejected)]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        scores = roles.scalars(model, batch["input_ids"], batch["attention_mask"])
        if pads:
            scores = scores.mean(1)
        elif at == "last":
            scores = ops.pool_last(scores, batch["attention_mask"].bool())
        else:
            scores = scores[:, -1 if at == "column" else 0]
        good, bad = (scores.detach() if detached else scores).chunk(2)
        margin = sign * (good - bad)
        likelihood = torch.log(torch.sigmoid(margin)) if naive else torch.nn.functional.logsigmoid(margin)
        return -likelihood.mean()

    return loss

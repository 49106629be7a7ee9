"""Whether a policy reads texts better with the BOS that its prompts lack: then it was trained with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.prompts import Prompts, encode
from rlhf_doctor.instruments.readings import Manifest, Output

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["BosEffect", "bos_effect"]

ROWS, LONGEST = 16, 64


@dataclass(frozen=True)
class BosEffect:
    """Mean negative log-likelihood in nats a token of the same tokens, as encoded and with one BOS in front."""

    without: float
    with_bos: float
    tokens: int

    @property
    def lost(self) -> float:
        """Nats a token that the missing BOS costs."""
        return self.without - self.with_bos


@role_fact(Stage.PROBE)
def bos_effect(
    role: Role, models: Models, setup: Any, prompts: Prompts, manifest: Manifest, output: Output
) -> BosEffect:
    """Up to 16 prompts, continued by their preferred responses where those are given.

    Raises:
        Unavailable: not the policy, no BOS is defined, or the prompts have it.
        Broken: the model cannot be called.
    """
    info = manifest.tokenizer
    if role != "policy" or info is None or info.bos_id is None:
        raise Unavailable("needs a policy and a tokenizer with a BOS")
    if output.kind != "vocabulary" or not output.finite:
        raise Unavailable("needs finite logits over the vocabulary")
    rows = [row for row in prompts.rows if row and row[0] != info.bos_id][:ROWS]
    if not rows:
        raise Unavailable("the prompts have their BOS")
    if prompts.texts and setup.preferences:
        from rlhf_doctor.instruments.texts import live_tokenizer

        tokenizer = live_tokenizer(setup)
        rows += [tuple(encode(tokenizer, f"{p} {c}")) for p, c, _ in list(setup.preferences)[:ROWS]]
    rows = [row[:LONGEST] for row in rows if len(row) > 2 and row[0] != info.bos_id]
    live = models.get(role)
    plain, kept = _likelihood(live, rows, skip=0)
    front, _ = _likelihood(live, [(info.bos_id, *row) for row in rows], skip=1)
    if not kept:
        raise Unavailable("the prompts are too short")
    return BosEffect(plain / kept, front / kept, kept)


def _likelihood(live: Live, rows: Sequence[Sequence[int]], skip: int) -> tuple[float, int]:
    """(summed negative log-likelihood, tokens) of every token after the second of the text itself."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([list(row)])
        with torch.no_grad(), live.kept():
            logits = live.read(ids, torch.ones_like(ids)).tensor[0].float().cpu()
        start = 1 + skip
        scored = logits[start:-1].log_softmax(-1).gather(-1, ids[0, start + 1 :, None])
        total -= float(scored.sum())
        count += scored.numel()
    return total, count

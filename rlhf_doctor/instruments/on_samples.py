"""What the reward and the critic give for the responses that the policy samples."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.samples import Samples

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["OnSamples", "on_samples"]


@dataclass(frozen=True)
class OnSamples:
    """Numbers for S sampled responses: a reward's ``numbers`` are S scores, a critic's the values of every state.

    ``lengths`` are the responses' tokens. ``again`` are the scores when a reward function is asked a second time,
    empty for a model. ``samples`` are the responses themselves, of the policy before any update.
    """

    samples: Samples
    numbers: tuple[float, ...]
    again: tuple[float, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each response."""
        return tuple(len(r) for r in self.samples.responses)

    @property
    def mean(self) -> float:
        """Of the numbers."""
        return fmean(self.numbers)

    @property
    def std(self) -> float:
        """Of the numbers."""
        return pstdev(self.numbers)


@role_fact(Stage.PROBE)
def on_samples(role: Role, models: Models, setup: Any, manifest: Manifest, policy_samples: Samples) -> OnSamples:
    """Scores, or values of the response's states, without any padding.

    Raises:
        Unavailable: there are no samples, or the role's output is no scalar.
        Broken: the model cannot be called.
    """
    if role not in ("reward", "value"):
        raise Unavailable(f"the {role} gives neither scores nor values")
    live = models.get(role)
    if role == "reward":
        from rlhf_doctor.instruments.judging import Judge

        judge = Judge(live, setup, manifest)
        pairs = list(zip(policy_samples.prompts, policy_samples.responses, strict=True))
        scores = judge.tokens(pairs)
        if live.is_module:
            return OnSamples(policy_samples, tuple(scores))
        live.seed += 1  # a function that draws its scores should draw others now
        try:
            return OnSamples(policy_samples, tuple(scores), tuple(judge.tokens(pairs)))
        finally:
            live.seed -= 1
    return OnSamples(policy_samples, tuple(_values(live, manifest, policy_samples)))


def _values(live: Any, manifest: Manifest, drawn: Samples) -> list[float]:
    import torch

    if manifest.embedding_rows and max(max(s) for s in drawn.sequences) >= manifest.embedding_rows:
        raise Unavailable("the critic has no embedding for some of the ids")
    values: list[float] = []
    with torch.no_grad(), live.kept():
        for prompt, response in zip(drawn.prompts, drawn.responses, strict=True):
            ids = torch.tensor([[*prompt, *response]])
            tensor = live.read(ids, torch.ones_like(ids)).tensor.double().cpu()
            if tensor.numel() != ids.numel():
                raise Unavailable("the critic gives no scalar per state")
            values += tensor.reshape(-1)[len(prompt) - 1 : -1].tolist()
    return values

"""What a reward model's score does when a response stands behind another prompt of the setup's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest, Output
from rlhf_doctor.instruments.samples import Samples
from rlhf_doctor.instruments.variation import ROUNDING

if TYPE_CHECKING:
    from rlhf_doctor.instruments.judging import Ids
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["PromptUse", "prompt_use"]


@dataclass(frozen=True)
class PromptUse:
    """Scores of responses, one to each of up to four prompts: ``own`` behind their own prompt, ``exchanged`` a row a
    response behind the others' prompts.

    ``gradient`` is the largest at any embedding of a prompt, as a share of the largest at any token; it is only asked
    for where exchanging the prompts moves nothing, and None where no embedding look-up can be tapped. ``rounding`` is
    what the dtype cannot tell apart.
    """

    own: tuple[float, ...]
    exchanged: tuple[tuple[float, ...], ...]
    gradient: float | None
    rounding: float

    @property
    def moved(self) -> float:
        """The largest change that another prompt made."""
        return max(abs(score - own) for own, row in zip(self.own, self.exchanged, strict=True) for score in row)

    @property
    def spread(self) -> float:
        """The largest difference between two responses."""
        return max(self.own) - min(self.own)

    @property
    def ignored(self) -> bool:
        """Whether responses are told apart and their prompts are not."""
        if self.spread <= 8 * self.rounding:
            return False
        return self.moved <= self.rounding and self.gradient == 0 if self.gradient is not None else self.moved == 0


@role_fact(Stage.PROBE)
def prompt_use(
    role: Role, models: Models, setup: Any, manifest: Manifest, output: Output, policy_samples: Samples
) -> PromptUse:
    """Score one response to each prompt behind every one of the prompts.

    Raises:
        Unavailable: the role is no reward model, or there are fewer than two prompts.
        Broken: the model cannot be called.
    """
    live = models.get(role)
    if role != "reward" or not live.is_module:
        raise Unavailable("only for reward models")
    from rlhf_doctor.instruments.judging import Judge

    pairs = list(dict(zip(policy_samples.prompts, policy_samples.responses, strict=True)).items())
    if len(pairs) < 2:
        raise Unavailable("needs two different prompts")
    judge = Judge(live, setup, manifest)
    scores = judge.tokens([(prompt, response) for _, response in pairs for prompt, _ in pairs])
    rows = [scores[i * len(pairs) : (i + 1) * len(pairs)] for i in range(len(pairs))]
    own = tuple(row[i] for i, row in enumerate(rows))
    exchanged = tuple((*row[:i], *row[i + 1 :]) for i, row in enumerate(rows))
    rounding = 8 * ROUNDING.get(output.dtype, 0.0) * max(map(abs, scores))
    found = PromptUse(own, exchanged, None, rounding)
    if found.moved > rounding or judge.recodes:
        return found
    return PromptUse(own, exchanged, _gradient(live, *pairs[0]), rounding)


def _gradient(live: Live, prompt: Ids, response: Ids) -> float | None:
    """The largest gradient of a score at its prompt, as a share of the largest of all."""
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap

    ids = torch.tensor([[*prompt, *response]], device=live.device)
    with live.kept(), torch.enable_grad(), EmbeddingTap(ids) as tap:
        score = live.read(ids, torch.ones_like(ids)).tensor.reshape(-1)[-1]
        if not tap.leaves or not score.requires_grad:
            return None
        row = tap.gradients(score.float())[0]
    if not bool(torch.isfinite(row).all()):
        raise Broken(live.role, f"{live.role}: gradients to the embeddings are NaN or infinite")
    return float(row[: len(prompt)].max() / row.max().clamp(min=1e-300))

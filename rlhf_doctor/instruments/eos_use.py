"""Whether a model hides a real EOS from itself because it takes pads from token values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Inputs, Output

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["EosUse", "eos_use"]


@dataclass(frozen=True)
class EosUse:
    """Influence of the token at ``position`` on what comes after it, mask 1 everywhere: of an EOS and of another.

    Both as shares of the largest influence of any token.
    """

    position: int
    of_eos: float
    of_other: float

    @property
    def hidden(self) -> bool:
        """The EOS has none where another token has some: the model masks it although the mask it was given does not."""
        return self.of_eos == 0.0 and self.of_other > 0.0


@role_fact(Stage.PROBE)
def eos_use(role: Role, models: Models, inputs: Inputs, output: Output) -> EosUse:
    """Gradients at a token in the middle of a text.

    Raises:
        Unavailable: there is no EOS, or it is not the pad; or no embedding look-up could be tapped.
        Broken: the model cannot be called.
    """
    if inputs.eos_id is None or inputs.eos_id != inputs.pad_id:
        raise Unavailable("needs a pad token that is also the EOS")
    live = models.get(role)
    if live.texts:
        raise Unavailable(f"the {role} is a function of texts")
    text = list(inputs.sequences[-1])
    middle = len(text) // 2
    with_eos = [*text[:middle], inputs.eos_id, *text[middle + 1 :]]
    return EosUse(middle, _influence(live, with_eos, middle), _influence(live, text, middle))


def _influence(live: Live, ids: list[int], at: int) -> float:
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap

    row = torch.tensor([ids], device=live.device)
    with live.kept(), torch.enable_grad(), EmbeddingTap(row) as tap:
        tensor = live.read(row, torch.ones_like(row)).tensor
        if not tap.leaves or not tensor.requires_grad:
            raise Unavailable("no embedding look-up could be tapped")
        per_token = tensor.dim() >= 2 and tensor.shape[1] == len(ids)
        after = (tensor[:, at + 1 :] if per_token else tensor).float()
        weights = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after.device)
        gradient = tap.gradients((after * weights).sum())[0]
    return float(gradient[at] / gradient.max()) if float(gradient.max()) > 0 else 0.0

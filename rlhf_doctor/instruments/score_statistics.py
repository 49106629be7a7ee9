"""Statistics that a reward module keeps for normalising its own scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["ScoreStatistics", "score_statistics"]

RUNNING = ("count", "num_", "steps", "batches")


@dataclass(frozen=True)
class ScoreStatistics:
    """A stored ``mean`` and ``spread`` (a deviation or a variance) of scores, under these ``names``.

    ``switch`` is the attribute that says whether they are used, empty where there is none, and ``on`` what it says.
    ``running`` says that they are counted up while the model is used.
    """

    names: tuple[str, str]
    mean: float
    spread: float
    switch: str
    on: bool
    running: bool

    @property
    def inert(self) -> bool:
        """Whether subtracting and dividing by them changes nothing."""
        return not self.running and self.mean == 0.0 and self.spread == 1.0


@role_fact(Stage.PROBE)
def score_statistics(role: Role, models: Models) -> ScoreStatistics:
    """Look for a mean and a deviation of one number each, side by side in one module; nothing is called.

    Raises:
        Unavailable: the role is no reward model, or keeps none.
    """
    live = models.get(role)
    if role != "reward" or not live.is_module:
        raise Unavailable("only for reward models")
    for path, module in live.module.named_modules():
        kept = {
            name: tensor
            for name, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
            if tensor.numel() == 1 and not tensor.is_meta
        }
        mean = next((name for name in kept if "mean" in name.lower()), "")
        spread = next((name for name in kept if any(word in name.lower() for word in ("std", "var", "sigma"))), "")
        if not mean or not spread:
            continue
        switch, on = _switch(module, live.module)
        where = f"{path}." if path else ""
        running = any(word in name.lower() for name in (*kept, *vars(module)) for word in RUNNING)
        return ScoreStatistics(
            (where + mean, where + spread), float(kept[mean]), float(kept[spread]), switch, on, running
        )
    raise Unavailable("the reward keeps no mean and deviation")


def _switch(*modules: Any) -> tuple[str, bool]:
    """The attribute that switches a normalisation on or off, and whether it is on."""
    for module in modules:
        for name, value in vars(module).items():
            if "normal" in name.lower() and isinstance(value, bool):
                return name, value
    return "", False

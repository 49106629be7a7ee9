"""The influence map: which tokens each output depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Influence, Inputs

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["MAP_LENGTH", "influence"]

MAP_LENGTH = (12, 9)  # tokens, for a small and for a large model
# A structural zero is an exact zero of autograd; anything that this share of the row's largest entry is influence.
FLOOR = 1e-6


@role_fact(Stage.PROBE)
def influence(role: str, models: Models, inputs: Inputs) -> Influence:
    """The influence map of a role, from one forward and one backward pass.

    Row r of a batch of T equal sequences is asked for output r alone, so a single backward pass gives all T rows of
    the map. Where no embedding look-up can be tapped, tokens are exchanged one at a time instead.

    Raises:
        Unavailable: the role is a function, or shows no activation per position.
        Broken: the model cannot be called.
    """
    import torch

    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    _ = live.module
    longest = max(inputs.sequences, key=len)
    length = MAP_LENGTH[live.large]
    rows = length + (role == "reward")  # the last one for the score, where it is one per sequence
    ids = torch.tensor([list(longest[:length])] * rows, device=live.device)
    with live.kept(), torch.enable_grad():
        mapped = _by_gradient(live, ids)
        if mapped is None:
            mapped = _by_substitution(live, ids[0], inputs.vocab_size)
    return mapped


def _by_gradient(live: Live, ids: torch.Tensor) -> Influence | None:
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap, trunk_outputs

    batch, length = ids.shape
    with trunk_outputs(batch, length) as trunk, EmbeddingTap(ids) as tap:
        called = live.read(ids, torch.ones_like(ids))
    output = called.tensor
    if not tap.leaves or not output.requires_grad:
        return None
    score = None
    asked = torch.zeros(())
    per_token = output.dim() >= 2 and output.shape[1] == length and not _square_by_accident(live, output)
    if not per_token:
        flat = output.reshape(output.shape[0], -1)
        if flat.shape[0] == batch:
            asked = (flat[-1].float() * _direction(flat[-1])).sum()
            if batch == length:
                score = _scaled(tap.gradients(asked)[-1])
        # The last module's activation is the embedding itself where the model has no trunk.
        reaching = [(name, a) for name, a in trunk if a.requires_grad]
        if not reaching:
            raise Unavailable(f"the {live.role} shows no activation per position")
        where, output = reaching[-1]
        tokens_of = f"the last activation per position ({where})"
    else:
        tokens_of = called.where
    per_position = output.reshape(batch, length, -1)
    picked = per_position[torch.arange(length), torch.arange(length)].float()
    wanted = (picked * _direction(picked[0])).sum()
    rows = tap.gradients(wanted + asked if batch > length else wanted)
    if not bool(torch.isfinite(rows).all()):
        raise Broken(live.role, f"{live.role}: gradients to the embeddings are NaN or infinite")
    if asked.requires_grad and score is None:
        score = _scaled(rows[-1])
    return Influence(tuple(_scaled(row) for row in rows[:length]), tokens_of, score, "gradient", FLOOR)


def _square_by_accident(live: Live, output: torch.Tensor) -> bool:
    """(B,) pooled outputs never have a second axis of T; a (B, T) one with T labels cannot be told apart."""
    return output.dim() == 2 and live.role in ("policy", "reference")


def _by_substitution(live: Live, sequence: torch.Tensor, vocab_size: int) -> Influence:
    import torch

    length = sequence.shape[0]
    changed = sequence.repeat(length + 1, 1)
    for s in range(length):
        changed[s + 1, s] = (changed[s + 1, s] + 1) % vocab_size
    with torch.no_grad():
        output = live.read(changed, torch.ones_like(changed)).tensor.float().cpu()
    if output.dim() >= 2 and output.shape[1] == length:
        moved = (output[1:] - output[:1]).reshape(length, length, -1).norm(dim=-1).T  # [t, s]
        return Influence(tuple(_scaled(row) for row in moved), "the output", None, "substitution", 1e-4)
    row = (output.reshape(length + 1, -1)[1:] - output.reshape(length + 1, -1)[:1]).norm(dim=-1)
    return Influence((), "nothing per position", _scaled(row), "substitution", 1e-4)


def _direction(row: torch.Tensor) -> torch.Tensor:
    """A fixed random direction, so that no symmetry (a sum of normalised activations) cancels the gradient."""
    import torch

    generator = torch.Generator().manual_seed(row.numel())
    return torch.randn(row.shape, generator=generator).to(row.device)


def _scaled(row: torch.Tensor) -> tuple[float, ...]:
    largest = float(row.max())
    return tuple(float(v) / largest if largest > 0 else 0.0 for v in row)

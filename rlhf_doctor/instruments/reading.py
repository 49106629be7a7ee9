"""Which position a reward model's score is read from, found by what it depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Influence, Inputs, Output, Reading

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["reading"]


@role_fact(Stage.PROBE)
def reading(role: str, models: Models, inputs: Inputs, output: Output, influence: Influence) -> Reading:
    """The last position with influence on the score, alone, padded on each side, and with an EOS inside the prompt.

    In a causal model a score that is read at position p depends on p and on nothing after it.

    Raises:
        Unavailable: the model is not causal, its output is not one scalar per sequence, or it is pooled over several
            positions.
    """
    if output.kind != "scalar per sequence":
        raise Unavailable(f"needs one scalar per sequence; the output is {output.kind}")
    if not influence.causal or influence.method != "gradient":
        raise Unavailable("only a causal model reads its score at one position")
    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    text = list(inputs.sequences[0])
    length = len(text)
    cases = {
        "alone": (text, [1] * length),
        "right padding": _with_pads(text, inputs.pad_id, "right"),
        "left padding": _with_pads(text, inputs.pad_id, "left"),
    }
    if inputs.eos_id is not None:
        middle = [*text[: length // 2], inputs.eos_id, *text[length // 2 + 1 :]]
        cases["eos inside the prompt"] = (middle, [1] * length)
        cases["eos at the end"] = _with_pads([*text[:-1], inputs.eos_id], inputs.pad_id, inputs.padding_side)
    if inputs.bos_id is not None:
        cases["bos at the start"] = _with_pads([inputs.bos_id, *text], inputs.pad_id, inputs.padding_side)
    read: dict[str, tuple[int, int, int]] = {}
    for name, (ids, mask) in cases.items():
        if name == "left padding" and not live.caller.takes_mask:
            continue
        last = max(i for i, m in enumerate(mask) if m)
        read[name] = (_last_influence(live, ids, mask), last, len(ids))
    return Reading(read)


def _with_pads(text: list[int], pad_id: int, side: str) -> tuple[list[int], list[int]]:
    """ids and mask of a text with four pads on one side."""
    pads, ones, zeros = [pad_id] * 4, [1] * len(text), [0] * 4
    return (pads + text, zeros + ones) if side == "left" else (text + pads, ones + zeros)


def _last_influence(live: Live, ids: list[int], mask: list[int]) -> int:
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap, trunk_outputs

    row = torch.tensor([ids], device=live.device)
    with live.kept(), torch.enable_grad():
        with EmbeddingTap(row) as tap, trunk_outputs(1, len(ids)) as trunk:
            score = live.read(row, torch.tensor([mask], device=live.device)).tensor.float().sum()
        if not tap.leaves or not score.requires_grad:
            raise Unavailable("no embedding look-up could be tapped")
        last = [activation for _, activation in trunk if activation.requires_grad][-1:]
        for at_trunk in torch.autograd.grad(score, last, allow_unused=True, retain_graph=True) if last else ():
            used = _reached(at_trunk[0].double().norm(dim=-1)) if at_trunk is not None else []
            if len(used) > 1:
                raise Unavailable(f"the score is pooled over {len(used)} positions")
            if used:  # what a causal model gives there depends on nothing behind it: no need to go on to the embedding
                return used[0]
        reached = _reached(tap.gradients(score)[0])
    if not reached:
        raise Unavailable("the score depends on no token")
    return reached[-1]


def _reached(gradient: torch.Tensor) -> list[int]:
    return [int(i) for i in (gradient > 1e-6 * gradient.max()).nonzero().reshape(-1)]

"""Which position a reward model's score is read from, found by what it depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Influence, Inputs, Output, Reading

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["reading"]


@role_fact(Stage.PROBE)
def reading(role: str, models: Models, inputs: Inputs, output: Output, influence: Influence) -> Reading:
    """The last position with influence on the score, alone, padded on each side, and with an EOS inside the prompt.

    In a causal model a score that is read at position p depends on p and on nothing after it.

    Raises:
        Unavailable: the model is not causal, or its output is not one scalar per sequence.
    """
    if output.kind != "scalar per sequence":
        raise Unavailable(f"needs one scalar per sequence; the output is {output.kind}")
    if not influence.causal or influence.method != "gradient":
        raise Unavailable("only a causal model reads its score at one position")
    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    text = list(inputs.sequences[0])
    length = len(text)
    pads = [inputs.pad_id] * 4
    cases = {
        "alone": (text, [1] * length),
        "right padding": (text + pads, [1] * length + [0] * 4),
        "left padding": (pads + text, [0] * 4 + [1] * length),
    }
    if inputs.eos_id is not None:
        middle = text[: length // 2] + [inputs.eos_id] + text[length // 2 + 1 :]
        cases["eos inside the prompt"] = (middle, [1] * length)
        cases["eos at the end"] = ([*text[:-1], inputs.eos_id, *pads], [1] * length + [0] * 4)
    if inputs.bos_id is not None:
        cases["bos at the start"] = ([inputs.bos_id, *text, *pads], [1] * (length + 1) + [0] * 4)
    read: dict[str, tuple[int, int, int]] = {}
    for name, (ids, mask) in cases.items():
        if name == "left padding" and not live.caller.takes_mask:
            continue
        last = max(i for i, m in enumerate(mask) if m)
        read[name] = (_last_influence(live, ids, mask), last, len(ids))
    return Reading(read)


def _last_influence(live: Live, ids: list[int], mask: list[int]) -> int:
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap

    row = torch.tensor([ids], device=live.device)
    with live.kept(), torch.enable_grad(), EmbeddingTap(row) as tap:
        score = live.read(row, torch.tensor([mask], device=live.device)).tensor
        if not tap.leaves or not score.requires_grad:
            raise Unavailable("no embedding look-up could be tapped")
        gradient = tap.gradients(score.float().sum())[0]
    reached = (gradient > 1e-6 * gradient.max()).nonzero().reshape(-1)
    if not len(reached):
        raise Unavailable("the score depends on no token")
    return int(reached[-1])

"""How long a text a model in memory really reads, where nothing on paper says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Inputs, Manifest, Output

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["Capacity", "capacity", "needed_length"]

# Longer texts would make the probe slower than the rest of it together.
LONGEST = 2048
SHORT = 12


@dataclass(frozen=True)
class Capacity:
    """What a role does with a text as long as prompt and response together.

    ``raised`` is what it raised, "" where it did not. ``blind_to_end`` and ``blind_to_start`` say that exchanging the
    last or first tokens changes the score of a short text and leaves that of the long one the same to the last bit;
    None where that was not tried (only a score of a whole sequence can tell).
    """

    length: int
    raised: str
    blind_to_end: bool | None
    blind_to_start: bool | None


def needed_length(setup: Any, prompt_tokens: int | None, generation: Any = None) -> int | None:
    """Tokens of prompt and response together, None where either is unknown."""
    prompt = setup.declared.get("prompt_length") or prompt_tokens
    response = setup.declared.get("response_length") or (generation or {}).get("max_new_tokens")
    return prompt + response if isinstance(prompt, int) and isinstance(response, int) else None


@role_fact(Stage.PROBE)
def capacity(role: Role, models: Models, setup: Any, inputs: Inputs, manifest: Manifest, output: Output) -> Capacity:
    """Call the model with a text of the declared length.

    Raises:
        Unavailable: no length is declared, it is longer than 2048 tokens, the config's positions decide already, or
            the model was loaded from a folder.
    """
    length = needed_length(setup, None)
    live = models.get(role)
    if length is None or not SHORT < length <= LONGEST or live.loaded_here or live.texts:
        raise Unavailable("needs a declared prompt_length and response_length, and a model in memory")
    if manifest.max_positions is not None and manifest.max_positions < length:
        raise Unavailable("the config's positions decide")
    text = [token for sequence in inputs.sequences for token in sequence]
    long = (text * (length // len(text) + 1))[:length]
    try:
        scores = output.kind == "scalar per sequence"
        if scores:
            return Capacity(length, "", _blind(live, long, -1), _blind(live, long, 0))
        _read(live, [long])
        return Capacity(length, "", None, None)
    except Broken as broken:
        return Capacity(length, broken.sentence, None, None)


def _blind(live: Live, long: list[int], at: int) -> bool:
    """Whether exchanging three tokens at an end moves the short text's score and not the long one's."""
    spare = next(token for token in reversed(long) if token not in (*long[:3], *long[-3:]))
    moved = []
    for text in (long[:SHORT], long):
        other = [*text[:-3], spare, spare, spare] if at else [spare, spare, spare, *text[3:]]
        one, two = _read(live, [text]), _read(live, [other])
        moved.append(one != two)
    return moved[0] and not moved[1]


def _read(live: Live, rows: list[list[int]]) -> list[float]:
    import torch

    ids = torch.tensor(rows)
    with torch.no_grad(), live.kept():
        read: list[float] = live.read(ids, torch.ones_like(ids)).tensor.reshape(-1).float().tolist()
    return read

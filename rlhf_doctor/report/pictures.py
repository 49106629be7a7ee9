"""The pictures as plain geometry: influence maps, and how the four models feed one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Edge", "Map", "Node", "influence_map", "influence_words", "legend", "wiring"]

LEVELS = 6


@dataclass(frozen=True)
class Map:
    """An influence map in units of one cell: an SVG path for each level of darkness, and the decoder's staircase."""

    size: int
    past: tuple[tuple[int, str], ...]
    future: tuple[tuple[int, str], ...]
    staircase: str
    score: tuple[tuple[int, str], ...]


def influence_map(tokens: Sequence[Sequence[float]], score: Sequence[float] | None, floor: float) -> Map:
    """The paths of a map of T × T numbers in 0 … 1; a number up to ``floor`` is left blank."""
    size = max(len(tokens), len(score or ()))
    cells = [(t, s, v) for t, row in enumerate(tokens) for s, v in enumerate(row) if v > floor]
    steps = "".join(f"H{t + 1}V{t + 1}" for t in range(len(tokens)))
    return Map(
        size,
        _levels((s, t, v) for t, s, v in cells if s <= t),
        _levels((s, t, v) for t, s, v in cells if s > t),
        f"M0 0{steps}" if tokens else "",
        _levels((s, 0, v) for s, v in enumerate(score or ()) if v > floor),
    )


def _levels(cells: Any) -> tuple[tuple[int, str], ...]:
    """Level 1 … LEVELS -> path; the square root keeps weak influence visible."""
    found: dict[int, str] = {}
    for x, y, value in cells:
        level = min(LEVELS, max(1, math.ceil(LEVELS * math.sqrt(min(value, 1.0)))))
        found[level] = found.get(level, "") + f"M{x} {y}h1v1h-1z"
    return tuple(sorted(found.items()))


def legend() -> list[tuple[str, str, Map]]:
    """(name, meaning, map) of the three shapes worth knowing."""
    n = 6
    triangle = [[1.0 if s <= t else 0.0 for s in range(n)] for t in range(n)]
    band = [[1.0 if abs(t - s) <= 1 else 0.0 for s in range(n)] for t in range(n)]
    square = [[1.0] * n for _ in range(n)]
    return [
        ("Lower triangle", "a Transformer decoder: every output sees its whole past and nothing later",
         influence_map(triangle, None, 0.5)),
        ("Band", "a convolution: an output sees its neighbours and no further", influence_map(band, None, 0.5)),
        ("Full square", "an encoder: outputs see the future too", influence_map(square, None, 0.5)),
    ]  # fmt: skip


def influence_words(card: Mapping[str, Any]) -> tuple[str, str]:
    """A model's map in words: its shape in two or three of them, and a sentence or two."""
    found = card["influence"]
    if not found:
        return "No map", _no_map(card)
    shape, sentence = _shape(found)
    kind = card["kind"] or "unknown"
    if kind == "transformer decoder":
        judged = "This is the picture of a Transformer decoder."
    elif shape == "Full lower triangle":
        judged = f"A decoder shows the same triangle, but here it comes about otherwise (see the census): {kind}."
    else:
        judged = "A Transformer decoder shows a full lower triangle."
    score = found["score"]
    if score:
        seen = sum(v > found["floor"] for v in score)
        every = "all" if seen == len(score) else f"{seen} of"
        judged += f" Its one output depends on {every} {len(score)} tokens (the row below the map)."
    return shape, f"{sentence} {judged}"


def _no_map(card: Mapping[str, Any]) -> str:
    if not card["present"]:
        return "This role was not given."
    if card["origin"] == "callable":
        return "A function of texts has no map."
    if card["origin"] == "adapter-off":
        return "The policy with its adapter off: see the policy's map."
    return "It was not measured: the models were not called, or this one could not be."


def _shape(found: Mapping[str, Any]) -> tuple[str, str]:
    tokens, floor = found["tokens"], found["floor"]
    if not tokens:
        return "No map per token", "The model shows nothing per token."
    size = len(tokens)
    back = max((t - s for t, row in enumerate(tokens) for s, v in enumerate(row) if v > floor), default=0)
    ahead = max((s - t for t, row in enumerate(tokens) for s, v in enumerate(row) if v > floor), default=0)
    filled = sum(v > floor for row in tokens for v in row) / (size * size)
    if back <= 0 and ahead <= 0:
        return "Diagonal", "Each output sees its own token and no other."
    if ahead > 0 and filled > 0.99:
        return "Full square", "Every output sees the whole text, later tokens included."
    if ahead > 0 and back < size - 1 and ahead < size - 1:
        return "Band", f"Outputs see at most {_tokens(back)} back and {_tokens(ahead)} ahead."
    if ahead > 0:
        return "Sees the future", f"Outputs see up to {_tokens(ahead)} ahead of themselves."
    if found["coverage"] > 0.99:
        return "Full lower triangle", "Every output sees its whole past and nothing later."
    if back < size - 1:
        return "Band below the diagonal", f"Outputs see at most {_tokens(back)} back and nothing later."
    return "Part of the lower triangle", f"Outputs see {found['coverage']:.0%} of their past and nothing later."


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Node:
    """A box: ``state`` is "", "sick" (an error), "risky" (a warning), "reached" (by an error upstream) or "absent"."""

    name: str
    label: str
    note: str
    x: int
    y: int
    w: int
    state: str


@dataclass(frozen=True)
class Edge:
    """An arrow; ``said`` is what it means in words; ``state`` as a node's; ``label`` is written at its x and y."""

    path: str
    said: str
    state: str
    label: tuple[str, int, int] | None = None


BOXES = (
    ("prompt", "prompt", "tokenizer", 0, 140, 110),
    ("policy", "policy", "writes", 150, 140, 120),
    ("response", "response", "tokens", 310, 140, 110),
    ("reference", "reference", "KL to the policy", 470, 40, 150),
    ("reward", "reward model", "one score", 470, 140, 150),
    ("value", "critic", "one value a state", 470, 240, 150),
    ("total", "return", "reward − KL", 670, 90, 120),
    ("advantage", "advantage", "return − value", 820, 165, 150),
)
# From, to, path, words. The last two close the loop: what they reach is updated, and the diagram stops there.
ARROWS = (
    ("prompt", "policy", "M110 168H144", "the policy reads the prompt"),
    ("policy", "response", "M270 168H304", "the policy writes a response"),
    ("response", "reference", "M420 160C450 160 440 68 464 68", "the reference rates the response's tokens"),
    ("response", "reward", "M420 168H464", "the reward model gives the response one score"),
    ("response", "value", "M420 176C450 176 440 268 464 268", "the critic estimates the return from every token"),
    ("reference", "total", "M620 68C650 68 640 108 664 108", "the KL penalty is taken off"),
    ("reward", "total", "M620 168C650 168 640 128 664 128", "the score enters the return"),
    ("total", "advantage", "M790 118C812 118 800 182 814 182", "the return is compared …"),
    ("value", "advantage", "M620 262C780 262 760 204 814 204", "… with what the critic expected"),
    ("advantage", "policy!", "M895 165V14H210V134", "the advantage updates the policy"),
    ("total", "value!", "M730 146V278H626", "the return is the critic's target"),
)
LABELS = {
    ("advantage", "policy!"): ("updates the policy", 500, 9),
    ("total", "value!"): ("the critic's target", 738, 296),
}


def wiring(cards: Mapping[str, Mapping[str, Any]], sick: Mapping[str, str]) -> tuple[list[Node], list[Edge], str]:
    """Boxes, arrows, and a sentence on what the errors reach.

    Args:
        cards: role -> card.
        sick: role -> gravest severity, of every role with an error or a warning.
    """
    places = {"tokenizer": "prompt", "loop": "advantage"}
    names = {name for name, *_ in BOXES}
    ill = {places.get(role, role) for role, severity in sick.items() if severity == "error"} & names
    risky = {places.get(role, role) for role, severity in sick.items() if severity == "warning"} & names - ill
    missing = {role for role, card in cards.items() if not card["present"]}
    reached = set(ill)
    for start, end, _, _ in ARROWS:  # in the order of the flow, so that one pass is enough
        if start in reached and not end.endswith("!") and end not in missing:
            reached.add(end)

    def state(name: str) -> str:
        if name in missing:
            return "absent"
        if name in ill:
            return "sick"
        return "risky" if name in risky else "reached" if name in reached else ""

    # Without a critic the return is compared with a baseline of another kind.
    notes = {"advantage": "return − baseline"} if "value" in missing else {}
    nodes = [Node(name, label, notes.get(name, note), x, y, w, state(name)) for name, label, note, x, y, w in BOXES]
    edges = [
        Edge(path, said, "reached" if start in reached else "", LABELS.get((start, end)))
        for start, end, path, said in ARROWS
        if not {start, end.strip("!")} & missing
    ]
    return nodes, edges, _reach(nodes, ill)


def _reach(nodes: Sequence[Node], ill: set[str]) -> str:
    if not ill:
        return ""
    faults = " and the ".join(node.label for node in nodes if node.name in ill)
    onward = [node.label for node in nodes if node.state == "reached"]
    if not onward:
        return f"What goes wrong in the {faults} goes straight into every update."
    return f"What goes wrong in the {faults} goes on into the {', the '.join(onward)}, and so into every update."

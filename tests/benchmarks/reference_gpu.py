"""Measure the reference on a GPU: the update against the card's arithmetic, decoding against its memory, TRL beside it.

Run it from the repository's root: ``python tests/benchmarks/reference_gpu.py``; it writes a section of
reports/benchmarks.md, with the card's name. ``--no-trl`` leaves TRL out; else it is found as reference_vs_trl.py says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import reference_vs_trl, sections  # noqa: E402  # found through the line above, run as a script
from benchmarks.measure import WORDS, Row  # noqa: E402
from benchmarks.reference_vs_trl import Size  # noqa: E402

COMMAND = "python tests/benchmarks/reference_gpu.py"
UTILISATION, DECODING = 0.40, 0.50  # the promises
BILLION = Size(
    "2048 × 18, 50k tokens",
    2048,
    5632,
    18,
    16,
    50304,
    faster=2.0,
    iterations=3,
    repeats=1,
    micro=8,
    epochs=1,
    prompt=256,
    response=256,
    device="cuda",
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Card:
    """What its data sheet says: dense bfloat16 operations and bytes of memory, a second."""

    operations: float
    bandwidth: float


CARDS = {  # by what the driver's name for it holds
    "H200": Card(989e12, 4.8e12),  # https://www.nvidia.com/en-us/data-center/h200/
    "H100": Card(989e12, 3.35e12),  # https://www.nvidia.com/en-us/data-center/h100/, SXM
    "A100": Card(312e12, 2.04e12),  # https://www.nvidia.com/en-us/data-center/a100/, 80 GB SXM
}


def card_of(name: str) -> Card:
    """The card that the driver calls so; raises ValueError for one that is not in CARDS."""
    for part, card in CARDS.items():
        if part in name:
            return card
    raise ValueError(f"the peak of {name} is not known; add it to CARDS")


def read_by_a_step(size: Size) -> float:
    """Bytes that no decoding step can do without: each weight once in bfloat16, and the keys and values so far."""
    prompts = reference_vs_trl.prompts(size)
    prompt = sum(len(text.split()) for text in prompts) / len(prompts)
    body = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)
    cache = size.batch * (prompt + size.response / 2) * size.layers * 2 * size.hidden
    return 2.0 * (body + size.hidden * size.vocabulary + cache)


def rows(size: Size, found: dict[str, list[dict[str, Any]]], card: Card) -> list[Row]:
    """The promises about a size on this card."""
    reference = found["reference"]
    update, decoding = (reference_vs_trl.phase(reference, name) for name in ("update", "generate"))
    rate, step = update["flops"] / update["seconds"], decoding["seconds"] / size.response
    least = read_by_a_step(size) / card.bandwidth
    made = [
        Row(f"{size.name}: the update's model FLOPs utilisation", f"at least {UTILISATION:.0%}",
            f"{rate / card.operations:.0%} ({rate / 1e12:.0f} of {card.operations / 1e12:.0f} TFLOP/s)",
            rate / card.operations >= UTILISATION),
        Row(f"{size.name}: the same, if it did its matrix products and nothing else", "none set",
            f"{update['flops'] / update['floor'] / card.operations:.0%}", None),
        Row(f"{size.name}: decoding, in the bandwidth that it must have", f"at least {DECODING:.0%}",
            f"{least / step:.0%} ({step * 1e3:.2f} ms a token, {least * 1e3:.2f} at least)", least / step >= DECODING),
    ]  # fmt: skip
    if "trl" in found:
        peaks = [max(one["peak"] for one in found[side]) / 1e9 for side in ("reference", "trl")]
        ratio = reference_vs_trl.ratio(found, "seconds")
        made += [
            Row(f"{size.name}: samples a second, in TRL's", f"{size.faster:.0f} ×", f"{ratio:.2f} ×",
                ratio >= size.faster),
            Row(f"{size.name}: peak memory", "no more than TRL's", f"{peaks[0]:.1f} GB against {peaks[1]:.1f} GB",
                peaks[0] <= peaks[1]),
        ]  # fmt: skip
    return made


def section(size: Size, measured: Sequence[Row], name: str, software: dict[str, Any]) -> str:
    """The section of reports/benchmarks.md."""
    return "\n".join([
        "## The reference on a GPU",
        "",
        f"Measured with `{COMMAND}` on one {name}, torch {software['torch']} and transformers",
        f"{software['transformers']}, in bfloat16 with float32 master weights: {size.batch} responses an iteration,",
        f"micro-batches of {size.micro}, prompts of up to {size.prompt} tokens and responses of {size.response}; the",
        "first iteration is left out. Operations are those of the matrix products, padding left out, against the",
        "card's data sheet.",
        "",
        "| what | target | measured | kept |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.target} | {row.measured} | {WORDS[row.kept]} |" for row in measured),
    ])  # fmt: skip


def main() -> None:
    """Measure, write the section, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="an interpreter with TRL; default: TRL_PYTHON, or one made in ~/.cache")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("reference_gpu.py: there is no CUDA device here")
    name = torch.cuda.get_device_name()
    card, sides = card_of(name), ("reference",) if given.no_trl else ("trl", "reference")
    python = sys.executable if given.no_trl else reference_vs_trl.trl_python(given.trl_python)
    found = reference_vs_trl.compare(BILLION, python, sides)
    measured = rows(BILLION, found, card)
    text = section(BILLION, measured, name, found["reference"][0])
    sections.write("reference on a GPU", text)
    print(text)
    sys.exit(1 if any(row.kept is False for row in measured) else 0)


if __name__ == "__main__":
    main()

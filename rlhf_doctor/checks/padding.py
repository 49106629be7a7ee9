"""Which side the setup pads, and what a shift under padding says. Shared by REW004, REW005, VAL004; no check itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_doctor.finding import Evidence, Severity
from rlhf_doctor.instruments.readings import Invariance, Manifest, Shift

__all__ = ["grave_shifts", "moved_shifts", "shift_evidence", "side_of", "side_severity"]

PADDINGS = ("right padding", "left padding")


def side_of(setup: Any, manifest: Manifest) -> str:
    """The side that the role's rows are padded on: as the given prompts are, else as the tokenizer says.

    Where neither says so it is the right: responses end at different tokens, and what follows them is padding.
    """
    prompts = setup.prompts
    if isinstance(prompts, Mapping) and prompts.get("attention_mask") is not None:
        rows = [[int(v) for v in row] for row in prompts["attention_mask"]]
        if any(row and not row[0] for row in rows):
            return "left"
        if any(row and not row[-1] for row in rows):
            return "right"
    return (manifest.tokenizer.padding_side if manifest.tokenizer else None) or "right"


def side_severity(name: str, side: str) -> Severity | None:
    """INFO for a fault that shows under one padding only, and not the one that the setup uses; else the check's own."""
    if name not in PADDINGS:
        return None
    return None if name.startswith(side) else Severity.INFO


def moved_shifts(found: Invariance) -> dict[str, Shift]:
    """The paddings and neighbours that moved the output."""
    return {
        name: found.shifts[name]
        for name in (*PADDINGS, "neighbours")
        if name in found.shifts and found.shifts[name].moved
    }


def grave_shifts(moved: Mapping[str, Shift], side: str) -> dict[str, Shift]:
    """Those that show in this setup's own rows.

    A batch that leaks moves the output under the setup's padding too, so neighbours under the other padding alone do
    not count.
    """

    def padding(name: str, shift: Shift) -> str:
        return name if name in PADDINGS else next((p for p in PADDINGS if p in shift.detail), name)

    return {n: s for n, s in moved.items() if side_severity(padding(n, s), side) is None}


def shift_evidence(what: str, name: str, shift: Shift) -> Evidence:
    """How far the output moved under a change."""
    return Evidence(
        f"{what} of the same text: alone, and with {name}"
        if name != "neighbours"
        else f"{what} of the same text beside other texts",
        expected="the same",
        observed=f"moved by {shift.largest:.4g}, {shift.largest / max(shift.scale, 1e-12):.2g} standard deviations",
        tolerance=f"{shift.tolerance:.2g}, what rounding explains",
        where=shift.detail,
    )

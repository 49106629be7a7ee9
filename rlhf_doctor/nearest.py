"""The nearest real name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["did_you_mean", "near_path"]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``; did you mean 'gamma'?``, or nothing where no candidate is near."""
    folded = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def near_path(path: Path) -> str:
    """``; did you mean 'runs/policy'?`` for a path that does not exist, or nothing where no neighbour is near."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
        if missing == missing.parent:
            return ""
    try:
        neighbours = [entry.name for entry in missing.parent.iterdir()]
    except OSError:  # a folder that may not be listed has no neighbour to suggest
        return ""
    near = difflib.get_close_matches(missing.name, neighbours, n=1, cutoff=0.5)
    if not near:
        return ""
    mended = missing.parent / near[0] / path.relative_to(missing)
    return f"; did you mean {str(mended if mended.exists() else missing.parent / near[0])!r}?"

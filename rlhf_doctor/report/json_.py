"""The JSON report: the record itself, strict and with sorted keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["dump", "render"]


def render(record: Mapping[str, Any]) -> str:
    """The record as JSON text, ending in a newline.

    Raises:
        ValueError: the record holds NaN or an infinity, which JSON has not.
    """
    return dump(record, indent=1) + "\n"


def dump(record: Mapping[str, Any], *, indent: int | None) -> str:
    """The record as JSON; every character stands as itself except those that UTF-8 cannot hold.

    Raises:
        ValueError: as ``render``.
    """
    separators = (",", ":") if indent is None else None
    said = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    # A lone surrogate's backslash form is also its JSON escape.
    return said.encode("utf-8", "backslashreplace").decode("utf-8")

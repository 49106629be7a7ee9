"""``gamma=0.99`` as YAML 1.2 reads it: 1e-6 is a number, ``true`` a truth value, ``null`` nothing, the rest text."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Scalar", "parse_assignments", "parse_scalar"]

Scalar = bool | int | float | str | None
WORDS: dict[str, Scalar] = {
    "": None,
    "~": None,
    "null": None,
    "true": True,
    "false": False,
    ".inf": float("inf"),
    "+.inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}
INTEGER = re.compile(r"[-+]?[0-9]+")
BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def parse_scalar(text: str) -> Scalar:
    """The value of a plain or quoted scalar of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema)."""
    stripped = text.strip()
    if len(stripped) >= 2 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        return stripped[1:-1]
    if stripped in (stripped.lower(), stripped.upper(), stripped.capitalize()) and stripped.lower() in WORDS:
        return WORDS[stripped.lower()]
    if INTEGER.fullmatch(stripped):
        return int(stripped)
    if BASED.fullmatch(stripped):
        return int(stripped, 0)
    if FLOAT.fullmatch(stripped):
        return float(stripped)
    return stripped


def parse_assignments(texts: Iterable[str]) -> dict[str, Scalar]:
    """``("gamma=0.99", "kl_estimator=k1")`` -> ``{"gamma": 0.99, "kl_estimator": "k1"}``; the last one wins.

    Raises:
        ValueError: one has no name or no equals sign.
    """
    declared: dict[str, Scalar] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{text!r} is no NAME=VALUE, as in gamma=0.99")
        declared[name.strip()] = parse_scalar(value)
    return declared

"""Text for every renderer: what is safe to show, and the little structure that pages have."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Block", "Span", "blocks", "clean", "counted", "first_sentence", "one_line", "spans"]

# Characters that would act instead of being read: controls, escapes, text direction, lone surrogates.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
URL = re.compile(r"https?://[A-Za-z0-9\[][^\s<>\"'`\\^{}|]*")
ITEM = re.compile(r"^(\s*)(?:(\d+)[.)]|[-*•])\s+(.*)$")
SENTENCE = re.compile(r"(?<=[.!?])[)”\"']?\s+(?=[A-Z“\"(])")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|al|etc|approx|no)\.)$", re.IGNORECASE)


@dataclass(frozen=True)
class Span:
    """A piece of a line: ``kind`` is "text", "code" or "link" (then ``text`` is its address as well)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Block:
    """A paragraph ("text", one item) or a list ("numbered" or "bullets")."""

    kind: str
    items: list[str] = field(default_factory=list)


def clean(value: Any) -> Any:
    """The same data with every character that would act on the reader's screen written out as an escape."""
    if isinstance(value, str):
        return UNSAFE.sub(lambda found: _written_out(found[0]), value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def one_line(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(clean(text).split())


def counted(number: int, noun: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_sentence(text: str) -> str:
    """The first sentence of a message, ending in a full stop."""
    line = one_line(text)
    for found in SENTENCE.finditer(line):
        head = line[: found.start()]
        if not ABBREVIATION.search(head):
            return head
    return line if not line or line[-1] in ".!?" else line + "."


def blocks(text: str) -> list[Block]:
    """Paragraphs and lists of a page's section; an indented line goes on with the item above it."""
    found: list[Block] = []
    open_block = False
    for line in clean(text).splitlines():
        item = ITEM.match(line)
        if not line.strip():
            open_block = False
        elif item and (open_block is False or not found or found[-1].kind != "text" or item[2]):
            kind = "numbered" if item[2] else "bullets"
            if not found or found[-1].kind != kind:
                found.append(Block(kind))
            found[-1].items.append(item[3].strip())
            open_block = True
        elif found and (open_block or (line.startswith(" ") and found[-1].kind != "text")):
            found[-1].items[-1] += " " + line.strip()
        else:
            found.append(Block("text", [line.strip()]))
            open_block = True
    return found


def spans(text: str) -> list[Span]:
    """A line split into text, `code` between backticks, and http(s) addresses, which alone become links."""
    found: list[Span] = []
    for n, part in enumerate(re.split(r"`+([^`]+)`+", text)):
        if n % 2:
            found.append(Span("code", part))
            continue
        at = 0
        for url in URL.finditer(part):
            address = _trimmed(url[0])
            found += [Span("text", part[at : url.start()]), Span("link", address)]
            at = url.start() + len(address)
        found.append(Span("text", part[at:]))
    return [span for span in found if span.text]


def _trimmed(address: str) -> str:
    """Without the sentence's own punctuation, and without a closing bracket that the address did not open."""
    while address[-1] in ".,;:!?)]":
        if address[-1] == ")" and address.count("(") >= address.count(")"):
            break
        address = address[:-1]
    return address


def _written_out(character: str) -> str:
    number = ord(character)
    if unicodedata.category(character) == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"

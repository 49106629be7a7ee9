"""Read files that may be anything: every way in which one can be bad is one sentence that names it. No torch."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = ["CONFIG_LIMIT", "INDEX_LIMIT", "TOKENIZER_LIMIT", "BadFile", "folder_problem", "read_json", "read_object"]

CONFIG_LIMIT = 8 << 20  # the largest config.json in use are some hundred KB: lists of every layer's settings
INDEX_LIMIT = 64 << 20  # 9 MB for the 90 000 tensors of DeepSeek-V3
TOKENIZER_LIMIT = 128 << 20  # 33 MB for the 262 144 tokens of Gemma 3
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
         list: "a list", type(None): "null"}  # fmt: skip
NESTED = ("text_config", "llm_config", "language_config")


class BadFile(Exception):
    """A file cannot be used; the message is one sentence that names it."""


def read_bytes(path: Path, limit: int | None) -> bytes:
    """The bytes of a regular file.

    Raises:
        BadFile: it is not there, no file, not readable, or larger than ``limit`` bytes.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadFile(f"{path} is a folder where a file should be")
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(f"{path} is not a regular file")
        if limit is not None and status.st_size > limit:
            raise BadFile(
                f"{path} has {status.st_size:,} bytes and was not read: such a file has at most {limit:,}, "
                "so this one is something else or damaged"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {said_by(error)}") from None


def read_json(path: Path, limit: int = CONFIG_LIMIT, prepare: Callable[[bytes], bytes] = bytes) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark, ``prepare`` applied to its bytes.

    Raises:
        BadFile: it is no such file.
    """
    return parse_json(prepare(read_bytes(path, limit)), str(path))


def parse_json(raw: bytes, name: str) -> Any:
    """The content of JSON text in UTF-8; ``name`` says in the sentence what it is.

    Raises:
        BadFile: it is not JSON, or not UTF-8, or nested beyond reason.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        if SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{name} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}") from None
    except UnicodeEncodeError:
        raise BadFile(f"{name} holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise BadFile(f"{name} is nested too deeply to be what it should be") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadFile(f"{name} is not valid JSON: {error.msg} at {where}") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadFile(f"{name} is not valid JSON: {said_by(error)}") from None
    return value


def read_object(
    path: Path,
    kinds: Mapping[str, tuple[type, ...]],
    problems: list[str],
    limit: int = CONFIG_LIMIT,
    prepare: Callable[[bytes], bytes] = bytes,
) -> dict[str, Any]:
    """A JSON file that holds an object. What is wrong with it goes to ``problems``; {} where nothing can be read.

    Args:
        path: the file; absent is no problem and gives {}.
        kinds: key -> the types its value may have; null always may. A key with another type is named and left out.
        problems: where sentences are added, at most one.
        limit: more bytes than this are not read.
        prepare: applied to the bytes before they are read as JSON.
    """
    if not os.path.lexists(path):
        return {}
    try:
        value = read_json(path, limit, prepare)
        if not isinstance(value, dict):
            raise BadFile(f"{path} should hold an object of settings and holds {kind_of(value)}")
    except BadFile as bad:
        problems.append(str(bad))
        return {}
    wrong = list(_wrong(value, kinds))
    if wrong:
        said = "; ".join(
            f"{key!r} should be {_either(kinds[key])} and is {kind_of(within[key])}" for key, within in wrong[:3]
        )
        problems.append(f"{path} has settings of the wrong kind: {said}")
        for key, within in wrong:
            del within[key]
    return value


def _wrong(value: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> Iterable[tuple[str, dict[str, Any]]]:
    nested = [value[key] for key in NESTED if isinstance(value.get(key), dict)]
    for within in (value, *nested):
        for key, allowed in kinds.items():
            given = within.get(key)
            if given is None:
                continue
            # True is an int to Python, and no whole number to anybody else.
            fits = isinstance(given, allowed) and (not isinstance(given, bool) or bool in allowed)
            if not fits or (list in allowed and isinstance(given, list) and not _plain(given)):
                yield key, within


def _plain(items: list[Any]) -> bool:
    return all(isinstance(item, (str, int, float, dict)) or item is None for item in items)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return WORDS.get(type(value), type(value).__name__)


def _either(kinds: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(WORDS[kind] for kind in kinds))


def said_by(error: BaseException) -> str:
    """An exception's own words on one line, without the path that the sentence names already."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200] or type(error).__name__


def folder_problem(path: Path) -> str | None:
    """Why a path is no folder that can be looked into, in one sentence with the nearest real one; None if it is."""
    try:
        if path.is_dir():
            os.listdir(path)
            return None
        if path.exists():
            return f"{path} is a file: give the checkpoint's folder, {path.parent}"
        if path.is_symlink():
            return f"{path} is a link to {os.readlink(path)}, which leads nowhere"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {said_by(error)}"
    hint = _nearest(path)
    if not hint and len(path.parts) == 2 and not path.is_absolute():
        hint = "; models are read from folders on this machine: download what is only on the Hugging Face Hub first"
    return f"{path} does not exist{hint}"


def _nearest(path: Path) -> str:
    """The longest part of a path that exists, and what stands there under nearly the same name."""
    for parent in path.parents:
        try:
            if not parent.is_dir():
                continue
            missing = path.parts[len(parent.parts)]
            names = sorted(entry.name for entry in parent.iterdir())
        except (OSError, IndexError):
            return ""
        near = get_close_matches(missing, names, n=1, cutoff=0.5)
        return f"; did you mean {parent / near[0]}?" if near else ""
    return ""

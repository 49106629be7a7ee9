"""The header of a safetensors file: names, shapes and dtypes, checked against the file's size. No tensor is read.

The layout is https://huggingface.co/docs/safetensors: 8 bytes little-endian N, N bytes of JSON, then the data, which
the offsets must cover from its first byte to its last without overlap.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any, TypeGuard

from rlhf_doctor.instruments.files import BadFile, kind_of, parse_json, said_by
from rlhf_doctor.instruments.readings import TensorInfo

__all__ = ["read_header"]

HEADER_LIMIT = 100_000_000  # the format's own
LARGEST = 1 << 63
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, TensorInfo], str]:
    """(tensor name -> what it is, what is wrong with the file or "").

    A header that can be read is given even if the data behind it is cut short.

    Raises:
        BadFile: there is no header that can be read.
    """
    raw, size = _header_bytes(path)
    header = parse_json(raw, f"the header of {path}")
    if not isinstance(header, dict):
        raise BadFile(f"the header of {path} should be an object of tensors and is {kind_of(header)}")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    file = path.name
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(path, name, entry)
        tensors[name] = TensorInfo(shape, dtype, file)
        spans.append((begin, end, name))
    return tensors, _layout_problem(path, sorted(spans), size - 8 - len(raw))


def _header_bytes(path: Path) -> tuple[bytes, int]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            folder = stat.S_ISDIR(status.st_mode)
            raise BadFile(f"{path} is {'a folder where a file should be' if folder else 'not a regular file'}")
        size = status.st_size
        with open(path, "rb", buffering=0) as file:
            start = file.read(8)
            if len(start) < 8:
                raise BadFile(f"{path} is truncated: it has {size} bytes, too few for a safetensors header")
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise BadFile(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            if length > HEADER_LIMIT:
                raise BadFile(
                    f"{path} is no safetensors file or damaged: it claims a header of {length:,} bytes, "
                    f"and the format allows {HEADER_LIMIT:,}"
                )
            if length > size - 8:
                raise BadFile(f"{path} is truncated: it claims a header of {length:,} bytes and has {size - 8:,} left")
            parts, missing = [], length
            while missing:
                part = file.read(missing)
                if not part:
                    raise BadFile(f"{path} is truncated: its header ends {missing:,} bytes too early")
                parts.append(part)
                missing -= len(part)
            return b"".join(parts), size
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {said_by(error)}") from None


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    if not isinstance(entry, dict):
        raise BadFile(
            f"the header of {path} says of {_short(name)} {kind_of(entry)} instead of a dtype, shape and offsets"
        )
    shape, dtype, offsets = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise BadFile(f"the header of {path} gives {_short(name)} no dtype, shape and pair of offsets that can be read")
    if dtype not in BITS:
        raise BadFile(f"the header of {path} gives {_short(name)} the dtype {_short(dtype)}, which is none")
    begin, end = offsets
    needed = (math.prod(shape) * BITS[dtype] + 7) // 8
    if end - begin != needed:
        raise BadFile(
            f"the header of {path} lies about {_short(name)}: shape {_short(shape)} in {dtype} takes {needed:,} bytes, "
            f"its offsets give it {end - begin:,}"
        )
    return tuple(shape), dtype, begin, end


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    if not isinstance(numbers, list) or len(numbers) > 64:
        return False
    for n in numbers:  # noqa: SIM110 # a generator here takes a fifth of reading a checkpoint
        if type(n) is not int or not 0 <= n < LARGEST:
            return False
    return True


def _layout_problem(path: Path, spans: list[tuple[int, int, str]], available: int) -> str:
    """What is wrong with where the tensors lie, in one sentence."""
    reached, before = 0, ""
    for begin, end, name in spans:
        if begin < reached:
            return f"the header of {path} lies: {_short(name)} overlaps {_short(before)}"
        if begin > reached:
            return f"the header of {path} lies: {begin - reached:,} bytes before {_short(name)} belong to no tensor"
        reached, before = end, name
    if reached > available:
        last = next(name for begin, end, name in spans if end > available)
        return (
            f"{path} is truncated: its header promises {reached:,} bytes of tensors and {available:,} are there; "
            f"{_short(last)} is the first that is cut"
        )
    if reached < available:
        return f"{path} has {available - reached:,} bytes after its last tensor that its header does not know"
    return ""


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else said[:77] + "..."

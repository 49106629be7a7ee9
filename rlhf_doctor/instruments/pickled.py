"""What a pickle of weights would import when it is loaded, read without loading it. No torch is imported here."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Manifest

__all__ = ["pickled"]

MOST_BYTES = 1 << 26
# What torch.load(weights_only=True) builds by itself.
SAFE = ("torch", "torch._utils", "torch._tensor", "torch.nn.parameter", "torch.storage", "collections", "_codecs")
SAFE_NAMES = ("OrderedDict", "Counter", "encode", "Size", "Parameter", "UntypedStorage", "TypedStorage", "Tensor")


@role_fact(Stage.STATIC)
def pickled(role: str, manifest: Manifest) -> Mapping[str, tuple[str, ...]]:
    """Weight file -> the names it imports beyond tensors; an empty tuple is a pickle of plain tensors.

    Raises:
        Unavailable: the role has no pickled weights.
    """
    if not manifest.pickles or manifest.path is None:
        raise Unavailable(f"the {role} has no pickled weights")
    found = {}
    for name in manifest.pickles:
        path = Path(manifest.path) / name
        if path.is_file():
            found[name] = tuple(sorted(n for n in _imports(path) if not _safe(n)))
    return found


def _imports(path: Path) -> set[str]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = next((i for i in archive.infolist() if i.filename.endswith("data.pkl")), None)
                raw = archive.read(inner) if inner and inner.file_size <= MOST_BYTES else b""
        else:
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES)
        return _named(raw)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return set()  # a damaged file is said so by whoever reads it as a checkpoint


def _named(raw: bytes) -> set[str]:
    found: set[str] = set()
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                found.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, IndexError, UnicodeDecodeError):
        return found  # cut off or no pickle from here on; what was named before counts
    return found


def _safe(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    known = attribute.startswith("_rebuild") or attribute.endswith("Storage") or attribute in SAFE_NAMES
    dtype = module == "torch" and attribute.rstrip("0123456789_").islower()
    return module in SAFE and (known or dtype)

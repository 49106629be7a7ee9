"""What a pickle of weights would import when it is loaded, read without loading it. No torch is imported here."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.manifest import SCALAR_HEADS
from rlhf_doctor.instruments.readings import Manifest

__all__ = ["Pickled", "pickled"]

MOST_BYTES = 1 << 26
# What torch.load(weights_only=True) builds by itself.
SAFE = ("torch", "torch._utils", "torch._tensor", "torch.nn.parameter", "torch.storage", "collections", "_codecs")
SAFE_NAMES = ("OrderedDict", "Counter", "encode", "Size", "Parameter", "UntypedStorage", "TypedStorage", "Tensor")


@dataclass(frozen=True)
class Pickled:
    """``imports``: what a weight file names beyond tensors, empty for plain tensors. ``names``: of its tensors."""

    imports: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def scalar_head(self) -> str:
        """The name of a tensor of a scalar head, "" where none is called like one."""
        heads = (n for n in self.names if any(p in SCALAR_HEADS for p in n.split(".")[:-1]))
        return next(heads, "")


@role_fact(Stage.STATIC)
def pickled(role: str, manifest: Manifest) -> Mapping[str, Pickled]:
    """Weight file -> what a look at its opcodes tells.

    Raises:
        Unavailable: the role has no pickled weights.
    """
    if not manifest.pickles or manifest.path is None:
        raise Unavailable(f"the {role} has no pickled weights")
    found = {}
    for name in manifest.pickles:
        path = Path(manifest.path) / name
        if path.is_file():
            imports, strings = _read(path)
            names = (s for s in strings if s.endswith((".weight", ".bias")))
            found[name] = Pickled(tuple(sorted(n for n in imports if not _safe(n))), tuple(dict.fromkeys(names)))
    return found


def _read(path: Path) -> tuple[set[str], list[str]]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = next((i for i in archive.infolist() if i.filename.endswith("data.pkl")), None)
                raw = archive.read(inner) if inner and inner.file_size <= MOST_BYTES else b""
        else:
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES)
        return _opcodes(raw)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return set(), []  # a damaged file is said so by whoever reads it as a checkpoint


def _opcodes(raw: bytes) -> tuple[set[str], list[str]]:
    """(imports, strings) of the pickles that stand one behind the other in ``raw``, as in torch's older format."""
    imports: set[str] = set()
    strings: list[str] = []
    stream = BytesIO(raw)
    try:
        while stream.tell() < len(raw):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    imports.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    imports.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, IndexError, UnicodeDecodeError):
        return imports, strings  # cut off, or no pickle from here on; what was named before counts
    return imports, strings


def _safe(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    known = attribute.startswith("_rebuild") or attribute.endswith("Storage") or attribute in SAFE_NAMES
    dtype = module == "torch" and attribute.rstrip("0123456789_").islower()
    return module in SAFE and (known or dtype)

"""Where a report goes: which formats, under which names, to which files or to stdout."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "Delivery", "plan"]

# Format -> (renderer's module, suffix of its files).
FORMATS: Mapping[str, tuple[str, str]] = {
    "terminal": ("terminal", ".txt"),
    "html": ("html", ".html"),
    "json": ("json_", ".json"),
    "markdown": ("markdown", ".md"),
}
FOLDER = "reports"


@dataclass(frozen=True)
class Delivery:
    """One rendering; ``path`` None means stdout."""

    format: str
    path: Path | None

    def render(self, record: Mapping[str, Any]) -> str:
        """The report in this format."""
        module = importlib.import_module(f"rlhf_doctor.report.{FORMATS[self.format][0]}")
        return str(module.render(record))

    def write(self, record: Mapping[str, Any]) -> None:
        """Render to the file.

        Raises:
            OSError: it cannot be written.
        """
        assert self.path is not None  # stdout is the command's
        self.path.write_text(self.render(record), encoding="utf-8")


def plan(formats: Sequence[str], output: str | None, name: str) -> list[Delivery]:
    """Decide where each format goes, and make the folders.

    Args:
        formats: chosen formats; none means the terminal, and what the suffix of ``output`` says or else HTML.
        output: a file, a folder, ``-`` for stdout, or None for ``reports/``.
        name: what the setup is called, for the names of files.

    Raises:
        ValueError: stdout is asked for several formats.
        OSError: a folder cannot be made.
    """
    if output == "-":
        if len(formats) > 1:
            raise ValueError(f"-o - writes one format to stdout, not {len(formats)}: {', '.join(formats)}")
        return [Delivery(formats[0] if formats else "terminal", None)]
    if not formats:
        by_suffix = [f for f, (_, suffix) in FORMATS.items() if output and output.endswith(suffix)]
        formats = ("terminal", *(f for f in by_suffix or ["html"] if f != "terminal"))
    to_screen = "terminal" in formats and (output is None or len(formats) > 1)
    files = [f for f in formats if not (f == "terminal" and to_screen)]
    planned = [Delivery("terminal", None)] if to_screen else []
    return planned + [Delivery(f, _path(f, output, name, alone=len(files) == 1)) for f in files]


def _path(fmt: str, output: str | None, name: str, *, alone: bool) -> Path:
    suffix = FORMATS[fmt][1]
    wanted = Path(output or FOLDER)
    is_folder = output is None or output.endswith(("/", "\\")) or wanted.is_dir() or not wanted.suffix
    if is_folder:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted / f"rlhf-doctor-{_file_name(name)}-{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    return wanted if alone else wanted.with_suffix(suffix)


def _file_name(name: str) -> str:
    """``setups/cnn.py:build`` -> ``cnn-build``."""
    short = name.rsplit("/", 1)[-1].replace(".py:", "-").removesuffix(".py")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", short).strip("-.")[:60] or "setup"

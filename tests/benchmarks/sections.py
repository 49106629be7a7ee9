"""reports/benchmarks.md, of which each script that measures owns a section."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "reports" / "benchmarks.md"


def put(page: str, name: str, text: str) -> str:
    """The page with this section's text between its marks, where it was or at the end; the rest stays as it is."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in page:
        return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: section, page, flags=re.DOTALL)
    return f"{page.rstrip() or '# Benchmarks'}\n\n{section}\n"


def write(name: str, text: str) -> None:
    """Put the section into reports/benchmarks.md."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(put(PAGE.read_text() if PAGE.exists() else "", name, text))

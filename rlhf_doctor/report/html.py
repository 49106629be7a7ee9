"""The HTML report: one file that opens offline and asks nothing of any other place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]


def render(record: Mapping[str, Any]) -> str:
    """The page of a report record. The same record gives the same bytes.

    Raises:
        ValueError: the record holds NaN or an infinity, which JSON has not.
    """
    from rlhf_doctor.report.view import view

    return _template().render(view(record), embedded=_embedded(record))


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    from rlhf_doctor.report.text import spans

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_doctor.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["spans"] = spans
    return environment.get_template("page.html.j2")


def _embedded(record: Mapping[str, Any]) -> Any:
    """The record as JSON that no string in it can end: <, > and & are written as escapes."""
    import markupsafe

    from rlhf_doctor.report.json_ import dump

    said = dump(record, indent=None)
    for character in "<>&":
        said = said.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(said)  # safe: the characters that HTML acts upon are gone

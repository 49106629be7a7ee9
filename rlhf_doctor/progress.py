"""What the tool is doing, on stderr: a spinner on a terminal, sparse lines elsewhere, nothing where it is quick."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["shown_progress"]

QUIET_SECONDS = 1.0
LINE_SECONDS = 5.0


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that is told what is being done, and shows it."""
    if quiet:
        yield lambda text: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(escape(text))
    else:
        yield Lines()


class Lines:
    """One line when a second has passed, then at most one every five."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.next = QUIET_SECONDS

    def __call__(self, text: str) -> None:
        passed = time.monotonic() - self.started
        if passed >= self.next:
            self.next = passed + LINE_SECONDS
            print(f"[{passed:4.0f} s] {text}", file=sys.stderr, flush=True)

"""What goes wrong with a target that cannot be read."""

from __future__ import annotations

__all__ = ["UnreadableTarget"]


class UnreadableTarget(ValueError):
    """A target on the command line, or handed to ``load_setup``, gives no setup: one sentence that names it."""

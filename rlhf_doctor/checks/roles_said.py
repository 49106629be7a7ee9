"""One fault that shows in several roles is said once. No torch is imported here."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_doctor.finding import Role

__all__ = ["blamed", "listed"]


def listed(roles: Sequence[Role]) -> str:
    """``policy``, ``policy and reward``, ``policy, reward and value``."""
    return " and ".join(filter(None, (", ".join(roles[:-1]), roles[-1]))) if roles else "none"


def blamed(roles: Sequence[Role], together: Role) -> Role:
    """The one role, or the name for several."""
    return roles[0] if len(set(roles)) == 1 else together

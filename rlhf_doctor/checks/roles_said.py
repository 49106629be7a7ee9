"""How messages speak of roles, and one fault that shows in several of them. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_doctor.finding import Role

__all__ = ["blamed", "listed", "spoken"]

NOUNS: Mapping[Role, str] = {"reward": "reward model", "value": "critic"}


def spoken(role: Role) -> str:
    """The word for a role's model in every message: policy, reference, reward model, critic."""
    return NOUNS.get(role, role)


def listed(roles: Sequence[Role]) -> str:
    """``policy``, ``policy and critic``, ``policy, reward model and critic``."""
    words = [spoken(role) for role in roles]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"


def blamed(roles: Sequence[Role], together: Role) -> Role:
    """The one role, or the name for several."""
    return roles[0] if len(set(roles)) == 1 else together

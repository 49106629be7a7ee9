"""The ids that end a response, as each file names them. No torch is imported here."""

from __future__ import annotations

from typing import Any

from rlhf_doctor.instruments.readings import Manifest

__all__ = ["generation_stops", "ids_in"]


def ids_in(given: Any) -> frozenset[int]:
    """The ids in a field that holds one, a list of them, or None."""
    if isinstance(given, bool) or given is None:
        return frozenset()
    if isinstance(given, int):
        return frozenset((given,))
    return frozenset(i for i in given if isinstance(i, int)) if isinstance(given, (list, tuple, set)) else frozenset()


def generation_stops(m: Manifest) -> tuple[frozenset[int], str]:
    """(ids at which the model's own generation stops, who says so): its generation config, else its config."""
    own = ids_in(m.generation_config.get("eos_token_id"))
    return (own, "generation config") if own else (ids_in(m.config.get("eos_token_id")), "config")

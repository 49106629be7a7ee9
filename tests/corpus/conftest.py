"""Everything runs where the corpus is asked for by name; elsewhere some cases, and some setups with one seed."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rest."""
    if any("corpus" in argument for argument in config.invocation_params.args):
        return
    left_out = [item for item in items if "corpus" in item.location[0] and item.get_closest_marker("whole_corpus")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]

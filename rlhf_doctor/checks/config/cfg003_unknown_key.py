"""CFG003: every declared option has a meaning."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.setups import DECLARED_NAMES


@check("CFG003", "every declared option has a meaning", stage=Stage.STATIC, severity=Severity.WARNING)
def unknown_key(setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The names in ``declared`` that no check reads, each with the nearest one that is read. They are only
        mentioned: a declaration may say more than this tool knows.

    Why it matters:
        A misspelt option is not an error in most frameworks: it disappears in keyword arguments, and the default
        stands. The same happens to what is declared here.

    What it looks like when broken:
        A setting that can be changed at will without any effect on a curve.

    How to fix:
        1. Compare the name with the one that is suggested.
        2. In your own code let functions refuse keyword arguments that they do not know.

    Source:
        https://github.com/RLinf/RLinf/issues/316 (an option swallowed under another name);
        https://github.com/verl-project/verl/issues/418 (a schedule that nothing reads).
    """
    if not setup.declared:
        raise Unavailable("needs declared options")
    for name in setup.declared:
        if name in DECLARED_NAMES:
            continue
        near = difflib.get_close_matches(str(name).lower(), DECLARED_NAMES, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]!r}?" if near else "It is kept and not examined."
        yield Finding(
            f"No check reads the declared option {name!r}. {hint}",
            role="loop",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("name of the option", near[0] if near else "one that is read", str(name), where="declared"),
            ),
        )


@unknown_key.fault("a misspelt option")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"klcoef": 0.1})


@unknown_key.fault("an option of another framework")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(declared={"cliprange": 0.1})

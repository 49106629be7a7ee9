"""CFG003: every declared option has a meaning."""

from __future__ import annotations

import difflib
import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.setups import DECLARED_NAMES


@check(
    "CFG003",
    "every declared option has a meaning",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("LOS007",),
    across_roles=True,
)
def unknown_key(setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The names in ``declared`` that no check reads, each with the nearest one that is read. They are only
        mentioned: a declaration may say more than this tool knows. One is a fault where a function of the setup
        (``functions``) has a parameter of nearly that name, would take this one among its other keywords
        (``**kwargs``), and never reads those, while no function has a parameter of just that name.

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
        swallowed = _swallowed(str(name), setup.functions)
        if swallowed is not None:
            yield swallowed
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


def _swallowed(name: str, functions: Mapping[str, Callable[..., Any]]) -> Finding | None:
    """An option that a function takes among its other keywords, which nothing reads, under nearly its own name."""
    taken = {called: parameters for called, f in functions.items() if (parameters := _parameters(f))}
    if any(name in parameters for parameters in taken.values()):
        return None
    for called, parameters in taken.items():
        others = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
        near = difflib.get_close_matches(name, [n for n in parameters if n != others], n=1, cutoff=0.6)
        code = getattr(inspect.unwrap(functions[called]), "__code__", None)
        if others is None or not near or code is None or _reads(code, others):
            continue
        return Finding(
            f"The option {name!r} has no effect: {called} takes it among **{others}, which it never reads. Its own "
            f"parameter is called {near[0]!r}: use that name.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(f"parameters of {called}", name, ", ".join(map(str, parameters.values())), where="functions"),
            ),
        )
    return None


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return {}


def _reads(code: CodeType, name: str) -> bool:
    """Whether a function's code, or that of a function within it, reads the variable."""
    if any(step.argval == name and step.opname.startswith("LOAD") for step in dis.get_instructions(code)):
        return True
    return any(_reads(within, name) for within in code.co_consts if isinstance(within, CodeType))


@unknown_key.fault("a misspelt option")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"klcoef": 0.1})


@unknown_key.fault("an option of another framework")
def _(healthy_files: Any) -> Any:
    return healthy_files.but(declared={"cliprange": 0.1})


@unknown_key.fault("an option that a loss takes among its other keywords and never reads")
def _(healthy: Any) -> Any:
    def value_loss(values: Any, returns: Any, *, clip_range_value: float = 0.2, **rest: Any) -> Any:
        return (values - returns).square().mean()

    return healthy.but(functions={"value_loss": value_loss}, declared={"value_clip_range": 0.1}, step=None)

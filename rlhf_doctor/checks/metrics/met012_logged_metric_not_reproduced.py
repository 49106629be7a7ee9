"""MET012: what a step reports is what its tensors give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "MET012",
    "what a step reports is what its tensors give",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
)
def logged_metric_not_reproduced(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The numbers of a dict that the step returns, under the field's common names: mean score, KL to the reference,
        entropy, response length, explained variance, share of ended responses. Each is computed from the traced tensors
        in every convention in use (by token or sequence, with or without the penalty, over the batch or the mean of its
        minibatches); a number that none of them gives is reported; of a mean score only a whole multiple or part, since
        loops shape scores in many ways of their own. The step is watched with its optimizers held back,
        so that all of it is of one policy.

    Why it matters:
        Curves are what decides when a run is stopped and which one is kept. A mean that counts padding falls with the
        length; a sum over ranks doubles with the machines.

    What it looks like when broken:
        Curves that change with the batch size, the padding or the number of processes.

    How to fix:
        1. Take means over the response mask, after it was applied.
        2. Average over ranks and micro-batches by their counts; leave out empty ones.
        3. Use the log-probabilities at the temperature of sampling.

    Source:
        https://github.com/huggingface/trl/issues/6809 and https://github.com/RLinf/RLinf/issues/1259 (padding in the
        log), https://github.com/huggingface/trl/pull/850 (summed over ranks), https://github.com/RLinf/RLinf/pull/1297
        (micro-batches). Tolerance: 2% of the number, or 0.02 of an explained variance: minibatches differ by more than
        float32 rounds, and padding or ranks are tens of per cent.
    """
    from rlhf_doctor.trace.reported import conventions, shaped

    returned = traced.experiments.first.returned
    numbers = _numbers(returned)
    if not numbers:
        raise Unavailable("needs a step that returns a dict of numbers, by their common names")
    for name, value in numbers.items():
        known = conventions(traced, setup.declared, name)
        if not known or any(abs(value - x) <= tolerance for x, tolerance in known.values()):
            continue
        if shaped(name, value, known):
            continue
        nearest = min(known, key=lambda n: abs(value - known[n][0]))
        yield Finding(
            f"The step reports {name} {value:.5g}, and its tensors give {known[nearest][0]:.5g} as the {nearest}. No "
            "convention in use gives the number that is reported: check its mask, divisor and what it is computed of.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    f"{name} of one step",
                    expected="; ".join(f"{x:.5g} ({n})" for n, (x, _) in list(known.items())[:4]),
                    observed=f"{value:.6g}",
                    tolerance="2%, or 0.02 of an explained variance",
                    where="the dict that the step returns",
                ),
            ),
        )


def _numbers(returned: Any) -> Mapping[str, float]:
    """What is a plain number in a returned dict, also one level down."""
    if not isinstance(returned, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, value in returned.items():
        inner = value.items() if isinstance(value, Mapping) else [(name, value)]
        found |= {str(n): float(v) for n, v in inner if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return found


@logged_metric_not_reproduced.fault("the response length counts padding")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reported(healthy, lambda told: {"response_length": 10.0})


@logged_metric_not_reproduced.fault("the score is a sum over two ranks")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reported(healthy, lambda told: {"score": 2 * told["score"]})


@logged_metric_not_reproduced.fault("the entropy is averaged over slots that hold nothing")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reported(healthy, lambda told: {"entropy": 0.7 * told["entropy"]})

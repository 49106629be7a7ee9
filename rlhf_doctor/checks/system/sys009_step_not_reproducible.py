"""SYS009: a step run again from the same state gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

HINTS = {
    "prompts": "Draw the prompts with torch's, numpy's or Python's seeded generator, and put what counts them (a "
    "loader, a cursor, a sampler) into the setup's state.",
    "sampling": "Sample with torch's global generator, or seed one of your own and put it into the setup's state.",
    "outputs": "Look for numbers drawn inside a model, for state that a model keeps between calls, and for operations "
    "without a deterministic kernel.",
    "gradients": "Look for a shuffle with a generator of its own, for noise in the losses, and for operations whose "
    "backward pass has no deterministic kernel.",
}


@check(
    "SYS009",
    "a step run again from the same state gives the same",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    explains=("ROL007",),
    across_roles=True,
)
def step_not_reproducible(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run twice from the same state: weights, optimizers, the setup's state, the random generators of
        torch, numpy and Python, and what can be reached from the step itself. Up to the first update both runs must see
        the same tokens, the same outputs and the same gradients. What differs first is told: the prompts, the tokens
        drawn, the models' outputs, or the gradients. Where a model whose dropout is at work differs first, that is
        told as dropout and not here.

    Why it matters:
        What cannot be repeated cannot be told from noise: not by this tool, which then skips every check that changes
        one thing in a step, and not by you when you compare two runs of one seed or bisect a change.

    What it looks like when broken:
        Two runs of one seed part within the first steps.

    How to fix:
        1. Draw everything from generators that a seed sets, and give generators of your own as the setup's `state`.
        2. Give loaders, cursors and queues there too: whatever a step changes and the next step reads.
        3. On accelerators ask for deterministic kernels; for NCCL pin the algorithm.

    Source:
        https://github.com/huggingface/trl/issues/6688 and https://github.com/OpenRLHF/OpenRLHF/pull/1355 (runs of one
        seed that differ: irreproducible, not incorrect, hence a warning); NVIDIA NeMo-Aligner pins NCCL_ALGO,
        https://github.com/NVIDIA/NeMo-Aligner/blob/main/CHANGELOG.md. Tolerance: 1e-5 of a quantity's range, a hundred
        times what sums in another order give in float32.
    """
    from rlhf_doctor.trace.twice import dropout_at_work, first_difference

    real = traced.experiments.real
    if real is None or not real.calls:
        raise Unavailable("needs a step that can be run twice and calls the models where that can be seen")
    found = first_difference(traced.experiments.first, real)
    if found is None or (found.kind in ("outputs", "gradients") and dropout_at_work(setup, found)):
        return
    yield Finding(
        f"Two runs of the step from the same state differ: first in the {found.said}. They should be the same. "
        f"{HINTS[found.kind]}",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                f"{found.said} in two runs from the same state",
                "the same",
                found.observed,
                found.tolerance,
                f"call {found.nth + 1} of the {found.role} model in the step",
                "run the step, put everything back, run it again",
            ),
        ),
    )


@step_not_reproducible.fault("the sampler seeds itself from the operating system")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"sample": value_faults.sample_from_own_entropy})


@step_not_reproducible.fault("the policy loss carries noise that no seed repeats")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"policy_loss": value_faults.noisy_loss})


@step_not_reproducible.fault("the step seeds itself from the operating system")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import value_faults

    return value_faults.prompts_from_own_entropy(healthy)

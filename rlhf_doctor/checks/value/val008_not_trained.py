"""VAL008: the critic is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.algorithms import algorithm_kind
from rlhf_doctor.instruments.tracing import Traced

WHY = {
    "not called": "The step never calls it on token ids.",
    "called without gradient": "Every call of it is made without gradient.",
    "no gradient came back": "No backward pass reaches its head: its loss is left out or its values are detached.",
    "trained": "A gradient reaches its head, but no optimizer applies it: its parameters are in none, the optimizer "
    "never steps, or its learning rate is 0.",
}


@check(
    "VAL008",
    "the critic changes when the step trains",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    explains=("VAL009", "LOS004", "OPT002", "SYS008"),
    across_roles=True,
)
def value_not_trained(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The step is run twice in a row, and the critic's parameters are compared with what they were, bit for bit: the
        head must have changed, and where no head can be told, at least one parameter that is not the policy's as well.
        A critic whose head receives a gradient of exactly 0 is not this fault (its loss is weighed with 0, LOS004).

    Why it matters:
        A critic that stays as it was is a fixed baseline. From a reward model's copy it knows the score of the start of
        training and nothing of what the policy does since; from a random head it is noise that every advantage carries.

    What it looks like when broken:
        A value loss that never falls, explained variance that stays where it began, while rewards move.

    How to fix:
        1. Give the optimizer the critic's parameters, its head included, after the last change of requires_grad.
        2. Call that optimizer's step() in every update, with a learning rate above 0.
        3. Compute the values of the update outside of no_grad() and without detach(), and add the value loss to what
           is differentiated.

    Source:
        https://github.com/hiyouga/LlamaFactory/issues/1646 (a value head without trainable parameters),
        https://github.com/hiyouga/ChatGLM-Efficient-Tuning/issues/255 (a head that is put back after each scoring).
        Two steps, since the first update of a warm-up has the learning rate 0
        (https://github.com/verl-project/verl/issues/3674). No tolerance: equal is equal.
    """
    from rlhf_doctor.trace.critic import heads, own_parameters, part_in_training

    parameters = own_parameters(setup)
    if not parameters or algorithm_kind(setup.declared) == "critic-free":
        raise Unavailable("needs a value model as a module, of an algorithm that trains one")
    real = traced.experiments.real
    if real is None or real.error:
        raise Unavailable(f"needs a step that can be run for real{f': {real.error}' if real else ''}")
    first = heads(parameters)
    moved = [name for name in real.moved.get("value", {}) if name in parameters]
    part = part_in_training(traced.experiments.first.calls)
    if (any(name in moved for name in first) if first else moved) or part == "gradient is zero":
        return
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    what = "head" if moved else "parameters"
    why = WHY[part]
    if len(frozen) == len(parameters) or (first and all(name in frozen for name in first)):
        why = "requires_grad is off."
    watched = first if moved else list(parameters)
    yield Finding(
        f"The critic's {what} {'is' if moved else 'are'} the same after two training steps. {why} Train the critic "
        "towards the returns in every update.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "critic parameters that changed in two steps",
                "at least its head" if first else "at least one",
                f"{len(moved)} of {len(parameters)}, the head not among them" if moved else f"0 of {len(parameters)}",
                "0, compared bit for bit",
                ", ".join(watched[:3]) + (" …" if len(watched) > 3 else ""),
            ),
            Evidence("part of the critic in the backward passes", "a gradient other than 0", part),
        ),
    )


@value_not_trained.fault("the critic's learning rate is 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import value_faults

    return value_faults.critic_at_rate_zero(healthy)


@value_not_trained.fault("the values of the update are detached")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"value_loss": value_faults.loss_of_detached_values})


@value_not_trained.fault("the critic's head is frozen")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, value=value_faults.with_frozen_head(healthy.value))

"""SYS008: the four models influence one another as the algorithm says, and not otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.algorithms import algorithm_kind, number
from rlhf_doctor.instruments.tracing import Traced

TO_ADVANTAGE, TO_REWARD, TO_LOSS = "value → advantage", "reference → reward", "reference → loss"
SMALL = 1e-3  # of a unit: float32 gives some 1e-6, bfloat16 some 1e-3 where a difference of gradients is divided


@check(
    "SYS008",
    "the models influence one another as the algorithm says",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    effect=True,
)
def unexpected_influence(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        The wiring of the four models, measured by running the step again with one model's output changed, against what
        is declared: without a critic no value may reach the advantages; with a KL coefficient of 0 the reference may
        reach neither rewards nor losses; and a reward model that is given must be called. Influences that are missing,
        and penalties of another size or in another place, have checks of their own.

    Why it matters:
        An influence that the algorithm does not have is another objective than the declared one, and a declaration that
        is not true misleads whoever reads the curves.

    What it looks like when broken:
        A KL that is held down although the coefficient is 0; a critic-free run whose advantages change with a critic
        that nobody trains.

    How to fix:
        1. Look at the edge that the message names, and remove the term, or declare it.
        2. Where a reward model is not called, see what stands in for its scores.

    Source:
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (which model enters where in PPO); Shao et al. 2024,
        https://arxiv.org/abs/2402.03300 (no critic; the KL in the loss); a critic's gradient in the policy:
        https://github.com/huggingface/trl/issues/1108. An influence of less than a thousandth of a unit is rounding.
    """
    found = list(_edges(traced, setup.declared, setup.value is None))
    if not found and not traced.recovered.edges:
        raise Unavailable("needs a step whose models can be seen")
    for name, gain, why in found:
        yield Finding(
            f"The step has an influence that the algorithm has not: {name}, by {gain:.3g} for each unit, although "
            f"{why}. Remove the term, or declare it.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(Evidence(name, "no influence", f"{gain:.4g} for each unit", f"{SMALL:g}", "the step run again"),),
        )
    yield from _never_called(traced, setup)


def _edges(traced: Traced, declared: Mapping[str, Any], no_critic: bool) -> Iterator[tuple[str, float, str]]:
    """(edge, gain, why it should not be there)."""
    edges = traced.recovered.edges.values()
    there = {edge.name: edge.gain for edge in edges if edge.gain is not None and abs(edge.gain) > SMALL}
    if TO_ADVANTAGE in there and (algorithm_kind(declared) == "critic-free" or no_critic):
        yield TO_ADVANTAGE, there[TO_ADVANTAGE], "the declared algorithm has no critic"
    for name in (TO_REWARD, TO_LOSS):
        if name in there and number(declared.get("kl_coef")) == 0:
            yield name, there[name], "the KL coefficient is 0"


def _never_called(traced: Traced, setup: Any) -> Iterator[Finding]:
    """A reward model that takes no part in a step that trains."""
    calls, texts = traced.experiments.first.calls, traced.experiments.first.texts
    called, trained = {c.role for c in calls} | ({"reward"} if texts else set()), any(c.backwards for c in calls)
    if trained and "reward" not in called and hasattr(setup.reward, "named_parameters"):
        yield Finding(
            "The step trains and never calls the reward model. The score of each response should come from it: see "
            "what stands in for its scores, or whether the step holds another model than the setup.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(Evidence("calls of the reward model in a step", "at least 1", "0", "none", "the whole step"),),
        )


@unexpected_influence.fault("a KL penalty although its coefficient is declared 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, declared={"kl_coef": 0.0})


@unexpected_influence.fault("a critic's values in the advantages of an algorithm that has none")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.reference_step(healthy, declared={"algorithm": "reinforce++"})


@unexpected_influence.fault("the length stands in for the reward model's scores")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops, value_faults

    return loops.reference_step(healthy, parts={"score": value_faults.unseen_scores})

"""LOS007: what is declared of the loss shows in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.disturbed import Disturbed

APART = 3.0  # factor between a declared and a measured coefficient that no convention of ½, 2 or an extra slot makes


@check(
    "LOS007",
    "what is declared of the loss shows in it",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("CFG002", "CFG003", "OPT002"),
)
def loss_coefficient_inert(traced: Traced, setup: Any, disturbed: Disturbed | None = None) -> Iterator[Finding]:
    """
    What it examines:
        Declared options of the loss against what the gradients show: ent_coef (a gradient of the entropy at the
        policy's logits), vf_coef (the critic's weight beside the policy's, where one optimizer steps both),
        clip_range_value (values moved past it), ppo_epochs and num_minibatches (how many updates are made on what).

    Why it matters:
        An option that is not read is an experiment that was not made: a term multiplied by something without a graph, a
        coefficient left at its default, an accumulation that swallows the minibatches.

    What it looks like when broken:
        Two runs with different settings and the same curves.

    How to fix:
        1. Follow the option from the configuration to the loss; a detached or no-grad term moves nothing.
        2. The number of updates is ppo_epochs times num_minibatches; accumulation over minibatches makes fewer.

    Source:
        https://github.com/huggingface/trl/issues/6805 (an option that never takes effect). vf_coef is judged only where
        it is off by more than a factor of three, since ½ and 2 are conventions.
    """
    said = setup.declared
    if not traced.base.has("weight"):
        raise Unavailable("needs a gradient at the policy's logits, and none was seen")
    yield from _entropy(traced, said.get("ent_coef"))
    yield from _value_coefficient(traced, said.get("vf_coef"))
    declared = said.get("clip_range_value")
    if disturbed is not None and disturbed.clip is not None and _above_0(declared) and disturbed.clip.kind == "none":
        yield _finding(
            f"The declared clip_range_value {declared:g} changes nothing: values moved past it keep their full "
            "gradient. Take the larger of the clipped and the plain square.",
            ("values past the clip whose gradient is cut", "all", f"0 of {disturbed.clip.toward}"),
        )
    yield from _updates(traced, said.get("ppo_epochs"), said.get("num_minibatches"))


def _above_0(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0


def _entropy(traced: Traced, declared: Any) -> Iterator[Finding]:
    """A term that is there shows at most tokens; PURE says that one log-probability explains their gradients."""
    base = traced.base
    known = base.real & (base["weight"] == base["weight"]) & (base["mixed"] == base["mixed"])
    count = int(known.sum())
    if not _above_0(declared) or count < 8:
        return
    shown = int((base["entropy_weight"][known] != 0).sum())
    clean = base["mixed"][known]
    if shown == 0 and float((clean < 1e-3).mean()) > 0.9 and _visible(traced, float(declared)):
        yield _finding(
            f"The declared ent_coef {declared:g} changes nothing: the gradient has no part of an entropy. Compute the "
            "entropy with its graph and subtract ent_coef times its mean from what is minimised.",
            ("tokens whose gradient has a part of an entropy", "all", f"0 of {count}"),
        )


def _visible(traced: Traced, declared: float) -> bool:
    """Whether a bonus of this size would show beside the weights: at ent_coef over a typical advantage."""
    from rlhf_doctor.trace.weighting import weighting

    read = weighting(traced)
    known = traced.base["weight"] == traced.base["weight"]
    weights = abs(traced.base["weight"][known & traced.base.real])
    if not len(weights) or not len(read.divisors):
        return declared >= 1e-3
    return declared / float(max(read.divisors)) > 1e-3 * float(sorted(weights)[len(weights) // 2])


def _value_coefficient(traced: Traced, declared: Any) -> Iterator[Finding]:
    from rlhf_doctor.trace.weighting import SOUND, weighting

    read, kappa = weighting(traced), traced.recovered.kappa
    together = any({"policy", "value"} <= set(roles) for _, _, roles in traced.experiments.first.steps)
    if not _above_0(declared) or read.name not in SOUND or not together:
        return
    known = (read.scale == read.scale) & (kappa == kappa)
    ratios = sorted(abs(kappa[known] / read.scale[known]).tolist())
    if len(ratios) < 8:
        return
    measured = ratios[len(ratios) // 2]
    if not 1 / APART < measured / declared < APART:
        yield _finding(
            f"The critic's loss weighs {measured:.3g} times the policy's, and the declared vf_coef is {declared:g}: it "
            "is not what the loss is multiplied by. Pass it on.",
            (
                "weight of (V - R)²/2 beside that of the surrogate",
                f"{declared:g}, or half or twice of it",
                f"{measured:.4g}",
            ),
        )


def _updates(traced: Traced, epochs: Any, minibatches: Any) -> Iterator[Finding]:
    from rlhf_doctor.trace.schedule import schedule

    made = schedule(traced.base)
    count = len(made.windows)
    if not _above_0(epochs) or not _above_0(minibatches) or not 0 < count < epochs * minibatches:
        return
    if made.left_out or made.ahead or made.twice:
        return  # the order of updates is wrong, and says it itself
    whole = all(len(w) == len(made.everything) for w in made.windows)
    if minibatches > 1 and whole:
        yield _finding(
            f"The declared num_minibatches {minibatches} changes nothing: every update is made on the whole batch. "
            "Step once a minibatch, and accumulate within one only.",
            ("updates of one step", f"{epochs * minibatches}", f"{count}, each on all {len(made.everything)} samples"),
        )


def _finding(message: str, shown: tuple[str, str, str]) -> Finding:
    quantity, expected, observed = shown
    return Finding(
        message,
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(Evidence(quantity, expected=expected, observed=observed, where="the gradients of one step"),),
    )


@loss_coefficient_inert.fault("the entropy has lost its graph")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, declared={"ent_coef": 0.05})


@loss_coefficient_inert.fault("the value clip is computed and not used")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"value_loss": loss_faults.plain_value_loss})


@loss_coefficient_inert.fault("accumulation swallows the minibatches")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, settings={"num_minibatches": 1}, declared={"num_minibatches": 4})

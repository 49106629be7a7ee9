"""VAL014: the critic gives the same value for the same state."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Invariance, Parameters
from rlhf_doctor.instruments.tracing import Traced

APART = 1e-3  # of the values' spread: float32 leaves 1e-6 between two passes, dropout a tenth and more


@check(
    "VAL014",
    "the critic gives the same value for the same state",
    stage=Stage.TRACE,
    early=Stage.PROBE,
    severity=Severity.ERROR,
    after=("VAL002", "PRE004"),
    explains=("VAL004",),
)
def value_dropout_active(
    setup: Any,
    value_invariance: Invariance,
    value_parameters: Parameters | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The critic is called twice on one batch, in the mode (train or eval) in which it was handed over. Train mode
        alone is no fault, most decoders have no dropout; what counts is whether the values differ. Where the step can
        be run: whether its rollout passes are in train mode with dropout, and differ from the update's at one state.

    Why it matters:
        Old and new values of one state are compared by the value clip and subtracted in the advantages. If each call
        draws another dropout mask, that comparison is noise: the clip acts at random and explained variance has a
        ceiling that no training lifts.

    What it looks like when broken:
        A value loss above 0 directly after the rollout, before any update; a clip fraction of the values that stays
        high.

    How to fix:
        1. Set every dropout of the critic to 0: classifier_dropout, summary_dropout_prob, resid_pdrop, attn_pdrop,
           embd_pdrop, hidden_dropout (GPT-2's are 0.1 by default, token classifiers' and value heads' often too).
        2. Or keep the critic in eval mode, in the update too: it still trains.

    Source:
        https://github.com/huggingface/trl/issues/43 (dropout 0.1 in the value head); Huang et al. 2024, "The N+
        Implementation Details of RLHF with PPO", https://arxiv.org/abs/2403.17031 (dropout is off in every model).
    """
    shift = value_invariance.shifts.get("repeat")
    if shift is None or not shift.moved or not isfinite(shift.largest):
        if traced is not None:
            yield from _in_step(setup.model("value"), traced)
        return  # what is not finite is no draw of chance
    active = value_parameters.active_dropout if value_parameters else ()
    cause = f"{len(active)} dropout layers are active" if active else "something in its forward pass is random"
    yield Finding(
        f"The critic gives two different values for one state, in {value_invariance.mode} mode: {cause}. It should be "
        "deterministic: set its dropout probabilities to 0, or keep it in eval mode.",
        role="value",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "largest difference between two calls on one batch",
                expected="0",
                observed=f"{shift.largest:.4g}, {shift.largest / max(shift.scale, 1e-12):.2g} standard deviations",
                tolerance=f"{shift.tolerance:.2g}",
                where=", ".join(active[:3]) or shift.detail,
            ),
        ),
    )


def _in_step(model: Any, traced: Traced) -> Iterator[Finding]:
    import numpy as np

    from rlhf_doctor.trace.twice import dropout_rates

    base, rates = traced.base, dropout_rates(model)
    passes = [p.call for p in base.placed if p.call.role == "value" and not p.call.with_grad]
    dropping = sum(call.training for call in passes)
    known = base.real & np.isfinite(base["old_value"]) & np.isfinite(base["value"])
    known &= (base["value_window"] == 0) | (not traced.experiments.by_hand)
    if not rates or not dropping or known.sum() < 2:
        return
    apart = float(np.abs(base["old_value"] - base["value"])[known].max())
    spread = float(base["old_value"][known].std())
    if apart > APART * spread:
        yield Finding(
            f"The step takes the rollout's values in train mode, with dropout of up to {max(rates):g}, so baselines "
            "and targets have noise. Call value.eval() before the rollout, or set its dropout probabilities to 0.",
            role="value",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("rollout passes of the critic in train mode", "0", f"{dropping} of {len(passes)}"),
                Evidence(
                    "largest difference between a rollout's value and the update's at the same state and weights",
                    "0",
                    f"{apart:.3g}, the values' standard deviation being {spread:.3g}",
                    f"{APART:g} standard deviations",
                ),
            ),
        )


@value_dropout_active.fault("hand-written, dropout and train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.hand_written_critic(healthy, dropout=0.1).train())


@value_dropout_active.fault("a Hugging Face critic with dropout before its head, in train mode")
def _(healthy: Any) -> Any:
    import copy

    import torch

    value = copy.deepcopy(healthy.value)
    value.score = torch.nn.Sequential(torch.nn.Dropout(0.1), value.score)
    return healthy.but(value=value.train())


@value_dropout_active.fault("dropout that does not hear eval()")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import scorers

    def rule(values: Any, ids: Any, mask: Any) -> Any:
        return torch.nn.functional.dropout(values, 0.2, training=True)

    return healthy.but(value=scorers.Reader(healthy.value, rule).eval())


@value_dropout_active.fault("a step that sets a critic with dropout to train mode")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loops

    return loops.in_train_mode(healthy, "value")

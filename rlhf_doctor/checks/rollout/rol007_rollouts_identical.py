"""ROL007: every response is drawn anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.sampling import listed
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing

COPIED = 0.3  # of the scored rows; some loops fill up their last batch with rows once more


@check(
    "ROL007",
    "every response is drawn anew",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL001", "ROL010", "ROL011"),
    explains=("LOS001", "ADV008", "ADV010"),
)
def rollouts_identical(drawing: Drawing) -> Iterator[Finding]:
    """
    What it examines:
        Whether any two responses to one prompt within a step, and responses at one place of the batch in two steps in
        a row, agree in more tokens than draws do. Every agreement is weighed with how likely the policy finds the
        token, so that a policy which is sure of itself is no alarm. The prompts of the two steps may differ: one seed
        for both steps still shows.

    Why it matters:
        Samples that repeat each other carry one sample's information. Groups of copies have advantages of 0, and a run
        that starts every step at one seed sees the same few continuations for ever.

    What it looks like when broken:
        Groups without any deviation of the score, duplicates in the logs, reward that stands still.

    How to fix:
        1. Seed once, at the start, and every rank or engine with its own number.
        2. Never call manual_seed, nor make a seeded generator, within a step.
        3. Ask the sampler for n draws of a prompt instead of copying one.

    Source:
        https://github.com/huggingface/trl/pull/2824, https://github.com/verl-project/verl/pull/5179 and
        https://github.com/modelscope/ms-swift/pull/7858. The alarm is at odds of a million to one of "some tokens are
        repeated" against "all are drawn", which have mean 1 in healthy loops
        (https://en.wikipedia.org/wiki/Ville%27s_inequality).
    """
    from rlhf_doctor.trace import odds

    draws = drawing.first.draws
    seen = "old" if draws.placed["old"] else "new"  # a loop without ratios reads its responses in the update alone
    copies, rows = draws.copies[seen], draws.placed[seen]
    if copies > COPIED * rows:
        yield Finding(
            f"{rows} responses are used, and {copies} of them are copies of others, which were drawn once. Draw each "
            "response anew: ask the sampler for as many as there are samples.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(Evidence("responses that were drawn", f"{rows}", f"{rows - copies}", f"{COPIED:.0%}"),),
        )
        return
    compared = [("within one step, to one prompt", odds.repeats_within(drawing.first), "samples")]
    if drawing.second is not None:
        compared.append(
            ("in two steps in a row", odds.repeats_between(drawing.first, drawing.second), "places of the batch")
        )
    if not any(found.tokens for _, found, _ in compared):
        raise Unavailable("needs a prompt with two responses, or two steps in a row")
    for where, found, _what in compared:
        if found.log_odds < odds.ALARM:
            continue
        yield Finding(
            f"Responses repeat {where}: {found.equal} of {found.tokens} tokens are those of another response, "
            f"e^{found.log_odds:.0f} times likelier if they are repeated than if they are drawn. Draw each response "
            "anew: seed once at the start, each rank with its own number, and never within a step.",
            role="loop",
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "odds that tokens are repeated, as a logarithm",
                    "around or below 0",
                    f"{found.log_odds:.1f}",
                    f"{odds.ALARM:.1f}",
                    f"{found.tokens} tokens; most alike: {listed(j for _, j in found.rows)}",
                ),
            ),
        )


@rollouts_identical.fault("every rollout starts from one seed")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"sample": rollout_faults.sample_seeded})


@rollouts_identical.fault("equal prompts get one and the same response")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    few = healthy.but(prompts=list(healthy.prompts)[:3])
    return reference_step(few, parts={"sample": rollout_faults.every_row_the_same})

"""ROL009: a sample's score, values, advantages and mask are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.sampling import listed
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "ROL009",
    "a sample's score, values, advantages and mask are its own",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL004", "ROL010"),
    explains=(
        "VAL013",
        "ADV008",
        "ADV002",
        "ADV001",
        "ROL003",
        "VAL009",
        "VAL011",
        "LOS004",
        "SYS008",
        "ROL005",
        "ADV004",
        "KLD005",
        "ADV003",
        "KLD003",
        "ADV006",
        "ADV007",
    ),
    across_roles=True,
)
def rows_misaligned(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Which samples answer when one sample's score is changed, or the rollout values of some: the critic's targets and
        the policy's weights of these samples should move, and others' only by a shared mean and deviation. And
        whether the trained spans are as long as the responses of other samples.

    Why it matters:
        A reward that is given to another response is noise. Training runs, losses fall, and the policy learns nothing,
        or that short answers are good because a long one was.

    What it looks like when broken:
        Reward that does not rise although everything else looks healthy; it grows worse with dynamic batches, which
        sort by length.

    How to fix:
        1. Carry scores, values and masks with their samples, in one structure, through every sort and shuffle.
        2. Undo each sort with its inverse permutation, argsort of the order.
        3. Index all of a minibatch with the same rows; never reshape across the batch.

    Source:
        https://github.com/verl-project/verl/issues/2185. The steps are the same but for one sample's number, so a
        target that moves is proof. What a shared mean, deviation or baseline moves lies on one line through all
        samples and is taken off; 1 % of the largest movement is let pass.
    """
    from rlhf_doctor.trace import rows

    found = traced.experiments
    masks = rows.masks_of_others(traced.base)
    if masks is not None:
        wrong = (masks.rows & (masks.counts != masks.lengths)).nonzero()[0].tolist()
        yield Finding(
            f"{listed(wrong).capitalize()} are trained with masks of other samples: as many tokens are trained as "
            "other responses have. Move masks along with their samples.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "trained tokens of each sample",
                    ", ".join(str(n) for n in masks.lengths[wrong][:8]),
                    ", ".join(str(n) for n in masks.counts[wrong][:8]),
                    where=listed(wrong),
                ),
            ),
        )
        return
    for what, moved in (
        ("scores", rows.score_moves(found, traced.recovered) or rows.group_moves(setup, found)),
        ("rollout values", rows.value_moves(setup, found)),
    ):
        if moved is not None:
            yield Finding(
                f"Other {what} of {listed(moved.touched)} move the {moved.target} of {listed(moved.moved)}, where they "
                f"should move their own and none else. Keep {what} with their samples through every sort and shuffle.",
                role="loop",
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(
                        f"movement of the {moved.target}, of the largest",
                        f"1 in {listed(moved.touched)}, 0 elsewhere",
                        f"{moved.own:.2g} there, {moved.other:.2g} in {listed(moved.moved)}",
                        f"{rows.STILL:g}",
                        f"the step again with other {what}",
                    ),
                ),
            )
            return
    if found.done.get("one score") is None and found.done.get("rollout outputs") is None:
        traced.needs("one score")


@rows_misaligned.fault("scores come back in another order")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"score": rollout_faults.scores_of_others})


@rows_misaligned.fault("rollout values of the next row")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"values": rollout_faults.values_of_others})

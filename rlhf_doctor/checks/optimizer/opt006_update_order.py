"""OPT006: an epoch trains on every sample once, and a step on its own samples only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced


@check(
    "OPT006",
    "an epoch trains on every sample once, and a step on its own samples only",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
)
def update_order(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Which rows each update of the policy is made on, over one whole step, and over a second one right after it:
        no sample is left out, none comes twice in one update, none is trained on a second time before all were once,
        and the second step trains on nothing that the first one drew.

    Why it matters:
        PPO's ratio is 1 in the first update and close to 1 in those after it only if each epoch goes over the whole
        batch. Samples that come again at once are trained on far from where they were drawn; the clip then cuts them,
        and others were paid for and never used. Batches of earlier steps were drawn from a policy that is gone.

    What it looks like when broken:
        A KL and a clip fraction that jump within the first minibatches; an effective batch smaller than the one
        configured; memory that grows from step to step.

    How to fix:
        1. Loop over epochs outside and over minibatches inside.
        2. Draw a permutation each epoch and split it; do not draw indices with replacement, and step by the size of a
           minibatch.
        3. Clear the buffer at the start or at the end of every step, also while the actor is frozen.

    Source:
        ReMax scores a greedy response for its baseline and trains on none of it: https://arxiv.org/abs/2310.10505.
        Algorithm 1 of https://arxiv.org/abs/1707.06347, https://github.com/CarperAI/trlx/pull/522 (epochs inside each
        minibatch), https://github.com/OpenRLHF/OpenRLHF/pull/1356 (buffer not cleared).
    """
    from rlhf_doctor.trace.schedule import greedy, schedule, trained_again

    found, base = traced.experiments, traced.base
    if "policy" in base.scattered:
        raise Unavailable("needs minibatches of responses: these are drawn from single tokens")
    made = schedule(base)
    if not made.windows:
        raise Unavailable("needs rows that the policy is trained on, and none was seen")
    total, count = len(base.samples), len(made.windows)
    again, rows = trained_again(base, found.second) if found.second is not None else (0, 0)
    left = [t for t in made.left_out if not _same_as_its_group(base, made, t)]
    baselines = greedy(base) if left else set()  # as in ReMax
    left = [t for t in left if t not in baselines]
    if again:
        yield _finding(
            "A step trains on samples of the step before it, which an older policy drew. Each step should train on its "
            "own samples only: clear the buffer.",
            ("rows of the second step's updates that the first step had drawn", "0", f"{again} of {rows}"),
        )
    elif made.nested:
        after, others = made.ahead or (0, 0)
        yield _finding(
            "The epochs are looped inside each minibatch: one minibatch is trained on again and again before the next "
            "one comes. Loop over the epochs outside and over the minibatches inside.",
            ("samples still to be trained on when others had two updates more", "0", f"{others} after update {after}"),
        )
    elif made.twice:
        yield _finding(
            "Updates have the same sample more than once and leave out others. Draw a permutation of the batch in each "
            "epoch, and split it.",
            (
                "samples that are in one update twice",
                "0",
                f"{len(made.twice)} in {count} updates, and {len(left)} of {total} in none",
            ),
        )
    elif left or (made.ahead and len({s.tokens for s in base.samples}) == total):  # copies take turns as they like
        after, others = made.ahead or (count, len(left))
        yield _finding(
            "The minibatches of an epoch do not cover the batch: some samples are trained on again before others are "
            "at all, or some never. Each epoch should have every sample in exactly one minibatch.",
            (
                "samples in no update, and samples two updates behind others",
                "0 and 0",
                f"{len(left)} of {total}, and {others} after update {after} of {count}",
            ),
        )


def _same_as_its_group(base: Any, made: Any, text: Any) -> bool:
    """Whether all responses to one prompt scored alike: group-relative methods leave those out with reason."""
    prompt = next(s.prompt for s in base.samples if s.tokens == text)
    scores = [made.scores.get(s.tokens) for s in base.samples if s.prompt == prompt]
    return len(scores) > 1 and None not in scores and len(set(scores)) == 1


def _finding(message: str, shown: tuple[str, str, str]) -> Finding:
    quantity, expected, observed = shown
    return Finding(
        message,
        role="loop",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                quantity,
                expected=expected,
                observed=observed,
                where="the rows of the policy's training passes, by their token ids",
            ),
        ),
    )


@update_order.fault("minibatches are drawn with replacement")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.with_replacement(healthy)


@update_order.fault("the batch of the step before is trained on once more")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.training_on_the_batch_before(healthy)

"""LOS003: the loss is one mean over the update, however it is cut and padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

MEANS = {
    "token-mean": "every token weighs alike, so that long responses count more than short ones",
    "seq-mean": "every response weighs alike, so that a token of a long one counts less",
    "seq-sum": "tokens are added up and responses averaged, so that the step grows with the length",
    "sum": "everything is added up, so that the step grows with the batch",
    "fixed": "everything is divided by a number that is the same for all minibatches",
}
# A divisor that does not depend on the batch (Dr. GRPO's), as verl and TRL call it.
CONSTANT = ("fixed", "seq-mean-token-sum-norm", "dr_grpo")
ROWS = {"seq-mean": True, "token-mean": False, "seq-sum": False, "sum": False}


@check(
    "LOS003",
    "the loss is one mean over the update, however it is cut and padded",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    after=("ROL005", "OPT004"),
)
def loss_aggregation(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        What each token's weight is divided by, in every pass of an update: its weight over its advantage, against the
        tokens and rows of the update, those of each micro-batch, and the width of the padded grid. It should be the
        declared loss_aggregation; without one, what was found is named.

    Why it matters:
        Micro-batches and padding are there for memory and speed. Where the divisor depends on them, a token's weight
        depends on its neighbours, and a run with another micro-batch size is another experiment.

    What it looks like when broken:
        Gradient norms that change with the micro-batch size or with the longest response; short responses that train
        faster than long ones.

    How to fix:
        1. Count the tokens (or rows) of the whole update first; divide the sum of every micro-batch by that count.
        2. Divide by the mask's sum, never by the width of the tensor.

    Source:
        https://github.com/verl-project/verl/issues/5625 and https://github.com/huggingface/transformers/pull/34191
        (means of micro-batch means), https://github.com/verl-project/verl/issues/3741 (padded width),
        https://arxiv.org/abs/2503.20783 (length weighting). Tolerance: a divisor has to fit a count within 1%;
        rounding leaves 1e-5.
    """
    from rlhf_doctor.trace.groups import by_its_groups
    from rlhf_doctor.trace.weighting import SOUND, weighting

    read = weighting(traced)
    declared = setup.declared.get("loss_aggregation")
    meant = not declared or declared in CONSTANT or "sum" in str(declared)
    fixed = read.name.startswith(("grid", "longest")) and meant and _is_fixed(read, setup)
    if read.name and read.name not in (*SOUND, "undivided") and "undivided" not in read.name and not fixed:
        said = {
            "pieces": "by the tokens of its micro-batch, and by their number",
            "grid": "by the size of the padded grid, pads included",
            "longest": "by the length of the longest response beside it",
        }[read.name.split()[0]]
        yield _finding(
            f"The policy's loss is divided {said}: the gradient of one and the same batch depends on how it is cut and "
            f"padded. Divide the sums of all micro-batches by one count of the update{_as(declared)}.",
            read,
            declared,
        )
    elif declared in ROWS and fixed and read.per_row == ROWS[declared]:
        return
    elif declared in ROWS and read.per_row is not None and read.name != "undivided" and _differs(read, declared):
        alike = "responses weigh alike, whatever their length" if read.per_row else "tokens weigh alike"
        found = f"{read.name} ({MEANS[read.name]})" if read.name in MEANS else f"one where all {alike}"
        yield _finding(
            f"The declared loss_aggregation is {declared}, and the loss has {found}. Compute what is declared, or "
            "declare what is meant.",
            read,
            declared,
        )
    elif not declared and read.name in SOUND:
        yield _finding(f"The policy's loss is a {read.name}: {MEANS[read.name]}.", read, declared, Severity.INFO)
    elif not read.name and read.per_row is None:
        if by_its_groups(traced, setup.declared.get("group_size")):
            yield _finding(
                "The policy's loss is divided by the tokens of each micro-batch: only so do the advantages of the "
                "responses to one prompt add up to 0. Divide the sums of all micro-batches by one count of the "
                f"update{_as(declared)}.",
                read,
                declared,
            )
            return
        raise Unavailable(f"needs weights whose divisor can be read: {read.reason}")


def _as(declared: Any) -> str:
    return f", as the declared {declared} does" if declared else ""


def _is_fixed(read: Any, setup: Any) -> bool:
    """Whether a width is the declared limit of responses, which does not depend on the batch."""
    limit = setup.declared.get("response_length")
    return isinstance(limit, int) and any(
        abs(e / rows / limit - 1) < 0.02
        for e, p in zip(read.expected, read.passes, strict=True)
        for rows in (1, p.update_rows)
    )


def _differs(read: Any, declared: str) -> bool:
    if read.per_row != ROWS[declared]:
        return not all(p.update_tokens == p.update_rows * p.update_longest for p in read.passes)
    if read.name in ("", "fixed") or read.name == declared:
        return False
    return not all(p.update_rows == 1 for p in read.passes)


def _finding(message: str, read: Any, declared: Any, severity: Severity | None = None) -> Finding:
    counts = "; ".join(
        f"{d:.5g} with {p.tokens} tokens of {p.update_tokens} in {p.rows} rows of {p.update_rows}"
        for d, p in list(zip(read.divisors, read.passes, strict=True))[:3]
    )
    return Finding(
        message,
        role="loop",
        severity=severity,
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "what the sum over a pass's tokens is divided by" if counts else "whether rows or tokens weigh alike",
                expected=str(declared or "the tokens or the rows of the whole update"),
                observed=counts
                or ("a pass of its own" if read.per_row is None else "rows" if read.per_row else "tokens"),
                tolerance="1% of a count",
                where="the gradient at the policy's logits over the advantages",
            ),
        ),
    )


@loss_aggregation.fault("the mean of the micro-batches' means")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(
        healthy, settings={"micro_batch_size": 4}, parts={"policy_loss": loss_faults.mean_of_micro_means(2)}
    )


@loss_aggregation.fault("pads count in the mean")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, parts={"policy_loss": loss_faults.over_the_grid})


@loss_aggregation.fault("a mean over tokens where one over responses is declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(healthy, declared={"loss_aggregation": "seq-mean"})

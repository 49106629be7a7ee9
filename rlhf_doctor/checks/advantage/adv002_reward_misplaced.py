"""ADV002: the score is the reward of the last response token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.tracing import Traced

if TYPE_CHECKING:
    from rlhf_doctor.trace.arrival import Placement


@check(
    "ADV002",
    "the score is the reward of the last response token",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL005", "ROL009"),
    explains=("ADV008", "VAL009", "ADV001", "ADV006", "VAL011", "REW014", "SYS008", "ADV004", "ADV009"),
    across_roles=True,
)
def reward_misplaced(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Scores are changed and the step run again. A score that is the reward of token p moves the advantages of p by
        1 and of the tokens before it by γλ a token, and none after p. So p is read off: it should be the last token
        of each response, its end of sequence included. One slot after it, with the value of that slot kept, is info.

    Why it matters:
        A score on the first token credits nothing that was chosen after it. On a pad or in the last column it comes
        discounted by the number of pads, or is lost where pads are masked, so that only responses that fill the batch
        are paid. On every token long responses earn more.

    What it looks like when broken:
        Length creeps up or down although the reward model does not ask for it; a value loss that stays high; responses
        that end early are not learnt from.

    How to fix:
        1. Take the last position of the response mask for each row: last = mask.sum(1) - 1 for responses that start
           at column 0; never -1 in a padded batch.
        2. Add the score after the mask has been applied to the rewards, at [rows, last].
        3. Guard against empty responses: an index of -1 is the last column.

    Source:
        https://github.com/radixark/miles/pull/1827 (the score on a masked token, and lost),
        https://github.com/verl-project/verl/pull/6310 (index -1), and
        https://github.com/huggingface/trl/issues/3750 (one slot after the end, a port that is right as long as mask and
        value keep the slot). Tolerance 0.01 of a unit of the score; float32 leaves 0.0001.
    """
    from rlhf_doctor.trace import arrival, gains

    gamma, lam = number(setup.declared.get("gamma")), number(setup.declared.get("lam"))
    if gains.critic_free(traced):
        gamma, lam = 1.0 if gamma is None else gamma, 1.0
    declared = None if gamma is None or lam is None else gamma * lam
    found = arrival.placement(traced, declared)
    if gains.critic_free(traced) and found.kind in ("last", "unknown"):
        found = _lost(traced) or _spread(traced, declared) or found
    if found.kind == "last":
        return
    if found.kind == "spread" and setup.declared.get("dense_rewards"):
        raise Unavailable("rewards of every token are declared: no one token has the whole score")
    if found.kind == "unknown":
        raise Unavailable("needs scores whose effect on the advantages shows the token that they are put on")
    length = len(found.gain)
    normal = found.kind == "late" and found.offset == 1
    place = {
        "early": "the token before the last one" if found.offset == -1 else f"{-found.offset} tokens before the last",
        "late": f"{found.offset} slots after the last token" if found.offset > 1 else "the slot after the last token",
        "lost": f"column {found.column} of the batch, which is masked wherever a response is shorter",
        "spread": "every token of the response",
    }[found.kind]
    if found.kind == "early" and -found.offset == length - 1:
        place = "the first token of the response"
    shown = ", ".join(f"{g:.3g}" for g in found.gain)
    yield Finding(
        f"The score is put on {place}, and the value there is kept. It still reaches the tokens, discounted once more."
        if normal
        else f"The score is put on {place}. It should be the reward of the last response token: index each row by its "
        "own length, after masking.",
        role="loop",
        confidence=Confidence.PROVEN,
        severity=Severity.INFO if normal else None,
        evidence=(
            Evidence(
                f"change of the {length} tokens' advantages for one unit of the score, without their common scale"
                if gains.critic_free(traced)
                else f"change of the {length} tokens' advantages for one unit of the score",
                "1 at the last token, times gamma · lambda for each token before it",
                shown,
                "0.01",
                where=f"sample {found.sample}",
            ),
        ),
    )


def _lost(traced: Traced) -> Placement | None:
    """Without a critic, scores in the last column of a batch whose shorter rows are masked there."""
    import numpy as np

    from rlhf_doctor.trace.arrival import Placement
    from rlhf_doctor.trace.shaped import lost_scores

    short = lost_scores(traced)
    if short is None:
        return None
    lengths = traced.base.real.sum(1)
    sample = int(short.argmax())
    return Placement("lost", 0, sample, np.zeros(lengths[sample]), int(lengths.max()))


def _spread(traced: Traced, decay: float | None) -> Placement | None:
    """Without a critic, scores on every token of a batch that is whitened afterwards."""
    from rlhf_doctor.trace.arrival import Placement, entry
    from rlhf_doctor.trace.shaped import own_moves

    moved = own_moves(traced)
    if moved is None or not len(moved) or not abs(moved).max() > 0:
        return None
    gain = moved / abs(moved).max()
    row = int(traced.experiments.done["one score"].touched.argmax())
    return Placement("spread", 0, row, gain) if entry(gain, decay)[0] == "spread" else None


@reward_misplaced.fault("the score in the last column of the batch")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.score_in_last_column})


@reward_misplaced.fault("the score on the first token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.score_on_first_token})


@reward_misplaced.fault("the score on every token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.score_on_every_token})


@reward_misplaced.fault("the score one token early")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import advantage_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"rewards": advantage_faults.score_one_early})


@reward_misplaced.fault("without a critic, the score in the last column of the batch")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import leave_one_out

    return leave_one_out.setup(healthy, leave_one_out.Returns(last_column=True))

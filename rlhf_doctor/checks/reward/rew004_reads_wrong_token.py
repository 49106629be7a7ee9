"""REW004: the score is read at the last real token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.padding import side_of, side_severity
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.readings import Inputs, Manifest, Reading
from rlhf_doctor.instruments.tracing import Traced


@check(
    "REW004",
    "the score is read at the last real token",
    stage=Stage.TRACE,
    early=Stage.PROBE,
    severity=Severity.ERROR,
    after=("REW001",),
    explains=("TOK001", "REW005", "REW006", "REW009", "TOK005", "REW012", "REW013"),
)
def reward_reads_wrong_token(
    reward_reading: Reading, reward_manifest: Manifest, inputs: Inputs, setup: Any, traced: Traced | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The last position that the score depends on, by its gradient to the embeddings: for a text alone, padded on
        either side, with an end-of-sequence inside the prompt, with one at its end, and with a start token. In a
        causal model the score read at a position depends on that position and on nothing after it. Where pad and eos
        are one id, the token before the final eos is what every implementation reads, and is fine. A fault that only
        shows under the padding side that this setup does not use is info: reading index -1 is right with left padding.
        Where the step can be run, the rows that it scores tell which side they are padded on; and where the loop itself
        picks one of a row's numbers, those at all tokens but the last real one are changed: no target may move.

    Why it matters:
        Only the last real token has seen the whole response. A score read at a pad, at the first eos of a
        multi-turn prompt, or at position 0 belongs to another text or to none; the same response then scores
        differently in another batch, or every response to a prompt scores the same.

    What it looks like when broken:
        A reward that changes with batch size, with prompt length, or with the padding side; a pairwise loss that stays
        at ln 2 = 0.693 for one model family and not for another.

    How to fix:
        1. Compute the position from the attention mask and not from token ids: the last index where it is 1,
           `last = mask.shape[1] - 1 - mask.flip(1).argmax(1)`, right for both sides.
        2. Do not search for the first pad or eos; chat templates put them into prompts.
        3. Give the reward the mask, set config.pad_token_id (in a nested text_config too), and keep pad and eos apart.

    Source:
        https://github.com/huggingface/trl/issues/2758 (first eos of a chat prompt),
        https://github.com/huggingface/trl/issues/2778 (right-padding index on left-padded rows),
        https://github.com/EleutherAI/gpt-neox/pull/1285 (one past the eos),
        https://github.com/deepspeedai/DeepSpeedExamples/issues/455 (a skipped first pad),
        https://github.com/hiyouga/LlamaFactory/issues/191 (index -1: right with left padding).
    """
    same_id = inputs.eos_id is not None and inputs.pad_id == inputs.eos_id
    wrong = {
        name: (read, last, length)
        for name, (read, last, length) in reward_reading.cases.items()
        if read != last and not (same_id and name == "eos at the end" and read == last - 1)
    }
    sides = (padded_sides(traced) if traced is not None else set()) or {side_of(setup, reward_manifest)}
    grave = {n: case for n, case in wrong.items() if any(side_severity(n, side) is None for side in sides)}
    cases = grave or wrong
    if not grave and traced is not None and not setup.declared.get("dense_rewards"):
        yield from _by_the_loop(traced, {inputs.eos_id} if same_id else set())
    if not cases:
        return
    name = next(iter(cases))
    yield Finding(
        f"The score is read at {_place(*cases[name])} ({_case(name)}), not at the last real token"
        + (
            ". Read it at the last position whose attention mask is 1."
            if grave
            else f": right for the rows of this setup, which are padded on the {min(sides)}, and wrong for others."
        ),
        role="reward",
        confidence=Confidence.PROVEN,
        severity=None if grave else Severity.INFO,
        evidence=tuple(
            Evidence(
                "last position that the score depends on",
                expected=f"{last} of 0 … {length - 1}",
                observed=str(read),
                where=_case(n),
                reproduce="gradient of the score to the embedding of every position",
            )
            for n, (read, last, length) in cases.items()
        ),
    )


def _by_the_loop(traced: Traced, ends_alike: set[int | None]) -> Iterator[Finding]:
    """Responses whose score the loop takes from another token; an end that is the pad as well may be left out."""
    from rlhf_doctor.trace.arrival import read_elsewhere

    rows = [s for s in read_elsewhere(traced) if traced.base.samples[s].response[-1] not in ends_alike]
    if rows:
        yield Finding(
            f"The loop reads the score of {len(rows)} of {len(traced.base.samples)} responses at another token than "
            "the last real one. Read it at the last position whose attention mask is 1.",
            role="reward",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "responses that answer when the reward model's numbers at all tokens but their last one move",
                    expected="0",
                    observed=str(len(rows)),
                    where="samples " + ", ".join(map(str, rows[:8])),
                ),
            ),
        )


def padded_sides(traced: Traced) -> set[str]:
    """The sides that rows of the reward model are padded on in the step, by where the samples stand in them."""
    found = set[str]()
    for placed in traced.base.placed:
        if placed.call.role == "reward":
            for sample, start in placed.starts.items():
                end = start + len(traced.base.samples[sample].tokens)
                found |= {"left"} if start else set()
                found |= {"right"} if end < placed.call.ids.shape[1] else set()
    return found


def _case(name: str) -> str:
    return {"alone": "a text alone, without padding"}.get(name, f"with {name}")


def _place(read: int, last: int, length: int) -> str:
    if read == 0:
        return "position 0, the first token"
    if read == last + 1:
        return f"position {read}, one past the last real token"
    if read > last:
        return f"position {read}, a pad" + (", the end of the row" if read == length - 1 else "")
    return f"position {read}, {last - read} before the last real token"


def _read_at(healthy: Any, rule: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(reward=scorers.Reader(healthy.reward, rule).eval())


@reward_reads_wrong_token.fault("left-padded rows, read at the number of real tokens less one")
def _(healthy: Any) -> Any:
    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        return scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]

    return _read_at(healthy, rule)


@reward_reads_wrong_token.fault("read one past the last real token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        past = (scorers.last_real(mask) + 1).clamp(max=mask.shape[1] - 1)
        return scores.gather(1, past[:, None])[:, 0]

    return _padded_right(_read_at(healthy, rule))


@reward_reads_wrong_token.fault("read at the first end of sequence, also inside the prompt")
def _(healthy: Any) -> Any:
    eos = healthy.tokenizer.eos_token_id

    def rule(scores: Any, ids: Any, mask: Any) -> Any:
        from rlhf_doctor.selftest import scorers

        stop = (ids == eos) & mask.bool()
        first = stop.int().argmax(1).where(stop.any(1), scorers.last_real(mask))
        return scores.gather(1, first[:, None])[:, 0]

    return _read_at(healthy, rule)


@reward_reads_wrong_token.fault("hand-written, read at position 0")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(reward=specimens.hand_written_critic(healthy, pool="first").eval())


@reward_reads_wrong_token.fault("hand-written, index -1 on right-padded rows")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return _padded_right(healthy.but(reward=specimens.hand_written_critic(healthy, pool="final").eval()))


def _padded_right(setup: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.padding_side = "right"
    return setup.but(tokenizer=tokenizer)


@reward_reads_wrong_token.fault("the loop takes the last column of every row")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    return reference_step(healthy, parts={"score": rollout_faults.score_at_the_last_column})

"""What a reward function that gives one number for every text should be told of. No torch is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity
from rlhf_doctor.instruments.function_range import FunctionRange
from rlhf_doctor.instruments.on_samples import OnSamples
from rlhf_doctor.instruments.preferences import PairScores
from rlhf_doctor.instruments.readings import Manifest

__all__ = ["of_function"]

FEWEST = 8
KINDS = 4


def of_function(
    samples: OnSamples | None, pairs: PairScores | None, wide: FunctionRange | None, manifest: Manifest
) -> Iterator[Finding]:
    """What is wrong where every text gets one score, and how that is known."""
    given = [*(samples.numbers if samples else ())]
    paired = [score for pair in (pairs.with_eos if pairs else ()) for score in pair]
    if len({*given, *paired}) > 1:
        yield from _of_prompts_alone(samples, pairs, manifest)
        return
    if len(given) + len(paired) < FEWEST:
        return
    value = (given or paired)[0]
    texts = f"{len(given)} sampled responses" + (f" and {len(paired)} of the preference pairs" if paired else "")
    evidence = [
        Evidence(f"scores of {texts}", "at least two different ones", f"{value:.6g} for all", where=manifest.class_name)
    ]
    message = (
        f"The reward function gives {value:.6g} for all {texts}. That is normal for a strict verifier and a policy "
        "that does not yet solve the task; nothing is learned until some response scores otherwise."
    )
    severity: Severity | None = Severity.INFO
    if wide is not None and any(score != value for score in wide.behind):
        changed = sum(score != value for score in wide.behind)
        message = (
            f"The reward function gives {value:.6g} for all {texts}, and something else once {wide.prefill.strip()!r}, "
            "with which the prompt already ends, is put before the response. It should be asked for that tag and the "
            "response, or not look for the tag."
        )
        evidence.append(Evidence("scores that change with the tag before the response", "0", f"{changed}"))
        severity = Severity.WARNING
    elif half := next((h for h in (wide.completed if wide else ()) if h[2] == value != h[3]), None):
        end, rest, _, whole = half
        message = (
            f"The reward function gives {value:.6g} for all {texts}. It looks for a text that starts with "
            f"{end.strip()!r}, with which every prompt already ends, so a response that goes on from there, "
            f"{rest.strip()[:40]!r}, gets {value:.6g} too. It should be asked for that beginning and the response, or "
            "not look for the beginning."
        )
        evidence.append(
            Evidence(
                "score of such a response, without and with the prompt's end",
                "the same",
                f"{value:.6g} and {whole:.6g}",
            )
        )
        severity = Severity.WARNING
    elif paired or (wide is not None and all(score == value for score in wide.others)):
        message = (
            f"The reward function gives {value:.6g} for all {texts}"
            + ("" if paired else " and for every other text that was tried")
            + ". It should tell a good response from a bad one: look for a test that never matches, or a "
            "result that is overwritten."
        )
        severity = Severity.WARNING
        if wide is not None:
            evidence.append(Evidence("scores of other texts", "some other than that", f"{len(wide.others)} tried"))
    yield Finding(message, role="reward", confidence=Confidence.MEASURED, severity=severity, evidence=tuple(evidence))


def _of_prompts_alone(samples: OnSamples | None, pairs: PairScores | None, manifest: Manifest) -> Iterator[Finding]:
    """One score for all responses to a prompt, and more scores than right and wrong."""
    by_prompt: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    if samples is not None:
        drawn = zip(samples.samples.prompts, samples.samples.responses, samples.numbers, strict=True)
        for prompt, response, score in drawn:
            by_prompt.setdefault(tuple(prompt), {})[tuple(response)] = score
    groups = [list(scores.values()) for scores in by_prompt.values() if len(scores) > 1]
    groups += [list(pair) for pair in (pairs.with_eos if pairs else ())]
    if len(groups) < FEWEST or any(len(set(scores)) > 1 for scores in groups):
        return
    different = len({scores[0] for scores in groups})
    if different < KINDS:
        return  # a verifier says right and wrong, and some tasks are right for every response
    yield Finding(
        "The reward function's score does not depend on the response: whatever answers a prompt scores the same. It "
        "should be asked for prompt and response: look at what it is given and which of its arguments it reads.",
        role="reward",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                f"scores of different responses to one prompt, for {len(groups)} prompts",
                "some that differ",
                f"one score for each prompt, {different} different ones in all",
                where=manifest.class_name,
            ),
        ),
    )

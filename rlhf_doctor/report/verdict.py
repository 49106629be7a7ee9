"""The verdict: one sentence for whoever pays for the GPUs, and what it costs not to listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_doctor.finding import Severity
from rlhf_doctor.report.text import counted, first_sentence

__all__ = ["verdict"]

# What comes of a fault in a family, told in the future so that it reads after "started as it is," and "there is a
# risk that". A code wins over its family.
CONSEQUENCE: Mapping[str, str] = {
    "SYS010": "opening the checkpoint will run someone else's code on your machine",
    "SYS": "the four models will not play the parts that the algorithm gives them, so what is trained is not what was "
    "meant",
    "TOK": "the models will read or score other text than was written, and the curves will not show it",
    "POL": "every later number will rest on wrong log-probabilities of the policy, so its updates will point the wrong "
    "way",
    "REF": "the KL penalty will hold the policy to the wrong place or to nothing, so it can drift into text that "
    "scores well and reads badly",
    "REW": "the policy will be driven towards scores that do not measure what people preferred: the reward curve can "
    "rise while the answers get worse",
    "VAL": "the advantages will be mostly noise: the run will use its full time and teach the policy little, while the "
    "losses look normal",
    "ROL": "the update will be computed for other tokens or probabilities than were sampled",
    "KLD": "the policy will be held to its starting point too tightly, too loosely or not at all",
    "ADV": "the updates will credit the wrong tokens",
    "LOS": "the optimiser will minimise another loss than the one declared",
    "OPT": "the wrong parameters will learn, or the right ones will not",
    "PRE": "rounding will swallow or distort the updates",
    "CFG": "the run will train with other settings than were meant",
    "MET": "the run will go on although its own log shows that it is not learning what was meant",
}
ROLE_WORDS = {
    "policy": "policy",
    "reference": "reference",
    "reward": "reward model",
    "value": "critic",
    "tokenizer": "tokenizer",
    "loop": "training loop",
    "setup": "setup",
}
STEPS = 1000
BATCH, RESPONSE, EPOCHS = 512, 200, 1
# Dense bf16 arithmetic of one H100 SXM by its data sheet, and a share of it that well-tuned training reaches.
PEAK, SHARE = 989e12, 0.4
SMALLEST = 50_000_000


def verdict(made: Mapping[str, Any]) -> dict[str, Any]:
    """status, sentence, cost, cost_basis, incomplete, counts, ran: see ``schema.SCHEMA``."""
    counts = {str(s): sum(f["severity"] == s for f in made["findings"]) for s in Severity}
    ran = len({one["code"] for one in (*made["passed"], *made["findings"])})
    skipped, errors, crashed = len(made["skipped"]), made["errors"], made["crashed"]
    incomplete = []
    if errors:
        incomplete.append(f"{counted(len(errors), 'part')} of the setup could not be read or judged")
    if crashed:
        incomplete.append(f"{counted(len(crashed), 'check')} of this tool crashed")
    cost = basis = ""
    if made["diagnosis"]:
        first = made["diagnosis"][0]
        grave = first["severity"] == Severity.ERROR
        said = first_sentence(first["message"])
        said = said[0].lower() + said[1:] if said.split(" ", 1)[0] in ("The", "A", "An", "No", "Two") else said
        advice = "Do not start this RLHF run yet" if grave else "This RLHF run can start, at a risk"
        sentence = f"{advice}: {said}"
        cost, basis = _cost(made, first, grave)
    elif crashed:
        sentence = "This tool failed before it could reach a verdict; nothing is known against the setup, or for it."
    elif errors:
        sentence = f"No verdict yet, since not everything could be examined: {first_sentence(errors[0]['message'])}"
    elif not ran:
        sentence = "No verdict: not one check could be decided with what was given."
    else:
        undecided = f"; {skipped} more could not be decided with what was given" if skipped else ""
        sentence = f"Nothing was found that should stop this run, by {counted(ran, 'check')}{undecided}."
    status = "tool-error" if crashed else "findings" if made["diagnosis"] else "unreadable" if errors else "healthy"
    return {
        "status": status,
        "sentence": sentence,
        "cost": cost,
        "cost_basis": basis,
        "incomplete": f"The verdict is incomplete: {' and '.join(incomplete)}." if incomplete else "",
        "counts": counts,
        "ran": ran,
    }


def _cost(made: Mapping[str, Any], first: Mapping[str, Any], grave: bool) -> tuple[str, str]:
    code = first["code"]
    consequence = CONSEQUENCE.get(code) or CONSEQUENCE.get(code[:3], "the run will not do what was meant")
    if not grave:
        return f"Started as it is, there is a risk that {consequence}.", ""
    hours, basis = gpu_hours(made["setup"])
    return f"Started as it is, {consequence}." + (f" At stake: at least {hours} H100-hours." if hours else ""), basis


def gpu_hours(setup: Mapping[str, Any]) -> tuple[str, str]:
    """A lower bound on the run's H100-hours, and the assumptions behind it; empty where a model's size is unknown.

    2 floating-point operations per parameter and token forward and 4 backward: the policy samples, scores and is
    updated, the critic scores and is updated, the others score.
    """
    sizes = {role: one["parameters"] for role, one in setup["roles"].items()}
    if not sizes.get("policy") or sizes["policy"] < SMALLEST:
        return "", ""
    declared = setup["declared"]
    batch = _whole(declared.get("batch_size"), BATCH)
    response = _whole(declared.get("response_length"), RESPONSE)
    epochs = _whole(declared.get("ppo_epochs"), EPOCHS)
    policy, value = sizes["policy"], sizes.get("value") or 0
    scored = sum(size or 0 for size in sizes.values()) + policy
    operations = (2.0 * scored + 6.0 * epochs * (policy + value)) * STEPS * batch * response
    hours = operations / (PEAK * SHARE) / 3600
    shown = f"{hours:,.0f}" if hours >= 10 else f"{hours:.1g}"
    return shown, (
        f"Arithmetic alone, for {STEPS:,} steps of {batch:,} responses of {response:,} tokens, "
        f"{counted(epochs, 'epoch')} each, at {SHARE:.0%} of an H100's dense bf16 peak; prompts, memory traffic of "
        "sampling and idle time come on top."
    )


def _whole(value: Any, otherwise: int) -> int:
    """A declared count where it is a sensible one: NaN fails every comparison."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 10**9
    return int(value) if usable else otherwise

"""TOK008: nothing that matters is cut off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.tokens.cuts import end_cut, request_cut, start_cut
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.prompts import Prompts
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.round_trips import Pair
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer

# Of the prompts. Data sets have a few too long ones, which most loops filter out.
FEW = 0.1


@check(
    "TOK008",
    "truncation cuts off nothing that matters",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    early=Stage.STATIC,
)
def truncation_cuts_template_or_response(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    prompts: Prompts | None = None,
    encoded_pairs: tuple[Pair, ...] | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Prompts as texts against the declared prompt_length, and what the tokenizer's truncation side would cut from
        the long ones. Prompts as ids: whether the longest rows lack the first token that all others share, or the last
        ones: the template's generation prompt (where all rows are of one width, by what they decode to), or two tokens
        and more without a template. Preference
        pairs at the limit of the reward's tokenizer or positions: how many lose their response, or become the same two
        sequences.

    Why it matters:
        Cut on the left, a prompt loses its BOS, system turn and template; cut on the right, the end of the question
        and the generation prompt. A preference pair that is cut before its responses differ teaches nothing, at a
        loss of exactly ln 2.

    What it looks like when broken:
        Odd continuations for long prompts only; a reward-model loss that stays near 0.693 for part of the data.

    How to fix:
        1. Filter prompts that are too long instead of cutting them, or raise prompt_length.
        2. For reward models cut the start of the prompt, never the response: truncation_side="left", with BOS kept.

    Source:
        https://github.com/huggingface/trl/pull/3646; https://github.com/deepspeedai/DeepSpeedExamples/pull/782;
        https://github.com/verl-project/verl/pull/506 (either side); https://github.com/CarperAI/trlx/pull/395 (pairs
        become identical). Up to a tenth of the prompts may be long by accident and is a warning.
    """
    if prompts is None and encoded_pairs is None:
        raise Unavailable("needs prompts or preferences")
    info = feeding_tokenizer(setup, manifest)
    if prompts is not None:
        limit = setup.declared.get("prompt_length")
        if prompts.texts and isinstance(limit, int) and limit > 0:
            yield from _too_long(prompts, limit, info.truncation_side if info else None)
        if not prompts.texts:
            yield from start_cut(prompts)
            ends = [*end_cut(prompts, info)]
            if not ends and callable(decode := getattr(setup.tokenizer, "decode", None)):
                ends = [*request_cut(prompts, info, limit if isinstance(limit, int) else None, decode)]
            yield from ends
    if encoded_pairs is not None:
        yield from _pairs(manifest, encoded_pairs)


def _too_long(prompts: Prompts, limit: int, side: str | None) -> Iterator[Finding]:
    long = [row for row in prompts.rows if len(row) > limit]
    if not long:
        return
    lost = (
        "its BOS, system turn and template head"
        if side == "left"
        else "the end of the question and the generation prompt"
    )
    yield Finding(
        f"{len(long)} of {len(prompts.rows)} prompts are longer than prompt_length={limit}, up to {prompts.longest} "
        f"tokens. Truncation on the {side or 'right'} cuts off {lost}: filter them or raise the limit.",
        role="tokenizer",
        severity=Severity.WARNING if len(long) <= FEW * len(prompts.rows) else None,
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence("tokens of the longest prompt", f"at most {limit}", str(prompts.longest), where="prompts"),
            Evidence("prompts above the limit", "0", f"{len(long)} of {len(prompts.rows)}", tolerance=f"{FEW:.0%}"),
        ),
    )


def _pairs(manifest: Mapping[Role, Manifest], pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    reward = manifest.get("reward")
    info = reward.tokenizer if reward else None
    known = [n for n in (info.model_max_length if info else None, reward.max_positions if reward else None) if n]
    if not known:
        return
    limit, left = min(known), bool(info and info.truncation_side == "left")

    def cut(ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[-limit:] if left else ids[:limit]

    long = [p for p in pairs if max(len(p.chosen), len(p.rejected)) > limit]
    same = [p for p in long if p.differs and cut(p.chosen) == cut(p.rejected)]
    lost = [p for p in long if not left]
    if same or lost:
        what = f"{len(same)} become two equal sequences" if same else f"{len(lost)} lose the end of a response"
        yield Finding(
            f"The reward model reads {limit} tokens, and of {len(pairs)} preference pairs {what} when they are cut "
            "there. Cut the start of the prompt instead, or shorten the pairs.",
            role="reward",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("pairs that are equal after truncation", "0", str(len(same)), where=f"limit {limit} tokens"),
                Evidence("pairs whose response is cut", "0", str(len(lost)), where="right" if not left else "left"),
            ),
        )


@truncation_cuts_template_or_response.fault("a prompt length that most prompts exceed")
def _(healthy: Any) -> Any:
    return healthy.but(declared={"prompt_length": 6})


@truncation_cuts_template_or_response.fault("preference pairs longer than the reward's tokenizer allows")
def _(healthy: Any) -> Any:
    filler = "the " * 80
    pairs = [(filler + p, c, r) for p, c, r in healthy.preferences]
    return healthy.but(preferences=pairs, step=None)


@truncation_cuts_template_or_response.fault("prompts given as ids, cut on the left")
def _(healthy_files: Any) -> Any:
    made = healthy_files.tokenizer(list(healthy_files.prompts))["input_ids"]
    width = max(map(len, made)) - 1
    rows = [row[-width:] for row in made]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    ids = [[0] * (width - len(row)) + row for row in rows]
    return healthy_files.but(prompts={"input_ids": ids, "attention_mask": mask})


@truncation_cuts_template_or_response.fault("chat prompts as ids, all cut on the right")
def _(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}</s> {{ m.content }} {% endfor %}{% if add_generation_prompt %}</s>{% endif %}"
    )
    rows = [tokenizer(f"</s> {p} </s>")["input_ids"][:6] for p in healthy.prompts]
    return healthy.but(tokenizer=tokenizer, step=None, prompts={"input_ids": rows}, declared={"prompt_length": 6})

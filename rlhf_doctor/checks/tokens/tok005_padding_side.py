"""TOK005: the policy generates from prompts that are padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.prompts import PaddedPrompts
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer


@check("TOK005", "the policy generates from prompts padded on the left", stage=Stage.STATIC, severity=Severity.ERROR)
def padding_side(
    setup: Any, manifest: Mapping[Role, Manifest], padded_prompts: PaddedPrompts | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        Prompts that are given as a table of ids: where the pads stand in rows shorter than the table, for a policy
        with a generate method that is no encoder-decoder. A tokenizer that pads on the right, with prompts as texts,
        is only mentioned: loops often pad on their own.

    Why it matters:
        A decoder continues after the last column. With pads on the right, that column is a pad, so every short
        prompt is continued after a run of pads, at positions that do not fit, and the pads stay inside the sequence.

    What it looks like when broken:
        Short prompts get poor responses and long ones good ones; a warning about right padding at generation;
        log-probabilities of rollout and update that disagree for short prompts.

    How to fix:
        1. Set tokenizer.padding_side = "left" for the tokenizer that encodes prompts, and encode them again.
        2. Reward models and critics may be padded on either side, as long as they read by the mask.

    Source:
        https://github.com/LAION-AI/Open-Assistant/issues/2140 (the side was not passed to the tokenizer that
        generates); https://huggingface.co/docs/transformers/llm_tutorial (prompts are padded on the left). Right
        padding is right for encoder-decoder policies: https://github.com/huggingface/trl/pull/262.
    """
    policy = manifest.get("policy")
    if policy is None:
        raise Unavailable("needs a policy model")
    if policy.config.get("is_encoder_decoder"):
        return
    info = feeding_tokenizer(setup, manifest)
    if padded_prompts is not None:
        rows = list(_padded_behind(padded_prompts, info.pad_id if info and info.pad_id != info.eos_id else None))
        generates = policy.origin == "checkpoint" or callable(getattr(setup.policy, "generate", None))
        if rows:
            yield Finding(
                f"{len(rows)} of {len(padded_prompts.ids)} prompts have pads behind their text, and the policy would "
                "go on after the pads. Pad prompts on the left.",
                role="tokenizer",
                severity=None if generates else Severity.INFO,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence(
                        "the last column of the prompts", "a token of the prompt", "a pad", where=f"row {rows[0]}"
                    ),
                ),
            )
    elif info is not None and info.padding_side == "right" and setup.prompts and not isinstance(setup.prompts, Mapping):
        yield Finding(
            "The tokenizer pads on the right. That is usual for reward models and critics; the loop should pad "
            "prompts on the left before the policy generates.",
            role="tokenizer",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(Evidence("padding_side", "left where prompts are batched", "right", where=info.where),),
        )


def _padded_behind(prompts: PaddedPrompts, pad: int | None) -> Iterator[int]:
    """Rows that end in a pad, in a table whose rows are of one width."""
    if len({len(row) for row in prompts.ids}) != 1:
        return
    for i, row in enumerate(prompts.ids):
        behind = prompts.mask[i][-1] == 0 if prompts.mask else pad is not None and row[-1] == pad
        if row and behind and (prompts.mask is None or any(prompts.mask[i])):
            yield i


@padding_side.fault("prompts padded on the right")
def _(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.padding_side = "right"
    made = tokenizer(list(healthy.prompts), padding=True, return_tensors="pt")
    prompts = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    return healthy.but(tokenizer=tokenizer, prompts=prompts, step=None)


@padding_side.fault("prompts padded on the right, without a mask, for checkpoints")
def _(healthy_files: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy_files.tokenizer)
    tokenizer.padding_side = "right"
    rows = tokenizer(list(healthy_files.prompts), padding=True)["input_ids"]
    return healthy_files.but(prompts={"input_ids": rows})

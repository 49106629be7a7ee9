"""TOK001: a real EOS is not taken for padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.checks.rollout.sampling import listed
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.eos_use import EosUse
from rlhf_doctor.instruments.prompts import PaddedPrompts
from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.instruments.vocabularies import Fed


@check(
    "TOK001",
    "a real EOS is not taken for padding",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("ROL005", "ROL004"),
)
def pad_is_eos(
    vocabularies: Mapping[Role, Fed],
    padded_prompts: PaddedPrompts | None = None,
    eos_use: Mapping[Role, EosUse] | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Whether pad and EOS are one id, and then whether anything takes one for the other: prompts that are given as
        ids without a mask, a mask that is 0 at an EOS between real tokens, and models in which an EOS in the middle of
        a text has no influence although the mask says that it is there. Where a step can be watched, also whether the
        policy is trained on the last token of every response but of those that end in EOS. The shared id alone is
        mentioned, no more.

    Why it matters:
        GPT-2 and many others have no pad token, and reusing EOS is sound as long as masks say what is real. Where a
        mask, a label filter or an end is inferred from ids, the real EOS goes with the pads: it gets no credit, and
        the policy never learns to stop.

    What it looks like when broken:
        Responses grow to the length limit; the log-probability of EOS is exactly 0; chosen and rejected score alike
        because the first EOS of the prompt is taken for the end.

    How to fix:
        1. Keep the attention mask from the tokenizer and carry it along; never compute it as ids != pad_token_id.
        2. Or add a pad token of its own and resize the embeddings of all models.

    Source:
        https://github.com/huggingface/trl/pull/4970 and https://github.com/huggingface/trl/issues/976 (EOS lost with
        the pads); https://github.com/hpcaitech/ColossalAI/issues/3200 (pads attended to); Huang et al. 2024,
        https://arxiv.org/abs/2403.17031 (a pad token of its own). That a reward model then reads the token before EOS
        is how sequence classifiers pool: https://github.com/huggingface/transformers/pull/35911.
    """
    fed = next(iter(vocabularies.values())).ids_of
    if fed.pad_id is None or fed.pad_id != fed.eos_id:
        return
    shared = Evidence("pad id and EOS id", "two ids", f"both {fed.pad_id}", where=fed.where)
    inferred = list(_in_prompts(padded_prompts, fed.pad_id)) if padded_prompts else []
    hidden = [(role, use) for role, use in (eos_use or {}).items() if use.hidden]
    if inferred:
        yield Finding(
            f"Pad and EOS are one id, and {inferred[0].observed}: real EOS tokens and pads cannot be told apart. Give "
            "the attention mask that the tokenizer made.",
            role="tokenizer",
            confidence=Confidence.PROVEN,
            evidence=(shared, *inferred),
        )
    for role, use in hidden:
        yield Finding(
            f"Pad and EOS are one id, and the {spoken(role)} masks every EOS although its attention mask does not: it "
            "infers pads from token ids. Use the mask that it is given.",
            role=role,
            confidence=Confidence.PROVEN,
            evidence=(
                shared,
                Evidence(
                    "influence of an EOS in the middle of a text",
                    f"as of another token, {use.of_other:.2g}",
                    "0",
                    where=f"{role}, position {use.position}",
                ),
            ),
        )
    ends = _untrained_ends(traced, fed.pad_id)
    if ends:
        yield Finding(
            "Pad and EOS are one id, and the policy is trained on every token of its responses but EOS: a label "
            "filter, an ignore_index or a mask takes it for a pad, and ending is never learned. Let the response mask "
            "say what is a pad, by the first EOS of each response.",
            role="loop",
            severity=Severity.ERROR,
            confidence=Confidence.MEASURED,
            evidence=(
                shared,
                Evidence("gradient at the policy's head where EOS was drawn", "as at other tokens", "0", where=ends),
            ),
        )
    if not inferred and not hidden and not ends:
        yield Finding(
            "Pad and EOS are one id. That is sound as long as masks come from the tokenizer and are never computed "
            "from ids; a reward model that pools by pad id then reads the token before EOS, as everywhere.",
            role="tokenizer",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=(shared,),
        )


def _untrained_ends(traced: Traced | None, token: int) -> str:
    if traced is None:
        return ""
    from rlhf_doctor.trace.ends import untrained_ends

    samples = untrained_ends(traced.base, token)
    return listed(samples) if samples else ""


def _in_prompts(prompts: PaddedPrompts, pad: int) -> Iterator[Evidence]:
    if prompts.mask is None:
        rows = sum(row[0] == pad or row[-1] == pad for row in prompts.ids if row)
        if rows and len({len(row) for row in prompts.ids}) == 1:
            yield Evidence(
                "attention mask of the prompts", "given", f"{rows} padded prompts have no mask", where="prompts"
            )
        return
    holes = 0
    for row, mask in zip(prompts.ids, prompts.mask, strict=True):
        kept = [i for i, m in enumerate(mask) if m]
        holes += any(row[i] == pad and not mask[i] for i in range(kept[0], kept[-1])) if kept else 0
    if holes:
        yield Evidence(
            "mask at an EOS between real tokens", "1", f"{holes} prompts have mask 0 at an EOS between real tokens",
            where="prompts['attention_mask']",
        )  # fmt: skip


def _with_shared_id(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    models = {role: copy.deepcopy(healthy.model(role)) for role in healthy.present}
    for model in models.values():
        model.config.pad_token_id = tokenizer.eos_token_id
    models["policy"].generation_config.pad_token_id = tokenizer.eos_token_id
    return healthy.but(**models, tokenizer=tokenizer, optimizers=(), step=None)


@pad_is_eos.fault("padded prompts without a mask")
def _(healthy: Any) -> Any:
    shared = _with_shared_id(healthy)
    tokenizer = shared.tokenizer
    rows = tokenizer(list(healthy.prompts), padding=True)["input_ids"]
    return shared.but(prompts={"input_ids": rows})


@pad_is_eos.fault("a mask computed from ids")
def _(healthy: Any) -> Any:
    shared = _with_shared_id(healthy)
    tokenizer = shared.tokenizer
    rows = tokenizer([f"{p} </s> {p}" for p in healthy.prompts], padding=True)["input_ids"]
    mask = [[int(t != tokenizer.pad_token_id) for t in row] for row in rows]
    return shared.but(prompts={"input_ids": rows, "attention_mask": mask})


@pad_is_eos.fault("a hand-written critic that infers its mask")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    shared = _with_shared_id(healthy)
    tokenizer = shared.tokenizer

    class Infers(specimens.HandWrittenDecoder):
        def forward(self, ids: Any, mask: Any) -> Any:
            return super().forward(ids, (ids != tokenizer.pad_token_id).long())

    return shared.but(value=Infers(specimens.vocabulary(healthy)))

"""SYS005: every role is fed ids that its embedding knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import blamed, listed, spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.scored_ids import ScoredIds
from rlhf_doctor.instruments.vocabularies import Fed


@check(
    "SYS005", "every role is fed ids that its embedding knows", stage=Stage.STATIC, severity=Severity.ERROR,
    explains=("TOK002", "TOK003", "TOK006", "REW009", "SYS007", "SYS004"), across_roles=True,
)  # fmt: skip
def vocabulary_mismatch(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    vocabularies: Mapping[Role, Fed],
    scored_ids: ScoredIds | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The tokenizer whose ids each model gets (the policy's, or an own one of the reward model) against the rows of
        the model's embedding, and against the tokenizer in the model's own folder, token by token. More rows than
        tokens is usual padding. Special tokens that were only renamed, or added at the end, are sound. Where the reward
        model has a tokenizer of its own and a step is given: whether the step gives it the policy's ids as they are.

    Why it matters:
        Loops hand the policy's token ids to reward and critic. With another vocabulary the same numbers are other
        words, so the reward model scores a text that nobody wrote. A critic gives one value for each of the policy's
        tokens and can never have another tokenizer.

    What it looks like when broken:
        Rewards look like noise, or an index error deep in an embedding. Vocabularies of the same size hide it.

    How to fix:
        1. Use a reward model of the policy's family, or decode the ids and encode the text again with the reward
           model's tokenizer (reward_tokenizer=…).
        2. Start the critic from a model with the policy's tokenizer.
        3. After adding tokens, resize the embeddings of all four models.

    Source:
        https://github.com/huggingface/trl/issues/1674; https://github.com/deepspeedai/DeepSpeedExamples/issues/276;
        https://github.com/allenai/open-instruct/issues/512; https://github.com/PKU-Alignment/safe-rlhf/issues/55
        (the reward model may differ if texts are encoded again, the critic may not).
    """
    small: dict[Role, tuple[int, int]] = {}
    for role, fed in vocabularies.items():
        m = manifest[role]
        if fed.differing:
            number, theirs, mine = fed.examples[0]
            share = f"{fed.differing} of {fed.compared} ids"
            yield Finding(
                f"The {spoken(role)} was trained with another tokenizer than the one whose ids it is fed: {share} are "
                f"other tokens (id {number} is {theirs!r} to one and {mine!r} to the other). {_advice(role)}",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence("ids with another token", "0", share, where=f"{fed.ids_of.where} against "
                             f"{fed.own.where if fed.own else role}"),
                    *(Evidence(f"id {i}", repr(a), repr(b)) for i, a, b in fed.examples[:3]),
                ),
            )  # fmt: skip
            continue
        rows = m.embedding_rows or m.vocab_size
        beyond = fed.ids_of.size - rows if rows else 0
        only_pad = beyond == 1 and fed.ids_of.pad_id == fed.ids_of.size - 1
        if rows is not None and beyond > 0 and not only_pad:
            small[role] = (rows, fed.ids_of.size)
    if small:
        yield _too_small(manifest, small)
    yield from _reward_tokenizer(setup, manifest, vocabularies, scored_ids)


def _too_small(manifest: Mapping[Role, Manifest], small: Mapping[Role, tuple[int, int]]) -> Finding:
    rows, size = min(small.values())
    return Finding(
        f"The embedding of {listed(tuple(small))} has {rows} rows and is fed ids up to {size - 1}. It needs at least "
        f"{size} rows: resize it, or use the tokenizer it was trained with.",
        role=blamed(tuple(small), "tokenizer"),
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence(
                "rows of the embedding", f"at least {size}", str(rows), where=f"{role} {manifest[role].path or ''}"
            )
            for role, (rows, size) in small.items()
        ),
    )


def _advice(role: Role) -> str:
    if role == "reward":
        return "Encode the texts again with its own tokenizer, or take a reward model of the policy's family."
    return f"The {spoken(role)} needs the policy's tokenizer."


def _reward_tokenizer(
    setup: Any, manifest: Mapping[Role, Manifest], vocabularies: Mapping[Role, Fed], scored_ids: ScoredIds | None
) -> Iterator[Finding]:
    """A reward model with a tokenizer of its own: sound for itself, never for a critic that was started from it."""
    reward, policy = vocabularies.get("reward"), vocabularies.get("policy")
    if setup.reward_tokenizer is None or not reward or not policy:
        return
    if not reward.ids_of.fingerprint or reward.ids_of.fingerprint == policy.ids_of.fingerprint:
        return
    evidence = (
        Evidence("fingerprint of the tokenizer", policy.ids_of.fingerprint, reward.ids_of.fingerprint, where="reward"),
    )
    if scored_ids is not None and scored_ids.other:
        yield _not_encoded_again(scored_ids)
    else:
        yield Finding(
            "The reward model has another tokenizer than the policy. That is sound as long as responses are decoded "
            "and encoded again before they are scored.",
            role="reward",
            severity=Severity.INFO,
            confidence=Confidence.PROVEN,
            evidence=evidence,
        )
    if setup.value is not None and _has_rewards_rows(manifest):
        yield Finding(
            "The critic was started from the reward model, which has another tokenizer than the policy. A critic "
            "values the policy's tokens one by one, so it needs the policy's tokenizer: start it from the policy.",
            role="value",
            confidence=Confidence.PROVEN,
            evidence=evidence,
        )


def _not_encoded_again(scored: ScoredIds) -> Finding:
    share = f"{scored.other} of {scored.tokens} tokens"
    return Finding(
        "The step gives the policy's ids to a reward model that has a tokenizer of its own, without decoding them and "
        f"encoding the text again: {share} are another word to it. Encode the texts with the reward model's tokenizer.",
        role="reward",
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence("tokens that are another word to the reward model", "0", share, where="the samples of a step"),
            *(Evidence(f"id {number}", repr(ours), repr(its)) for number, ours, its in scored.examples),
        ),
    )


def _has_rewards_rows(manifest: Mapping[Role, Manifest]) -> bool:
    rows = [m.embedding_rows if (m := manifest.get(role)) else None for role in ("policy", "reward", "value")]
    return None not in rows and rows[2] == rows[1] != rows[0]


@vocabulary_mismatch.fault("a reward model with a smaller embedding than the policy's tokenizer")
def _(healthy: Any) -> Any:
    import copy

    config = copy.deepcopy(healthy.reward.config)
    config.vocab_size = len(healthy.tokenizer) // 2
    return healthy.but(reward=type(healthy.reward)(config).eval().requires_grad_(False))


@vocabulary_mismatch.fault("a hand-written critic with too small a table")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    return healthy.but(value=specimens.HandWrittenDecoder(specimens.vocabulary(healthy) - 9), optimizers=())


@vocabulary_mismatch.fault("a reward checkpoint whose vocabulary is permuted")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("reward") / "tokenizer.json"
    whole = json.loads(path.read_text())
    words = whole["model"]["vocab"]
    names = sorted(words, key=words.get)
    whole["model"]["vocab"] = {name: i for i, name in enumerate([*names[:4], *reversed(names[4:])])}
    path.write_text(json.dumps(whole))
    return healthy_files.but(tokenizer=healthy_files.path("policy"))

"""TOK004: prompts begin with one BOS where there is one, and do not end in EOS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.bos_effect import BosEffect
from rlhf_doctor.instruments.chat import turns_of
from rlhf_doctor.instruments.prompts import Prompts
from rlhf_doctor.instruments.readings import Manifest, TokenizerInfo
from rlhf_doctor.instruments.round_trips import Pair
from rlhf_doctor.instruments.stops import generation_stops, ids_in
from rlhf_doctor.instruments.tracing import Traced
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer

# Nats a token. GPT-2, which does without, gains under 0.1 by a BOS; Gemma loses several without one.
COSTLY = 0.5


@check(
    "TOK004",
    "prompts begin with one BOS and do not end in EOS",
    stage=Stage.TRACE,
    severity=Severity.WARNING,
    early=Stage.STATIC,
    explains=("TOK006",),
)
def double_or_missing_bos(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    prompts: Prompts | None = None,
    encoded_pairs: tuple[Pair, ...] | None = None,
    policy_bos_effect: BosEffect | None = None,
    traced: Traced | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The prompts as they reach the policy: as the step was seen to encode them, else encoded by the setup's
        tokenizer, or as the ids that are given. How many start with two BOS, how many end in EOS, how many given as ids
        lack the BOS that the tokenizer puts before a text. Where no BOS is there, the policy's likelihood of the same
        tokens is measured with one in front. And how many preference pairs start with two BOS as the reward's tokenizer
        encodes them, or the one in its folder.

    Why it matters:
        A chat template that writes <s> and a tokenizer that adds one make two, in some stages and not in others. A
        prompt that ends in EOS asks the policy to go on after the end. Models that were trained with a BOS read
        garbage without.

    What it looks like when broken:
        Unrelated text from the first step on; or a small, steady loss of quality that no curve shows; rewards of the
        same text that differ between training and scoring.

    How to fix:
        1. Encode rendered chat templates with add_special_tokens=False.
        2. Encode plain prompts with add_special_tokens=True where the model has a BOS, and strip a trailing EOS.

    Source:
        https://github.com/huggingface/trl/issues/1400 and https://github.com/vllm-project/vllm/pull/27515 (two BOS);
        https://github.com/huggingface/trl/issues/3520 (BOS dropped); https://github.com/CarperAI/trlx/pull/287 (prompts
        end in EOS; right for encoder-decoder models, which are left out). Half a nat a token is five times what a
        model that does without a BOS gains by one.
    """
    if prompts is None and encoded_pairs is None:
        raise Unavailable("needs prompts or preferences")
    fed = () if traced is None else tuple(dict.fromkeys(s.prompt for s in traced.base.samples))
    found = list(_of_prompts(setup, manifest, prompts, policy_bos_effect, fed)) if prompts is not None else []
    yield from found
    if encoded_pairs and not found:
        yield from _of_pairs(setup, manifest, encoded_pairs)


def _of_prompts(
    setup: Any, manifest: Mapping[Role, Manifest], prompts: Prompts, policy_bos_effect: BosEffect | None, fed: Any
) -> Iterator[Finding]:
    policy = manifest.get("policy")
    info = feeding_tokenizer(setup, manifest)
    bos = info.bos_id if info else policy.config.get("bos_token_id") if policy else None
    stops = (ids_in(info.eos_id) if info else frozenset()) | (generation_stops(policy)[0] if policy else frozenset())
    rows = [row for row in fed or prompts.rows if row]
    if not rows or (bos is None and not stops):
        raise Unavailable("needs a tokenizer with a BOS or an EOS")
    doubled = [row for row in rows if isinstance(bos, int) and row[:2] == (bos, bos)]
    ended = [row for row in rows if row[-1] in stops and len(row) > 1]
    bare = [row for row in rows if bos is not None and row[0] != bos]
    if doubled:
        yield _finding(
            f"{len(doubled)} of {len(rows)} prompts start with two BOS (id {bos}): a template writes one and the "
            "tokenizer adds another. Encode rendered templates with add_special_tokens=False.",
            Evidence("ids at the start of a prompt", f"one {bos}", _shown(doubled[0][:4]), where="prompts"),
        )
    encoder_decoder = policy is not None and bool(policy.config.get("is_encoder_decoder"))
    if ended and not encoder_decoder and not _turn_ends(info, prompts):
        yield _finding(
            f"{len(ended)} of {len(rows)} prompts end in EOS (id {ended[0][-1]}), so the policy is asked to go on "
            "after the end of a text. Strip it.",
            Evidence("ids at the end of a prompt", "no EOS", _shown(ended[0][-4:]), where="prompts"),
        )
    if bare and not prompts.texts and info and info.adds_bos and len(bare) == len(rows):
        yield _finding(
            f"The prompts are given as ids without the BOS (id {bos}) that their tokenizer puts before every text. "
            "Encode them with add_special_tokens=True.",
            Evidence("ids at the start of a prompt", f"{bos} first", _shown(bare[0][:4]), where="prompts"),
        )
    elif bare and policy_bos_effect and policy_bos_effect.lost > COSTLY:
        e = policy_bos_effect
        yield _finding(
            f"The prompts have no BOS and the policy was trained with one: with a BOS in front it reads the same "
            f"tokens at {e.with_bos:.2f} nats each instead of {e.without:.2f}. Add it.",
            Evidence("negative log-likelihood a token", f"{e.with_bos:.3f} (with BOS)", f"{e.without:.3f}",
                     tolerance=f"{COSTLY} nats", where=f"{e.tokens} tokens of the prompts"),
            Confidence.MEASURED,
        )  # fmt: skip


def _of_pairs(setup: Any, manifest: Mapping[Role, Manifest], pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    """The texts that the reward model reads: with the tokenizer that feeds it, else with the one in its own folder."""
    fed = feeding_tokenizer(setup, manifest, "reward")
    bos = fed.bos_id if fed else None
    doubled = [p.chosen for p in pairs if bos is not None and p.chosen[:2] == (bos, bos)]
    where, how = "preferences", "the tokenizer"
    own = manifest["reward"].tokenizer if "reward" in manifest else None
    if not doubled and own is not None and own.bos and own.bos_id is not None and own.adds_bos:
        starting = [p for p, *_ in list(setup.preferences)[: len(pairs)] if str(p).lstrip().startswith(own.bos)]
        doubled = [(own.bos_id, own.bos_id)] * len(starting)
        where, how = f"preferences, by {own.where}", "the tokenizer in the reward model's folder"
    if doubled:
        yield _finding(
            f"{len(doubled)} of {len(pairs)} preference texts start with two BOS as the reward model reads them: they "
            f"are written with one and {how} adds another, so its scores are of other ids than in PPO. Encode rendered "
            "texts with add_special_tokens=False.",
            Evidence("ids at the start of a text", f"one {doubled[0][0]}", _shown(doubled[0][:4]), where=where),
            role="reward",
        )


def _turn_ends(info: TokenizerInfo | None, prompts: Prompts) -> bool:
    """Whether the prompts end a turn of the chat template, which lacks its generation prompt then: TOK006 says so."""
    turns = turns_of(info) if info else None
    marker = turns.behind.strip() if turns and turns.ask.strip() else ""
    return bool(marker) and any(text.rstrip().endswith(marker) for text in prompts.texts)


def _shown(ids: tuple[int, ...]) -> str:
    return " ".join(map(str, ids))


def _finding(
    message: str, evidence: Evidence, confidence: Confidence = Confidence.PROVEN, role: Role = "tokenizer"
) -> Finding:
    return Finding(message, role=role, confidence=confidence, evidence=(evidence,))


@double_or_missing_bos.fault("a template writes the BOS and the tokenizer adds it")
def _(healthy: Any) -> Any:
    return healthy.but(
        prompts=[f"{healthy.tokenizer.bos_token} {p}" for p in healthy.prompts], declared={"prompt_length": 32}
    )


@double_or_missing_bos.fault("prompts that end in EOS")
def _(healthy: Any) -> Any:
    return healthy.but(
        prompts=[f"{p} {healthy.tokenizer.eos_token}" for p in healthy.prompts], declared={"prompt_length": 32}
    )


@double_or_missing_bos.fault("pairs whose texts hold the BOS that the reward's tokenizer adds")
def _(healthy: Any) -> Any:
    bos = healthy.tokenizer.bos_token
    return healthy.but(preferences=[(f"{bos} {p}", c, r) for p, c, r in healthy.preferences], step=None)


@double_or_missing_bos.fault("prompts given as ids without their BOS")
def _(healthy_files: Any) -> Any:
    tokenizer = healthy_files.tokenizer
    rows = tokenizer(list(healthy_files.prompts), add_special_tokens=False, padding=True)
    given = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    return healthy_files.but(prompts=given, tokenizer=healthy_files.path("policy"))

"""TOK007: decoding and encoding again gives the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.chat import turns_of
from rlhf_doctor.instruments.readings import Manifest, TokenizerInfo
from rlhf_doctor.instruments.round_trips import RoundTrips
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer

# Of the texts. A subword tokenizer merges across a boundary now and then; a format that does it does it always.
SHARE = 0.25


@check("TOK007", "decoding and encoding again gives the same ids", stage=Stage.PROBE, severity=Severity.WARNING)
def retokenisation_drift(setup: Any, manifest: Mapping[Role, Manifest], round_trips: RoundTrips) -> Iterator[Finding]:
    """
    What it examines:
        Prompts and preferred responses: whether their ids, decoded and encoded again, are the same; and whether a
        prompt has the same ids inside prompt + response as alone, and a response that is glued to its prompt's last
        mark ("Answer:yes") the same ids there as alone. And what a chat template writes behind the token that ends an
        assistant's turn, which sampled ids do not have.

    Why it matters:
        Loops work on ids, reward training on texts. Where the way from one to the other changes ids, log-probabilities
        belong to other tokens than those that were sampled, and the reward model sees sequences it was not trained
        on.

    What it looks like when broken:
        KL spikes on few tokens; responses that begin one token late; ratios far from 1 in the first update.

    How to fix:
        1. Train on the ids that were sampled; never on decoded text.
        2. Let no prompt end in a space, and let every response begin as the policy begins it.
        3. Switch off clean_up_tokenization_spaces, and normalisers that change text.

    Source:
        https://github.com/huggingface/trl/issues/1702 (joint and split encoding);
        https://github.com/rllm-org/rllm/pull/272 and https://github.com/huggingface/trl/issues/5144 (decoded and
        encoded again); https://github.com/verl-project/verl/issues/3720 (newline behind the turn). A quarter of the
        texts separates a format from the odd merge.
    """
    again, boundary = round_trips.again, round_trips.boundary
    if again.first and again.changed >= SHARE * again.texts:
        text, ids, other = again.first
        at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
        yield _finding(
            f"{again.changed} of {again.texts} texts have other ids after they are decoded and encoded again. Keep the "
            "ids that were sampled wherever log-probabilities or scores are computed.",
            Evidence(
                "ids of a text, decoded and encoded",
                _shown(ids[at : at + 6]),
                _shown(other[at : at + 6]),
                tolerance=f"{SHARE:.0%} of texts",
                where=f"{text[:60]!r}, token {at}",
            ),
        )
    if boundary and boundary.first and boundary.changed >= SHARE * boundary.pairs:
        prompt, response = boundary.first
        yield _finding(
            f"In {boundary.changed} of {boundary.pairs} pairs the prompt's last tokens merge with the response's first "
            "when both are encoded together, as in reward training. Move the space to where the policy samples it.",
            Evidence(
                "ids of the prompt inside prompt + response",
                "as alone",
                "others",
                tolerance=f"{SHARE:.0%} of pairs",
                where=f"{prompt[-20:]!r} + {response[:20]!r}",
            ),
        )
    if boundary and boundary.first_moved and boundary.moved >= SHARE * boundary.pairs:
        prompt, response, behind, alone = boundary.first_moved
        yield _finding(
            f"In {boundary.moved} of {boundary.pairs} pairs the response begins with other ids behind its prompt, as "
            "in reward training, than alone, as a word that is sampled: nothing stands between the two. Put the space "
            "there that the policy samples.",
            Evidence(
                "ids of the response",
                f"{_shown(alone[:4])} as alone",
                f"{_shown(behind[:4])} behind its prompt",
                tolerance=f"{SHARE:.0%} of pairs",
                where=f"{prompt[-20:]!r} + {response[:20]!r}",
            ),
        )
    info = feeding_tokenizer(setup, manifest)
    if info is not None:
        yield from _suffix(info)


def _suffix(info: TokenizerInfo) -> Iterator[Finding]:
    turns = turns_of(info)
    if turns is None or not info.eos or info.eos not in turns.behind_answer:
        return
    rest = turns.behind_answer.split(info.eos, 1)[1]
    if rest:
        yield _finding(
            f"The chat template writes {rest!r} behind the end of an assistant's turn, which sampled ids lack. In one "
            "turn that is normal; histories of several turns must add it.",
            Evidence("text behind the end of a turn", "''", repr(rest), where=info.where),
            Severity.INFO,
        )


def _shown(ids: tuple[int, ...]) -> str:
    return " ".join(map(str, ids)) or "nothing"


def _finding(message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role="tokenizer", severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


def _pieces(healthy: Any) -> Any:
    """A tokenizer over the same ids whose words are pieces of characters: " :" and ": the" may merge."""
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never", split=False)
    inner.decoder = tokenizers.decoders.Metaspace(replacement="_", prepend_scheme="never", split=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(healthy.tokenizer), special_tokens=special, show_progress=False
    )
    inner.train_from_iterator([f"a{'_' * n}b" for n in range(1, 9)] + list(healthy.prompts)[:4], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


@retokenisation_drift.fault("prompts that end in a space which merges with the response's")
def _(healthy: Any) -> Any:
    pairs = [(f"{p} ", f" {c}", f" {r}") for p, c, r in healthy.preferences if len(p + c) < 48 and len(p + r) < 48]
    return healthy.but(tokenizer=_pieces(healthy), preferences=pairs, declared={"prompt_length": 32}, step=None)


@retokenisation_drift.fault("a tokenizer that changes texts when it decodes")
def _(healthy: Any) -> Any:
    import copy

    import tokenizers

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Replace("the", "a")
    return healthy.but(tokenizer=tokenizer, step=None)

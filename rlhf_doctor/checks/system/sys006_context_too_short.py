"""SYS006: every role can hold prompt and response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import blamed, spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.capacity import Capacity, needed_length
from rlhf_doctor.instruments.prompts import Prompts
from rlhf_doctor.instruments.readings import Architecture, Manifest

# Positions of these are a slope on the attention, a relative bucket or none at all: no length is the last.
UNLIMITED = ("bloom", "mpt", "t5", "mt5", "umt5", "mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "xlnet")
LONGER = ("linear", "dynamic", "yarn", "longrope", "su", "ntk")


@check(
    "SYS006",
    "every role can hold prompt and response",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    explains=("TOK008", "REW009", "REW012"),
    across_roles=True,
)
def context_too_short(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    prompts: Prompts | None = None,
    capacity: Mapping[Role, Capacity] | None = None,
    architecture: Mapping[Role, Architecture] | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        The positions of each model's config, scaled rotary embeddings included, and the length limit of an own reward
        tokenizer, against prompt_length + response_length as declared (or the longest prompt, and max_new_tokens of
        the generation config). A model in memory is also called with a text of that length, and the first and last
        tokens are exchanged: a score that does not move was computed from cut text.

    Why it matters:
        Beyond its positions a model with a position table stops with an index error, and one with rotary positions
        reads something it never saw. A reward model that cuts its input scores a response without its end, or
        without its question.

    What it looks like when broken:
        The reward falls or freezes for long responses only; chosen and rejected get equal scores; an index error
        after hours, at the first long response.

    How to fix:
        1. Lower response_length or prompt_length until their sum fits every role.
        2. Or use models with more positions, or raise the truncation limit of the reward path.

    Source:
        https://github.com/LAION-AI/Open-Assistant/pull/2071 (truncation that drops the reply being scored);
        positions of rotary models: Su et al. 2021, https://arxiv.org/abs/2104.09864; their extension: Peng et al.
        2023, https://arxiv.org/abs/2309.00071.
    """
    policy = manifest.get("policy")
    length = needed_length(setup, prompts.longest if prompts else None, policy.generation_config if policy else None)
    if length is None:
        raise Unavailable("needs declared prompt_length and response_length")
    short: dict[Role, tuple[str, str]] = {}
    for role, m in manifest.items():
        limit = _positions(m)
        if limit is not None and limit < length:
            short[role] = (f"has {limit} positions", str(limit))
    for role, measured in (capacity or {}).items():
        transformer = architecture is None or role not in architecture or architecture[role].is_transformer
        if measured.raised:
            short[role] = (f"raises for so long a text ({measured.raised[:160]})", "it raised")
        elif transformer and (measured.blind_to_end or measured.blind_to_start):
            part = "last" if measured.blind_to_end else "first"
            short[role] = (f"does not read the {part} tokens of so long a text", f"not the {part}")
    if short:
        yield _finding(short, length)
    yield from _cut_by_tokenizer(setup, manifest, length)


def _positions(m: Manifest) -> int | None:
    """The tokens that a model's positions reach, None where they have no end or are unknown."""
    if m.max_positions is None or m.model_type in UNLIMITED or m.config.get("alibi"):
        return None
    scaling = m.config.get("rope_scaling") or m.config.get("rope_parameters") or {}
    scaling = scaling if isinstance(scaling, Mapping) else {}
    factor = scaling.get("factor")
    if scaling.get("rope_type", scaling.get("type")) not in LONGER or not isinstance(factor, (int, float)):
        return m.max_positions
    original = scaling.get("original_max_position_embeddings")
    return max(m.max_positions, int(factor * (original if isinstance(original, int) else m.max_positions)))


def _finding(short: Mapping[Role, tuple[str, str]], length: int) -> Finding:
    said = ", ".join(f"the {spoken(role)} {what}" for role, (what, _) in short.items())
    return Finding(
        f"Prompt and response together take {length} tokens; {said}. Shorten them or use a model that holds them.",
        role=blamed(tuple(short), "setup"),
        confidence=Confidence.PROVEN,
        evidence=tuple(
            Evidence("tokens it can read", f"at least {length}", seen, where=role) for role, (_, seen) in short.items()
        ),
    )


def _cut_by_tokenizer(setup: Any, manifest: Mapping[Role, Manifest], length: int) -> Iterator[Finding]:
    """An own tokenizer of the reward model encodes whole texts again, up to its limit."""
    reward = manifest.get("reward")
    info = reward.tokenizer if reward and setup.reward_tokenizer is not None else None
    if info is not None and info.model_max_length is not None and info.model_max_length < length:
        yield Finding(
            f"The reward's tokenizer stops at {info.model_max_length} tokens and prompt and response together take "
            f"{length}: wherever it truncates, the score is of cut text. Raise model_max_length.",
            role="reward",
            severity=Severity.WARNING,
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("model_max_length", f"at least {length}", str(info.model_max_length), where=info.where),
            ),
        )


@context_too_short.fault("a reward model with fewer positions than prompt and response")
def _(healthy: Any) -> Any:
    import copy

    config = copy.deepcopy(healthy.reward.config)
    config.max_position_embeddings = 24
    return healthy.but(
        reward=type(healthy.reward)(config).eval().requires_grad_(False),
        declared={"prompt_length": 16, "response_length": 16},
    )


@context_too_short.fault("a hand-written reward model that cuts its input")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import specimens

    class Cuts(specimens.HandWrittenDecoder):
        def forward(self, ids: Any, mask: Any) -> Any:
            return super().forward(ids[:, :24], mask[:, :24])

    reward = Cuts(specimens.vocabulary(healthy), pool="last").requires_grad_(False)
    return healthy.but(reward=reward, declared={"prompt_length": 16, "response_length": 16})


@context_too_short.fault("a critic's checkpoint with fewer positions")
def _(healthy_files: Any) -> Any:
    import json

    path = healthy_files.path("value") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 20}))
    return healthy_files.but(declared={"prompt_length": 12, "response_length": 20})

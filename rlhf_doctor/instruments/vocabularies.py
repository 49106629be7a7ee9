"""Whose token ids each role is fed, and whether they mean the same tokens to it. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.manifest import tokenizer_of
from rlhf_doctor.instruments.readings import Manifest, TokenizerInfo

__all__ = ["Fed", "feeding_tokenizer", "vocabularies", "words_by_id"]


@dataclass(frozen=True)
class Fed:
    """``ids_of`` is the tokenizer whose ids a role is fed; ``own`` the one in its checkpoint folder, if another.

    ``differing`` counts ids that are another token to each, special tokens that were only renamed left out; the first
    few are in ``examples`` as (id, token of ``ids_of``, token of ``own``). ``compared`` is how many ids both define.
    """

    ids_of: TokenizerInfo
    own: TokenizerInfo | None
    differing: int
    compared: int
    examples: tuple[tuple[int, str, str], ...]


def feeding_tokenizer(setup: Any, manifest: Mapping[Role, Manifest], role: Role = "policy") -> TokenizerInfo | None:
    """The tokenizer that makes the ids of a role: the setup's, else the one in the policy's folder."""
    given = tokenizer_of(setup, role)
    if given is not None:
        return given
    policy = manifest.get("policy")
    return policy.tokenizer if policy else None


@fact(Stage.STATIC)
def vocabularies(setup: Any, manifest: Mapping[Role, Manifest]) -> dict[Role, Fed]:
    """Role -> whose ids it gets, against the tokenizer that its own folder holds.

    Raises:
        Unavailable: no tokenizer is known.
    """
    found: dict[Role, Fed] = {}
    for role, m in manifest.items():
        fed = feeding_tokenizer(setup, manifest, role)
        if fed is None or m.origin in ("callable", "adapter-off"):
            continue
        own = m.tokenizer if m.origin == "checkpoint" and m.tokenizer and m.tokenizer.where != fed.where else None
        if own is None or not own.fingerprint or not fed.fingerprint or own.fingerprint == fed.fingerprint:
            found[role] = Fed(fed, own, 0, 0, ())
            continue
        theirs, mine = _by_id(_given(setup, role, fed)), _by_id(_given(setup, role, own))
        both = theirs.keys() & mine.keys()
        apart = sorted(i for i in both if theirs[i] != mine[i] and not (_special(theirs[i]) or _special(mine[i])))
        found[role] = Fed(fed, own, len(apart), len(both), tuple((i, theirs[i], mine[i]) for i in apart[:5]))
    if not found:
        raise Unavailable("needs a tokenizer")
    return found


def words_by_id(live: Any, info: TokenizerInfo) -> Mapping[int, str]:
    """Id -> token of a tokenizer in memory, else of the folder that ``info`` was read from."""
    get: Any = getattr(live, "get_vocab", None)
    return _by_id(get() if callable(get) else _of_folder(info))


def _given(setup: Any, role: Role, info: TokenizerInfo) -> Mapping[str, int]:
    for live in (setup.reward_tokenizer if role == "reward" else None, setup.tokenizer):
        get: Any = getattr(live, "get_vocab", None)
        if callable(get) and type(live).__name__ == info.where:
            vocabulary: Mapping[str, int] = get()
            return vocabulary
    return _of_folder(info)


def _of_folder(info: TokenizerInfo) -> Mapping[str, int]:
    from rlhf_doctor.instruments.tokenizer_files import token_ids

    return token_ids(Path(info.where))


def _by_id(tokens: Mapping[str, int]) -> dict[int, str]:
    return {number: token for token, number in tokens.items()}


def _special(token: str) -> bool:
    """Whether a token is written like a special one: it may be renamed (a reserved one into a pad) without harm."""
    return len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))

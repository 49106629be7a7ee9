"""Texts to token ids and back, with the setup's own tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Role

__all__ = ["live_tokenizer"]


def live_tokenizer(setup: Any, role: Role = "policy") -> Any:
    """The tokenizer object that a role's texts are encoded with: an own one of the reward's, else the setup's.

    A path is loaded from disk; without a tokenizer in the setup, the checkpoint folder of the role, then the policy's.

    Raises:
        Unavailable: there is none, or it cannot be called.
    """
    given = setup.tokenizer
    if role == "reward" and setup.reward_tokenizer is not None:
        given = setup.reward_tokenizer
    folders = [given] if given is not None else [setup.path(role), setup.path("policy")]
    for folder in folders:
        if not isinstance(folder, (str, Path)):
            if callable(folder):
                return folder
            continue
        if not any(
            (Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
        ):
            continue
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=setup.trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            raise Unavailable(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    raise Unavailable("needs a tokenizer")

"""Texts to token ids and back, with the setup's own tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Role
from rlhf_doctor.instruments.files import read_object

__all__ = ["live_tokenizer"]

# Classes that do just what tokenizer.json says.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


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
        try:
            return _loaded(Path(folder), setup.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise Unavailable(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    raise Unavailable("needs a tokenizer")


def _loaded(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of the class that its own files name.

    ``AutoTokenizer`` goes by the model's type where the files name the generic class, and may then put another
    pre-tokenizer in the place of the one in tokenizer.json.
    """
    import transformers

    named = read_object(folder / "tokenizer_config.json", {"tokenizer_class": (str,)}, []).get("tokenizer_class")
    if named in GENERIC and (folder / "tokenizer.json").exists():
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )

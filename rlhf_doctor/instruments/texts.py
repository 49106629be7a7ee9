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


class FileTokenizer:
    """What tokenizer.json alone does with a text, without transformers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(path))
        self.inner.no_truncation()
        self.inner.no_padding()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``{"input_ids": ids}`` of a text."""
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}


def live_tokenizer(setup: Any, role: Role = "policy", *, from_files: bool = False) -> Any:
    """The tokenizer object that a role's texts are encoded with: an own one of the reward's, else the setup's.

    A path is loaded from disk; without a tokenizer in the setup, the checkpoint folder of the role, then the policy's.

    Args:
        setup: the setup.
        role: whose texts.
        from_files: without transformers, of folders whose tokenizer.json says it all; it can only be called then.

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
            if from_files:
                return _of_files(Path(folder))
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

    if _says_it_all(folder):
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )


def _of_files(folder: Path) -> FileTokenizer:
    if not _says_it_all(folder):
        raise Unavailable("needs --stage probe: the tokenizer's class does more than tokenizer.json says")
    try:
        return FileTokenizer(folder / "tokenizer.json")
    except Exception as error:  # the library raises bare exceptions about what it cannot parse
        raise Unavailable(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def _says_it_all(folder: Path) -> bool:
    """Whether a tokenizer does what its tokenizer.json says and nothing else."""
    named = read_object(folder / "tokenizer_config.json", {"tokenizer_class": (str,)}, []).get("tokenizer_class")
    return named in GENERIC and (folder / "tokenizer.json").exists()

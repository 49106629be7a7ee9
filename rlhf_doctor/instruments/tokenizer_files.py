"""A tokenizer from its files: tokens, special ids, sides, limits, what is added to a text. No torch, no tokenizers."""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Broken
from rlhf_doctor.instruments.files import TOKENIZER_LIMIT, BadFile, folder_problem, read_bytes, read_json, read_object
from rlhf_doctor.instruments.readings import TokenizerInfo

__all__ = ["added_around", "fingerprint", "read_tokenizer", "tokenizer_of_folder"]

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TEXT_OR_TOKEN = (str, dict)
KINDS: Mapping[str, tuple[type, ...]] = {
    "model_max_length": (int, float),
    "padding_side": (str,),
    "truncation_side": (str,),
    "chat_template": (str, list),
    "added_tokens_decoder": (dict,),
    "auto_map": (dict,),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), (bool,)),
    **dict.fromkeys(("pad_token", "bos_token", "eos_token", "unk_token"), TEXT_OR_TOKEN),
}
JSON_KINDS: Mapping[str, tuple[type, ...]] = {"added_tokens": (list,), "model": (dict,)}
MERGES = re.compile(rb'"merges"\s*:\s*\[')
_KNOWN: dict[bytes, TokenizerInfo] = {}  # by a hash of the files: the four models of a setup mostly share one
# Classes whose padding side is not "right" unless their files say so.
PADS_LEFT = ("Llama", "CodeLlama", "Gemma", "Cohere", "XLNet", "Bloom")


def read_tokenizer(path: Path) -> TokenizerInfo | None:
    """The tokenizer in a folder, None where the folder has none.

    Raises:
        Broken: the folder is not there, or a file of the tokenizer cannot be read.
    """
    said = folder_problem(path)
    if said:
        raise Broken("tokenizer", said)
    problems: list[str] = []
    info = tokenizer_of_folder(path, problems)
    if problems:
        raise Broken("tokenizer", problems[0])
    return info


def tokenizer_of_folder(folder: Path, problems: list[str]) -> TokenizerInfo | None:
    """The tokenizer in a folder, None where it has none. Sentences about bad files are added to ``problems``."""
    if not any(os.path.lexists(folder / name) for name in FILES):
        return None
    key = _digest(folder)
    if key not in _KNOWN:
        before = len(problems)
        info = _read(folder, problems)
        if key is None or len(problems) > before:
            return info
        _KNOWN[key] = info
    return replace(_KNOWN[key], where=str(folder))


def _digest(folder: Path) -> bytes | None:
    """A hash of the tokenizer's files, None where one of them cannot be read."""
    seen = hashlib.blake2b(digest_size=16)
    for name in (*FILES, "special_tokens_map.json", "chat_template.jinja", "chat_template.json"):
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            if not path.is_file() or path.stat().st_size > TOKENIZER_LIMIT:
                return None
            with path.open("rb") as file:
                seen.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
        except OSError:
            return None
    return seen.digest()


def _read(folder: Path, problems: list[str]) -> TokenizerInfo:
    config = read_object(folder / "tokenizer_config.json", KINDS, problems)
    special = read_object(folder / "special_tokens_map.json", KINDS, problems)
    whole = _whole(folder, problems)
    try:
        vocabulary = _vocabulary(folder, whole)
    except BadFile as bad:
        problems.append(str(bad))
        vocabulary = {}
    added, bad_ids = _added(whole, config)
    if bad_ids:
        problems.append(f"{folder / bad_ids[0]} gives the added token {bad_ids[1]!r:.80} no id that can be read")
    vocabulary.update(added)

    def text(name: str) -> str | None:
        for where in (config, special):
            given = where.get(name)
            given = given.get("content") if isinstance(given, dict) else given
            if isinstance(given, str):
                return given
        return None

    pad, bos, eos = text("pad_token"), text("bos_token"), text("eos_token")
    padding, truncation = whole.get("padding"), whole.get("truncation")
    if pad is None and isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
        pad = padding["pad_token"]
    adds_bos, adds_eos = _adds(whole, config, bos, eos)
    limit = config.get("model_max_length")
    return TokenizerInfo(
        where=str(folder),
        size=max(vocabulary.values(), default=-1) + 1,
        pad=pad,
        pad_id=vocabulary.get(pad) if pad is not None else None,
        bos=bos,
        bos_id=vocabulary.get(bos) if bos is not None else None,
        eos=eos,
        eos_id=vocabulary.get(eos) if eos is not None else None,
        unk=text("unk_token"),
        padding_side=_side(config.get("padding_side"), padding, _pads_left(config)),
        truncation_side=_side(config.get("truncation_side"), truncation, False),
        model_max_length=int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else None,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=_chat_template(folder, config, problems),
        fingerprint=fingerprint(vocabulary),
        raw=config,
    )


def fingerprint(vocabulary: Mapping[str, int]) -> str:
    """A short hash of a token -> id map, "" of an empty one."""
    if not vocabulary:
        return ""
    rows = sorted(vocabulary.items(), key=itemgetter(1))
    if len(set(vocabulary.values())) < len(rows):  # two tokens of one id, in either order
        rows.sort(key=itemgetter(1, 0))
    text = "\0".join([token for token, _ in rows])
    ids = array("q", [i for _, i in rows])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass") + b"\0\0" + ids.tobytes()).hexdigest()[:16]


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id of the tokenizer in a folder, added tokens included; empty where it has none that can be read."""
    whole = _whole(folder, [])
    config = read_object(folder / "tokenizer_config.json", KINDS, [])
    try:
        return _vocabulary(folder, whole) | _added(whole, config)[0]
    except BadFile:
        return {}


def _whole(folder: Path, problems: list[str]) -> dict[str, Any]:
    return read_object(folder / "tokenizer.json", JSON_KINDS, problems, TOKENIZER_LIMIT, _without_merges)


def _without_merges(raw: bytes) -> bytes:
    """The text of tokenizer.json without a BPE model's merges, where they come last in it, as they are written.

    They are most of the file, and nothing here asks for them. (Within a JSON string the key's quotes are escaped.)
    """
    start, end = raw.rfind(b'"merges"'), raw.rfind(b"]")
    if start < 0 or not MERGES.match(raw, start) or raw[end + 1 :].split() not in ([b"}", b"}"], [b"}}"]):
        return raw
    return raw[:start] + b'"merges":[]' + raw[end + 1 :]


def _vocabulary(folder: Path, whole: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the model, without the added tokens.

    Raises:
        BadFile: the file that holds it cannot be read as one.
    """
    model = whole.get("model") or {}
    if isinstance(model.get("vocab"), (dict, list)):
        return _tokens(folder / "tokenizer.json", model["vocab"])
    if os.path.lexists(folder / "vocab.json") and not whole:
        return _tokens(folder / "vocab.json", read_json(folder / "vocab.json", TOKENIZER_LIMIT))
    if os.path.lexists(folder / "vocab.txt") and not whole:
        lines = read_bytes(folder / "vocab.txt", TOKENIZER_LIMIT).decode("utf-8", "replace").splitlines()
        return {line: i for i, line in enumerate(lines)}
    for name in ("tokenizer.model", "spiece.model"):
        if os.path.lexists(folder / name) and not whole:
            return _pieces(folder / name)
    return {}


def _tokens(path: Path, given: Any) -> dict[str, int]:
    if isinstance(given, list):  # unigram models list (piece, score)
        given = {row[0]: i for i, row in enumerate(given) if isinstance(row, list) and row and isinstance(row[0], str)}
    ids = given.values() if isinstance(given, dict) else (None,)
    if set(map(type, ids)) - {int} or not 0 <= min(ids, default=0) <= max(ids, default=0) < 1 << 31:
        raise BadFile(f"{path} should map tokens to ids that are whole numbers, and does not")
    return dict(given)


def _pieces(path: Path) -> dict[str, int]:
    """The pieces of a sentencepiece model: field 1 of the message, each with its text in its own field 1.

    Raises:
        BadFile: it is no such message. (Some tokenizer.model files are of other formats: those give no pieces.)
    """
    raw = read_bytes(path, TOKENIZER_LIMIT)
    pieces: list[str] = []
    at = 0
    try:
        while at < len(raw) and raw[at] == 0x0A:
            size, at = _varint(raw, at + 1)
            if raw[at] == 0x0A:
                length, start = _varint(raw, at + 1)
                pieces.append(raw[start : start + length].decode("utf-8"))
            at += size
    except (IndexError, UnicodeDecodeError):
        raise BadFile(f"{path} is neither a whole sentencepiece model nor of a format that is known here") from None
    return {piece: i for i, piece in enumerate(pieces)}


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if raw[at - 1] < 0x80:
            return value, at
        if shift > 63:
            raise IndexError


def _added(whole: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, Any] | None]:
    """(token -> id of the added tokens, the file and entry that cannot be read or None)."""
    found: dict[str, int] = {}
    bad: tuple[str, Any] | None = None
    rows: list[tuple[str, Any, Any]] = [
        ("tokenizer.json", row.get("id"), row) if isinstance(row, dict) else ("tokenizer.json", None, row)
        for row in whole.get("added_tokens") or ()
    ]
    rows += [("tokenizer_config.json", key, row) for key, row in (config.get("added_tokens_decoder") or {}).items()]
    for file, key, row in rows:
        content = row.get("content") if isinstance(row, dict) else row
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(number) is not int or not 0 <= number < 1 << 31 or not isinstance(content, str):
            bad = bad or (file, content)
        else:
            found[content] = number
    return found, bad


def _side(given: Any, block: Any, left: bool) -> str:
    if isinstance(given, str):
        return given
    if isinstance(block, dict) and isinstance(block.get("direction"), str):
        return str(block["direction"]).lower()
    return "left" if left else "right"


def _pads_left(config: Mapping[str, Any]) -> bool:
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    return name in PADS_LEFT


def _adds(
    whole: Mapping[str, Any], config: Mapping[str, Any], bos: str | None, eos: str | None
) -> tuple[bool | None, bool | None]:
    """Whether a text gets a BOS in front and an EOS behind: by the post-processor, else by the two settings."""
    if not whole:
        return config.get("add_bos_token"), config.get("add_eos_token")
    return added_around(whole.get("post_processor"), bos, eos)


def added_around(processor: Any, bos: str | None, eos: str | None) -> tuple[bool, bool]:
    """Whether a post-processor, as tokenizer.json has it, puts the BOS before a text and the EOS behind it."""
    front, behind = _template(processor)
    return bos is not None and bos in front, eos is not None and eos in behind


def _template(processor: Any, depth: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens before the text, tokens behind it) that a post-processor of tokenizer.json adds."""
    if not isinstance(processor, dict) or depth > 8:
        return (), ()
    if isinstance(processor.get("processors"), list):
        parts = [_template(part, depth + 1) for part in processor["processors"]]
        return tuple(t for front, _ in parts for t in front), tuple(t for _, behind in parts for t in behind)
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        pair = [processor.get("cls"), processor.get("sep")]
        names = [str(entry[0]) if isinstance(entry, list) and entry else "" for entry in pair]
        return (names[0],), (names[1],)
    front: list[str] = []
    behind: list[str] = []
    side = front
    single = processor.get("single")
    for piece in single if isinstance(single, list) else ():
        if isinstance(piece, dict) and "Sequence" in piece:
            side = behind
        elif isinstance(piece, dict) and isinstance(piece.get("SpecialToken"), dict):
            side.append(str(piece["SpecialToken"].get("id")))
    return tuple(front), tuple(behind)


def _chat_template(folder: Path, config: Mapping[str, Any], problems: list[str]) -> str | None:
    """The default chat template: its own file first, then the older places."""
    try:
        if os.path.lexists(folder / "chat_template.jinja"):
            return read_bytes(folder / "chat_template.jinja", 4 << 20).decode("utf-8")
        if os.path.lexists(folder / "chat_template.json"):
            given = read_json(folder / "chat_template.json")
            given = given.get("chat_template") if isinstance(given, dict) else given
            if isinstance(given, str):
                return given
    except BadFile as bad:
        problems.append(str(bad))
    except UnicodeDecodeError as error:
        problems.append(f"{folder / 'chat_template.jinja'} is not UTF-8 text: byte {error.start} is out of place")
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {str(row.get("name")): row.get("template") for row in given if isinstance(row, dict)}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) else None

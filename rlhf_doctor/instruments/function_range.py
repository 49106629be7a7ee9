"""What a reward function can give: on the policy's samples, on texts that it might be looking for, behind a prefill."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.on_samples import OnSamples

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["FunctionRange", "function_range"]

PLAIN = ("", "yes", "no", "42", "The answer is 7.", "one two three four five six seven eight nine ten", "a\nb\nc")
# What a pattern's parts are replaced by, so that the text left over is one that it matches, for most that are in use.
EXAMPLES = (
    (re.compile(r"\\d(\{[\d,]*\}|[*+?]*)"), "7"),
    (re.compile(r"\\w(\{[\d,]*\}|[*+?]*)"), "a"),
    (re.compile(r"\\s[*+?]*"), " "),
    (re.compile(r"\[[^\]]*\](\{[\d,]*\}|[*+?]*)"), "1"),
    (re.compile(r"\(\?[a-zA-Z:=!<]*>?|\.[*+]\??|\\[bBAZ]|[\^$()*+?]|\|.*"), ""),
    (re.compile(r"\\(.)"), r"\1"),
)


@dataclass(frozen=True)
class FunctionRange:
    """``others``: scores of other texts, among them every text that the function's code mentions.

    ``prefill``: the end of the prompt that was put before the sampled responses, and ``behind``: their scores then;
    empty without one. ``completed``: a text that the code mentions and that starts with what every prompt already ends
    in, as (that end, what a response would have to be, its score, the score of the whole text).
    """

    others: tuple[float, ...]
    prefill: str
    behind: tuple[float, ...]
    completed: tuple[tuple[str, str, float, float], ...] = ()


@role_fact(Stage.PROBE)
def function_range(role: Role, models: Models, setup: Any, reward_on_samples: OnSamples) -> FunctionRange:
    """Ask a reward function of texts for the scores of other texts.

    Raises:
        Unavailable: the reward is a model, or a function of token ids.
        Broken: the function raises.
    """
    from rlhf_doctor.instruments.scoring import score_texts
    from rlhf_doctor.instruments.texts import live_tokenizer

    live = models.get(role)
    if role != "reward" or not live.texts:
        raise Unavailable("only for reward functions of texts")
    tokenizer = live_tokenizer(setup)
    drawn = reward_on_samples.samples
    prompts = [tokenizer.decode(list(p), skip_special_tokens=True) for p in drawn.prompts]
    responses = [tokenizer.decode(list(r), skip_special_tokens=True) for r in drawn.responses]
    texts = [*PLAIN, *_mentioned(live.model)]
    others = score_texts(live, [prompts[i % len(prompts)] for i in range(len(texts))], texts)
    prefill = next((found for text in (_rendered(tokenizer), prompts[0]) if (found := _tag(text))), "")
    behind = score_texts(live, prompts, [prefill + r for r in responses]) if prefill else []
    tail = _common_end({*prompts})
    halves = [half for text in texts if (half := _begun(tail, text))]
    rests = score_texts(live, prompts[:1] * len(halves), [rest for _, rest in halves]) if halves else []
    wholes = score_texts(live, prompts[:1] * len(halves), [end + rest for end, rest in halves]) if halves else []
    completed = tuple((*half, rest, whole) for half, rest, whole in zip(halves, rests, wholes, strict=True))
    return FunctionRange(tuple(others), prefill, tuple(behind), completed)


def _common_end(prompts: set[str]) -> str:
    """What all of several prompts end in, empty where there is but one."""
    one = min(prompts, key=len)
    sizes = range(len(one), 0, -1) if len(prompts) > 1 else ()
    return next((one[-size:] for size in sizes if all(p.endswith(one[-size:]) for p in prompts)), "")


def _begun(tail: str, text: str) -> tuple[str, str] | None:
    """(the whole words that the tail ends in and the text starts with, the rest of the text), None where it doesn't."""
    tail, text = tail.rstrip(), text.lstrip()
    for size in range(min(len(tail), len(text) - 1), 1, -1):
        end, rest = text[:size], text[size:]
        before = tail[-size - 1 : -size]
        if not tail.endswith(end) or not rest.strip():
            continue
        if not (before[-1:] + end[0]).isalnum() and not (end[-1] + rest[0]).isalnum():
            return end, rest
    return None


def _tag(text: str) -> str:
    """An opening tag at the very end of a prompt."""
    found = re.search(r"<[^<>|/\s][^<>\s]*>\s*$", text)
    return found.group() if found else ""


def _rendered(tokenizer: Any) -> str:
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return ""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template may raise anything about one plain message; then nothing is known of its end
        return ""
    return str(text)


def _mentioned(function: Any) -> list[str]:
    """Texts in the function's code, closure and the globals that it names; patterns without their metacharacters."""
    found: list[str] = []
    target = getattr(function, "func", function)
    target = target if hasattr(target, "__code__") else type(target).__call__
    code = getattr(target, "__code__", None)
    if isinstance(code, CodeType):
        names = {n for part in _codes(code) for n in part.co_names}
        known = [v for n, v in getattr(target, "__globals__", {}).items() if n in names]
        for cell in getattr(target, "__closure__", None) or ():
            try:
                known.append(cell.cell_contents)
            except ValueError:  # a cell that is filled later
                continue
        for value in [
            *(c for part in _codes(code) for c in part.co_consts),
            *known,
            *getattr(function, "__dict__", {}).values(),
        ]:
            found += _strings(value)
    texts = [text for f in found for text in (f, _example(f))]
    return list(dict.fromkeys(text for text in texts if 0 < len(text) <= 200))[:64]


def _example(pattern: str) -> str:
    for part, instead in EXAMPLES:
        pattern = part.sub(instead, pattern)
    return pattern


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, re.Pattern):
        return [value.pattern] if isinstance(value.pattern, str) else []
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [str(v) for v in list(value)[:64] if isinstance(v, (str, int, float))]
    return []

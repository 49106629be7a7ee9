"""Chat templates, rendered without a tokenizer: by jinja2, sandboxed, as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_doctor.instruments.readings import TokenizerInfo

__all__ = ["QUESTION", "Turns", "render", "turns_of"]

QUESTION, ANSWER = "What is a fox like?", "It is quick."


@dataclass(frozen=True)
class Turns:
    """A template's parts: the text before and behind a user's words, what asks for an answer, and what stands behind
    the assistant's words. ``whole`` is the rendered conversation."""

    before: str
    behind: str
    ask: str
    behind_answer: str
    whole: str


def turns_of(info: TokenizerInfo) -> Turns | None:
    """The parts of a tokenizer's template, None where it has none or it cannot be rendered with two plain turns."""
    user = [{"role": "user", "content": QUESTION}]
    asked, waiting = render(info, user), render(info, user, add_generation_prompt=True)
    whole = render(info, [*user, {"role": "assistant", "content": ANSWER}])
    if asked is None or waiting is None or whole is None or QUESTION not in asked or ANSWER not in whole:
        return None
    before, behind = asked.split(QUESTION, 1)
    ask = waiting[len(asked) :] if waiting.startswith(asked) else ""
    return Turns(before, behind, ask, whole.split(ANSWER, 1)[1], whole)


def render(
    info: TokenizerInfo, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str | None:
    """The conversation as text, None where there is no template or it refuses."""
    if not info.chat_template:
        return None
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    sandbox.globals.update(raise_exception=refuse, strftime_now=lambda _: "1 January 2025")
    try:
        text = sandbox.from_string(info.chat_template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=info.bos or "",
            eos_token=info.eos or "",
            pad_token=info.pad or "",
            unk_token=info.unk or "",
        )
    except Exception:  # a template is its owner's program and may raise anything
        return None
    return str(text)

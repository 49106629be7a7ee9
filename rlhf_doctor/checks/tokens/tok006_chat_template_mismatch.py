"""TOK006: everyone renders a conversation alike, with the generation prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.chat import Turns, turns_of
from rlhf_doctor.instruments.readings import Manifest, TokenizerInfo
from rlhf_doctor.instruments.vocabularies import feeding_tokenizer


@check("TOK006", "everyone renders a conversation alike", stage=Stage.STATIC, severity=Severity.ERROR)
def chat_template_mismatch(setup: Any, manifest: Mapping[Role, Manifest]) -> Iterator[Finding]:
    """
    What it examines:
        One conversation of a question and an answer, rendered by the template of the policy's tokenizer, of the
        tokenizers in the policy's, reference's and reward's folders, and of an own reward tokenizer. And whether
        prompts that are texts in the template's format end in its generation prompt.

    Why it matters:
        A reward model judges the format it was trained on; in another format its scores are about something else. A
        policy that is given another template in PPO than in SFT starts from text it never saw. Without the generation
        prompt it writes the user's next turn, or the header itself.

    What it looks like when broken:
        Accuracy on preference pairs near chance in the loop and high in reward training; responses that begin with
        role markers.

    How to fix:
        1. Take the tokenizer of the SFT checkpoint for PPO, template included.
        2. Render the conversation for the reward model with its own template from the messages, not from the text of
           the policy's.
        3. Render prompts with add_generation_prompt=True.

    Source:
        https://github.com/OpenRLHF/OpenRLHF/issues/592 (one template forced on both);
        https://huggingface.co/docs/transformers/chat_templating (generation prompts).
    """
    info = feeding_tokenizer(setup, manifest)
    if info is None or not info.chat_template:
        raise Unavailable("needs a tokenizer with a chat template")
    mine = turns_of(info)
    if mine is None:
        raise Unavailable("the chat template cannot be rendered with a question and an answer")
    for role, other in _others(setup, manifest, info):
        theirs = turns_of(other)
        if theirs is None or theirs.whole.strip() == mine.whole.strip():
            continue
        foreign = role == "reward" and setup.reward_tokenizer is not None and other.fingerprint != info.fingerprint
        yield Finding(
            f"The {spoken(role)}'s tokenizer renders the same conversation differently from the policy's. "
            + (
                "That is sound only if texts are rendered anew for it, from the messages."
                if foreign
                else "Use one template, the one that it was trained with."
            ),
            role=role,
            severity=Severity.INFO if foreign else None,
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence("a question and an answer as text", repr(mine.whole), repr(theirs.whole), where=other.where),
            ),
        )
    yield from _prompts(setup, mine)


def _others(setup: Any, manifest: Mapping[Role, Manifest], info: TokenizerInfo) -> Iterator[tuple[Role, TokenizerInfo]]:
    roles: tuple[Role, ...] = ("policy", "reference", "reward")
    for role in roles:
        m = manifest.get(role)
        own = m.tokenizer if m else None
        if own is not None and own.chat_template and own != info:
            yield role, own


def _prompts(setup: Any, mine: Turns) -> Iterator[Finding]:
    texts = [t for t in setup.prompts or () if isinstance(t, str)] if not isinstance(setup.prompts, Mapping) else []
    marker = mine.behind.strip()
    if not texts or not marker or not mine.ask.strip():
        return
    stopped = [text for text in texts if text.rstrip().endswith(marker)]
    if stopped:
        yield Finding(
            f"{len(stopped)} of {len(texts)} prompts are rendered by the chat template and end without its generation "
            f"prompt {mine.ask!r}: the policy will write that first. Render with add_generation_prompt=True.",
            role="tokenizer",
            confidence=Confidence.PROVEN,
            evidence=(Evidence("end of a prompt", repr(mine.ask), repr(stopped[0][-40:]), where="prompts"),),
        )


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@chat_template_mismatch.fault("a reward tokenizer with another template")
def _(healthy: Any) -> Any:
    import copy

    tokenizer, reward_tokenizer = copy.deepcopy(healthy.tokenizer), copy.deepcopy(healthy.tokenizer)
    tokenizer.chat_template = CHAT
    reward_tokenizer.chat_template = CHAT.replace("{{ m.role }} :", "[{{ m.role }}]")
    return healthy.but(tokenizer=tokenizer, reward_tokenizer=reward_tokenizer)


@chat_template_mismatch.fault("a reward checkpoint with another template")
def _(healthy_files: Any) -> Any:
    for role, template in (("policy", CHAT), ("reward", CHAT.replace(" </s>", " ."))):
        (healthy_files.path(role) / "chat_template.jinja").write_text(template)
    return healthy_files.but(tokenizer=healthy_files.path("policy"))


@chat_template_mismatch.fault("prompts without the generation prompt")
def _(healthy: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(healthy.tokenizer)
    tokenizer.chat_template = CHAT
    return healthy.but(
        tokenizer=tokenizer, prompts=[f"user : {p} </s>" for p in healthy.prompts], declared={"prompt_length": 32}
    )

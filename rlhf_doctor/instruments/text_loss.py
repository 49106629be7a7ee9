"""How well a policy predicts the setup's own texts, and whether it would stop at their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Manifest, Output
from rlhf_doctor.instruments.samples import stop_ids

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["TextLoss", "text_loss"]

TEXTS = 16
LONGEST = 256


@dataclass(frozen=True)
class TextLoss:
    """Mean negative log-likelihood in nats per token of the setup's texts, beside that of a uniform guess.

    ``source``: "preferences" (tokens of the preferred responses after their prompts) or "prompts". ``stop_chance``:
    the mean probability of a stop token right after a whole preferred response, None where that cannot be said.
    ``lengths``: tokens of the preferred responses.
    """

    nll: float
    uniform: float
    tokens: int
    source: str
    stop_chance: float | None
    lengths: tuple[int, ...]

    @property
    def ignorant(self) -> bool:
        """No better than a guess that knows nothing: within a twentieth of it, or worse; NaN included."""
        return not self.nll < 0.95 * self.uniform


@role_fact(Stage.PROBE)
def text_loss(role: Role, models: Models, setup: Any, manifest: Manifest, output: Output) -> TextLoss:
    """Score up to 16 preferred responses after their prompts, or, without preferences, the prompts.

    Raises:
        Unavailable: the role is not the policy, or there are no texts.
        Broken: the model cannot be called.
    """
    import torch

    if role != "policy" or output.kind != "vocabulary" or output.meaningless:
        raise Unavailable("needs a policy that gives logits over the vocabulary")
    live = models.get(role)
    pairs, source = _texts(setup)
    width = output.shape[-1]
    rows = [_fitted(p, r, manifest) for p, r in pairs if len(p) and len(r) and max(*p, *r) < width]
    if not rows:
        raise Unavailable("needs preferences or prompts that fit the policy's vocabulary and positions")
    stops = [i for i in stop_ids(manifest) if i < width]
    total, count, stopping = 0.0, 0, list[float]()
    with torch.no_grad(), live.kept():
        for prompt, response, complete in rows:
            ids = torch.tensor([[*prompt, *response]])
            logits = live.read(ids, torch.ones_like(ids)).tensor.float().cpu().reshape(ids.shape[1], -1)
            if logits.shape[-1] != width:
                raise Unavailable("the policy's logits are of another width for another text")
            logprobs = logits[len(prompt) - 1 :].log_softmax(-1)
            total -= float(logprobs[:-1].gather(-1, ids[0, len(prompt) :, None]).sum())
            count += len(response)
            if complete:
                stopping.append(float(logprobs[-1, stops].exp().sum()))
    lengths = [len(r) for _, r in pairs]
    return TextLoss(
        nll=total / count,
        uniform=log(width),
        tokens=count,
        source=source,
        stop_chance=sum(stopping) / len(stopping) if stopping and stops and source == "preferences" else None,
        lengths=tuple(lengths) if source == "preferences" else (),
    )


def _fitted(prompt: list[int], response: list[int], manifest: Manifest) -> tuple[list[int], list[int], bool]:
    """Prompt and response cut to what the model and the patience hold, and whether the response is whole."""
    room = min(manifest.max_positions or LONGEST, LONGEST)
    prompt = prompt[-(room // 2) :]
    return prompt, response[: room - len(prompt)], len(prompt) + len(response) <= room


def _texts(setup: Any) -> tuple[list[tuple[list[int], list[int]]], str]:
    """(prompt ids, ids to predict) and where they are from."""
    if setup.preferences:
        from rlhf_doctor.instruments.texts import live_tokenizer

        tokenizer = live_tokenizer(setup)
        chosen = [(str(p), str(c)) for p, c, *_ in _spread(setup.preferences)]
        return [_split(tokenizer, p, c) for p, c in chosen], "preferences"
    prompts = setup.prompts
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        ids = [[int(t) for t in row] for row in prompts["input_ids"][:TEXTS]]
        mask = prompts.get("attention_mask")
        keep = [[int(m) for m in row] for row in mask[:TEXTS]] if mask is not None else [[1] * len(row) for row in ids]
        rows = [[t for t, m in zip(row, some, strict=True) if m] for row, some in zip(ids, keep, strict=True)]
    else:
        texts = [text for text in _spread(prompts or ()) if isinstance(text, str)]
        if not texts:
            raise Unavailable("needs preferences or prompts")
        from rlhf_doctor.instruments.texts import live_tokenizer

        tokenizer = live_tokenizer(setup)
        rows = [[int(t) for t in tokenizer(text)["input_ids"]] for text in texts]
    return [(row[:1], row[1:]) for row in rows], "prompts"


def _spread(items: Sequence[Any]) -> list[Any]:
    return [items[i * len(items) // TEXTS] for i in range(TEXTS)] if len(items) > TEXTS else list(items)


def _split(tokenizer: Any, prompt: str, chosen: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of what follows it, an EOS that the tokenizer appends taken off both."""
    joined = prompt + chosen if not prompt or prompt[-1].isspace() or chosen[:1].isspace() else f"{prompt} {chosen}"
    first, whole = ([int(t) for t in tokenizer(text)["input_ids"]] for text in (prompt, joined))
    eos = getattr(tokenizer, "eos_token_id", None)
    while first and first[-1] == eos:
        first.pop()
    while whole and whole[-1] == eos:
        whole.pop()
    same = next((i for i, (a, b) in enumerate(zip(first, whole, strict=False)) if a != b), min(len(first), len(whole)))
    return whole[:same], whole[same:]

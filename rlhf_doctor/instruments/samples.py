"""A few responses sampled from a language model, one token at a time, at temperature 1 from the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.calling import CACHES, cache_argument, pick
from rlhf_doctor.instruments.readings import Manifest, Output

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["Samples", "samples", "stop_ids"]

DEFAULT_LIMIT = 53  # TRL's response_length
# A small model is sampled to the length the loop uses; a large one only as far as a laptop gets in some seconds.
PROMPTS = (4, 2)
PER_PROMPT = 8
LIMITS = (256, 24)


@dataclass(frozen=True)
class Samples:
    """S sampled responses to the setup's own prompts.

    ``prompts`` and ``responses`` are token ids, one prompt for each response. A response ends with its stop token
    where it has one; ``ended`` says so. ``stop_chance`` is the mean probability of a stop token over the response's
    tokens. ``limit`` is the number of tokens after which sampling stopped, ``wanted`` the number the setup declares.
    ``stop_ids`` are empty where none is known: then nothing can end. ``entropy`` is the mean entropy in nats of the
    distributions that were sampled from.
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    stop_chance: tuple[float, ...]
    stop_ids: tuple[int, ...]
    limit: int
    wanted: int
    entropy: float
    cached: bool

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Prompt and response of each."""
        return tuple(p + r for p, r in zip(self.prompts, self.responses, strict=True))


@role_fact(Stage.PROBE)
def samples(role: Role, models: Models, setup: Any, manifest: Manifest, output: Output) -> Samples:
    """Eight responses to each of up to four prompts (two for a large model).

    Every prompt is a batch of its own, so that no padding is involved. The seed makes the draw the same every time.

    Raises:
        Unavailable: the role is no language model, or there are no prompts.
        Broken: the model cannot be called.
    """
    if role not in ("policy", "reference"):
        raise Unavailable(f"the {role} is not sampled from")
    if output.kind != "vocabulary" or not output.finite:
        raise Unavailable(f"needs finite logits over the vocabulary to sample from the {role}")
    live = models.get(role)
    prompts = [p for p in _prompts(setup, manifest) if p][: PROMPTS[live.large]]
    if not prompts:
        raise Unavailable("needs prompts")
    wanted = setup.declared.get("response_length")
    wanted = wanted if isinstance(wanted, int) and wanted > 0 else DEFAULT_LIMIT
    limit = min(wanted, LIMITS[live.large])
    if manifest.max_positions:
        limit = min(limit, manifest.max_positions - max(len(p) for p in prompts))
    if limit < 1:
        raise Unavailable("the prompts leave no room for a response")
    stops = stop_ids(manifest)
    size = min(output.shape[-1], manifest.tokenizer.size if manifest.tokenizer else output.shape[-1])
    import torch

    generator = torch.Generator().manual_seed(models.options.seed)
    found: list[tuple[tuple[int, ...], tuple[int, ...], bool, float]] = []
    entropies: list[float] = []
    cached = True
    with torch.no_grad(), live.kept():
        for prompt in prompts:
            drawn, cached = _draw(live, prompt, limit, size, stops, generator, entropies, cached)
            found += drawn
    return Samples(
        prompts=tuple(f[0] for f in found),
        responses=tuple(f[1] for f in found),
        ended=tuple(f[2] for f in found),
        stop_chance=tuple(f[3] for f in found),
        stop_ids=stops,
        limit=limit,
        wanted=wanted,
        entropy=sum(entropies) / max(len(entropies), 1),
        cached=cached,
    )


def _draw(
    live: Live,
    prompt: Sequence[int],
    limit: int,
    size: int,
    stops: tuple[int, ...],
    generator: torch.Generator,
    entropies: list[float],
    cached: bool,
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...], bool, float]], bool]:
    import torch

    ids = torch.tensor([list(prompt)] * PER_PROMPT, device=live.device)
    stop = torch.tensor(stops, dtype=torch.long)
    ended = torch.zeros(PER_PROMPT, dtype=torch.bool)
    chances: list[torch.Tensor] = []
    cache: Any = None
    while ids.shape[1] < len(prompt) + limit and not bool(ended.all()):
        logits, cache = _next_logits(live, ids, cache, cached)
        cached = cache is not None
        logits = logits[:, :size].float().cpu()
        if not bool(torch.isfinite(logits.logsumexp(-1)).all()):
            raise Unavailable(f"the {live.role}'s logits are not finite while sampling")
        probabilities = logits.softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        entropy = torch.special.entr(probabilities).sum(-1)
        entropies += entropy[~ended].tolist()
        chances.append(probabilities[:, stop[stop < size]].sum(-1))
        ended = ended | torch.isin(token, stop)
        ids = torch.cat([ids, token[:, None].to(ids.device)], 1)
    responses = ids[:, len(prompt) :].cpu()
    chance = torch.stack(chances, 1)
    found = []
    for row, likely in zip(responses, chance, strict=True):
        hits = torch.isin(row, stop).nonzero().reshape(-1)
        length = int(hits[0]) + 1 if len(hits) else len(row)
        found.append((tuple(prompt), tuple(row[:length].tolist()), bool(len(hits)), float(likely[:length].mean())))
    return found, cached


def _next_logits(live: Live, ids: torch.Tensor, cache: Any, cached: bool) -> tuple[torch.Tensor, Any]:
    """Logits (B, V) after the last of ids (B, T), and the cache for the next call, None where the model has none."""
    import torch

    parameters = live.caller.signature
    name, theirs = cache_argument(parameters)
    if cached and live.caller.custom is None and name and theirs:
        step = ids if cache is None else ids[:, -1:]
        more: dict[str, Any] = {}
        if "position_ids" in parameters:
            more["position_ids"] = torch.arange(ids.shape[1] - step.shape[1], ids.shape[1], device=ids.device)[None]
        try:
            raw = live.module(
                input_ids=step, attention_mask=torch.ones_like(ids), use_cache=True, **{name: cache}, **more
            )
            following = next((raw[n] for n in CACHES if n in raw), None) if isinstance(raw, Mapping) else None
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            following = None  # a cache that cannot be used is another check's matter; sampling goes on without
        if following is not None:
            called = pick(live.role, raw, *step.shape)
            if called is not None and called.tensor.dim() == 3:
                return called.tensor[:, -1], following
    tensor = live.read(ids, torch.ones_like(ids)).tensor
    if tensor.dim() == 2 and tensor.shape[0] == ids.numel():
        tensor = tensor.reshape(*ids.shape, -1)
    if tensor.dim() != 3:
        raise Broken(live.role, f"{live.role}: logits of shape {tuple(tensor.shape)} for {tuple(ids.shape)} token ids")
    return tensor[:, -1], None


def _prompts(setup: Any, manifest: Manifest) -> list[list[int]]:
    """Ids of the setup's prompts, pads taken out; a spread over the list rather than its start."""
    given = setup.prompts
    if isinstance(given, Mapping) and "input_ids" in given:
        rows = [[int(t) for t in row] for row in given["input_ids"]]
        mask = given.get("attention_mask")
        if mask is not None:
            rows = [[t for t, m in zip(row, keep, strict=True) if int(m)] for row, keep in zip(rows, mask, strict=True)]
        return _spread(rows)
    texts = [text for text in (given or ()) if isinstance(text, str)]
    if not texts:
        return []
    from rlhf_doctor.instruments.texts import live_tokenizer

    tokenizer = live_tokenizer(setup)
    rows = [[int(t) for t in tokenizer(text)["input_ids"]] for text in _spread(texts)]
    limit = manifest.embedding_rows or manifest.vocab_size
    return [row for row in rows if not limit or max(row, default=0) < limit]


def _spread(items: list[Any]) -> list[Any]:
    count = max(PROMPTS)
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def stop_ids(manifest: Manifest) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, the generation config's (one or a list), the model config's."""
    found: list[int] = []
    tokenizer_eos = manifest.tokenizer.eos_id if manifest.tokenizer else None
    for given in (tokenizer_eos, manifest.generation_config.get("eos_token_id"), manifest.config.get("eos_token_id")):
        found += [given] if isinstance(given, int) else list(given) if isinstance(given, (list, tuple)) else []
    return tuple(sorted(set(found)))

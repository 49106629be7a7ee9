"""Invariance: the same text alone, padded on either side, beside other texts, twice, and with the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.calling import CACHES, IDS_NAMES, cache_argument, pick
from rlhf_doctor.instruments.readings import Inputs, Invariance, Output, Shift

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["invariance"]

# Share of the output's spread over states that rounding explains. float32 forward passes of these sizes differ by
# some 1e-6 of it between batch shapes, bfloat16 by a few 1e-2; a wrong mask or position moves it by tenths.
RELATIVE = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.2, "float16": 0.05}
CACHED = 5  # tokens that are decoded with the cache: each reads all weights once
EPSILON = {"float64": 2e-16, "float32": 1.2e-7, "bfloat16": 7.8e-3, "float16": 9.8e-4}


@role_fact(Stage.PROBE)
def invariance(role: str, setup: Any, models: Models, inputs: Inputs, output: Output) -> Invariance:
    """How far a role's output for one text moves when nothing about the text changes.

    Compared are log-probabilities of the tokens that follow (policy, reference), values of the states, or scores.
    "repeat" runs in the mode the model was handed over in, everything else in eval mode. Where some module was handed
    over in train mode, "repeat in eval mode" says whether eval() ends the randomness. For a language model without a
    mask "left padding" is measured only where prompts of different lengths are padded there.

    Raises:
        Broken: the model cannot be called.
        Unavailable: the output of one text has another size in another batch.
    """
    import torch

    from rlhf_doctor.instruments.models import padded

    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    _ = live.module
    text, others = inputs.sequences[0], list(inputs.sequences[1:])
    changed = [tuple(reversed(other)) for other in others]
    shifts: dict[str, Shift] = {}
    undecided: dict[str, str] = {}
    with torch.no_grad(), live.kept():
        alone = _numbers(live, *padded([text], inputs.pad_id, "right"), text)
        scale = _spread(alone, output)
        tolerance = RELATIVE.get(output.dtype, 0.1) * scale + 8 * EPSILON.get(output.dtype, 0.0) * float(
            alone.abs().max()
        )
        for name, side, rows in (
            ("right padding", "right", [text, *others]),
            ("left padding", "left", [text, others[-1]]),
        ):
            if side == "left" and not live.caller.takes_mask and not _pads_left(role, setup, inputs):
                undecided[name] = "the model takes no mask"
                continue
            moved = _numbers(live, *padded(rows, inputs.pad_id, side), text, once=side == "right")
            shifts[name] = Shift(_apart(moved, alone), tolerance, scale, f"beside {len(rows) - 1} longer texts")
            if not shifts[name].moved:  # what other texts and pads together do not move, other texts do not
                shifts.setdefault("neighbours", shifts[name])
                continue
            beside = _numbers(live, *padded([text, changed[-1]], inputs.pad_id, side, len(rows[-1])), text)
            change = Shift(_apart(beside, moved), tolerance, scale, f"other neighbours, {side} padding")
            if "neighbours" not in shifts or not change.largest <= shifts["neighbours"].largest:
                shifts["neighbours"] = change
        if role in ("policy", "reference") and _packs(setup):
            moved_by = [_packed(live, other[: len(text)], text) for other in (others[-1], changed[-1])]
            shifts["packed neighbours"] = Shift(_apart(*moved_by), tolerance, scale, "behind other texts in its row")
        if role in ("policy", "reference"):
            try:
                cached = _with_cache(live, text[:CACHED])
                apart = _apart(cached, alone[: len(cached)])
                shifts["cache"] = Shift(apart, tolerance, scale, "one token at a time")
            except Unavailable as reason:
                undecided["cache"] = str(reason)
    mode = "train" if getattr(live.model, "training", False) else "eval"

    def repeated(evaluating: bool, detail: str) -> Shift:
        many = alone.numel() > 4  # few numbers can come out the same twice by chance, many hardly
        batch = padded([text] if many else inputs.sequences, inputs.pad_id, "right")
        with torch.no_grad(), live.kept(evaluating=evaluating):
            first = _numbers(live, *batch, text, once=True, every=True)
            again = [_numbers(live, *batch, text, every=True) for _ in range(1 if many else 2)]
        return Shift(max(_apart(other, first) for other in again), tolerance, scale, detail)

    shifts["repeat"] = repeated(False, f"twice, in {mode} mode")
    if any(child.training for child in live.module.modules()):
        shifts["repeat in eval mode"] = repeated(True, "twice, in eval mode")
    return Invariance(shifts, undecided, mode)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        raise Unavailable("the output of one text changes its size with what stands beside it in the batch")
    return float((a - b).abs().max())


def _packs(setup: Any) -> bool:
    """Whether the setup's prompts are several to a row, told apart by masks of 1, 2, …"""
    rows = setup.prompts.get("attention_mask") if isinstance(setup.prompts, Mapping) else None
    return rows is not None and any(int(m) > 1 for row in rows for m in row)


def _packed(live: Live, before: tuple[int, ...], text: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of a text that stands behind another one in its row, under a mask of ones and twos."""
    import torch

    ids = torch.tensor([[*before, *text]], device=live.device)
    mask = torch.tensor([[1] * len(before) + [2] * len(text)], device=live.device)
    tensor = live.read(ids, mask).tensor.double().cpu()
    if tuple(tensor.shape[:2]) != tuple(ids.shape):
        raise Unavailable("the output of a packed row does not have its width")
    return following(tensor[0, len(before) :], text)


def _pads_left(role: str, setup: Any, inputs: Inputs) -> bool:
    """Whether a language model's prompts are padded on the left: the tokenizer does, and they differ in length."""
    if role not in ("policy", "reference") or inputs.padding_side != "left" or not setup.prompts:
        return False
    if isinstance(setup.prompts, Mapping):
        rows = setup.prompts.get("attention_mask")
        return rows is not None and len({sum(int(m) for m in row) for row in rows}) > 1
    texts = [text for text in list(setup.prompts)[:64] if isinstance(text, str)]
    return callable(setup.tokenizer) and len({len(setup.tokenizer(text)["input_ids"]) for text in texts}) > 1


def _spread(alone: torch.Tensor, output: Output) -> float:
    if alone.numel() > 1:
        return float(alone.std())
    return output.std_over_sequences


def _numbers(
    live: Live,
    ids: torch.Tensor,
    mask: torch.Tensor,
    text: tuple[int, ...],
    *,
    once: bool = False,
    every: bool = False,
) -> torch.Tensor:
    """What is compared of the first row: float64, (n - 1,) log-probabilities, (n,) values or (1,) score.

    ``once``: the batch may have been read before, and is read only once where that cannot make a difference.
    ``every``: where there is one score a row, those of all rows, (B,).
    """
    tensor = (live.read_once(ids, mask) if once else live.read(ids, mask)).tensor
    if tensor.dim() >= 2 and tensor.shape[:2] == ids.shape:
        tensor = tensor[:1]  # a vocabulary wide: the other rows are not worth a float64 copy
    tensor = tensor.double().cpu()
    if live.role == "value" and tuple(tensor.shape[:2]) == (ids.shape[0], ids.shape[1] - 1):
        # A critic that leaves out the row's last token.
        return tensor.reshape(*tensor.shape[:2], -1)[0, mask[0, :-1].bool()][: len(text) - 1].reshape(-1)
    if tensor.dim() >= 2 and tensor.shape[1] == ids.shape[1]:
        real = tensor[0][mask[0].bool()]
        if live.role in ("policy", "reference") and real.dim() == 2:
            return following(real, text)
        return real[:, 0] if real.dim() == 2 and real.shape[1] == 1 else real.reshape(-1)
    if tensor.shape[0] == ids.numel():
        real = tensor.reshape(*ids.shape, -1)[0][mask[0].bool()]
        return following(real, text) if live.role in ("policy", "reference") else real.reshape(-1)
    return tensor.reshape(-1) if every else tensor[0].reshape(-1)


def following(logits: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of tokens 1 … n-1 under the logits (n, V) at 0 … n-2."""
    import torch

    targets = torch.tensor(text[1:])
    if int(targets.max()) >= logits.shape[-1]:
        raise Unavailable("the output is narrower than the vocabulary")
    return logits[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def _with_cache(live: Live, text: tuple[int, ...]) -> torch.Tensor:
    """The same log-probabilities, decoded one token at a time with the key-value cache."""
    import torch

    parameters = live.caller.signature
    name, theirs = cache_argument(parameters)
    if getattr(getattr(live.model, "config", None), "is_encoder_decoder", False):
        raise Unavailable("an encoder-decoder is decoded in another way")
    if name is None or live.caller.custom is not None:
        raise Unavailable("the model's forward takes no key-value cache")
    cache: Any = None
    logits = []
    for position, token in enumerate(text):
        ids = torch.tensor([[token]], device=live.device)
        seen = torch.ones(1, position + 1, dtype=torch.long, device=live.device)
        try:
            raw = live.module(**_one_more(parameters, ids, seen), **{name: cache})
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if theirs:
                raise Broken(live.role, f"{live.role}: decoding with the cache failed: {said}") from error
            raise Unavailable(f"how to decode with the cache {name!r} could not be found out: {said}") from error
        cache = _cache_of(raw, name)
        if cache is None:
            raise Unavailable(f"the model returns no {name}")
        called = pick(live.role, raw, 1, 1)
        if called is None or called.tensor.dim() < 2:
            raise Unavailable("the model gives no logits for one token")
        logits.append(called.tensor.reshape(-1, called.tensor.shape[-1])[-1].double().cpu())
    return following(torch.stack(logits), text)


def _one_more(
    parameters: Mapping[str, inspect.Parameter], ids: torch.Tensor, seen: torch.Tensor
) -> dict[str, torch.Tensor | bool]:
    """Arguments for one further token (1, 1) after those seen (1, position + 1), by what the parameters are called."""
    plain = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given: dict[str, torch.Tensor | bool] = {next((n for n in IDS_NAMES if n in plain), plain[0]): ids}
    for name in plain:
        if name in ("attention_mask", "mask", "attn_mask", "masks"):
            given[name] = seen
        elif name in ("position_ids", "positions", "pos", "pos_ids", "input_pos"):
            given[name] = seen.sum(-1, keepdim=True) - 1
        elif name in ("use_cache", "return_cache", "return_past_key_values"):
            given[name] = True
    return given


def _cache_of(raw: Any, name: str) -> Any:
    """The cache in an output: under a cache's name, or what stands behind the logits in a tuple and is no value."""
    if isinstance(raw, Mapping):
        return next((raw[n] for n in (name, *CACHES) if raw.get(n) is not None), None)
    if isinstance(raw, (tuple, list)) and not hasattr(raw, "_fields"):
        last = next((part for part in reversed(raw[1:]) if part is not None), None)
        return None if getattr(last, "ndim", 4) < 4 else last
    return next((c for n in (name, *CACHES) if (c := getattr(raw, n, None)) is not None), None)

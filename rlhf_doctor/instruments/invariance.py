"""Invariance: the same text alone, padded on either side, beside other texts, twice, and with the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Inputs, Invariance, Output, Shift

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["invariance"]

# Share of the output's spread over states that rounding explains. float32 forward passes of these sizes differ by
# some 1e-6 of it between batch shapes, bfloat16 by a few 1e-2; a wrong mask or position moves it by tenths.
RELATIVE = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.2, "float16": 0.05}
EPSILON = {"float64": 2e-16, "float32": 1.2e-7, "bfloat16": 7.8e-3, "float16": 9.8e-4}


@role_fact(Stage.PROBE)
def invariance(role: str, models: Models, inputs: Inputs, output: Output) -> Invariance:
    """How far a role's output for one text moves when nothing about the text changes.

    Compared are log-probabilities of the tokens that follow (policy, reference), values of the states, or scores.
    "repeat" runs in the mode the model was handed over in, everything else in eval mode.

    Raises:
        Broken: the model cannot be called.
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
            ("left padding", "left", [text, *others]),
        ):
            if not live.caller.takes_mask and side == "left":
                undecided[name] = "the model takes no mask"
                continue
            moved = _numbers(live, *padded(rows, inputs.pad_id, side), text)
            shifts[name] = Shift(float((moved - alone).abs().max()), tolerance, scale, f"beside {len(others)} longer texts")
            beside = _numbers(live, *padded([text, *changed], inputs.pad_id, side), text)
            change = Shift(float((beside - moved).abs().max()), tolerance, scale, f"other neighbours, {side} padding")
            if "neighbours" not in shifts or not change.largest <= shifts["neighbours"].largest:
                shifts["neighbours"] = change
        if role in ("policy", "reference"):
            try:
                cached = _with_cache(live, text)
                shifts["cache"] = Shift(float((cached - alone).abs().max()), tolerance, scale, "one token at a time")
            except Unavailable as reason:
                undecided["cache"] = str(reason)
    mode = "train" if getattr(live.model, "training", False) else "eval"
    with torch.no_grad(), live.kept(evaluating=False):
        batch = padded(inputs.sequences, inputs.pad_id, "right")
        first, second = _numbers(live, *batch, text), _numbers(live, *batch, text)
        shifts["repeat"] = Shift(float((first - second).abs().max()), tolerance, scale, f"twice, in {mode} mode")
    return Invariance(shifts, undecided, mode)


def _spread(alone: torch.Tensor, output: Output) -> float:
    if alone.numel() > 1:
        return float(alone.std())
    return output.std_over_sequences


def _numbers(live: Live, ids: torch.Tensor, mask: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """What is compared of the first row: float64, (n - 1,) log-probabilities, (n,) values or (1,) score."""
    called = live.read(ids, mask)
    tensor = called.tensor.double().cpu()
    if tensor.dim() >= 2 and tensor.shape[1] == ids.shape[1]:
        real = tensor[0][mask[0].bool()]
        if live.role in ("policy", "reference") and real.dim() == 2:
            return following(real, text)
        return real[:, 0] if real.dim() == 2 and real.shape[1] == 1 else real.reshape(-1)
    if tensor.shape[0] == ids.numel():
        real = tensor.reshape(*ids.shape, -1)[0][mask[0].bool()]
        return following(real, text) if live.role in ("policy", "reference") else real.reshape(-1)
    return tensor[0].reshape(-1)


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
    if "past_key_values" not in parameters or "use_cache" not in parameters:
        raise Unavailable("the model's forward takes no past_key_values")
    cache: Any = None
    logits = []
    for position, token in enumerate(text):
        more: dict[str, Any] = {}
        if "position_ids" in parameters:
            more["position_ids"] = torch.tensor([[position]], device=live.device)
        try:
            raw = live.module(
                input_ids=torch.tensor([[token]], device=live.device),
                attention_mask=torch.ones(1, position + 1, dtype=torch.long, device=live.device),
                past_key_values=cache,
                use_cache=True,
                **more,
            )
        except Exception as error:
            raise Broken(live.role, f"{live.role}: decoding with the cache failed: {type(error).__name__}: {error}") from error
        cache = raw.get("past_key_values") if hasattr(raw, "get") else None
        if cache is None:
            raise Unavailable("the model returns no past_key_values")
        from rlhf_doctor.instruments.calling import pick

        called = pick(live.role, raw, 1, 1)
        assert called is not None
        logits.append(called.tensor[0, -1].double().cpu())
    return following(torch.stack(logits), text)

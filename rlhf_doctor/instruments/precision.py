"""What half precision costs: updates that vanish in the weights, and rounding in the vocabulary head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.rates import number
from rlhf_doctor.instruments.readings import Inputs, Output

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Models

__all__ = ["HeadRounding", "LostUpdates", "head_rounding", "lost_updates"]

MANTISSA = {"bfloat16": 8, "float16": 11}  # bits of a significand, the hidden one included
SAMPLE = 1 << 16  # entries of each tensor that are looked at
# What optimizers that keep the lost bits are called, in their classes, attributes, groups or state.
KEEPERS = ("master", "fp32", "kahan", "compensation", "stochastic", "mixedprecision", "mixed_precision", "bf16_groups",
           "fp16_groups", "bit16_groups", "bf16_optimizer", "fp16_optimizer", "deepspeed", "megatron")  # fmt: skip


@dataclass(frozen=True)
class LostUpdates:
    """Half-precision weights that an optimizer steps in place.

    ``share`` of them for which half a unit in the last place is larger than the learning rate ``lr``, which is the
    size of an Adam step. ``scalars`` counts them; 0 when no trained weight is in half precision. ``keeper`` says what
    keeps the lost bits, empty where nothing does.
    """

    share: float
    scalars: int
    dtype: str
    lr: float
    eps: float | None
    optimizer: str
    keeper: str


@dataclass(frozen=True)
class HeadRounding:
    """Log-probabilities of the probe's tokens as the model's output gives them, against a float32 head.

    ``mean`` and ``largest`` absolute differences in nats. ``weights`` and ``output`` are dtypes, ``head`` that of the
    product with the vocabulary matrix. ``normalised``: the model gives log-probabilities instead of logits.
    """

    mean: float
    largest: float
    weights: str
    head: str
    output: str
    normalised: bool


@role_fact(Stage.PROBE)
def lost_updates(role: Role, models: Models, setup: Any) -> LostUpdates:
    """Look at the weights that the optimizers hold; nothing is called or changed. A reward is trained where its loss
    is given.

    Raises:
        Unavailable: the role is not trained, or its weights are in half precision and no optimizer that holds them is
            known to be Adam's kind.
    """
    live = models.get(role)
    half = [p for p in live.module.parameters() if p.requires_grad and _dtype(p) in MANTISSA and not p.is_meta]
    trained = ("policy", "value") if setup.reward_loss is None else ("policy", "value", "reward")
    if role not in trained:
        raise Unavailable(f"needs a {role} model that is trained")
    if not half:
        return LostUpdates(0.0, 0, "", 0.0, None, "", "")
    if live.loaded_here:
        raise Unavailable("needs the optimizers: they may keep float32 master weights")
    mine = {id(p) for p in half}
    lost = counted = 0.0
    scalars, lr, eps, name, keeper = 0, 0.0, None, "", ""
    for optimizer in setup.optimizers:
        for group in getattr(optimizer, "param_groups", None) or ():
            held = [p for p in group.get("params", ()) if id(p) in mine] if isinstance(group, Mapping) else []
            rate = max(number(group.get("lr")) or 0.0, number(group.get("initial_lr")) or 0.0) if held else 0.0
            if not held or "betas" not in group or rate == 0:
                continue
            keeper = keeper or _keeper(optimizer, group, held)
            lr, eps, name = rate, number(group.get("eps")), type(optimizer).__name__
            for p in held:
                share = _vanishing(p, rate)
                lost, counted, scalars = lost + share * p.numel(), counted + p.numel(), scalars + p.numel()
    if not scalars:
        raise Unavailable("needs the Adam optimizer that holds the half-precision weights: it may keep master weights")
    return LostUpdates(lost / counted, scalars, _dtype(half[0]), lr, eps, name, keeper)


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype)
    return name.removeprefix("torch.")


def _vanishing(parameter: torch.Tensor, lr: float) -> float:
    """Share of entries w with half a unit in the last place above lr: w ± lr rounds back to w."""
    import torch

    with torch.no_grad():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLE)].float()
        exponent = torch.frexp(some).exponent  # |w| = m · 2^exponent with m in [0.5, 1)
        half_unit = torch.ldexp(torch.ones_like(some), exponent - MANTISSA[_dtype(parameter)] - 1)
        return float(((half_unit > lr) & (some != 0)).float().mean())


def _keeper(optimizer: Any, group: Mapping[str, Any], held: list[Any]) -> str:
    """What in an optimizer keeps the bits that a half-precision weight cannot, empty where nothing does."""
    kind = type(optimizer)
    names: list[str] = [*(c.__name__ for c in kind.__mro__), kind.__module__]
    for name in (*names, *(k for k, v in vars(optimizer).items() if v is not None and v is not False)):
        if any(word in name.lower() for word in KEEPERS):
            return str(name)
    for name, value in group.items():
        if value and name != "params" and any(word in str(name).lower() for word in KEEPERS):
            return f"param_groups' {name}"
    state = getattr(optimizer, "state", None) or {}
    for p in held[:8]:
        entries = state.get(p, {}) if isinstance(state, Mapping) else {}
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            known = any(word in str(name).lower() for word in KEEPERS)
            if known or (_is_float32_like(value, p) and _same_values(value, p)):
                return f"state's {name}"
    return ""


def _is_float32_like(value: Any, parameter: Any) -> bool:
    shape = getattr(value, "shape", None)
    return shape == parameter.shape and getattr(value, "element_size", lambda: 0)() == 4 and bool(parameter.any())


def _same_values(value: Any, parameter: Any) -> bool:
    return bool(((value.to(parameter.dtype) - parameter).abs() <= 0.02 * parameter.abs()).float().mean() > 0.9)


@role_fact(Stage.PROBE)
def head_rounding(role: Role, models: Models, inputs: Inputs, output: Output) -> HeadRounding:
    """Multiply the last hidden states with the vocabulary matrix once more, in float32, and compare.

    Raises:
        Unavailable: the role is no language model, or its vocabulary product was not seen.
        Broken: the model cannot be called.
    """
    import torch

    if role not in ("policy", "reference") or output.kind != "vocabulary":
        raise Unavailable(f"needs logits over the vocabulary from the {role}")
    if output.meaningless or output.shape[-1] <= max(inputs.sequences[-1]):
        raise Unavailable(f"needs finite logits over the whole vocabulary from the {role}")
    live = models.get(role)
    sequence = inputs.sequences[-1]
    ids = torch.tensor([list(sequence)])
    weights = next((_dtype(p) for p in live.module.parameters() if p.is_floating_point()), "float32")
    exact_already = live.loaded_here and output.dtype == "float32"
    if exact_already and all(_dtype(p) == "float32" for p in live.module.parameters() if p.is_floating_point()):
        return HeadRounding(0.0, 0.0, weights, "float32", output.dtype, False)
    with torch.no_grad(), live.kept():
        with _head_tap(output.shape[-1]) as caught:
            final = live.read(ids, torch.ones_like(ids)).tensor.detach().cpu()
        if not caught:
            raise Unavailable(f"the {role}'s product with the vocabulary matrix was not seen")
        hidden, matrix, bias, logits = caught[-1]
        if hidden.reshape(-1, hidden.shape[-1]).shape[0] != len(sequence):
            raise Unavailable(f"the {role}'s vocabulary product does not run over the positions")
        final = final.reshape(len(sequence), -1).float()
        logits = logits.reshape(len(sequence), -1).cpu()
        exact = _exact(hidden.reshape(len(sequence), -1).float(), matrix, bias).cpu()
    normalised = bool((final.logsumexp(-1).abs() < 0.1).all()) and not bool((exact.logsumexp(-1).abs() < 0.1).all())
    plain = torch.allclose(final, logits.float(), rtol=0.02, atol=1e-3)
    given = final if normalised else (final if plain else logits.float()).log_softmax(-1)
    following = torch.tensor(sequence[1:])[:, None]
    off = (given - exact.log_softmax(-1))[:-1].gather(-1, following)[:, 0].abs()
    return HeadRounding(float(off.mean()), float(off.max()), weights, _dtype(logits), output.dtype, normalised)


def _exact(hidden: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden (T, H) times matrix (V, H) transposed, float32, a slice of the vocabulary at a time."""
    import torch

    parts = [hidden @ matrix[start : start + 16384].float().T for start in range(0, matrix.shape[0], 16384)]
    product = torch.cat(parts, -1)
    return product if bias is None else product + bias.float()


def _head_tap(width: int) -> Any:
    """A context that collects (hidden, matrix (V, H), bias or None, result) of products that give ``width`` numbers."""
    from contextlib import contextmanager

    import torch
    from torch.overrides import TorchFunctionMode

    caught: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
    products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)

    class Tap(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor) or result.dim() < 2 or result.shape[-1] != width:
                return result
            if func is torch.nn.functional.linear and args[1].dim() == 2:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                caught.append((args[0], args[1], bias, result))
            elif func in products and len(args) == 2 and args[1].dim() == 2:
                caught.append((args[0], args[1].T, None, result))
            return result

    @contextmanager
    def tapped() -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]]:
        with Tap():
            yield caught

    return tapped()

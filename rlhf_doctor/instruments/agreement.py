"""What policy and reference say of the same tokens, kept small enough to compare them without two live models."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Inputs, Output

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.calling import Called
    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["Agreement", "Gap", "Predictions", "agreement", "begun", "predictions"]

ROWS = 4  # positions of each probe sequence whose whole distribution is kept: 12 × 150k × 4 bytes are 7 MB
# Half a unit in the last place, relative: what storing a number in this dtype may move it by.
ROUNDING = {"float64": 1.1e-16, "float32": 6e-8, "bfloat16": 3.9e-3, "float16": 4.9e-4}
# Layers add up: a bfloat16 forward pass ends some 8 roundings away from a float32 one of the same weights.
ROUNDINGS = 8.0
# Below this many nats per token two float32 models are one model: batch shapes and kernels move it by 1e-10.
LEAST = 1e-5
QUANTISED = 0.1


@dataclass(frozen=True)
class Predictions:
    """A language model's predictions on the probe sequences.

    ``realised``: log-probabilities of the tokens that follow. ``table``: float32 array (P, V) of log-softmax at P
    positions spread over the sequences. ``spread``: standard deviation of the logits over the vocabulary.
    ``dtype``: the coarsest floating dtype of weights and output, "quantised" where weights are packed integers.
    ``adapter_off``: the same with the model's adapter switched off, where it has one.
    """

    realised: tuple[float, ...]
    table: Any = field(repr=False)
    spread: float
    dtype: str
    adapter_off: Predictions | None = None


@dataclass(frozen=True)
class Gap:
    """KL(policy || other) in nats per token: its mean and largest over positions, and what rounding explains."""

    mean: float
    largest: float
    tolerance: float
    positions: int

    @property
    def open(self) -> bool:
        """More than rounding explains, NaN included."""
        return not self.mean <= self.tolerance


@dataclass(frozen=True)
class Agreement:
    """The policy beside each candidate for its reference: "the reference", "the policy with its adapter off"."""

    gaps: Mapping[str, Gap]


@role_fact(Stage.PROBE)
def predictions(role: Role, models: Models, inputs: Inputs, output: Output) -> Predictions:
    """Log-probabilities of the probe sequences in eval mode; of a policy with an adapter also without it.

    Raises:
        Unavailable: the role is no language model, or its output is no finite distribution over the vocabulary.
        Broken: the model cannot be called.
    """
    if role not in ("policy", "reference"):
        raise Unavailable(f"the {role} predicts no tokens")
    if output.kind != "vocabulary" or output.shape[-1] <= max(max(s) for s in inputs.sequences):
        raise Unavailable(f"needs logits over the vocabulary from the {role}")
    if output.meaningless:
        raise Unavailable(f"needs finite logits from the {role}")
    live = models.get(role)
    with live.kept():
        plain = _predict(live, live.read_once, inputs, output.dtype)
        if role == "policy":
            with _adapter_off(live) as switched:
                without = _predict(live, live.read, inputs, output.dtype) if switched else None
            return Predictions(plain.realised, plain.table, plain.spread, plain.dtype, without)
    return plain


@fact(Stage.PROBE)
def agreement(
    setup: Any, policy_predictions: Predictions, reference_predictions: Predictions | None = None
) -> Agreement:
    """KL of the policy to the reference, and to itself with its adapter off.

    Raises:
        Unavailable: there is nothing to compare with.
    """
    gaps: dict[str, Gap] = {}
    if reference_predictions is not None:
        gaps["the reference"] = _gap(policy_predictions, reference_predictions)
    if policy_predictions.adapter_off is not None:
        gaps["the policy with its adapter off"] = _gap(policy_predictions, policy_predictions.adapter_off)
    if not gaps or (reference_predictions is None and setup.reference != "adapter-off"):
        raise Unavailable("needs a reference that predicts the same vocabulary")
    return Agreement(gaps)


@fact(Stage.STATIC)
def begun(setup: Any) -> str:
    """Why training is known to have begun already, empty where nothing says so."""
    for index, optimizer in enumerate(setup.optimizers):
        state = getattr(optimizer, "state", None)
        steps = [float(s["step"]) for s in state.values() if isinstance(s, dict) and "step" in s] if state else []
        if any(step > 0 for step in steps):
            return f"optimizers[{index}] has already made {max(steps):.0f} steps"
    path = setup.path("policy")
    if path is not None and (path / "trainer_state.json").is_file():
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        lines = state.get("log_history") if isinstance(state, dict) else None
        names = {str(name).lower() for line in lines or () if isinstance(line, dict) for name in line}
        if any("kl" in name.replace("/", "_").split("_") or "objective" in name for name in names):
            return f"{path.name}/trainer_state.json has the log of reinforcement learning"
    return ""


def _predict(
    live: Live, read: Callable[[torch.Tensor, torch.Tensor], Called], inputs: Inputs, output_dtype: str
) -> Predictions:
    import torch

    from rlhf_doctor.instruments.models import padded

    ids, mask = padded(inputs.sequences, inputs.pad_id, "right")
    realised: list[float] = []
    kept: list[torch.Tensor] = []
    spreads: list[float] = []
    with torch.no_grad():
        tensor = read(ids, mask).tensor.detach().cpu()
        tensor = tensor.reshape(*ids.shape, tensor.shape[-1])
        for row, sequence in zip(tensor, inputs.sequences, strict=True):
            logits = row[: len(sequence) - 1].float()
            logprobs = logits.log_softmax(-1)
            following = torch.tensor(sequence[1:])[:, None]
            realised += logprobs.gather(-1, following)[:, 0].tolist()
            picked = torch.linspace(0, len(sequence) - 2, ROWS).long()
            kept.append(logprobs[picked])
            finite = logits[picked].masked_fill(torch.isinf(logits[picked]), float("nan"))
            centred = finite - finite.nanmean(-1, keepdim=True)
            spreads.append(float(centred.square().nanmean().sqrt()))
    table = torch.cat(kept).numpy()
    return Predictions(tuple(realised), table, sum(spreads) / len(spreads), _coarsest(live, output_dtype))


def _coarsest(live: Live, output_dtype: str) -> str:
    found = {str(p.dtype).removeprefix("torch.") for p in live.module.parameters()} if live.is_module else set()
    if any("int" in name for name in found):
        return "quantised"
    known = [name for name in (*found, output_dtype) if name in ROUNDING]
    return max(known, key=lambda name: ROUNDING[name], default="float32")


def _gap(policy: Predictions, other: Predictions) -> Gap:
    import numpy

    width = min(policy.table.shape[-1], other.table.shape[-1])
    p, q = _cut(policy.table, width), _cut(other.table, width)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        terms = numpy.where(p == -numpy.inf, 0.0, numpy.exp(p) * (p - q))
    kl = terms.sum(-1)
    return Gap(float(kl.mean()), float(kl.max()), _tolerance(policy, other), len(kl))


def _cut(table: Any, width: int) -> Any:
    """Log-probabilities over the first ``width`` tokens, normalised again, float64."""
    import numpy

    part = table[:, :width].astype(numpy.float64)
    top = part.max(-1, keepdims=True)
    return part - top - numpy.log(numpy.exp(part - top).sum(-1, keepdims=True))


def _tolerance(policy: Predictions, other: Predictions) -> float:
    """Logits that are off by σ each cost σ²/2 nats of KL; σ is some roundings of the logits' own spread."""
    if "quantised" in (policy.dtype, other.dtype):
        return QUANTISED
    sigma = ROUNDINGS * max(ROUNDING[policy.dtype] * policy.spread, ROUNDING[other.dtype] * other.spread)
    return max(LEAST, sigma**2 / 2)


@contextmanager
def _adapter_off(live: Live) -> Iterator[bool]:
    """Switch every adapter layer of a PEFT model off by its own flag, and back; whether there was one to switch.

    A merged adapter cannot be switched off without changing weights, so it counts as none. A hand-written one is
    switched by its ``disable_adapter``, where that is written as a context manager, which puts it back itself.
    """
    layers = [m for m in live.module.modules() if isinstance(getattr(m, "_disable_adapters", None), bool)]
    by_hand = getattr(live.module, "disable_adapter", None)
    if not layers and callable(by_hand) and inspect.isgeneratorfunction(inspect.unwrap(by_hand)):
        with by_hand():
            yield True
        return
    usable = [m for m in layers if not getattr(m, "merged", False) and not m._disable_adapters]
    if not usable or len(usable) < len([m for m in layers if not m._disable_adapters]):
        yield False
        return
    for layer in usable:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield True
    finally:
        for layer in usable:
            layer._disable_adapters = False  # type: ignore[assignment]

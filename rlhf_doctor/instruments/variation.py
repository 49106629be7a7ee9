"""What a scalar output changes with: the response, the prompt, the state, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.readings import Inputs, Output

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["LastProjection", "Variation", "variation"]

VARIANTS = 4
ROUNDING = {"float64": 2.2e-16, "float32": 1.2e-7, "bfloat16": 7.8e-3, "float16": 9.8e-4}


@dataclass(frozen=True)
class LastProjection:
    """The last matrix product that ends in one number, else the last of all.

    ``to_one`` says that it ends in one number, ``input_spread`` is the largest change of any of its input features over
    positions and texts, ``weight_zero`` whether its weight is exactly zero, ``tied_to`` the embedding whose memory it
    shares.
    """

    to_one: bool
    input_spread: float
    weight_zero: bool
    tied_to: str


@dataclass(frozen=True)
class Variation:
    """One text of ``length`` tokens and its variants, all of that length and alone in their batches' rows.

    Of a score, or of the value of the last state: ``base``; ``by_response``, with the second half replaced;
    ``by_prompt``, with the first half replaced. Of a critic: ``states`` (V of every state of the base text) and
    ``other_states`` (of a text with every token replaced). ``rounding`` is what the dtype cannot tell apart.
    """

    length: int
    base: float
    by_response: tuple[float, ...]
    by_prompt: tuple[float, ...]
    states: tuple[float, ...]
    other_states: tuple[float, ...]
    rounding: float
    projection: LastProjection | None

    def moved(self, numbers: tuple[float, ...]) -> float:
        """The largest distance of any of these from the base."""
        return max((abs(n - self.base) for n in numbers), default=0.0)

    @property
    def repeated(self) -> bool:
        """Whether all states of a text have one value, which another text's states do not."""
        if not self.states or not self.rounding < float("inf"):
            return False
        along = max(max(row) - min(row) for row in (self.states, self.other_states))
        return along <= self.rounding and abs(self.states[0] - self.other_states[0]) > 4 * self.rounding

    @property
    def still(self) -> bool:
        """Whether no replaced token changed it, beyond rounding."""
        return self.moved((*self.by_response, *self.by_prompt)) <= self.rounding < float("inf")


@role_fact(Stage.PROBE)
def variation(role: Role, models: Models, inputs: Inputs, output: Output) -> Variation:
    """Replace half of a text's tokens, four times each half, and see what the output does.

    Raises:
        Unavailable: the role is a function, a language model, or gives no scalar.
        Broken: the model cannot be called.
    """
    import torch

    if role not in ("reward", "value"):
        raise Unavailable(f"the {role} gives neither scores nor values")
    if output.kind not in ("scalar per sequence", "scalar per token"):
        raise Unavailable(f"needs a scalar output; it is {output.kind}")
    live = models.get(role)
    _ = live.module
    base = min(inputs.sequences, key=len)
    half = len(base) // 2
    rows = [base]
    rows += [base[:half] + other[half:] for other in _others(base, inputs, live.seed)]
    rows += [other[:half] + base[half:] for other in _others(base, inputs, live.seed + 1)]
    rows += _others(base, inputs, live.seed + 2)[:1]
    ids = torch.tensor(rows)
    spy = _spy(live)
    with torch.no_grad(), live.kept(), spy:
        tensor = live.read(ids, torch.ones_like(ids)).tensor.double().cpu()
    numbers = tensor.reshape(len(rows), -1)
    last = numbers[:, -1].tolist()
    per_state = output.kind == "scalar per token"
    return Variation(
        length=len(base),
        base=last[0],
        by_response=tuple(last[1 : 1 + VARIANTS]),
        by_prompt=tuple(last[1 + VARIANTS : 1 + 2 * VARIANTS]),
        states=tuple(numbers[0].tolist()) if per_state else (),
        other_states=tuple(numbers[-1].tolist()) if per_state else (),
        rounding=ROUNDING.get(output.dtype, 0.0) * max(float(numbers.abs().max()), 1e-30),
        projection=spy.found(live) if spy.last is not None else None,
    )


def _others(base: tuple[int, ...], inputs: Inputs, seed: int) -> list[tuple[int, ...]]:
    """Texts of the same length with another token at every position, none of them special."""
    import torch

    special = {inputs.pad_id, inputs.eos_id, inputs.bos_id}
    ordinary = [i for i in range(inputs.vocab_size) if i not in special]
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(VARIANTS):
        shifts = torch.randint(1, max(len(ordinary), 2), (len(base),), generator=generator).tolist()
        made.append(tuple(ordinary[(t + s) % len(ordinary)] for t, s in zip(base, shifts, strict=True)))
    return made


def _spy(live: Live) -> Any:
    """A mode that remembers the operands of the last projection."""
    import torch
    from torch.overrides import TorchFunctionMode

    from rlhf_doctor.instruments.tapping import PROJECTIONS

    embeddings = {
        module.weight.untyped_storage().data_ptr(): name
        for name, module in live.module.named_modules()
        if isinstance(module, torch.nn.Embedding) and not module.weight.is_meta
    }

    class Spy(TorchFunctionMode):
        last: tuple[torch.Tensor, torch.Tensor] | None = None

        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            operands = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            if func in PROJECTIONS and len(operands) >= 2 and isinstance(operands[1], torch.nn.Parameter):
                to_one = operands[1].dim() == 1 or operands[1].shape[0] == 1
                if to_one or self.last is None or self.last[1].shape[0] != 1:
                    self.last = (operands[0].detach(), operands[1])
            return result

        def found(self, live: Live) -> LastProjection:
            assert self.last is not None
            given, weight = self.last
            flat = given.double().reshape(-1, given.shape[-1])
            return LastProjection(
                to_one=weight.dim() == 1 or weight.shape[0] == 1,
                input_spread=float((flat.amax(0) - flat.amin(0)).max()) if flat.numel() else 0.0,
                weight_zero=not bool(weight.detach().any()),
                tied_to=embeddings.get(weight.untyped_storage().data_ptr(), ""),
            )

    return Spy()

"""The pairwise loss that the reward model is trained with: where it reads scores, and what large margins do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable, fact, raised_by_the_setup
from rlhf_doctor.finding import Stage

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Models
    from rlhf_doctor.trace.calls import Call

__all__ = ["RewardTraining", "reward_training"]

PAIRS = 4
MARGIN = 300.0  # of scores: exp(-300) is 0 in float32


@dataclass(frozen=True)
class RewardTraining:
    """What one call of the loss on a few pairs showed.

    Attributes:
        loss: its value.
        texts: rows that went through the reward model's head.
        trained: rows with a gradient at the head; ``at_last``: those with one at their last token; ``at_pads``: those
            with one at a pad. None where the head is called on pooled states.
        pulled: mean gradient of the chosen texts' scores less that of the rejected; None where they are not told apart.
        extremes: margin -> (loss, whether loss and gradient are finite), the scores being moved by it.
    """

    loss: float
    texts: int
    trained: int
    at_last: int | None
    at_pads: int | None
    pulled: float | None
    extremes: Mapping[float, tuple[float, bool]]


@fact(Stage.TRACE)
def reward_training(setup: Any, models: Models) -> RewardTraining:
    """Call the reward loss on some preference pairs, and again with the scores far apart.

    Raises:
        Unavailable: there is no reward loss, no pairs, or no scores of it that can be seen.
        Broken: the loss raises whatever it is given.
    """
    if setup.reward_loss is None:
        raise Unavailable("needs a reward_loss in the setup")
    pairs = [(str(p), str(c), str(r)) for p, c, r in setup.preferences or () if c != r]
    if not pairs:
        raise Unavailable("needs preferences")
    live = models.get("reward")
    if not live.is_module:
        raise Unavailable("the reward is a function, not a model")
    pairs = sorted(pairs, key=lambda p: len(p[1]) + len(p[2]))
    pairs = [pairs[i * (len(pairs) - 1) // max(PAIRS - 1, 1)] for i in range(min(PAIRS, len(pairs)))]
    with live.kept(evaluating=False):
        calls, loss, form = _called(setup, _forms(setup, pairs), None)
        signs = {(c.nth, r): s for c in calls for r, s in _pulls(c).items()}
        extremes = {}
        for margin in (-MARGIN, MARGIN) if any(signs.values()) else ():
            try:
                moved, value, _ = _called(setup, [form], (signs, margin))
            except Broken:
                extremes[margin] = (float("nan"), False)
            else:
                extremes[margin] = (value, _finite(value) and all(_finite(x) for c in moved for x in _gradient(c)))
        return _read(setup, pairs, calls, loss, extremes)


# ---- calling it ------------------------------------------------------------------------------------------------------

Form = tuple[Any, Any]


def _forms(setup: Any, pairs: Sequence[tuple[str, str, str]]) -> Iterator[Form]:
    """(chosen, rejected) as whole texts, as (prompt, response) pairs, and as padded tensors."""
    yield [f"{p} {c}" for p, c, _ in pairs], [f"{p} {r}" for p, _, r in pairs]
    yield [(p, c) for p, c, _ in pairs], [(p, r) for p, _, r in pairs]
    from rlhf_doctor.instruments.texts import live_tokenizer

    tokenizer = live_tokenizer(setup, "reward")
    chosen, rejected = (
        tokenizer([f"{p} {x}{tokenizer.eos_token or ''}" for p, x in side], padding=True, return_tensors="pt")
        for side in ([(p, c) for p, c, _ in pairs], [(p, r) for p, _, r in pairs])
    )
    yield chosen, rejected
    yield chosen["input_ids"], rejected["input_ids"]


def _called(
    setup: Any, forms: Any, push: tuple[Mapping[tuple[int, int], float], float] | None
) -> tuple[list[Call], float, Form]:
    """The calls of the head, the loss, and the form that was understood."""
    import torch

    from rlhf_doctor.trace.calls import Change
    from rlhf_doctor.trace.taps import Recorder

    said = ""
    for form in forms:
        leaves: list[Any] = []

        def opened(call: Call, output: torch.Tensor, leaves: list[Any] = leaves) -> torch.Tensor:
            add = torch.zeros_like(output, requires_grad=True)  # a gradient comes back also to a frozen model
            leaves.append(add)
            if push is not None:
                signs, margin = push
                by_row = torch.tensor([-margin / 2 * signs.get((call.nth, int(r)), 0.0) for r in call.rows])
                output = output + by_row.to(output).reshape(output.shape)
            return output + add

        recorder = Recorder(setup, changes=(Change("reward", opened),))
        try:
            with recorder.watching(), torch.enable_grad():
                loss = setup.reward_loss(setup.reward, *form)
                loss = loss["loss"] if isinstance(loss, Mapping) else loss[0] if isinstance(loss, tuple) else loss
                if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                    raise Unavailable("needs a reward_loss that returns one number")
                if loss.requires_grad:
                    parameters = [p for p in setup.reward.parameters() if p.requires_grad]
                    torch.autograd.grad(loss.sum(), [*leaves, *parameters], allow_unused=True)
        except (Unavailable, KeyboardInterrupt):
            raise
        except Exception as error:
            where = raised_by_the_setup(error)
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{f' ({where})' if where else ''}"
            continue
        calls = [c for c in recorder.calls if c.role == "reward" and not c.pooled and c.scalar is not None]
        if not calls:
            raise Unavailable("no score of the reward model was seen while its loss was computed")
        return calls, float(loss.detach()), form
    raise Broken("reward", f"reward: the reward_loss raised {said}")


# ---- reading it ------------------------------------------------------------------------------------------------------


def _gradient(call: Call) -> list[float]:
    found = call.gradient.get("scalar")
    return [0.0] * len(call.rows) if found is None else found.double().cpu().tolist()


def _pulls(call: Call) -> dict[int, float]:
    """Row -> sign of the pull on its score: -1 where the loss falls with it."""
    sums: dict[int, float] = {}
    for row, g in zip(call.rows.tolist(), _gradient(call), strict=True):
        sums[row] = sums.get(row, 0.0) + g
    return {row: float((g > 0) - (g < 0)) for row, g in sums.items()}


def _finite(x: float) -> bool:
    return abs(x) < float("inf")


def _read(
    setup: Any, pairs: Sequence[tuple[str, str, str]], calls: Sequence[Call], loss: float, extremes: Mapping[float, Any]
) -> RewardTraining:
    texts = trained = at_last = at_pads = 0
    whole = all(len(c.rows) == c.ids.numel() for c in calls)
    pulls: dict[str, list[float]] = {"chosen": [], "rejected": []}
    side = _sides(setup, pairs)
    for call in calls:
        by_row: dict[int, dict[int, float]] = {}
        for row, column, g in zip(call.rows.tolist(), call.columns.tolist(), _gradient(call), strict=True):
            by_row.setdefault(row, {})[column] = g
        for row, gradients in by_row.items():
            real = _real(setup, call, row)
            total = sum(gradients.values())
            texts += 1
            trained += any(gradients.values())
            end = max(real, default=-1)
            at_last += any(gradients.get(column, 0.0) for column in (end, end - _unsure(setup, call)))
            at_pads += any(g for column, g in gradients.items() if column not in real)
            name = side([int(call.ids[row, column]) for column in sorted(real)])
            if name:
                pulls[name].append(total)
    told = all(pulls.values())
    pulled = (
        sum(pulls["chosen"]) / len(pulls["chosen"]) - sum(pulls["rejected"]) / len(pulls["rejected"]) if told else None
    )
    return RewardTraining(
        loss, texts, trained, at_last if whole else None, at_pads if whole else None, pulled, dict(extremes)
    )


def _real(setup: Any, call: Call, row: int) -> set[int]:
    """Columns of a row that hold a token of its text: by the mask, else up to the last token that is no pad."""
    ids, mask = call.ids[row].tolist(), call.source.mask
    if mask is not None and tuple(mask.shape) == tuple(call.ids.shape):
        return {i for i, m in enumerate(mask[row].tolist()) if m}
    pad = getattr(setup.reward_tokenizer or setup.tokenizer, "pad_token_id", None)
    kept = [i for i, t in enumerate(ids) if t != pad]
    return set(range(kept[0], min(kept[-1] + 1 + _unsure(setup, call), len(ids)))) if kept else set()


def _unsure(setup: Any, call: Call) -> int:
    """1 where the end of a text may be one column further: without a mask, with one token as pad and end."""
    tokenizer, mask = setup.reward_tokenizer or setup.tokenizer, call.source.mask
    same = getattr(tokenizer, "pad_token_id", None) == getattr(tokenizer, "eos_token_id", None)
    return int(same and (mask is None or tuple(mask.shape) != tuple(call.ids.shape)))


def _sides(setup: Any, pairs: Sequence[tuple[str, str, str]]) -> Callable[[Sequence[int]], str]:
    """Says of a row's tokens whether they are a chosen or a rejected text."""
    from rlhf_doctor.instruments.texts import live_tokenizer

    tokenizer = live_tokenizer(setup, "reward")
    known: dict[tuple[int, ...], set[str]] = {}
    eos = getattr(tokenizer, "eos_token_id", None)
    for prompt, chosen, rejected in pairs:
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            ids = tokenizer(f"{prompt} {response}")["input_ids"]
            known.setdefault(tuple(t for t in ids if t != eos), set()).add(name)

    def told(ids: Sequence[int]) -> str:
        names = known.get(tuple(t for t in ids if t != eos), set())
        return next(iter(names)) if len(names) == 1 else ""

    return told

"""What is changed in a step that is run again: outputs at chosen samples and tokens, found again by their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf_doctor.finding import Role
from rlhf_doctor.trace.calls import Call, Change
from rlhf_doctor.trace.places import Placed
from rlhf_doctor.trace.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["at_columns", "at_states", "at_tokens", "is_old", "is_update", "of_other_scores", "of_scores", "of_texts"]

Chosen = Callable[[Placed], bool]


def is_old(placed: Placed) -> bool:
    """Whether a call serves the rollout: no gradient ever comes back to it."""
    return not placed.call.backwards


def is_update(placed: Placed) -> bool:
    """Whether a call is trained through."""
    return placed.call.backwards > 0


def at_states(table: Table, role: Role, amounts: Floats, which: Chosen) -> Change:
    """Add ``amounts`` (S, T) to a scalar role's outputs at the states before the response tokens."""
    deltas: dict[int, Floats] = {}
    for placed in table.placed:
        if placed.call.role == role and which(placed):
            delta = _spread(table, placed, amounts)
            if np.any(delta):
                deltas[placed.call.nth] = delta
    return Change(role, lambda call, output: _added(call, output, deltas))


def at_columns(table: Table, role: Role, amount: Callable[[Placed], Floats], which: Chosen) -> Change:
    """Add what ``amount`` gives for a call (N,) to its output rows; to every logit of a row for the vocabulary."""
    deltas: dict[int, Floats] = {}
    for placed in table.placed:
        if placed.call.role == role and which(placed):
            delta = amount(placed)
            if np.any(delta):
                deltas[placed.call.nth] = delta
    if role in ("policy", "reference"):
        return Change(role, lambda call, output: _noised(call, output, deltas))
    return Change(role, lambda call, output: _added(call, output, deltas))


def at_tokens(table: Table, role: Role, amounts: Floats, which: Chosen) -> Change:
    """Add ``amounts`` (S, T) to the logit of the token drawn in each state."""
    chosen: dict[int, tuple[Floats, NDArray[np.int64]]] = {}
    for placed in table.placed:
        if placed.call.role == role and which(placed):
            delta = _spread(table, placed, amounts)
            tokens = _spread(table, placed, table.tokens.astype(np.float64)).astype(np.int64)
            if np.any(delta):
                chosen[placed.call.nth] = (np.where(tokens >= 0, delta, 0.0), np.maximum(tokens, 0))

    def apply(call: Call, output: torch.Tensor) -> torch.Tensor | None:
        if call.nth not in chosen:
            return None
        delta, tokens = chosen[call.nth]
        if len(delta) != len(call.rows):
            return None
        flat = output.reshape(len(delta), -1)
        add = torch.zeros_like(flat, requires_grad=False)
        places = torch.from_numpy(tokens).to(flat.device)[:, None]
        add.scatter_(1, places, torch.from_numpy(delta).to(flat)[:, None])
        return (flat + add).reshape(output.shape)

    return Change(role, apply)


def of_scores(table: Table, amounts: Floats) -> Change:
    """Add ``amounts`` (S,) to the reward model's scores of the samples, wherever in the text they are read."""
    deltas: dict[int, Floats] = {}
    rows = {where: amounts[s] for s, where in enumerate(table.score_rows) if amounts[s] and where[0] >= 0}
    forwards = {placed.call.order: placed.call.source for placed in table.placed}  # a head's output, and its pooling
    for placed in table.placed:
        if placed.call.role != "reward":
            continue
        at = np.maximum(placed.row_sample, 0)
        by_row = np.where(placed.row_sample >= 0, amounts[at], 0.0)
        for (order, row), amount in rows.items():
            if forwards.get(order) is placed.call.source:
                by_row[row] = amount
        delta = by_row[placed.call.rows.cpu().numpy()]
        if np.any(delta):
            deltas[placed.call.nth] = delta
    return Change("reward", lambda call, output: _added(call, output, deltas))


def of_other_scores(table: Table, amounts: Floats) -> Change | None:
    """Add ``amounts`` (S,) to the reward model's numbers at every token of the samples but their last one.

    Rows that do not hold the last token, or are one number each, are left alone; None where that are all.
    """
    deltas: dict[int, Floats] = {}
    lengths = np.array([len(s.response) for s in table.samples] or [0])
    for placed in table.placed:
        if placed.call.role != "reward" or placed.call.pooled:
            continue
        last = (placed.sample >= 0) & (placed.state == lengths[np.maximum(placed.sample, 0)])
        rows = placed.call.rows.cpu().numpy()
        whole = np.isin(rows, rows[last]) & ~np.isin(rows, _goes_on(table, placed))
        delta = np.where(whole & ~last, amounts[np.maximum(placed.row_sample[rows], 0)], 0.0)
        if np.any(delta):
            deltas[placed.call.nth] = delta
    return Change("reward", lambda call, output: _added(call, output, deltas)) if deltas else None


def _goes_on(table: Table, placed: Placed) -> list[int]:
    """Rows of a call with more than filler behind their sample's last token: what that is, the loop knows better."""
    ids, mask = placed.call.ids.cpu().numpy(), placed.call.source.mask
    found = []
    for b, s in enumerate(placed.row_sample.tolist()):
        behind = ids[b, placed.starts.get(s, 0) + len(table.samples[s].tokens) :] if s >= 0 else ids[b, :0]
        if mask is not None and mask.shape == ids.shape and s >= 0:
            shown = mask[b].cpu().numpy().astype(bool)[len(ids[b]) - len(behind) :]
            behind = behind[shown]
        if len(set(behind.tolist())) > 1 or (mask is not None and len(behind)):
            found.append(b)
    return found


def of_texts(table: Table, orders: Mapping[int, int], amounts: Floats) -> Callable[[int, list[float]], list[float]]:
    """The same for a reward function; ``orders`` maps a call's order to its place among the calls."""
    by_call: dict[int, dict[int, float]] = {}
    for s, (order, row) in enumerate(table.score_rows):
        if amounts[s] and order in orders:
            by_call.setdefault(orders[order], {})[row] = float(amounts[s])

    def change(call: int, scores: list[float]) -> list[float]:
        add = by_call.get(call, {})
        return [score + add.get(row, 0.0) for row, score in enumerate(scores)]

    return change


def _spread(table: Table, placed: Placed, amounts: Floats) -> Floats:
    inside = (placed.sample >= 0) & (placed.state >= 0) & (placed.state < table.tokens.shape[1])
    delta = np.zeros(len(placed.sample))
    delta[inside] = amounts[placed.sample[inside], placed.state[inside]]
    return delta


def _added(call: Call, output: torch.Tensor, deltas: Mapping[int, Floats]) -> torch.Tensor | None:
    delta = deltas.get(call.nth)
    if delta is None or output.numel() != len(delta):
        return None
    return output + torch.from_numpy(delta).to(output).reshape(output.shape)


def _noised(call: Call, output: torch.Tensor, deltas: Mapping[int, Floats]) -> torch.Tensor | None:
    """Logits of a row pushed apart by fixed noise of the given size: a constant would cancel in the softmax."""
    delta = deltas.get(call.nth)
    if delta is None or output.numel() % len(delta):
        return None
    flat = output.reshape(len(delta), -1)
    noise = torch.linspace(-1, 1, flat.shape[1], device=flat.device, dtype=flat.dtype)
    return (flat + torch.from_numpy(delta).to(flat)[:, None] * noise).reshape(output.shape)

"""From logits and their gradients to a few numbers a row: nothing as wide as the vocabulary is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlhf_doctor.trace.calls import CANDIDATES, COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_doctor.trace.calls import Call

__all__ = ["Reducer"]

CHUNK = 1 << 22  # logits that are reduced at once


def _constant_from(ids: Tensor) -> Tensor:
    """(B,) the column from which on a row (B, L) repeats one token, as where a loop gathers past the end."""
    if ids.shape[1] == 1:
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    changes = ids[:, 1:] != ids[:, :-1]
    return (changes.long() * torch.arange(1, ids.shape[1], device=ids.device)).amax(1)


class Reducer:
    """Reduces one output after the other, in one room of memory.

    Args:
        temperatures: at which log-probabilities are wanted, the declared one first.
    """

    def __init__(self, temperatures: Sequence[float]) -> None:
        self.temperatures = tuple(dict.fromkeys((*temperatures, 1.0)))
        self._room: tuple[Tensor, Tensor] | None = None
        self._scored: set[bytes] = set()  # texts that the policy was seen to score

    def logits(self, call: Call, logits: Tensor) -> None:
        """Keep of (N, V) logits what the call has fields for."""
        size, device = logits.shape[1], logits.device
        call.size = size
        fixed = torch.linspace(0, size - 1, min(COLUMNS, size), device=device).round().long()
        ids, length = call.ids.to(device), call.ids.shape[1]
        rows, columns = call.rows.to(device), call.columns.to(device)
        tokens = []
        for offset in CANDIDATES:
            at = columns + offset
            known = (at >= 0) & (at < length)
            token = ids[rows, at.clamp(0, length - 1)]
            tokens.append(torch.where(known & (token < size) & (token >= 0), token, -1))
        call.candidates = torch.stack(tokens, 1)
        call.at_candidates = logits.gather(1, call.candidates.clamp(min=0)).float()
        call.at_columns = logits[:, fixed].float()
        wanted = self.temperatures if self._may_be_drawn(call) else tuple(dict.fromkeys((self.temperatures[0], 1.0)))
        pieces: dict[float, list[Tensor]] = {t: [] for t in wanted}
        entropies = []
        room = self._room  # used again for every piece: new memory costs more than the sums
        for piece in logits.split(max(1, CHUNK // size)):  # type: ignore[no-untyped-call]
            z = piece.float() if piece.dtype != torch.float64 else piece
            if room is None or room[0].numel() < z.numel() or room[0].dtype != z.dtype or room[0].device != z.device:
                room = self._room = torch.empty_like(z).view(-1), torch.empty_like(z).view(-1)
            first, second = (x[: z.numel()].view(z.shape) for x in room)
            peak = z.amax(-1)
            peak = torch.where(peak.isfinite(), peak, 0.0)
            below = torch.sub(z, peak[:, None], out=first)
            for i, t in enumerate(wanted):
                odds = torch.mul(below, 1 / t, out=second).exp_()
                total = odds.sum(-1)
                pieces[t].append(peak / t + total.log())
                if i == 0 and call.role == "policy":
                    mean = torch.einsum("rv,rv->r", odds, below)
                    if bool(mean.isnan().any()):  # logits of minus infinity, as filters set them
                        mean = torch.nan_to_num(odds * below, nan=0.0).sum(-1)
                    entropies.append(total.log() - mean / total / t)
        call.lse = {t: torch.cat(found) for t, found in pieces.items()}
        call.entropy = torch.cat(entropies) if entropies else None
        end = _constant_from(ids)[rows]
        last = ((columns == length - 1) | (columns == end) | (columns == end + 1)).nonzero()[:, 0]
        if len(last):
            call.tail, call.tail_of = logits[last].clone(), last

    def _may_be_drawn(self, call: Call) -> bool:
        """Whether tokens of these texts may have been drawn at a temperature that no one has declared.

        They are the policy's from before its first update, and once is enough for each text.
        """
        if call.role != "policy" or call.window:
            return False
        rows = set(map(bytes, call.ids.cpu().numpy()))
        if call.with_grad and rows <= self._scored:
            return False
        if len(call.rows) > len(call.ids):  # more than the next token's logits
            self._scored |= rows
        return True

    @staticmethod
    def gradient(call: Call, gradient: Tensor) -> None:
        """Add what came back at an output to what its call has kept."""
        kept = call.gradient
        if call.role not in ("policy", "reference"):
            flat = gradient.reshape(-1)
            if flat.numel() == len(call.rows):
                kept["scalar"] = kept["scalar"] + flat if "scalar" in kept else flat.clone()
            return
        assert call.candidates is not None
        g = gradient.reshape(len(call.rows), -1)
        fixed = torch.linspace(0, g.shape[1] - 1, min(COLUMNS, g.shape[1]), device=g.device).round().long()
        actions, peaks, sums = [], [], []
        for piece in g.split(max(1, CHUNK // g.shape[1])):  # type: ignore[no-untyped-call]
            (high, at_high), (low, at_low) = piece.max(-1), piece.min(-1)
            up = high >= -low
            actions.append(torch.where(up, at_high, at_low))
            peaks.append(torch.where(up, high, low))
            sums.append(torch.linalg.vector_norm(piece, 1, dim=-1) - torch.where(up, high, -low))
        new = {
            "action": torch.cat(actions),
            "at_action": torch.cat(peaks).float(),
            "others": torch.cat(sums).float(),
            "at_columns": g[:, fixed].float(),
            "at_candidates": g.gather(1, call.candidates.clamp(min=0)).float(),
        }
        for name, value in new.items():  # a second backward pass through the same output adds to the first
            kept[name] = kept[name] + value if name in kept and name != "action" else value

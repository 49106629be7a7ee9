"""What two passes over one text say: drawn and scored, before the update and in it; and which token is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.instruments.drawing import Drawing, Drawn
from rlhf_doctor.trace.draws import apart
from rlhf_doctor.trace.twice import has_dropout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = [
    "MOST",
    "Actions",
    "Gap",
    "Other",
    "actions",
    "adapter_off",
    "dropout_apart",
    "dropped_out",
    "old_and_new",
    "other_texts",
    "sampler_gap",
    "weighed",
]

MOST = 0.5  # of the samples
SHARE = 0.02  # of the tokens that may be apart
FLOOR = 2e-4, 0.05  # nats, in float32 and in half precision
CLEAN = 1e-2  # misfit of a gradient up to which its token is told
CLIPPED = 0.01  # of the largest weight: what is below may be clipped away
EXPLAINED = 0.002  # misfit, of the range of the weights


@dataclass(frozen=True)
class Gap:
    """How far two passes are apart, in nats; ``share`` of tokens or samples beyond ``limit``."""

    share: float
    mean: float
    typical: float
    largest: float
    limit: float
    tokens: int
    samples: int
    everywhere: bool = False
    half: bool = False
    because: str = ""
    contexts: tuple[tuple[str, str], ...] = ()


def old_and_new(drawing: Drawing) -> Gap | None:
    """The pass before the update beside the update's first, by the drawn tokens' log-probabilities.

    Of the first step; where dropout is at work there and does nothing yet, as behind a fresh adapter, of the second.
    """
    found = _old_and_new(drawing, drawing.first)
    later = drawing.second
    if (found is None or not found.share) and later is not None and dropped_out(later, drawing.setup.policy):
        return _old_and_new(drawing, later) or found
    return found


def _old_and_new(drawing: Drawing, step: Drawn) -> Gap | None:
    moved = np.abs(step.draws.new_logp - step.draws.old_logp)
    known = np.isfinite(moved) & step.table.real
    if not known.any():
        return None
    sizes = moved[known]
    half = _half(step.draws.old) or drawing.half
    training = any(c.training for c in step.run.calls if c.role == "policy" and c.backwards)
    drops = has_dropout(drawing.setup.policy)
    return Gap(
        float((sizes > drawing.rounding).mean()), float(sizes.mean()), float(np.median(sizes)), float(sizes.max()),
        drawing.rounding, len(sizes), int(known.any(1).sum()), half=half,
        because="The policy drops hidden states in the update: it is in train mode." if training and drops else "",
    )  # fmt: skip


def _half(logs: Floats) -> bool:
    """Whether differences of log-probabilities are multiples of what half precision can say."""
    known = logs[np.isfinite(logs).all(-1)]
    if not len(known):
        return False
    steps = np.abs(known[:, 1:] - known[:, :1]).ravel()
    steps = steps[(steps > 1e-3) & (steps < 8)]
    grid = steps * 2**10
    return bool(len(steps) > 32 and np.quantile(np.abs(grid - np.round(grid)), 0.9) < 2e-2)


def sampler_gap(drawing: Drawing, step: Drawn, than: Gap | None = None) -> Gap | None:
    """The sampler's words beside the scored policy's, by sample; ``than`` sets the limit by another step's gap."""
    made = step.draws
    before, update = apart(made.sampled, made.old), apart(made.sampled, made.new)
    between = apart(made.old, made.new)
    known = np.isfinite(between) & step.table.real
    apart_too = (
        known.any() and float((between[known] > drawing.rounding).mean()) > SHARE
    )  # then the old ones may be off
    found = update if apart_too else np.fmin(before, update)
    found[~step.table.real] = np.nan
    rows = np.flatnonzero(np.isfinite(found).any(1))
    if not len(rows):
        return None
    limit = drawing.rounding
    if than is not None:
        limit = max(5 * than.largest, FLOOR[drawing.half])
    middles = np.nanmedian(found[rows], axis=1)
    beyond = middles > limit
    sizes = found[rows][beyond] if beyond.any() else found[rows]
    sizes = sizes[np.isfinite(sizes)]
    contexts = []
    for s in rows[beyond].tolist():
        given, prompt = made.contexts[s], step.table.samples[s].prompt
        if given != prompt and given:
            contexts.append((" ".join(map(str, given[:12])), " ".join(map(str, prompt[:12]))))
    return Gap(
        float(beyond.mean()), float(sizes.mean()), float(np.median(sizes)), float(np.nanmax(found[rows])), limit,
        int(np.isfinite(found[rows]).sum()), len(rows), bool(beyond.all()), contexts=tuple(contexts),
    )  # fmt: skip


def dropped_out(step: Drawn, policy: Any) -> bool:
    """Whether dropout with a rate above 0 is at work in the passes that the update of a step is made of."""
    update = any(c.training and c.with_grad and c.role == "policy" for c in step.run.calls)
    return update and has_dropout(policy)


def dropout_apart(drawing: Drawing) -> float | None:
    """How far apart dropout alone drives the passes of the policy over one text at the same weights, in nats.

    None where they agree, or where they do not without it either.
    """
    policy = drawing.setup.policy
    dropping = any(c.training and c.role == "policy" for step in drawing.steps for c in step.run.calls)
    if not dropping or not has_dropout(policy):
        return None
    apart = [gap for step in drawing.steps for gap in _gaps(drawing, step)]
    if not apart:
        return None
    steady = drawing.without_dropout()
    return None if not steady or any(_gaps(drawing, step) for step in steady) else apart[0].largest


def _gaps(drawing: Drawing, step: Drawn) -> list[Gap]:
    """The passes before and in the update, and the sampler and the update, where they are apart."""
    made = [_old_and_new(drawing, step), sampler_gap(drawing, step) if drawing.by == "policy" else None]
    return [gap for gap, most in zip(made, (SHARE, 0.0), strict=True) if gap is not None and gap.share > most]


def other_texts(drawing: Drawing) -> Other | None:
    """The update's pass reads texts that nobody drew, and the pass before it reads those that were drawn."""
    placed, lost = drawing.first.draws.placed, drawing.first.draws.lost
    if lost["new"] <= placed["new"] or lost["old"] >= placed["old"]:
        return None
    return Other(
        "The update's pass reads other ids than the pass before it, so the ratio is not 1 before the first update. "
        "Give both the same ids, attention mask and positions.",
        "rows of the update that are texts as they were drawn",
        "all",
        f"{placed['new']} of {placed['new'] + lost['new']}",
        where="first epoch",
    )


@dataclass(frozen=True)
class Other:
    """A finding's words where the passes do not show it."""

    message: str
    quantity: str
    expected: str
    observed: str
    tolerance: str = ""
    where: str = ""


def adapter_off(traced: Traced, drawing: Drawing, setup: Any) -> Other | None:
    """Whether the texts pass twice without the adapter, and never with it, before the first of several updates."""
    if setup.reference != "adapter-off" or drawing.updates < 2:
        return None
    passes: dict[str, Counter[int]] = {"policy": Counter(), "reference": Counter()}
    for placed in traced.base.placed:
        call = placed.call
        if call.role in passes and not call.with_grad:
            whole = {int(s) for s, t in zip(placed.sample, placed.state, strict=True) if s >= 0 and t >= 1}
            passes[call.role].update(whole)
    scored = np.asarray(np.isfinite(drawing.first.draws.old).any(axis=(1, 2)))
    twice = [s for s, n in passes["reference"].items() if n >= 2 and not scored[s]]
    if len(twice) < len(traced.base.samples) or scored.any():
        return None
    return Other(
        "The old log-probabilities are taken with the adapter off: the texts pass twice without it before the update, "
        "and never with it, so the ratio leaves 1 as soon as the adapter is trained. Leave disable_adapter() first.",
        "passes over each text before the update",
        "one with the adapter on, one with it off",
        "two with it off",
        where=f"{len(twice)} samples",
    )


def weighed(traced: Traced) -> Other | None:
    """The weights are the advantages times the ratio of two temperatures, and not the advantages themselves."""
    base, raw, declared = traced.base, traced.recovered.raw_advantages, traced.temperature
    weight = base["weight"]
    if raw.shape != weight.shape or not np.isfinite(raw).any():
        return None
    untempered = _logp_at_one(base)
    lengths = np.maximum(base.real.sum(1), 1)[:, None].astype(np.float64)
    first = base.real & (base["window"] == 0)
    for scale in (1.0, lengths):
        y = np.where(first, weight * scale, np.nan)
        plain, n = _misfit(y, raw, np.ones(y.shape))
        for name, old in (
            ("taken at temperature 1", untempered),
            ("divided by it after the softmax", untempered / declared),
        ):
            ratio = np.exp(base["logp"] - old)
            other, _ = _misfit(y, raw, ratio)
            if n >= 6 and other < EXPLAINED and plain > 5 * EXPLAINED and plain > 20 * other:
                return Other(
                    f"The loss weighs tokens as if new log-probabilities were taken at temperature {declared:g} and "
                    f"old ones were {name}, so the ratio is not 1 before the first update. Divide the logits by "
                    "one temperature in both passes, before the softmax.",
                    "distance of the weights from advantages times the ratio, of their range",
                    "0 with a ratio of 1",
                    f"{plain:.2g} with it; {other:.2g} if the old ones are {name}",
                    f"{EXPLAINED:g}",
                    f"{n} tokens of the first minibatch",
                )
    return None


def _logp_at_one(table: Table) -> Floats:
    from rlhf_doctor.trace.draws import log_ratios

    gap = dict(log_ratios(table, (1.0,)))[1.0]
    return table["logp"] + gap


def _misfit(y: Floats, advantages: Floats, ratio: Floats) -> tuple[float, int]:
    """Of y = ratio (slope · advantage + intercept): root mean square residual over the range, and how many points."""
    use = np.isfinite(y) & np.isfinite(advantages) & np.isfinite(ratio)
    use &= np.abs(y) > CLIPPED * np.nanmax(np.abs(y), initial=0.0)
    if use.sum() < 5:
        return np.inf, 0
    design = np.stack([ratio[use] * advantages[use], ratio[use]], 1)
    solved, *_ = np.linalg.lstsq(design, y[use], rcond=None)
    residual = y[use] - design @ solved
    return float(np.sqrt(np.mean(residual**2)) / max(np.ptp(y[use]), 1e-300)), int(use.sum())


@dataclass(frozen=True)
class Actions:
    """Which tokens are trained: ``wrong`` of ``samples`` have most of theirs ``off``; ``usual`` is the usual offset."""

    wrong: int
    samples: int
    off: int
    tokens: int
    usual: int
    said: str


def actions(base: Table) -> Actions | None:
    """Where the trained tokens stand beside the drawn ones, of the gradients that tell."""
    offset, weight, bonus = base["offset"], np.abs(base["weight"]), np.abs(np.nan_to_num(base["entropy_weight"]))
    clear = np.isfinite(offset) & base.real & (base["mixed"] < CLEAN) & (weight > 20 * bonus)
    if not clear.any():
        return None
    off = clear & (offset != 0)
    known = clear.sum(1)
    wrong = (off.sum(1) >= 2) & (off.sum(1) > 0.5 * known)
    counted = Counter(offset[off].astype(int).tolist())
    usual = counted.most_common(1)[0][0] if counted else 0
    said = f"{usual:+d}" if usual != 99 else "at a token of no place near"
    return Actions(int(wrong.sum()), int((known > 0).sum()), int(off.sum()), int(clear.sum()), usual, said)

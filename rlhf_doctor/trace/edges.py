"""Batches that happen and that break loops: equal scores, a ratio far from 1, an unlikely token, advantages all 0."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace import changes
from rlhf_doctor.trace.disturbed import NotFinite, not_finite, run_changed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup
    from rlhf_doctor.trace.calls import Change

    Floats = NDArray[np.float64]

__all__ = ["FAR", "UNLIKELY", "Batch", "Edges", "at_the_edge"]

FAR = 30.0  # nats: e³⁰ is far above float16's 65504, and its square far below float32's largest
UNLIKELY = 110.0  # nats: below float32's smallest probability, e⁻¹⁰³


@dataclass(frozen=True)
class Batch:
    """What one batch gave. ``pushed`` says what was changed; ``error`` what the step raised, if anything."""

    name: str
    pushed: str
    finite: NotFinite
    error: str

    @property
    def broken(self) -> bool:
        """Whether something was not finite."""
        said = self.error.lower()
        return bool(self.finite) or any(word in said for word in ("nan", "inf", "finite", "floatingpoint"))


@dataclass(frozen=True)
class Edges:
    """The batches that were tried, and why others were not."""

    batches: tuple[Batch, ...]
    reasons: tuple[str, ...]


def at_the_edge(setup: RLHFSetup, traced: Traced) -> Edges:
    """Try each batch from the initial state."""
    found: list[Batch] = []
    reasons: list[str] = []
    base = traced.base
    plain = not_finite(base, first=True)
    if plain.outside and not plain.inside:  # then every batch breaks, and not at its edge
        return Edges((), ("gradients that are finite at masked slots in the step as it is",))
    known = bool(np.isfinite(base.scores).all()) and len(base.scores) > 1
    ratios, said = _ratios(traced)
    if known:
        found.append(_tried(setup, traced, "equal scores", "every score made the same", -base.scores, ()))
    else:
        reasons.append("scores that could be made equal were not seen")
    if ratios:
        found.append(_tried(setup, traced, "far ratios", said, None, ratios))
    else:
        reasons.append("log-probabilities of the rollout that could be moved were not seen")
    if known and traced.recovered.whitened and base.has("old_value"):
        scores, values = _nothing(setup, traced)
        made = (changes.at_states(base, "value", values, changes.is_old),)
        found.append(_tried(setup, traced, "no advantage", "all values and rewards made 0", scores, made))
    return Edges(tuple(found), tuple(reasons))


def _tried(
    setup: RLHFSetup, traced: Traced, name: str, pushed: str, scores: Floats | None, made: Sequence[Change]
) -> Batch:
    base = traced.base
    text: Any = None
    all_made = list(made)
    if scores is not None:
        texts = {scored.order: k for k, scored in enumerate(traced.experiments.first.texts)}
        if any(order in texts for order, _ in base.score_rows):
            text = changes.of_texts(base, texts, scores)
        else:
            all_made.append(changes.of_scores(base, scores))
    run, table = run_changed(setup, traced, all_made, text=text)
    return Batch(name, pushed, not_finite(table), run.error)


def _ratios(traced: Traced) -> tuple[tuple[Change, ...], str]:
    """One token a sample: a ratio of e³⁰ in some, in others a token of no probability, before as in the update."""
    base = traced.base
    if not base.has("old_logp") or not base.has("weight"):
        return (), ""
    far, unlikely = np.zeros(base.tokens.shape), np.zeros(base.tokens.shape)
    lengths = base.real.sum(1)
    copies = Counter(sample.tokens for sample in base.samples)
    single = np.array([copies[sample.tokens] == 1 for sample in base.samples])  # rows of copies could be either's
    for s in np.flatnonzero((lengths > 0) & single):
        (far if s % 3 else unlikely)[s, lengths[s] // 2] = -FAR if s % 3 else -UNLIKELY
    made = [changes.at_tokens(base, "policy", far + unlikely, changes.is_old)]
    if np.any(unlikely):
        made.append(changes.at_tokens(base, "policy", unlikely, changes.is_update))
        made.append(changes.at_tokens(base, "reference", unlikely, lambda placed: True))
    return tuple(made), f"one token a response made e^{FAR:.0f} times as likely as in the rollout, or of no probability"


def _nothing(setup: RLHFSetup, traced: Traced) -> tuple[Floats, Floats]:
    """(what makes every reward 0, what makes every rollout value 0)."""
    base = traced.base
    penalty = setup.declared.get("missing_eos_penalty")
    due = np.array([0.0 if s.ended else float(penalty or 0.0) for s in base.samples])
    values = np.where(base.real & np.isfinite(base["old_value"]), -base["old_value"], 0.0)
    return due - base.scores, values

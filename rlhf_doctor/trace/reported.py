"""The field's common numbers of a step, computed from its tensors in every convention in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.gains import coupled
from rlhf_doctor.trace.recover import masked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced

    Floats = NDArray[np.float64]
    Values = Iterator[tuple[str, float]]

__all__ = ["conventions", "shaped"]

NEAR = 0.02  # of a number
MULTIPLE = 2e-3  # of a whole multiple: means of float32 numbers leave 1e-6, of bfloat16 ones some 1e-3
NAMES = {
    "score": [
        "scores",
        "mean_score",
        "score_mean",
        "scores_mean",
        "reward_score",
        "objective/scores",
        "env/score_mean",
    ],
    "kl": ["mean_kl", "kl_mean", "objective/kl", "kl_div", "kl_to_reference", "ref_kl", "kl_ref"],
    "entropy": ["mean_entropy", "entropy_mean", "objective/entropy", "policy/entropy"],
    "response_length": [
        "mean_response_length",
        "response_length_mean",
        "response_length/mean",
        "completions/mean_length",
    ],
    "explained_variance": ["critic/vf_explained_var", "explained_var", "val/explained_variance"],
    "eos_rate": ["share_ended", "eos_fraction", "ended_fraction"],
}


def conventions(traced: Traced, declared: Mapping[str, Any], name: str) -> dict[str, tuple[float, float]]:
    """What the number of this name may be: convention -> (value, tolerance); empty for names of no fixed meaning."""
    kind = next((k for k, names in NAMES.items() if name == k or name in names), None)
    if kind is None:
        return {}
    found = {}
    for said, value in _KINDS[kind](traced, declared):
        if not np.isfinite(value):
            return {}  # a token was not seen, so one convention is missing
        found[said] = (value, NEAR if kind == "explained_variance" else NEAR * abs(value) + 1e-4)
    return found


def shaped(name: str, value: float, known: Mapping[str, tuple[float, float]]) -> bool:
    """Whether a mean score may be one that the loop has shaped, filtered or scaled: it is no multiple of what is known.

    Loops add penalties for length, drop groups without a difference, and weigh several rewards, declared nowhere. A sum
    over ranks or micro-batches is a whole multiple.
    """
    if name != "score" and name not in NAMES["score"]:
        return False
    ratios = [value / x for x, _ in known.values() if x and value]
    return not any(round(r) >= 2 and abs(r / round(r) - 1) < MULTIPLE for ratio in ratios for r in (ratio, 1 / ratio))


def _means(traced: Traced, each: Floats, said: str) -> Values:
    """By token, by sequence as a mean or a sum, and as the mean of the minibatches' means."""
    base = traced.base
    known = base.real & np.isfinite(each)
    if not known.any() or (base.real & ~known).sum() > 0:
        yield said, float("nan")
        return
    filled = np.where(known, each, 0.0)
    counts = np.maximum(known.sum(1), 1)
    yield f"{said} of a token", float(each[known].mean())
    yield f"{said} of a token, by sequence", float((filled.sum(1) / counts).mean())
    yield f"{said} of a sequence", float(filled.sum(1).mean())
    windows = base.windows.get("policy")
    if windows is not None and len(set(windows.tolist())) > 1:
        parts = [known & (windows == w)[:, None] for w in set(windows.tolist())]
        yield f"{said} of a token, by minibatch", float(np.mean([each[p].mean() for p in parts if p.any()]))


def _scores(traced: Traced, declared: Mapping[str, Any]) -> Values:
    base = traced.base
    if not np.isfinite(base.scores).all() or not len(base.scores):
        return
    if "one score" in traced.experiments.done and coupled(traced, "one score"):
        return  # normalised over the batch, in one of many ways, and so may be what is reported
    penalty, limit = declared.get("missing_eos_penalty") or 0.0, declared.get("reward_clip")
    ended = np.array([s.ended for s in base.samples])
    due = np.where(ended, 0.0, float(penalty))
    made = {"mean score": base.scores, "mean score less the penalty": base.scores - due}
    if isinstance(limit, (int, float)):
        made["mean clipped score"] = np.clip(base.scores, -limit, limit)
        made["mean clipped score less the penalty"] = np.clip(base.scores, -limit, limit) - due
        made["mean score less the penalty, clipped"] = np.clip(base.scores - due, -limit, limit)
    if penalty:  # some put the penalty in the score's place
        made["mean score, or the penalty in its place"] = np.where(ended, base.scores, -float(penalty))
    for said, scores in made.items():
        yield said, float(scores.mean())


def _kl(traced: Traced, declared: Mapping[str, Any]) -> Values:
    base = traced.base
    for old in ("old_logp", "logp"):
        x = masked(base, base[old] - base["ref_logp"])
        for said, kl in (
            ("k1", x),
            ("k2", x**2 / 2),
            ("k3", np.exp(-x) - 1 + x),
            ("|k1|", np.abs(x)),
            ("square", x**2),
        ):
            yield from _means(traced, kl, f"mean {said}")


def _entropy(traced: Traced, declared: Mapping[str, Any]) -> Values:
    base = traced.base
    for name in ("entropy", "new_entropy"):
        yield from _means(traced, masked(base, base[name]), "mean entropy")
    for name in ("old_logp", "logp"):
        yield from _means(traced, -masked(base, base[name]), "mean -log π")


def _length(traced: Traced, declared: Mapping[str, Any]) -> Values:
    base = traced.base
    lengths = base.real.sum(1)
    ended = np.array([s.ended for s in base.samples])
    if len(lengths):
        yield "mean length with its end", float(lengths.mean())
        yield "mean length without its end", float((lengths - ended).mean())


def _explained(traced: Traced, declared: Mapping[str, Any]) -> Values:
    base, returns = traced.base, traced.recovered.returns
    values = base["old_value"] if base.has("old_value") else base["value"]
    known = base.real & np.isfinite(returns) & np.isfinite(values)
    if known.sum() < 2 or (base.real & ~known).any() or returns[known].std() == 0:
        return
    yield "explained variance", _of(returns, values, known)
    windows = base.windows.get("value")
    if windows is not None and len(set(windows.tolist())) > 1:
        parts = [known & (windows == w)[:, None] for w in set(windows.tolist())]
        yield "its mean over minibatches", float(np.mean([_of(returns, values, p) for p in parts if p.sum() > 1]))


def _of(returns: Floats, values: Floats, known: NDArray[np.bool_]) -> float:
    return float(1 - (returns - values)[known].var() / returns[known].var())


def _ended(traced: Traced, declared: Mapping[str, Any]) -> Values:
    if traced.base.samples:
        yield "share of ended responses", float(np.mean([s.ended for s in traced.base.samples]))


_KINDS: Mapping[str, Callable[[Traced, Mapping[str, Any]], Values]] = {
    "score": _scores,
    "kl": _kl,
    "entropy": _entropy,
    "response_length": _length,
    "explained_variance": _explained,
    "eos_rate": _ended,
}

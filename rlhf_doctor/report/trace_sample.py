"""One sample of the traced step, token by token: what was measured beside what the declared settings make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.instruments.algorithms import number
from rlhf_doctor.report.trace_wiring import rounded
from rlhf_doctor.trace.gains import critic_free

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup
    from rlhf_doctor.trace.table import Table

    Floats = NDArray[np.float64]

__all__ = ["by_declaration", "sample"]

KEPT = 48  # tokens at each end of a long response
LEAST = 1e-5  # of the batch's largest number: float32's rounding
APART = 0.02  # of a row's largest number: bfloat16 leaves a hundredth
NAMES: Mapping[str, str] = {"kl": "k1", "mse": "k2", "abs": "|k1|", "low_var_kl": "k3"}


def sample(setup: RLHFSetup, traced: Traced) -> dict[str, Any] | None:
    """The sample whose score was changed alone, else the first; None where no sample was seen."""
    base = traced.base
    if not base.samples:
        return None
    one = traced.experiments.done.get("one score")
    at = int(np.argmax(np.abs(one.amounts))) if one is not None else 0
    columns = np.flatnonzero(base.tokens[at] >= 0)
    kept = columns if len(columns) <= 2 * KEPT else np.concatenate([columns[:KEPT], columns[-KEPT:]])
    words = _Words(setup.tokenizer)
    score = rounded(base.scores[at])
    return {
        "number": at + 1,
        "of": len(base.samples),
        "changed": one is not None,
        "ended": base.samples[at].ended,
        "prompt": words.text(base.samples[at].prompt),
        "score": score,
        "left_out": len(columns) - len(kept),
        "left_out_after": KEPT if len(kept) < len(columns) else 0,
        "tokens": [_token(base, at, t, words) for t in map(int, kept)],
        "rows": _rows(setup, traced, at, kept),
    }


def _token(base: Table, at: int, t: int, words: _Words) -> dict[str, Any]:
    weight, offset, token = base["weight"][at, t], base["offset"][at, t], int(base.tokens[at, t])
    return {
        "id": token,
        "text": words.token(token),
        "counted": bool(base.real[at, t]),
        "trained": bool(np.isfinite(weight) and weight != 0),
        "offset": int(offset) if np.isfinite(offset) else None,
    }


def _rows(setup: RLHFSetup, traced: Traced, at: int, kept: Any) -> list[dict[str, Any]]:
    base, made = traced.base, traced.recovered
    rewards, returns, advantages = by_declaration(setup.declared, base, at)
    unseen = base.fields.get("old_value")
    values = base["old_value"] if unseen is not None else base["value"]
    none = critic_free(traced)
    why = "there is no critic to read it from" if none else made.reasons.get("returns", "")
    shown: list[tuple[str, Floats | None, Floats | None, str]] = [
        (
            "reward",
            None if made.rewards is None else made.rewards[at],
            None if none else rewards,
            why or made.reasons.get("rewards", ""),
        ),
        ("value", values[at], None, "there is no critic" if none else "no value was seen"),
        ("return", made.returns[at], None if none else returns, why),
        ("advantage", made.raw_advantages[at], None if none else advantages, why),
        ("weight in the loss", np.where(base.real, base["weight"], np.nan)[at], None, "no gradient was seen"),
    ]
    size = _size(base["weight"]), max(_size(made.returns), _size(values))
    rows = []
    for name, measured, declared, reason in shown:
        least = LEAST * size[name != "weight in the loss"]
        seen = _numbers(measured, kept, least)
        said = None if declared is None else _numbers(declared, kept, least)
        known = any(x is not None for x in seen)
        rows.append(
            {
                "name": name,
                "measured": seen,
                "declared": said,
                "differs": _differs(seen, said),
                "reason": "" if known else reason or "it could not be measured",
            }
        )
    return rows


def _size(values: Floats) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _numbers(values: Floats | None, kept: Any, least: float) -> list[float | None]:
    """Rounded, with what is below ``least`` taken for 0."""
    if values is None:
        return [None] * len(kept)
    return [rounded(0.0 if abs(x) < least else x) for x in values[kept]]


def _differs(measured: list[float | None], declared: list[float | None] | None) -> list[bool]:
    if declared is None:
        return [False] * len(measured)
    size = max((abs(x) for row in (measured, declared) for x in row if x is not None), default=0.0)
    return [
        a is not None and b is not None and abs(a - b) > APART * size for a, b in zip(measured, declared, strict=True)
    ]


# ---- by the declared settings ----------------------------------------------------------------------------------------


def by_declaration(
    declared: Mapping[str, Any], base: Table, at: int
) -> tuple[Floats | None, Floats | None, Floats | None]:
    """(rewards, returns, advantages) of one sample, (T,), by the declared settings; None where they do not say.

    Rewards are the KL penalty where one is declared in the reward, and the score on the last token; advantages are GAE,
    https://arxiv.org/abs/1506.02438, equation 16, without a value after the last token.
    """
    rewards = _rewards(declared, base, at)
    gamma, lam = number(declared.get("gamma")), number(declared.get("lam"))
    values, length = base["old_value"][at], int(base.real[at].sum())
    if rewards is None or gamma is None or lam is None or not length or not np.isfinite(values[:length]).all():
        return rewards, None, None
    advantages = np.full(len(values), np.nan)
    running = 0.0
    for t in range(length - 1, -1, -1):
        ahead = values[t + 1] if t + 1 < length else 0.0
        running = rewards[t] + gamma * ahead - values[t] + gamma * lam * running
        advantages[t] = running
    return rewards, advantages + values, advantages


def _rewards(declared: Mapping[str, Any], base: Table, at: int) -> Floats | None:
    if declared.get("whiten_rewards") or declared.get("dense_rewards") or not np.isfinite(base.scores[at]):
        return None
    penalty = _penalty(declared, base, at)
    length = int(base.real[at].sum())
    if penalty is None or not length or not np.isfinite(penalty[:length]).all():
        return None
    score, clip = float(base.scores[at]), number(declared.get("reward_clip"))
    score = float(np.clip(score, -clip, clip)) if clip else score
    missing = number(declared.get("missing_eos_penalty"))
    if missing and not base.samples[at].ended:
        score -= missing
    rewards = np.where(base.real[at], -penalty, np.nan)
    rewards[length - 1] += score
    return rewards


def _penalty(declared: Mapping[str, Any], base: Table, at: int) -> Floats | None:
    coefficient, place = number(declared.get("kl_coef")), str(declared.get("kl_in") or "").strip().lower()
    if coefficient == 0 or place == "loss":
        return np.zeros(base.tokens.shape[1])
    estimator = str(declared.get("kl_estimator") or "k1").strip().lower()
    if coefficient is None or place != "reward" or declared.get("kl_adaptive"):
        return None
    k1 = base["old_logp"][at] - base["ref_logp"][at]
    kinds = {"k1": k1, "k2": k1**2 / 2, "k3": np.expm1(-k1) + k1, "|k1|": np.abs(k1)}
    found = kinds.get(NAMES.get(estimator, estimator))
    return None if found is None else coefficient * found


class _Words:
    """Texts of token ids; an id stands for itself where the tokenizer cannot say."""

    def __init__(self, tokenizer: Any) -> None:
        decode = getattr(tokenizer, "decode", None)
        self.decode = decode if callable(decode) else None

    def text(self, ids: Any) -> str:
        try:
            said = None if self.decode is None else self.decode([int(i) for i in ids])
        except Exception:  # any tokenizer of a user's
            said = None
        return said if isinstance(said, str) and said else " ".join(f"#{i}" for i in ids)

    def token(self, token: int) -> str:
        return self.text([token])

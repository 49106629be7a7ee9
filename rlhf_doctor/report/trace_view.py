"""What one step was seen to do, as plain data for the report: wiring, measured numbers, and one sample's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.instruments.algorithms import number
from rlhf_doctor.report import trace_sample, trace_wiring
from rlhf_doctor.report.trace_wiring import rounded
from rlhf_doctor.trace import gains
from rlhf_doctor.trace.divergence import divergence
from rlhf_doctor.trace.odds import scoring_temperature
from rlhf_doctor.trace.weighting import SOUND, weighting
from rlhf_doctor.trace.whitening import whitening

if TYPE_CHECKING:
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup
    from rlhf_doctor.trace.divergence import Divergence

__all__ = ["trace"]

# How far apart measured and declared may be: absolute for gamma and lambda, relative otherwise, as the checks have it.
DISCOUNT, TEMPERATURE, WEIGHT = 2 * gains.PRECISE, 0.02, 0.05
NO_CRITIC = "without a critic advantages are not discounted sums"
WHITENED: Mapping[str, tuple[str, bool | None]] = {
    "batch": ("over the whole batch", True),
    "minibatch": ("within each minibatch", True),
    "micro-batch": ("within each micro-batch", True),
    "row": ("within each response", True),
    "none": ("not whitened", False),
    "kept": ("divided by the deviation, mean kept", None),
    "variance": ("divided by the variance", None),
    "other": ("another number than the mean taken off", None),
}


def trace(setup: RLHFSetup, traced: Traced) -> dict[str, Any]:
    """The keys are documented in ``schema.SCHEMA`` under ``trace``."""
    terms = divergence(traced, setup.declared)
    rows = trace_wiring.wiring(setup, traced, terms)
    roles = trace_wiring.updated(setup, traced)
    done = traced.experiments.done
    return {
        "answer": trace_wiring.answer(setup, traced),
        "sentence": trace_wiring.wiring_sentence(rows, roles),
        "changed": list(done),
        "unchanged": "" if done else traced.experiments.reasons.get("*", "nothing could be changed"),
        "wiring": rows,
        "updated": roles,
        "numbers": _numbers(setup.declared, traced, terms),
        "sample": trace_sample.sample(setup, traced),
    }


def _numbers(declared: Mapping[str, Any], traced: Traced, terms: Divergence) -> list[dict[str, Any]]:
    return [
        _temperature(declared, traced),
        *_discount(declared, traced),
        _kl(declared, terms),
        _aggregation(declared, traced),
        _whitening(declared, traced),
    ]


def _row(name: str, declared: Any, measured: Any, agrees: bool | None, reason: str = "") -> dict[str, Any]:
    """Declared and measured are numbers or words, None where not known."""
    return {
        "name": name,
        "declared": declared,
        "measured": measured,
        "agrees": None if declared is None or measured is None else agrees,
        "reason": "" if measured is not None else reason or "it could not be measured",
    }


def _near(declared: float | None, measured: float | None, absolute: float = 0.0, relative: float = 0.0) -> bool | None:
    if declared is None or measured is None:
        return None
    return abs(measured - declared) <= absolute + relative * abs(declared) + 1e-12


def _temperature(declared: Mapping[str, Any], traced: Traced) -> dict[str, Any]:
    said, found = number(declared.get("temperature")), scoring_temperature(traced.base)
    if found is None:
        return _row("temperature", said, None, None, "no gradient was seen at the policy's head")
    measured, spread, _ = found
    return _row("temperature", said, rounded(measured), _near(said, measured, relative=max(TEMPERATURE, 4 * spread)))


def _discount(declared: Mapping[str, Any], traced: Traced) -> list[dict[str, Any]]:
    gamma, lam = number(declared.get("gamma")), number(declared.get("lam"))
    product = None if gamma is None or lam is None else rounded(gamma * lam)
    seen: tuple[float | None, ...] = (None, None, None)
    reason = traced.experiments.reasons.get("*") or "no score or value moved the advantages as discounted sums would"
    if gains.critic_free(traced):
        reason = reason if not traced.experiments.done else NO_CRITIC
    else:
        try:
            found = next((d for of in ("policy", "target") if (d := gains.discount(traced, of)).sound), None)
        except Unavailable as skip:
            found, reason = None, str(skip)
        if found is not None:
            seen = (found.gamma, found.lam, found.product)
    names = ("gamma", "lambda", "gamma · lambda")
    return [
        _row(name, said, None if x is None else rounded(x), _near(said, x, absolute=DISCOUNT), reason)
        for name, said, x in zip(names, (gamma, lam, product), seen, strict=True)
    ]


def _kl(declared: Mapping[str, Any], terms: Divergence) -> dict[str, Any]:
    """The coefficient of the KL and the place where it acts, said as one: "0.05 in the reward"."""
    coefficient, place = number(declared.get("kl_coef")), str(declared.get("kl_in") or "").strip().lower()
    said = None if coefficient is None else _placed(coefficient, place if coefficient else "")
    seen = [(name, p) for name in ("reward", "loss") if (p := getattr(terms, name)) is not None]
    found = [(name, p.best.coefficient) for name, p in seen if p.there and p.best is not None]
    if not seen:
        return _row("KL weight", said, None, None, terms.reasons.get("reward") or terms.reasons.get("loss") or "")
    if not found:
        if any(p.there for _, p in seen):
            return _row("KL weight", said, None, None, "what the reference moves is no known estimator of the KL")
        if len(seen) < 2:
            return _row("KL weight", said, None, None, next(iter(terms.reasons.values()), ""))
        return _row("KL weight", said, "0", None if coefficient is None else coefficient == 0)
    measured = " and ".join(_placed(rounded(weight) or 0.0, name) for name, weight in found)
    agrees = (
        len(found) == 1 and (not place or place == found[0][0]) and _near(coefficient, found[0][1], relative=WEIGHT)
    )
    # An adaptive coefficient is what it has become, and not what is declared.
    return _row("KL weight", said, measured, None if declared.get("kl_adaptive") and not agrees else agrees)


def _placed(weight: float, place: str) -> str:
    return f"{weight:.4g}" + (f" in the {place}" if place in ("reward", "loss") else "")


def _aggregation(declared: Mapping[str, Any], traced: Traced) -> dict[str, Any]:
    said = declared.get("loss_aggregation")
    found = weighting(traced)
    measured = found.name or None
    known = measured in SOUND and said in SOUND
    return _row("aggregation", None if said is None else str(said), measured, said == measured if known else None,
                found.reason or "the policy's weights follow no known advantages")  # fmt: skip


def _whitening(declared: Mapping[str, Any], traced: Traced) -> dict[str, Any]:
    said = declared.get("whiten_advantages")
    shown = None if said is None else {True: "whitened", False: "not whitened"}.get(said, str(said))
    if gains.critic_free(traced):
        return _row("whitening", shown, None, None, "advantages are not returns − values here")
    try:
        found = whitening(traced, declared).kind
    except Unavailable as skip:
        return _row("whitening", shown, None, None, str(skip))
    words, done = WHITENED.get(found, (None, None))
    reason = traced.recovered.reasons.get("returns") or "returns − values do not explain the policy's weights"
    return _row(
        "whitening", shown, words, said == done if isinstance(said, bool) and done is not None else None, reason
    )

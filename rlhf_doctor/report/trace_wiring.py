"""Who influences whom and who is updated, as declared and as measured, and whether the critic learns from scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.finding import MODEL_ROLES, Role
from rlhf_doctor.instruments.algorithms import algorithm_kind, number
from rlhf_doctor.report.text import counted
from rlhf_doctor.trace.critic import part_in_training
from rlhf_doctor.trace.gains import critic_free
from rlhf_doctor.trace.recover import EDGES, return_response

if TYPE_CHECKING:
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup
    from rlhf_doctor.trace.divergence import Divergence

__all__ = ["answer", "rounded", "updated", "wiring", "wiring_sentence", "without_critic"]

TARGET, POLICY, ADVANTAGE, REWARD, LOSS = EDGES
ENDS: Mapping[str, tuple[Role, Role]] = {
    TARGET: ("reward", "value"),
    POLICY: ("reward", "policy"),
    ADVANTAGE: ("value", "policy"),
    REWARD: ("reference", "reward"),
    LOSS: ("reference", "policy"),
}
MEANS = {
    TARGET: "the scores enter the critic's target",
    POLICY: "the scores reach the policy's gradient",
    ADVANTAGE: "the critic's values are taken off in the advantages",
    REWARD: "the KL to the reference is taken off the rewards",
    LOSS: "the KL to the reference is a term of the policy's loss",
}
ANSWERS = 1e-3  # of a unit: less is rounding


def rounded(value: Any, digits: int = 4) -> float | None:
    """To a few significant digits, so that machines agree; None for what is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") + 0.0 if np.isfinite(value) else None


def without_critic(setup: RLHFSetup, traced: Traced) -> bool:
    """Whether there is no critic, and none is meant to be."""
    kind = algorithm_kind(setup.declared)
    return critic_free(traced) and (kind == "critic-free" or (kind is None and setup.value is None))


def wiring(setup: RLHFSetup, traced: Traced, terms: Divergence) -> list[dict[str, Any]]:
    """One mapping for each of ``EDGES``; the keys are documented in ``schema.SCHEMA`` under ``trace.wiring[]``."""
    rows = []
    for name in EDGES:
        expected, why = _expected(name, setup)
        measured, gain, reason = _measured(name, setup, traced, terms)
        rows.append(
            {
                "edge": name,
                "from": ENDS[name][0],
                "to": ENDS[name][1],
                "means": MEANS[name],
                "expected": expected,
                "why": why,
                "measured": measured,
                "gain": gain,
                "reason": reason,
                "verdict": _verdict(expected, measured),
            }
        )
    return rows


def _verdict(expected: bool | None, measured: bool | None) -> str:
    if measured is None:
        return "unknown"
    if expected is None:
        return "undeclared"
    if expected:
        return "there" if measured else "missing"
    return "unexpected" if measured else "none"


def _expected(name: str, setup: RLHFSetup) -> tuple[bool | None, str]:
    declared = setup.declared
    kind, coefficient = algorithm_kind(declared), number(declared.get("kl_coef"))
    place = str(declared.get("kl_in") or "").strip().lower()
    if name in (TARGET, ADVANTAGE):
        if kind == "critic-free":
            return False, f"{declared.get('algorithm')} has no critic"
        if kind is None and setup.value is None:
            return False, "no critic was given"
        return (
            True,
            "PPO trains a critic towards the returns" if name == TARGET else "PPO's advantage is return − value",
        )
    if name == POLICY:
        return True, "the reward is what the policy is trained for"
    if coefficient == 0:
        return False, "kl_coef = 0 is declared"
    if place in ("reward", "loss"):
        return (name == REWARD) == (place == "reward"), f"kl_in = {place} is declared"
    if setup.reference is None:
        return False, "no reference was given"
    return None, "kl_in is not declared"


def _measured(name: str, setup: RLHFSetup, traced: Traced, terms: Divergence) -> tuple[bool | None, float | None, str]:
    edge = traced.recovered.edges.get(name)
    if edge is None:
        return None, None, "it could not be measured"
    if name in (TARGET, ADVANTAGE) and critic_free(traced) and traced.experiments.done:
        return False, None, "no critic takes part in the step"
    if name in (REWARD, LOSS):
        penalty = terms.reward if name == REWARD else terms.loss
        if _without_rewards(traced, terms):
            return _by_the_policy(name, setup, traced, "the critic's targets hold no rewards")
        if penalty is not None:
            return _of_penalty(penalty, edge)
        if critic_free(traced):
            return _by_the_policy(name, setup, traced, "there is no critic")
    if edge.gain is None:
        return None, None, edge.reason
    return edge.there, _gain(edge), "identical to the last bit" if edge.identical else edge.reason


def _of_penalty(penalty: Any, edge: Any) -> tuple[bool, float | None, str]:
    if not penalty.there:
        return False, 0.0, "identical to the last bit" if penalty.identical else ""
    return True, rounded(penalty.best.coefficient) if penalty.best else _gain(edge), ""


def _gain(edge: Any) -> float | None:
    return None if edge.gain is None else rounded(round(edge.gain, 6))


def _without_rewards(traced: Traced, terms: Divergence) -> bool:
    """Whether a critic's targets follow neither scores nor reference, so that rewards do not show in them."""
    target, kl = traced.recovered.edges.get(TARGET), terms.reward or traced.recovered.edges.get(REWARD)
    known = not critic_free(traced) and target is not None and target.gain is not None and not target.there
    return known and not (kl is not None and kl.there)


def _by_the_policy(name: str, setup: RLHFSetup, traced: Traced, why: str) -> tuple[bool | None, float | None, str]:
    """Where no rewards are seen, what the reference moves shows in the policy's gradient alone."""
    edge = traced.recovered.edges[LOSS]
    if edge.gain is None:
        return None, None, edge.reason
    if not edge.there:
        return False, 0.0, "identical to the last bit" if edge.identical else ""
    if _expected(name, setup)[0]:
        return True, None, f"seen in the policy's gradient; which way it came does not show, since {why}"
    return None, None, f"not told from a KL in the rewards or the loss, since {why}"


def wiring_sentence(rows: list[dict[str, Any]], roles: list[dict[str, Any]]) -> str:
    """The wiring in one or two sentences: complete, or what is missing, too much or unknown."""
    said = []
    for verdict, words in (("missing", "Missing"), ("unexpected", "Not expected, but there")):
        names = [one["edge"] for one in rows if one["verdict"] == verdict]
        if names:
            said.append(f"{words}: {', '.join(names)}.")
    for verdict, words in (("missing", "Not updated, but should be"), ("unexpected", "Updated, but should not be")):
        names = [_word(one["role"]) for one in roles if one["verdict"] == verdict]
        if names:
            said.append(f"{words}: {', '.join(names)}.")
    open_ = [one["edge"] for one in rows if one["verdict"] == "unknown" and one["expected"] is not False]
    if not said:
        there = sum(one["verdict"] == "there" for one in rows)
        if open_ and not there:
            return "The wiring could not be measured."
        rest = ", and no other is" if all(one["verdict"] != "unknown" for one in rows) else ""
        said.append(
            f"The wiring is as declared: {counted(there, 'influence')} that should be there {_are(there)}{rest}."
        )
    if open_:
        said.append(f"Not measured: {', '.join(open_)}.")
    return " ".join(said)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _word(role: str) -> str:
    return {"reward": "reward model", "value": "critic"}.get(role, role)


# ---- who is updated --------------------------------------------------------------------------------------------------


def updated(setup: RLHFSetup, traced: Traced) -> list[dict[str, Any]]:
    """One mapping a role; the keys are documented in ``schema.SCHEMA`` under ``trace.updated[]``."""
    run = traced.experiments.real or (traced.experiments.first if traced.experiments.first.moved else None)
    none = without_critic(setup, traced)
    rows = []
    for role in MODEL_ROLES:
        model = setup.model(role)
        expected = role == "policy" or (role == "value" and not none)
        present = role == "policy" or (model is not None and not (role == "value" and none))
        moved, reason = _moved(role, model, setup, run, traced)
        measured = None if moved is None else bool(moved)
        verdict = _verdict(expected, measured) if present else "absent"
        rows.append(
            {
                "role": role,
                "expected": expected,
                "measured": measured if present else None,
                "tensors": len(moved) if moved else 0,
                "largest": rounded(max((x for x in moved.values() if np.isfinite(x)), default=np.nan), 2)
                if moved
                else None,
                "reason": reason if present else "not part of this run",
                "verdict": verdict,
            }
        )
    return rows


def _moved(role: Role, model: Any, setup: RLHFSetup, run: Any, traced: Traced) -> tuple[dict[str, float] | None, str]:
    if run is None or not run.moved:
        said = getattr(run, "error", "") or traced.experiments.reasons.get("*")
        if run is None or said:
            return None, said or "no whole step was seen"
    if isinstance(model, str):
        return None, "it is the policy with its adapter off"
    if not hasattr(model, "named_parameters"):
        return {}, "it has no parameters"
    names = dict(run.moved.get(role, {}))
    own = {name for name, p in model.named_parameters() if id(p) not in _others(role, setup)}
    return ({n: size for n, size in names.items() if n in own} if own else names), ""


def _others(role: Role, setup: RLHFSetup) -> set[int]:
    """Parameters that count for another role: the trained policy's, and for the frozen ones the critic's as well."""
    above = {"policy": (), "value": ("policy",)}.get(role, ("policy", "value"))
    models = [setup.model(other) for other in above]  # type: ignore[arg-type]
    return {id(p) for m in models if hasattr(m, "named_parameters") for _, p in m.named_parameters()}


# ---- the question ----------------------------------------------------------------------------------------------------


def answer(setup: RLHFSetup, traced: Traced) -> dict[str, Any]:
    """Whether the critic learns from the reward model's scores; keys as in ``schema.SCHEMA``, ``trace.answer``."""
    learns, sentence, numbers = _answer(setup, traced)
    return {
        "question": "Does the critic learn from the reward model's scores?",
        "learns": learns,
        "sentence": sentence,
        "gain": None,
        "changed": 0,
        "responded": 0,
        "identical": False,
    } | numbers


def _answer(setup: RLHFSetup, traced: Traced) -> tuple[str, str, dict[str, Any]]:
    found = traced.experiments
    if without_critic(setup, traced):
        return "no critic", "There is no critic here: advantages are made of the scores themselves.", {}
    part = part_in_training(found.first.calls)
    if part != "trained":
        how = {
            "not called": "the step never calls it",
            "called without gradient": "the step only calls it without gradient",
            "no gradient came back": "no gradient comes back to its values",
            "gradient is zero": "the gradient of its values is 0",
        }[part]
        return "no", f"No. The critic does not learn at all: {how}.", {}
    edge, scored = traced.recovered.edges[TARGET], found.done.get("all scores")
    if scored is None:
        return "unknown", f"Not known: {edge.reason or 'no score was changed'}.", {}
    return _responses(traced, scored, edge)


def _responses(traced: Traced, scored: Any, edge: Any) -> tuple[str, str, dict[str, Any]]:
    base, gain = traced.base, _gain(edge)
    raw = np.where(base.real, scored.moved(base, "value_gradient"), np.nan)
    seen = scored.touched & np.isfinite(raw).any(1)
    count = int(seen.sum())
    numbers = {"gain": gain, "changed": count, "identical": bool(edge.identical)}
    if not count:
        return "unknown", "Not known: no response whose score was changed was seen in the critic's training.", {}
    elsewhere = any(
        not np.array_equal(base.outside[n], scored.table.outside[n])
        for n in ("value_prompt", "value_after")
        if n in base.outside and n in scored.table.outside
    )
    if edge.identical:
        if elsewhere:
            return "no", (
                f"No, not where it should: with the scores of {counted(count, 'response')} changed, the critic's "
                "gradient moved outside of the responses alone."
            ), numbers  # fmt: skip
        return "no", (
            f"No. With the scores of {counted(count, 'response')} changed, the critic's gradient stayed identical to "
            "the last bit."
        ), numbers  # fmt: skip
    moved = (np.abs(raw) > 0).any(1) & seen
    response = np.abs(return_response(traced.recovered, traced.experiments, scored))
    known = np.isfinite(response)
    if not known.any():
        numbers["responded"] = int(moved.sum())
        return "yes", (
            f"Yes. With the scores of {counted(count, 'response')} changed, the critic's gradient moved in "
            f"{numbers['responded']}; by how much its target moved does not show."
        ), numbers  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(known, response, 0.0).max(1) / np.abs(scored.amounts)
    responded = int((each[seen] > ANSWERS).sum())
    numbers["responded"] = responded
    if not responded:
        return "no", (
            f"No. With the scores of {counted(count, 'response')} changed, the critic's target moved by less than "
            f"{ANSWERS:g} for each unit of score."
        ), numbers  # fmt: skip
    return "yes", _yes(count, responded, gain, float(np.median(each[seen & (each > ANSWERS)]))), numbers


def _yes(count: int, responded: int, gain: float | None, largest: float) -> str:
    where = "all of them" if responded == count else f"{responded} of them"
    said = f"With the scores of {counted(count, 'response')} changed, the critic's target moved in {where}"
    if gain is not None and abs(gain) > ANSWERS:
        turned = ", the wrong way round" if gain < 0 else ""
        return f"Yes. {said}, by {gain:.3g} at the last token for each unit of score{turned}."
    return f"Yes, but not at the last token. {said}, by up to {largest:.3g} for each unit of score."

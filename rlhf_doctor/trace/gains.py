"""What a unit of a score and of a rollout value does to every response token, as measured, and the discount in it.

With generalized advantage estimation a unit of the score adds (γλ)^(L-1-t) to the advantage of token t, L being the
response's length, and a unit of V(s_u) adds -1 at u and (γλ)^(u-1-t) γ(1-λ) before it. https://arxiv.org/abs/1506.02438
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.recover import Recovered, masked, policy_response, return_response
from rlhf_doctor.trace.weighting import half_precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.interventions import Experiment

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

__all__ = [
    "FOLLOWS",
    "NOTHING",
    "PRECISE",
    "STILL",
    "Discount",
    "Response",
    "coupled",
    "critic_free",
    "discount",
    "follows",
    "moved_share",
    "ratios_ahead",
    "score_gains",
    "trusted",
    "value_gains",
]

FOLLOWS = 1e-2  # of the weights' range: float32 leaves 1e-6, bfloat16 some 1e-3, another rule tenths
ROUNDED = 1e-4  # relative; what float32 rounds is a thousandth of it
PRECISE = 2e-3  # of a gain: float32 leaves 1e-4 of the amounts that are added, and 0.99 is told from 1
NOTHING = 1e-3  # of a gain: nothing moved
GEOMETRIC = 2e-4  # between the gains' ratios of one row: float32 leaves 1e-4, a constant in every reward a thousandth
STILL = 1e-5  # of the largest weight: what reordered sums leave, with a margin
OWN = 0.1  # of the largest gain of a score: what is smaller is not the row's own score


def critic_free(traced: Traced) -> bool:
    """Whether no critic takes part in the step."""
    return not traced.base.has("old_value") and not traced.base.has("value")


def trusted(traced: Traced) -> Bools:
    """The samples whose training pass was seen at the initial weights, (S,)."""
    base = traced.base
    seen = base.windows.get("policy", base.windows.get("value", np.zeros(len(base.samples), dtype=np.int64)))
    return seen == 0 if traced.experiments.by_hand else seen >= 0


def follows(made: Recovered) -> bool | None:
    """Whether the policy is trained with returns − values, up to one line a minibatch; None where it does not show."""
    if not made.fits:
        return None
    return all(fit.misfit < FOLLOWS and fit.slope > 0 for fit in made.fits.values())


@dataclass(frozen=True)
class Response:
    """What one unit of something at state ``at`` of a sample does to its tokens: ``gain`` (L,)."""

    sample: int
    at: int
    gain: Floats


def _rows(traced: Traced, response: Floats, units: Floats) -> list[Response]:
    """The trusted samples' whole responses, for each unit that was added at a (sample, state)."""
    found = []
    lengths, good = traced.base.real.sum(1), trusted(traced)
    for s, at in zip(*np.nonzero(np.nan_to_num(units)), strict=True):
        row = response[s, : lengths[s]]
        if good[s] and at < len(row) and np.isfinite(row).all():
            found.append(Response(int(s), int(at), row / units[s, at]))
    return found


def coupled(traced: Traced, name: str, size: float | None = None) -> bool:
    """Whether samples that were not touched move as well, beyond a line: rewards are normalised over the batch.

    ``size`` is that of the change that matters, where several were made.
    """
    experiment = traced.experiments.done[name]
    still = trusted(traced) & ~experiment.touched
    size = float(np.abs(experiment.amounts).max(initial=0.0)) if size is None else size
    if not still.any() or not size or critic_free(traced):
        return False
    moved = np.abs(return_response(traced.recovered, traced.experiments, experiment))[still]
    if not np.isfinite(moved).any():
        moved = np.abs(_of_policy(traced, experiment))[still]
    return bool(np.nanmax(np.where(np.isfinite(moved), moved, 0.0)) > 2 * PRECISE * size)


def _of_policy(traced: Traced, experiment: Experiment) -> Floats:
    """How the policy's advantages moved; without a critic as weights, since a group moves together by right.

    Raises:
        Unavailable: they were computed too coarsely.
    """
    if critic_free(traced):
        return experiment.moved(traced.base, "weight")
    if traced.base.rounding("policy") > ROUNDED:
        raise Unavailable("needs the policy's logits in float32: half precision rounds away what is looked for")
    if half_precision(traced):
        raise Unavailable("needs a policy loss in float32: half precision rounds away what is looked for")
    return policy_response(traced.recovered, traced.experiments, experiment)


def score_gains(traced: Traced, of: str) -> list[Response]:
    """What a unit of the score does to the "policy"'s advantages or to the critic's "target", by sample.

    The policy's own gradient shows it of one sample; where it follows returns − values, the target's gains are the
    others'. Where it does not, and without a critic, the units are those of the weights.
    """
    made, found = traced.recovered, traced.experiments
    both = of == "target" or (follows(made) and not critic_free(traced))
    shared = not critic_free(traced) and "one score" in found.done and coupled(traced, "one score")
    if shared:
        both = False
        if of == "policy" and not follows(made):
            return []
    rows: dict[int, Response] = {}
    for name in ("one score", "all scores") if both else ("one score",):
        experiment = found.done.get(name)
        if experiment is None:
            continue
        # Where scores are normalised over the batch every sample moves, so none shows what a whole line did.
        direct = of == "policy" and name == "one score" and not shared
        response = _of_policy(traced, experiment) if direct else return_response(made, found, experiment)
        units = np.zeros(traced.base.tokens.shape)
        last = np.maximum(traced.base.real.sum(1) - 1, 0)
        units[np.arange(len(last)), last] = experiment.amounts
        for row in _rows(traced, response, units):
            rows.setdefault(row.sample, row)
    return list(rows.values())


def value_gains(traced: Traced, of: str) -> list[Response]:
    """What a unit of one rollout value does to the policy's advantages or to the critic's "target"."""
    experiment = traced.experiments.done.get("rollout outputs")
    if experiment is None or not traced.base.has("old_value"):
        return []
    made, found = traced.recovered, traced.experiments
    response = return_response(made, found, experiment) if of == "target" else _of_policy(traced, experiment)
    pushed = np.where((experiment.amounts != 0) & traced.base.real, experiment.moved(traced.base, "old_value"), 0.0)
    if coupled(traced, "rollout outputs", float(np.nan_to_num(np.abs(pushed)).max(initial=0.0))):
        return []
    if of == "policy":  # a clipped token answers to nothing
        pushed = np.where(np.nan_to_num(traced.base["weight"]) != 0, pushed, 0.0)
    return _rows(traced, response, pushed)


def moved_share(traced: Traced, name: str) -> Floats:
    """The largest move of each sample's policy weights in a changed run, in units of the largest weight, (S,)."""
    experiment = traced.experiments.done[name]
    weight = np.abs(masked(traced.base, traced.base["weight"]))
    moved = np.abs(masked(traced.base, experiment.moved(traced.base, "weight")))
    size = max(float(np.nan_to_num(x, posinf=0.0).max(initial=0.0)) for x in (weight, moved)) or 1.0
    share: Floats = np.where(np.isfinite(moved) & trusted(traced)[:, None], moved / size, 0.0).max(1)
    return share


@dataclass(frozen=True)
class Discount:
    """γλ and γ as measured, None where they do not show; ``scatter`` is how far most readings are apart."""

    product: float | None
    gamma: float | None
    scatter: float
    readings: int

    @property
    def sound(self) -> bool:
        """Whether one γ and one λ between 0 and 1 explain every reading."""
        if self.product is None or self.scatter > 5 * PRECISE or not -PRECISE < self.product < 1 + PRECISE:
            return False
        return self.gamma is None or self.product - 5 * PRECISE < self.gamma < 1 + 5 * PRECISE

    @property
    def lam(self) -> float | None:
        """λ, where both show."""
        return None if self.product is None or not self.gamma else self.product / self.gamma


def discount(traced: Traced, of: str) -> Discount:
    """γλ from the scores' gains and γ from a rollout value's, wherever they are those of discounted sums.

    The units of the gains do not matter: where the policy does not follow returns − values they are unknown.
    """
    products: list[float] = []
    shared = traced.recovered.scores_shared
    try:
        rows = score_gains(traced, of)
    except Unavailable:
        if not shared:
            raise
        rows = []
    largest = max((np.abs(row.gain).max(initial=0.0) for row in rows), default=0.0)
    for row in rows:  # a score that something else takes the place of shows what the others' do to its rewards
        ratios = ratios_ahead(row.gain) if np.abs(row.gain).max(initial=0.0) > OWN * largest else []
        apart = ratios_ahead(-np.diff(row.gain)) if len(ratios) > 3 and np.ptp(ratios) > 10 * PRECISE else []
        if len(apart) > 2 and np.ptp(apart) < 10 * PRECISE:  # every token has a share of the score
            ratios = apart
        if not shared or (len(ratios) > 2 and np.ptp(ratios) < GEOMETRIC):  # normalised, it may have moved every reward
            products += ratios
    values = [row for row in value_gains(traced, of) if row.at >= 1]
    if of == "policy":
        values = [row for row in values if abs(row.gain[row.at]) > NOTHING]
        for row in values:
            if row.at >= 2 and np.abs(row.gain[: row.at]).max() > 20 * NOTHING * abs(row.gain[row.at]):
                products += ratios_ahead(row.gain[: row.at])
    product = float(np.median(products)) if products else None
    gammas: list[float] = []
    for row in values if product is not None else ():
        own = row.gain[row.at]
        if of == "policy":
            gammas.append(row.gain[row.at - 1] / -own + product)
        elif abs(own) < NOTHING:
            gammas.append(row.gain[row.at - 1] + product)
    scatter = max((_scatter(x) for x in (products, gammas) if x), default=float("inf"))
    gamma = float(np.median(gammas)) if gammas else None
    return Discount(float(np.median(products)) if products else None, gamma, scatter, len(products) + len(gammas))


def _scatter(readings: list[float]) -> float:
    """How far three quarters of the readings are from their median: a single odd token says nothing."""
    return float(np.quantile(np.abs(np.array(readings) - np.median(readings)), 0.75))


def ratios_ahead(gain: Floats) -> list[float]:
    """Each token's gain over the next one's, where the next one's is not small."""
    size = np.abs(gain)
    good = size[1:] > 0.05 * size.max() if len(gain) > 1 and size.max() > 0 else np.zeros(0, dtype=bool)
    return [float(x) for x in (gain[:-1][good] / gain[1:][good])]

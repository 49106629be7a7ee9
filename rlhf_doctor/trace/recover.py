"""The training algorithm, read off what moved: returns, advantages, discount, rewards, and who influences whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.interventions import Experiment, Experiments
from rlhf_doctor.trace.rescaled import Rates, elsewhere, rates_of_scaled, rewards_of, steadied, values_ahead
from rlhf_doctor.trace.table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = [
    "EDGES",
    "Edge",
    "Fit",
    "Recovered",
    "misread",
    "moved_for_real",
    "policy_response",
    "recover",
    "return_response",
]

EDGES = (
    "reward → value target",
    "reward → policy",
    "value → advantage",
    "reference → reward",
    "reference → loss",
)
STILL = 1e-9  # of a field's range: nothing moved
UNKNOWN: Mapping[str, Any] = {
    "gamma_lam": None, "gamma": None, "lam": None, "gamma_lam_of_policy": None, "scores_shared": False, "rewards": None,
    "edges": None,
}  # fmt: skip
LINEAR = 0.25  # of the tokens
ANSWER = 1e-2  # of a score's change: float32 leaves 1e-4
SHARED = 4e-3  # of a changed score: float32 leaves 1e-4, a mean over 200 samples 5e-3


@dataclass(frozen=True)
class Edge:
    """One measured influence. ``gain`` is what comes of one unit; None where it could not be measured, and why."""

    name: str
    gain: float | None
    reason: str = ""
    identical: bool = False  # not one bit moved

    @property
    def there(self) -> bool | None:
        """Whether it exists; None where unknown."""
        return None if self.gain is None else not self.identical and abs(self.gain) > 1e-4


@dataclass(frozen=True)
class Fit:
    """``weight`` = slope · row scale · (return − value) + intercept · row scale, over one window's tokens."""

    slope: float
    intercept: float
    misfit: float  # largest residual over the range of the weights
    count: int


class Recovered:
    """All arrays (S, T), NaN where unknown; ``reasons`` says why something could not be identified.

    What takes changed scores or rollout values to know is worked out when it is first asked for.

    Attributes:
        kappa: ∂²L/∂V² at every state: what the value gradient is per unit of V − return.
        returns: V − gradient / kappa: the target that the critic is trained towards.
        advantages: what the policy is trained with, in units of the returns where they fit them, else as weights.
        raw_advantages: returns − rollout value.
        row_scale: (S,) how a row's tokens are weighted beside other rows'.
        fits: window -> how the policy's weights follow from ``raw_advantages``.
        gamma_lam, gamma, lam: measured; None where not identifiable. ``gamma_lam_of_policy`` is from its advantages.
        scores_shared: whether one changed score moves most samples' rewards, by no line that could be taken out.
        rewards: per token, from the returns by inverting GAE with the measured (else declared) gamma and lambda.
        edges: the measured wiring, by ``EDGES``.
    """

    kappa: Floats
    returns: Floats
    raw_advantages: Floats
    advantages: Floats
    gamma_lam: float | None
    gamma: float | None
    lam: float | None
    gamma_lam_of_policy: float | None
    scores_shared: bool
    rewards: Floats | None
    edges: dict[str, Edge]

    def __init__(self, base: Table, rest: Callable[[Recovered], None] | None = None) -> None:
        self.kappa = self.returns = self.raw_advantages = self.advantages = np.full(base.tokens.shape, np.nan)
        self.row_scale: Floats = np.ones(len(base.samples))
        self.fits: dict[int, Fit] = {}
        self.reasons: dict[str, str] = {}
        self.rest = rest  # works out what is not there yet
        self.rates: list[Rates | None] = []  # of rewards that a batch's deviation scales, once they were asked for

    def __getattr__(self, name: str) -> Any:
        if name not in UNKNOWN:
            raise AttributeError(name)
        vars(self).update({**UNKNOWN, "edges": {}, **vars(self)})
        rest, self.rest = self.rest, None
        if rest is not None:
            rest(self)
        return vars(self)[name]

    @property
    def scaled(self) -> bool:
        """Whether the batch was seen to scale its rewards, so that what a change does was read as if it did not."""
        return any(self.rates)

    @property
    def whitened(self) -> bool | None:
        """Whether the advantages were shifted or scaled on the way to the policy; None where they fit no returns."""
        good = [f for f in self.fits.values() if f.misfit < 1e-2]
        if not good:
            return None
        return any(abs(f.intercept) > 1e-3 * abs(f.slope) for f in good)


def recover(found: Experiments, declared: dict[str, object]) -> Recovered:
    """Everything that can be identified from the experiments; never a guess."""
    base = found.base

    def rest(made: Recovered) -> None:
        _discount(made, found)
        _rewards(made, base, declared)
        _edges(made, found)

    made = Recovered(base, rest)
    _returns(made, found)
    _fits(made, base)
    return made


def masked(base: Table, values: Floats) -> Floats:
    """NaN outside of the response tokens."""
    return np.where(base.real, values, np.nan)


def moved_for_real(base: Table, experiment: Experiment, name: str) -> bool:
    """Whether any response token's number of a field moved at all between two runs."""
    moved = masked(base, experiment.moved(base, name))
    return bool((np.abs(moved[np.isfinite(moved)]) > 0).any())


def _returns(made: Recovered, found: Experiments) -> None:
    base, pushed = found.base, found.done.get("update values")
    if pushed is None:
        said = found.reasons.get("update values") or found.reasons.get("*")
        made.reasons["returns"] = said or "no critic was trained"
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = pushed.moved(base, "value")  # behind the head there may be a gain
        amounts = np.where(pushed.amounts != 0, np.where(np.isfinite(moved), moved, pushed.amounts), np.nan)
        kappa = masked(base, pushed.moved(base, "value_gradient") / amounts)
        linear = (kappa == 0) & (masked(base, base["value_gradient"]) != 0)
        if linear.any() and not linear[np.isfinite(kappa)].all():
            if linear.sum() > LINEAR * np.isfinite(kappa).sum():
                made.reasons["returns"] = "the critic's loss is linear in most of its errors, so targets do not show"
                return
            kappa = np.where(_squared(kappa), kappa, np.nan)
        kappa = np.where(np.abs(kappa) > 0, kappa, np.nan)
        made.kappa = kappa
        made.returns = base["value"] - masked(base, base["value_gradient"]) / kappa
    old = base["old_value"] if base.has("old_value") else base["value"]
    made.raw_advantages = made.returns - old
    if not np.isfinite(made.returns).any():
        made.reasons["returns"] = "the critic's gradient does not depend on its values"


def _squared(kappa: Floats) -> NDArray[np.bool_]:
    """Where a loss that is linear far off (Huber's) is a square: at least two tokens of a row agree on the most."""
    size = np.nan_to_num(np.abs(kappa))
    top = (size > 0) & (size > 0.99 * size.max(1, keepdims=True, initial=0.0))
    return np.asarray(top & (top.sum(1, keepdims=True) > 1))


def _fits(made: Recovered, base: Table) -> None:
    """How the policy's weights follow from returns − values, and which row weighting fits best."""
    if not base.has("weight"):
        made.reasons["advantages"] = "no gradient was seen at the policy's head"
        return
    lengths = np.maximum(base.real.sum(1), 1).astype(np.float64)
    weight = masked(base, base["weight"])
    best: tuple[float, Floats, dict[int, Fit]] | None = None
    for scale in (np.ones(len(lengths)), 1 / lengths):  # means over tokens, over rows
        fits = _fit_windows(weight / scale[:, None], made.raw_advantages, base)
        if fits:
            misfit = float(np.median([f.misfit for f in fits.values()]))
            if best is None or misfit < 0.5 * best[0]:
                best = (misfit, scale, fits)
    made.advantages = weight
    if best is None:
        made.reasons["advantages"] = made.reasons.get("returns", "returns and weights have no token in common")
        return
    _, scale, fits = best
    made.fits, made.row_scale = fits, scale
    scaled = np.full(weight.shape, np.nan)
    for window, fit in fits.items():
        inside = base["window"] == window
        scaled[inside] = (weight / scale[:, None])[inside] / fit.slope if fit.slope else np.nan
    made.advantages = scaled


def _fit_windows(weight: Floats, raw: Floats, base: Table) -> dict[int, Fit]:
    fits = {}
    windows = base["window"]
    for window in np.unique(windows[np.isfinite(windows)]):
        inside = (windows == window) & np.isfinite(weight) & np.isfinite(raw)
        if inside.sum() < 4:
            continue
        x, y = raw[inside], weight[inside]
        span = np.ptp(y)
        if np.ptp(x) <= 1e-12 or span <= 0:
            continue
        slope, intercept = _line(x, y)
        misfit = float(np.abs(slope * x + intercept - y).max() / span)
        fits[int(window)] = Fit(slope, intercept, misfit, int(inside.sum()))
    return fits


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    dx = x - x.mean()
    slope = float((dx * (y - y.mean())).sum() / (dx * dx).sum())
    return slope, float(y.mean() - slope * x.mean())


def misread(base: Table, experiment: Experiment) -> NDArray[np.bool_]:
    """Where a weight is so near 0 that an entropy bonus is read beside it in one run, and in its place in the other."""
    bonus = np.nan_to_num(np.abs(base["entropy_weight"])).max(initial=0.0)
    moved = np.nan_to_num(np.abs(experiment.moved(base, "entropy_weight")))
    return np.asarray(moved > 0.5 * bonus)


def policy_response(made: Recovered, found: Experiments, experiment: Experiment) -> Floats:
    """How the policy's weights moved, in units of the returns where they fit, whitening taken out, (S, T).

    Whitening moves every token by one and the same line; it is read off the samples that were not touched.
    """
    base = found.base
    before = masked(base, base["weight"]) / made.row_scale[:, None]
    after = masked(base, experiment.table["weight"]) / made.row_scale[:, None]
    after = np.where(misread(base, experiment), np.nan, after)
    response = after - before
    windows = base["window"]
    as_scaled = _policy_of_scaled(made, found, experiment, after)
    if as_scaled is not None:
        return as_scaled
    known = ~experiment.touched[:, None] & np.isfinite(before) & np.isfinite(after)
    for window in np.unique(windows[np.isfinite(windows)]):
        inside = windows == window
        still = inside & known
        unit = np.ones(before.shape)
        if not _enough(before[still]):  # whitening over the whole batch is taken for granted; minibatches have units
            still = known
            for other, fit in made.fits.items():
                unit[windows == other] = fit.slope or 1.0
        was, now = before / unit, after / unit
        if _enough(was[still]) and (now[still] != was[still]).any():
            slope, intercept = _line(was[still], now[still])
            if slope:
                response[inside] = (((now - intercept) / slope - was) * unit)[inside]
        own = made.fits.get(int(window))
        if own is not None and own.slope and own.misfit < 1e-2:
            response[inside] /= own.slope
    return response


def _policy_of_scaled(made: Recovered, found: Experiments, experiment: Experiment, after: Floats) -> Floats | None:
    """The same where the batch scales its rewards and the policy follows returns − values: what these moved by, and
    what the policy's weights have besides."""
    base = found.base
    if not made.fits or max(fit.misfit for fit in made.fits.values()) > 1e-2 or not base.has("old_value"):
        return None
    moved = _moved_targets(made, base, experiment)
    steady = _steadied(made, found, experiment, moved)
    if steady is None:
        return None
    pushed = np.nan_to_num(experiment.moved(base, "old_value"))
    besides = np.full(after.shape, np.nan)
    raw = made.returns + moved - experiment.table["old_value"]
    for window in made.fits:
        inside = base["window"] == window
        still = inside & ~experiment.touched[:, None] & np.isfinite(raw) & np.isfinite(after)
        if not _enough(raw[still]):
            return None
        slope, intercept = _line(raw[still], after[still])
        if not slope:
            return None
        besides[inside] = ((after - intercept) / slope - raw)[inside]
    return np.asarray(steady - pushed + besides)


def _enough(values: Floats) -> bool:
    return len(values) > 1 and bool(np.ptp(values) > 0)


def return_response(made: Recovered, found: Experiments, experiment: Experiment) -> Floats:
    """How the critic's target moved, (S, T); where the batch scales its rewards, as if the scale had stayed."""
    moved = _moved_targets(made, found.base, experiment)
    return moved if (known := _steadied(made, found, experiment, moved)) is None else known


def _steadied(made: Recovered, found: Experiments, experiment: Experiment, moved: Floats) -> Floats | None:
    if not elsewhere(moved, experiment):
        return None
    if not made.rates:
        made.rates.append(_rates(made, found))
    rates = made.rates[0]
    return None if rates is None else steadied(found.base, made.returns, moved, experiment, rates)


def _rates(made: Recovered, found: Experiments) -> Rates | None:
    """γ and λ of rewards that the batch scales, where one changed score and all of them show the same."""
    base, one, several = found.base, found.done.get("one score"), found.done.get("all scores")
    if one is None or not np.isfinite(made.returns).any():
        return None
    rates = rates_of_scaled(base, made.returns, _moved_targets(made, base, one), one)
    if rates is None or several is None:
        return rates
    alike = steadied(base, made.returns, _moved_targets(made, base, several), several, rates)
    return None if alike is None else rates


def _moved_targets(made: Recovered, base: Table, experiment: Experiment) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        moved: Floats = -masked(base, experiment.moved(base, "value_gradient")) / made.kappa
    if base.has("value"):
        moved = moved + masked(base, experiment.moved(base, "value"))
    return moved


def _shared_scores(made: Recovered, found: Experiments, one: Experiment) -> bool:
    """Whether one changed score moves most other samples' targets: rewards are normalised over the batch."""
    moved = np.abs(return_response(made, found, one)[~one.touched])
    each = np.where(np.isfinite(moved), moved, 0.0).max(1, initial=0.0)[np.isfinite(moved).any(1)]
    return bool(len(each)) and float(np.median(each)) > SHARED * float(np.abs(one.amounts).max(initial=0.0))


def _discount(made: Recovered, found: Experiments) -> None:
    base = found.base
    lengths = base.real.sum(1)
    scored, one = found.done.get("all scores"), found.done.get("one score")
    if one is not None and _shared_scores(made, found, one):
        made.scores_shared = True
        return
    if scored is not None:
        made.gamma_lam = _decay(return_response(made, found, scored), lengths, scored.touched)
    if one is not None:
        made.gamma_lam_of_policy = _decay(policy_response(made, found, one), lengths, one.touched)
        if made.gamma_lam is None:
            made.gamma_lam = _decay(return_response(made, found, one), lengths, one.touched)
    rollout = found.done.get("rollout outputs")
    if rollout is None or not base.has("old_value"):
        return
    returns, policy = return_response(made, found, rollout), policy_response(made, found, rollout)
    seen = (returns, policy if made.fits else returns)
    decay = made.gamma_lam if made.gamma_lam is not None else made.gamma_lam_of_policy
    ahead, further = (_ahead(base, rollout, seen, steps) for steps in (1, 2))
    if decay is None and ahead and further and abs(np.median(ahead)) > 1e-3:
        decay = made.gamma_lam = float(np.median(further) / np.median(ahead))
    if ahead and decay is not None:
        made.gamma = float(np.median(ahead)) + decay
        made.lam = decay / made.gamma if made.gamma else None


def _ahead(base: Table, rollout: Experiment, seen: tuple[Floats, ...], steps: int) -> list[float]:
    """What a unit of a pushed value does so many tokens before it."""
    found = []
    for s, t in zip(*np.nonzero(rollout.amounts), strict=True):
        pushed = rollout.table["old_value"][s, t] - base["old_value"][s, t]
        if np.isfinite(pushed) and pushed and t >= steps:
            found += [moved[s, t - steps] / pushed for moved in seen if np.isfinite(moved[s, t - steps])]
    return found


def _decay(response: Floats, lengths: NDArray[np.int64], touched: NDArray[np.bool_]) -> float | None:
    """γλ: the ratio of neighbouring tokens' responses to a changed score; None where they are no geometric series."""
    ratios = []
    for s in np.flatnonzero(touched):
        row = response[s, : lengths[s]]
        if len(row) < 2 or not np.isfinite(row).all() or row[-1] == 0:
            continue
        size = np.abs(row)
        good = size[1:] > 1e-3 * size.max()
        ratios += (row[:-1][good] / row[1:][good]).tolist()
    if not ratios:
        return None
    middle = float(np.median(ratios))
    return middle if float(np.median(np.abs(np.array(ratios) - middle))) < 1e-2 else None


def _rewards(made: Recovered, base: Table, declared: dict[str, object]) -> None:
    gamma = made.gamma if made.gamma is not None else declared.get("gamma")
    lam = made.lam if made.lam is not None else declared.get("lam")
    if not isinstance(gamma, (int, float)) or not isinstance(lam, (int, float)) or not np.isfinite(made.returns).any():
        made.reasons["rewards"] = made.reasons.get("returns", "gamma and lambda are neither measured nor declared")
        return
    made.rewards = rewards_of(base, made.returns, values_ahead(base, base), Rates(gamma, lam))


def _edges(made: Recovered, found: Experiments) -> None:
    base = found.base

    def missing(name: str, *experiments: str) -> Edge:
        said = [found.reasons[e] for e in (*experiments, "*") if e in found.reasons]
        return Edge(name, None, said[0] if said else "it could not be measured")

    lengths = base.real.sum(1)
    last = np.maximum(lengths - 1, 0)
    rows = np.arange(len(lengths))
    for name, key in ((EDGES[0], "all scores"), (EDGES[1], "one score")):
        one = found.done.get(key)
        seen = base.has("value_gradient") if name == EDGES[0] else base.has("weight")
        if one is None or not seen:
            reason = made.reasons.get("returns" if name == EDGES[0] else "advantages", "")
            made.edges[name] = missing(name, key) if one is None else Edge(name, None, reason or "nothing was trained")
            continue
        field_name = "value_gradient" if name == EDGES[0] else "weight"
        identical = not moved_for_real(base, one, field_name)
        response = return_response(made, found, one) if name == EDGES[0] else policy_response(made, found, one)
        with np.errstate(divide="ignore", invalid="ignore"):
            gains = (response[rows, last] / one.amounts)[one.touched]
        gains = gains[np.isfinite(gains)]
        answers = gains[np.abs(gains) > ANSWER]  # a constant may stand for the scores of responses without an end
        typical = float(np.median(answers if len(answers) else gains)) if len(gains) else None
        made.edges[name] = Edge(name, 0.0 if identical else typical, "", identical)
    rollout = found.done.get("rollout outputs")
    if rollout is None:
        for name in EDGES[2:]:
            made.edges[name] = missing(name, "rollout outputs")
        return
    policy, returns = policy_response(made, found, rollout), return_response(made, found, rollout)
    pushed = rollout.moved(base, "old_value")
    at = (rollout.amounts != 0) & np.isfinite(pushed) & (pushed != 0) & np.isfinite(policy)
    if at.any():
        gain = float(np.median(policy[at] / pushed[at]))
        made.edges[EDGES[2]] = Edge(EDGES[2], gain, "", bool((policy[at] == 0).all()))
    else:
        made.edges[EDGES[2]] = Edge(EDGES[2], None, "no rollout value was seen that could be changed")
    reference = masked(base, rollout.moved(base, "ref_logp"))
    moved = np.isfinite(reference) & (reference != 0)
    if not moved.any():
        for name in EDGES[3:]:
            made.edges[name] = Edge(name, None, "the reference was not seen on the samples")
        return
    through, onto = np.isfinite(returns) & moved, np.isfinite(policy) & moved
    felt = _gain(reference[through], _back(made, returns)[through]) if through.any() else None
    made.edges[EDGES[3]] = Edge(
        EDGES[3], felt, "" if through.any() else made.reasons.get("returns", ""),
        bool(through.any()) and bool((returns[through] == 0).all()),
    )  # fmt: skip
    left = policy - np.where(np.isfinite(returns), returns, 0.0)
    made.edges[EDGES[4]] = Edge(
        EDGES[4], _gain(reference[onto], left[onto]) if onto.any() else None,
        "" if onto.any() else made.reasons.get("advantages", ""),
        bool(onto.any()) and bool((policy[onto] == 0).all()),
    )  # fmt: skip


def _gain(x: Floats, y: Floats) -> float:
    return float((x * y).sum() / (x * x).sum())


def _back(made: Recovered, returns: Floats) -> Floats:
    """From moved returns to moved rewards."""
    decay = made.gamma_lam or made.gamma_lam_of_policy or 0.0
    moved = returns.copy()
    ahead = returns[:, 1:]
    moved[:, :-1] -= decay * np.where(np.isfinite(ahead), ahead, 0.0)
    return moved

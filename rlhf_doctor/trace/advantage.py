"""The advantage estimator, measured: what a unit of a score and of a rollout value does to every response token.

With generalized advantage estimation a unit of the score adds (γλ)^(L-1-t) to the advantage of token t, L being the
response's length, and a unit of V(s_u) adds -1 at u and (γλ)^(u-1-t) γ(1-λ) before it. https://arxiv.org/abs/1506.02438
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.facts import Unavailable
from rlhf_doctor.trace.recover import Recovered, _fit_windows, masked, policy_response, return_response
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
    "Discount",
    "Placement",
    "Reach",
    "Response",
    "Terminal",
    "advantages_by_definition",
    "baseline",
    "critic_free",
    "crossed",
    "discount",
    "entry",
    "follows",
    "kl_part",
    "leaks",
    "moved_share",
    "placement",
    "reach",
    "recursion",
    "score_gains",
    "terminal",
    "trusted",
    "value_gains",
]

FOLLOWS = 1e-2  # of the weights' range: float32 leaves 1e-6, bfloat16 some 1e-3, another rule tenths
ROUNDED = 1e-4  # relative; what float32 rounds is a thousandth of it
PRECISE = 2e-3  # of a gain: float32 leaves 1e-4 of the amounts that are added, and 0.99 is told from 1
NOTHING = 1e-3  # of a gain: nothing moved
GEOMETRIC = 2e-4  # between the gains' ratios of one row: float32 leaves 1e-4, a constant in every reward a thousandth
OWN = 0.1  # of the largest gain of a score: what is smaller is not the row's own score
STILL = 1e-5  # of the largest weight: what reordered sums leave, with a margin


@dataclass(frozen=True)
class Response:
    """What one unit of something at state ``at`` of a sample does to its tokens: ``gain`` (L,)."""

    sample: int
    at: int
    gain: Floats


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


@dataclass(frozen=True)
class Placement:
    """Where the scores enter. ``kind``: last, early, late, lost, spread, unknown; ``offset`` from the last token."""

    kind: str
    offset: int
    sample: int
    gain: Floats
    column: int = -1


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


# ---- discount --------------------------------------------------------------------------------------------------------


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
        ratios = _ratios(row.gain) if np.abs(row.gain).max(initial=0.0) > OWN * largest else []
        apart = _ratios(-np.diff(row.gain)) if len(ratios) > 3 and np.ptp(ratios) > 10 * PRECISE else []
        if len(apart) > 2 and np.ptp(apart) < 10 * PRECISE:  # every token has a share of the score
            ratios = apart
        if not shared or (len(ratios) > 2 and np.ptp(ratios) < GEOMETRIC):  # normalised, it may have moved every reward
            products += ratios
    values = [row for row in value_gains(traced, of) if row.at >= 1]
    if of == "policy":
        values = [row for row in values if abs(row.gain[row.at]) > NOTHING]
        for row in values:
            if row.at >= 2 and np.abs(row.gain[: row.at]).max() > 20 * NOTHING * abs(row.gain[row.at]):
                products += _ratios(row.gain[: row.at])
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


def _ratios(gain: Floats) -> list[float]:
    """Each token's gain over the next one's, where the next one's is not small."""
    size = np.abs(gain)
    good = size[1:] > 0.05 * size.max() if len(gain) > 1 and size.max() > 0 else np.zeros(0, dtype=bool)
    return [float(x) for x in (gain[:-1][good] / gain[1:][good])]


# ---- where the score enters ------------------------------------------------------------------------------------------


def placement(traced: Traced, declared: float | None) -> Placement:
    """Where the scores enter the rewards, from what each of them does to its tokens.

    γλ is what the scores' own gains show, else a rollout value's, else the declared product.

    Raises:
        Unavailable: no score's effect was seen, or no γλ is known.
    """
    of = "policy" if follows(traced.recovered) or critic_free(traced) else "target"
    rows = score_gains(traced, of)
    if not rows:
        raise Unavailable("needs to see what a changed score does to the advantages, and that could not be seen")
    ahead = [
        x
        for row in value_gains(traced, of)
        if np.abs(row.gain[: row.at]).max(initial=0.0) > 20 * NOTHING
        for x in _ratios(row.gain[: row.at])
    ]
    decay = float(np.median(ahead)) if ahead else declared
    found = [(row, *entry(row.gain / (np.abs(row.gain).max() or 1.0) if critic_free(traced) else row.gain, decay))
             for row in rows]  # fmt: skip
    for row, kind, offset in found:
        if kind in ("early", "spread"):
            return Placement(kind, offset, row.sample, row.gain)
    first = rows[0]
    if critic_free(traced) or coupled(traced, "one score"):  # the scale of the gains says nothing then
        return Placement("last" if found[0][1] != "unknown" else "unknown", 0, first.sample, first.gain)
    lengths = {kind: [len(row.gain) for row, k, _ in found if k == kind] for _, kind, _ in found}
    width = int(traced.base.real.sum(1).max())
    if set(lengths) == {"none", "last"} and set(lengths["last"]) == {width} and max(lengths["none"]) < width:
        lost = next(row for row, kind, _ in found if kind == "none")
        return Placement("lost", 0, lost.sample, lost.gain, width)
    late = [(row, offset) for row, kind, offset in found if kind == "late"]
    if late and set(lengths) <= {"late", "last"}:
        row, offset = max(late, key=lambda one: one[1])
        return Placement("late", offset, row.sample, row.gain)
    return Placement("last" if set(lengths) == {"last"} else "unknown", 0, first.sample, first.gain)


def entry(gain: Floats, decay: float | None) -> tuple[str, int]:
    """(kind, tokens from the last one to where the score enters): gain_t = Σ_l decay^l entry_(t+l)."""
    size, last = float(np.abs(gain).max()), len(gain) - 1
    if size < NOTHING:
        return "none", 0
    own = _ratios(gain)
    if own and np.ptp(own) < 10 * PRECISE:
        decay = float(np.median(own))
    if decay is None:
        return "unknown", 0
    entry = gain - decay * np.append(gain[1:], 0.0)
    places = np.flatnonzero(np.abs(entry) > 10 * PRECISE * size)
    if len(places) == 1 and places[0] < last:
        return "early", int(places[0]) - last
    if len(places) == 1:
        if abs(gain[last] - 1) < 5 * PRECISE:
            return "last", 0
        steps = np.log(gain[last]) / np.log(decay) if gain[last] > 0 and 0 < decay < 1 else 0.0
        whole = round(float(steps))
        return ("late", whole) if whole > 0 and abs(gain[last] - decay**whole) < 5 * PRECISE else ("scaled", 0)
    if len(places) == len(gain) > 1 and np.ptp(entry) < 0.05 * np.abs(entry).max():
        return "spread", 0
    return "unknown", 0


# ---- padding, and what follows the last token ------------------------------------------------------------------------


def leaks(traced: Traced) -> Floats:
    """How far the critic's target of each sample moves for one unit in every slot that is no response token, (S,).

    Raises:
        Unavailable: that was not tried, or no critic's target was seen.
    """
    traced.needs("poison")
    if not traced.base.has("value_gradient") or not np.isfinite(traced.recovered.returns).any():
        raise Unavailable("needs a critic whose target shows in its gradient")
    from rlhf_doctor.trace.interventions import POISON

    experiment = traced.experiments.done["poison"]
    moved = np.abs(masked(traced.base, return_response(traced.recovered, traced.experiments, experiment))) / POISON
    largest: Floats = np.where(np.isfinite(moved), moved, 0.0).max(1)
    return largest


@dataclass(frozen=True)
class Terminal:
    """How well the rewards of last tokens are explained by the score alone, and with ``name`` added.

    ``without`` and ``best`` are the largest residuals of reward = score + constant, over the range of that value.
    """

    samples: Ints
    without: float
    best: float
    name: str

    @property
    def bootstraps(self) -> bool:
        """Whether a value explains what the score does not."""
        return self.without > 5 * PRECISE and self.best < min(5 * PRECISE, 0.1 * self.without)

    @property
    def decided(self) -> bool:
        """Whether either explains the rewards."""
        return min(self.without, self.best) < 5 * PRECISE


def terminal(traced: Traced, product: float, gamma: float, *, ended: bool) -> Terminal | None:
    """Whether the last tokens of responses that have ended (or were cut) count a value of what follows.

    None where fewer than two such responses were seen.
    """
    base, made = traced.base, traced.recovered
    rows = np.arange(len(base.samples))
    last = np.maximum(base.real.sum(1) - 1, 0)
    left = made.returns[rows, last] - base.scores - kl_part(traced, product, gamma)[rows, last]
    kind = np.array([s.ended for s in base.samples], dtype=bool)
    known = trusted(traced) & np.isfinite(left) & (kind == ended)
    found: list[Terminal] = []
    candidates = (
        ("γ of the value of the state after it", gamma, base["value_after"][:, 0]),
        ("γ(1-λ) of the value of the state after it", gamma - product, base["value_after"][:, 0]),
        ("γ of the value of its own state", gamma, base["old_value"][rows, last]),
    )
    for name, weight, value in candidates:
        good = known & np.isfinite(value)
        span = float(np.ptp(value[good])) if good.sum() > 1 else 0.0
        if span > NOTHING:
            off, on = (float(np.ptp(left[good] - w * value[good])) / span for w in (0.0, weight))
            found.append(Terminal(np.flatnonzero(good), off, on, name))
    return min(found, key=lambda one: one.best, default=None)


def recursion(traced: Traced) -> Response | None:
    """A rollout value whose effect on the advantages is none of looking one state ahead; None where all are."""
    if not follows(traced.recovered):
        return None
    rows = value_gains(traced, "policy")
    strays: list[tuple[float, Response]] = []
    right: list[float] = []
    for row in rows:
        own, before = row.gain[row.at], row.gain[: row.at][::-1]
        if abs(own) < 2 * PRECISE:
            continue
        ahead = float(before[0]) if len(before) else 0.0
        uneven = len(before) > 2 and np.abs(before[1:-1] ** 2 - before[:-2] * before[2:]).max() > 5 * PRECISE
        if abs(own + 1) > 5 * PRECISE or not -5 * PRECISE < ahead < 1 + 5 * PRECISE or uneven:
            strays.append((-ahead / float(own), row))
        elif len(before):
            right.append(-ahead / float(own))
    # One that is as the others are, and in other units, weighs less and looks nowhere else.
    return next((row for x, row in strays if not any(abs(x - y) < 5 * PRECISE for y in right)), None)


def baseline(traced: Traced) -> tuple[float, float, Response, bool] | None:
    """(effect of V(s_u) on token u, of the score on the last token, where, whether something else explains the first).

    Values that the loop takes from other states or rows leave their own tokens alone too: then the critic's target does
    not answer to them either. None where either effect was not seen.
    """
    rows, scores = value_gains(traced, "policy"), score_gains(traced, "policy")
    if not rows or not scores:
        return None
    made = traced.recovered
    row = max(rows, key=lambda one: abs(one.gain[one.at]))
    score = float(scores[0].gain[np.abs(scores[0].gain).argmax()])
    answered = any(np.abs(one.gain[: one.at + 1]).max() > NOTHING for one in value_gains(traced, "target"))
    weight = masked(traced.base, traced.base["weight"]) / made.row_scale[:, None]
    whole = _fit_windows(weight, made.returns, traced.base)
    returns = bool(whole) and all(fit.misfit < FOLLOWS for fit in whole.values())
    subtracted = bool(score) and float((row.gain / score).min()) < -0.5  # from another token
    return float(row.gain[row.at]), score, row, subtracted or not (answered or returns)


def crossed(traced: Traced) -> tuple[float, float]:
    """(change of the values' gradient when only the policy's logits change, over its largest entry; that entry)."""
    base, changed = traced.base, traced.experiments.done["update logits"]
    gradient = np.abs(masked(base, base["value_gradient"]))
    moved = np.abs(masked(base, changed.moved(base, "value_gradient")))
    size = float(np.nan_to_num(gradient).max(initial=0.0))
    moved = np.where(np.isfinite(moved) & trusted(traced)[:, None], moved, 0.0)
    return (float(moved.max(initial=0.0)) / size if size else 0.0), size


# ---- whether the score arrives ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What the scores do to the policy.

    ``moved`` is the largest change of a weight when scores change, over the largest weight; ``sign`` that of the last
    token's advantage when its score rises, 0 where it is not known; ``arrives`` whether something other than the KL
    stands where the score belongs; ``dead`` (S,) the samples whose return does not answer, ``known`` (S,) those seen.
    """

    moved: float
    sign: int
    arrives: bool
    dead: Bools
    known: Bools
    rewards: Floats

    @property
    def none(self) -> bool:
        """Whether no score moves the policy at all."""
        return self.moved < STILL


def reach(traced: Traced, declared: Mapping[str, Any]) -> Reach:
    """Whether scores reach the policy's gradient, and what becomes of them.

    Raises:
        Unavailable: no score could be changed, or the policy's gradient was not seen.
    """
    traced.needs("one score")
    base = traced.base
    if not base.has("weight"):
        raise Unavailable("needs a policy that is trained in the step")
    names = [n for n in ("one score", "all scores") if n in traced.experiments.done]
    moved = max(float(moved_share(traced, n).max(initial=0.0)) for n in names)
    if moved < STILL and _deaf(traced):
        raise Unavailable("needs a policy loss that answers to its advantages, and changed values do not move it")
    count = len(base.samples)
    dead, known, rewards = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool), np.full(count, np.nan)
    for row in [] if critic_free(traced) else score_gains(traced, "target"):
        known[row.sample] = True
        dead[row.sample] = float(np.abs(row.gain).max()) < 5 * PRECISE
    return Reach(moved, _sign(traced), _arrives(traced, declared, rewards), dead, known, rewards)


def _deaf(traced: Traced) -> bool:
    """Whether changed rollout values move no weight either, so that nothing is to be learnt from one that stays."""
    experiment = traced.experiments.done.get("rollout outputs")
    if experiment is None or not np.nan_to_num(experiment.moved(traced.base, "old_value")).any():
        return False
    return float(moved_share(traced, "rollout outputs").max(initial=0.0)) < STILL


def _sign(traced: Traced) -> int:
    """-1 where a higher score lowers the last token's weight though a higher rollout value does so too."""
    if critic_free(traced) or follows(traced.recovered):
        return 0
    scores, values = score_gains(traced, "policy"), value_gains(traced, "policy")
    if not scores or not values:
        return 0
    gain = scores[0].gain[np.abs(scores[0].gain).argmax()]
    owns = [row.gain[row.at] for row in values]
    if abs(gain) < NOTHING * np.abs(owns).max() or max(owns) >= 0:  # all signs turned is the loss's matter
        return 0
    return int(np.sign(gain))


def _arrives(traced: Traced, declared: Mapping[str, Any], rewards: Floats) -> bool:
    base, made = traced.base, traced.recovered
    rows, last = np.arange(len(base.samples)), np.maximum(base.real.sum(1) - 1, 0)
    if critic_free(traced):
        weight = np.where(trusted(traced)[:, None], masked(base, base["weight"]), np.nan)
        flat = [w[np.isfinite(w)] for w in weight]
        size = max((float(np.abs(w).max()) for w in flat if len(w)), default=0.0)
        return size > 0 and all(np.ptp(w) < 1e-3 * size for w in flat if len(w))
    gamma, lam = (
        float(x) if isinstance(x, (int, float)) else 1.0 for x in (declared.get("gamma"), declared.get("lam"))
    )
    rewards[:] = (made.returns - kl_part(traced, gamma * lam, gamma))[rows, last]
    rewards[~trusted(traced)] = np.nan
    spread = float(np.nanstd(base.scores)) or 1.0
    seen = rewards[np.isfinite(rewards)]
    return bool(len(seen)) and float(np.abs(seen).max()) > NOTHING * spread


def kl_part(traced: Traced, product: float, gamma: float) -> Floats:
    """What the KL adds to each token's reward, (S, T): the estimator that fits the tokens before the last one best.

    All 0 where nothing of the kind shows.
    """
    base, made = traced.base, traced.recovered
    values = base["old_value"] if base.has("old_value") else base["value"]
    nothing = np.zeros(base.tokens.shape)
    if not base.has("old_logp") or not base.has("ref_logp") or not np.isfinite(made.returns).any():
        return nothing
    ahead = (gamma - product) * values[:, 1:] + product * made.returns[:, 1:]
    rewards = np.where(base.real[:, :-1] & base.real[:, 1:], made.returns[:, :-1] - ahead, np.nan)
    k1 = masked(base, base["old_logp"] - base["ref_logp"])
    best, left = nothing, np.inf
    for k in (k1, k1**2, np.expm1(-k1) + k1, np.abs(k1)):
        known = np.isfinite(rewards) & np.isfinite(k[:, :-1]) & trusted(traced)[:, None]
        x, y = k[:, :-1][known], rewards[known]
        if len(x) < 2 or float(np.abs(x).max()) < 1e-6:
            continue
        weight = float((x * y).sum() / (x * x).sum())
        misfit = float(np.abs(y - weight * x).max())
        if misfit < left:
            best, left = np.nan_to_num(weight * k), misfit
    return best


def advantages_by_definition(
    traced: Traced, declared: Mapping[str, Any], product: float, gamma: float
) -> Floats | None:
    """Raw advantages of all samples, those not trained at the initial weights included, (S, T).

    From scores, rollout values and log-probabilities; None unless they give what was measured of the others.
    """
    base, made = traced.base, traced.recovered
    if not np.isfinite(base.scores).all() or not base.has("old_value"):
        return None
    lengths = base.real.sum(1)
    rows, last = np.arange(len(lengths)), np.maximum(lengths - 1, 0)
    clip = declared.get("reward_clip")
    scores = np.clip(base.scores, -clip, clip) if isinstance(clip, (int, float)) and clip > 0 else base.scores
    cut = np.array([not s.ended for s in base.samples], dtype=bool)
    kl = kl_part(traced, product, gamma)
    good = trusted(traced) & np.isfinite(made.returns[rows, last])
    left = made.returns[rows, last] - scores - kl[rows, last]
    penalty = declared.get("missing_eos_penalty")
    amount = -float(penalty) if isinstance(penalty, (int, float)) else 0.0
    if (good & cut).any():
        amount = float(np.median(left[good & cut]))
    rewards = kl.copy()
    rewards[rows, last] += scores + amount * cut
    found = np.full(base.tokens.shape, np.nan)
    values = base["old_value"]
    for s, length in enumerate(lengths):
        running = 0.0
        for t in range(length - 1, -1, -1):
            ahead = values[s, t + 1] if t + 1 < length else 0.0
            running = rewards[s, t] + gamma * ahead - values[s, t] + product * running
            found[s, t] = running
    known = good[:, None] & np.isfinite(made.raw_advantages) & base.real
    if not known.any() or not np.isfinite(found[base.real]).all():
        return None
    spread = float(np.ptp(made.raw_advantages[known])) or 1.0
    return found if float(np.abs(found - made.raw_advantages)[known].max()) < NOTHING * spread else None

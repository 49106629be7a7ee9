"""The KL coefficient of a second step beside that of the first: what a controller did in between.

Two whole steps are run with the reference's logits lowered at every token that was drawn, so that the KL is as large as
is wanted, and lowered unevenly in the second step, so that its coefficient can be read there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_doctor.trace.anchor import Line, deviation, solve
from rlhf_doctor.trace.calls import Call, Change
from rlhf_doctor.trace.estimators import CLOSE, SLOPES, VALUES, Fit, old_logp, reference_logp
from rlhf_doctor.trace.recover import masked
from rlhf_doctor.trace.runs import Run, Stepper
from rlhf_doctor.trace.table import Table, tabulate

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]

__all__ = ["Controlled", "controlled", "expected"]

KNOWN = 0.9  # of the tokens
ROUNDING = 2.0**-23  # of a log-probability in float32


@dataclass(frozen=True)
class Controlled:
    """``first`` and ``second``: coefficients; ``error``: how sure their ratio is, by what both fits and the rounding
    of log-probabilities leave. Of the first step: the KL of a sequence and of a token, in nats, and how many samples it
    had."""

    first: float
    second: float
    error: float
    sequence_kl: float
    token_kl: float
    samples: int
    wanted: float  # the ratio that the declared controller gives
    by_token: float  # the same of one that is told the KL of a token
    target: float

    @property
    def ratio(self) -> float:
        """How the coefficient changed."""
        return self.second / self.first


def controlled(traced: Traced, setup: RLHFSetup, fit: Fit, place: str) -> Controlled | str:
    """Measure both coefficients, or say why that cannot be.

    Args:
        traced: of the setup's step.
        setup: whose step is run.
        fit: the KL of the first step, in ``place``, "reward" or "loss".
        place: see ``fit``.
    """
    declared = dict(setup.declared)
    if place == "reward" and traced.recovered.scaled:
        return "each batch's own deviation divides the rewards, so what the KL weighs in them is another in each step"
    kinds = VALUES if place == "reward" else SLOPES
    if fit.estimator not in kinds:
        return "the KL is a sum over the vocabulary, whose coefficient in a second step is not read"
    first, second = traced.base, traced.experiments.second
    if declared.get("kl_adaptive"):
        if expected(0.0, 1, declared) is None:
            return "needs kl_target and kl_horizon to be declared"
        length = float(first.real.sum(1).mean())
        first, second = _pushed(traced, setup, min(3 * float(declared["kl_target"]) / max(length, 1.0), 5.0))
    if second is None or not second.samples:
        return "the step could not be run twice in a row"
    per_token = _kl(first, fit)
    if per_token is None:
        return "the log-probabilities of the first step are not all known"
    read = _in_reward if place == "reward" else _in_loss
    found = read(traced, second, fit, kinds[fit.estimator])
    if found is None:
        return "the coefficient of the second step could not be read"
    coefficient, error = found
    error += fit.misfit
    lengths = first.real.sum(1)
    kl = float(np.nansum(per_token, 1).mean())
    of_a_token = float(np.nansum(per_token) / max(lengths.sum(), 1))
    return Controlled(
        fit.coefficient, coefficient, error, kl, of_a_token, len(lengths), expected(kl, len(lengths), declared) or 1.0,
        expected(of_a_token, len(lengths), declared) or 1.0, float(declared.get("kl_target") or 0.0),
    )  # fmt: skip


def _kl(table: Table, fit: Fit) -> Floats | None:
    apart = masked(table, old_logp(table) - reference_logp(table, fit.temperature))
    return apart if np.isfinite(apart[table.real]).mean() > KNOWN else None


def _pushed(traced: Traced, setup: RLHFSetup, push: float) -> tuple[Table, Table | None]:
    """The tables of two steps, with the reference lowered at what was drawn; unevenly in the second."""
    calls = sum(c.role == "reference" and c.order <= _end(traced) for c in traced.experiments.first.calls)
    stepper = Stepper(setup, (traced.temperature,), traced.experiments.snapshot)
    run = stepper.run(hold=False, times=2, may_fail=True, changes=(Change("reference", _lowered(push, calls)),))
    first = tabulate(run, setup, traced.temperature)
    if len(run.boundaries) < 2 or run.error:
        return first, None
    start, end = run.boundaries[:2]
    later = Run(
        [c for c in run.calls if start < c.order <= end], [t for t in run.texts if start < t.order <= end], [],
        run.stopped, {}, [end], None, run.error,
    )  # fmt: skip
    return first, tabulate(later, setup, traced.temperature)


def _end(traced: Traced) -> float:
    boundaries = traced.experiments.first.boundaries
    return boundaries[0] if boundaries else float("inf")


def _lowered(push: float, calls: int) -> Callable[[Call, torch.Tensor], torch.Tensor]:
    """Log-probabilities of the next tokens lowered by about ``push``, in the first so many calls."""

    def apply(call: Call, output: torch.Tensor) -> torch.Tensor:
        import torch

        flat = output.reshape(len(call.rows), -1)
        ids = call.ids.to(flat.device)
        rows, columns = call.rows.to(flat.device), call.columns.to(flat.device)
        following = ids[rows, (columns + 1).clamp(max=ids.shape[1] - 1)].clamp(0, flat.shape[1] - 1)
        amount = torch.full_like(flat[:, :1], push)
        if call.nth >= calls:
            amount = 0.3 * torch.where((rows + columns)[:, None] % 2 == 0, 1.0, -1.0).to(amount)
        z = flat.gather(1, following[:, None])
        logp = z - flat.logsumexp(-1, keepdim=True)
        # z' with log-probability logp - amount: z' - log(e^z' + rest) = wanted
        wanted = (logp - amount).clamp(max=-1e-3)
        rest = flat.logsumexp(-1, keepdim=True) + torch.log1p(-logp.exp()).clamp(min=-30.0)
        new = wanted + rest - torch.log1p(-wanted.exp())
        return flat.scatter(1, following[:, None], new).reshape(output.shape)

    return apply


def _first_window(table: Table, name: str) -> Any:
    """Tokens of the step's first update; the count of updates may have begun in an earlier step."""
    seen = table[name][np.isfinite(table[name])]
    return table.real & (table[name] == (seen.min() if len(seen) else -1))


def _in_reward(traced: Traced, table: Table, fit: Fit, f: Callable[[Any], Any]) -> tuple[float, float] | None:
    """β from r_t = −β f(x_t) at the tokens before the last, by inverting GAE; read in the step's first update."""
    found = traced.recovered
    curvature = _curvature(traced, table)
    decay, gamma = found.gamma_lam, found.gamma
    if curvature is None or decay is None or gamma is None:
        return None
    returns = table["value"] - table["value_gradient"] / curvature
    old = np.where(np.isfinite(table["old_value"]), table["old_value"], table["value"])
    returns = np.where(_first_window(table, "value_window"), returns, np.nan)
    ahead = (gamma - decay) * old[:, 1:] + decay * returns[:, 1:]
    rewards = returns[:, :-1] - ahead
    x = f(old_logp(table) - reference_logp(table, fit.temperature))[:, :-1]
    inner = table.real[:, 1:] & np.isfinite(rewards) & np.isfinite(x)
    made = _slope(x[inner], -rewards[inner])
    return None if made is None else (made[0], made[1] + _rounded(table, float(np.sqrt((x[inner] ** 2).mean()))))


def _in_loss(traced: Traced, table: Table, fit: Fit, f: Callable[[Any], Any]) -> tuple[float, float] | None:
    """β from w_t = a A_t + b − β s f'(x_t), the unit s being that of the first step's fit."""
    curvature = _curvature(traced, table)
    if curvature is None:
        return None
    returns = table["value"] - table["value_gradient"] / curvature
    old = np.where(np.isfinite(table["old_value"]), table["old_value"], table["value"])
    raw, x = masked(table, returns - old), f(table["logp"] - reference_logp(table, fit.temperature))
    weight = np.where(_first_window(table, "window"), table["weight"], np.nan)
    line = min(solve(table, weight, raw, x), key=lambda line: line.left, default=None)
    if line is None or line.left > CLOSE * np.nanmax(np.abs(weight / line.share)):
        return None
    known, unit = raw[table.real], 1.0
    if traced.recovered.whitened:
        if not np.isfinite(known).all():
            return None
        unit = deviation(table, line, known)
        if not _plain_mean(table, line, unit):
            return None  # a value that was clipped hides its return, and the deviation of all with it
    a, _, c = next(iter(line.solved.values()))
    spread = float(np.nanstd(np.where(np.isfinite(weight), x, np.nan)))
    if not c or not spread:
        return -c / (a * unit), np.inf
    error = line.left / (abs(c) * spread * np.isfinite(weight).sum() ** 0.5)
    return -c / (a * unit), error + _rounded(table, spread)


def _rounded(table: Table, size: float) -> float:
    """How much of log-ratios of this size is the rounding of the log-probabilities that they are taken from."""
    logs = np.abs(old_logp(table)[table.real])
    return ROUNDING * float(np.nanmax(logs, initial=0.0)) / size if size else float("inf")


def _plain_mean(table: Table, line: Line, unit: float) -> bool:
    """Whether s is one over the tokens, or over the rows, of the update: the deviation is then right."""
    lengths = table.real.sum(1)
    for window, (a, _, _) in line.solved.items():
        at = table.real & (table["window"] == window)
        counts = at.sum(), at.any(1).sum() * lengths.mean(), at.any(1).sum()
        if all(abs(a * unit * count - 1) > 1e-3 for count in counts):
            return False
    return True


def _slope(x: Floats, y: Floats) -> tuple[float, float] | None:
    if len(x) < 4 or not (x * x).sum():
        return None
    slope = float((x * y).sum() / (x * x).sum())
    left = y - slope * x
    if not slope or np.abs(left).max() > CLOSE * max(np.abs(y).max(), 1e-12):
        return None
    return slope, float(np.sqrt((left * left).sum() / max(len(x) - 1, 1) / (x * x).sum()) / abs(slope))


def _curvature(traced: Traced, table: Table) -> Floats | None:
    """∂²L/∂V² of another step's first update: the first step's, by what it is divided by there."""
    base, kappa = traced.base, traced.recovered.kappa
    shares = _divisors(base), _divisors(table)
    for mine, other in zip(*shares, strict=True):
        known = np.isfinite(kappa) & np.isfinite(mine)
        if not known.any():
            return None
        constant = (kappa * mine)[known]
        if np.ptp(constant) <= 1e-3 * abs(constant.mean()):
            return np.asarray(constant.mean() / other)
    return None


def _divisors(table: Table) -> list[Floats]:
    """By what a token's square may be divided: tokens of its update, its row's times rows, rows, nothing."""
    shape, window = table.tokens.shape, table["value_window"]
    lengths = np.maximum(table.real.sum(1), 1)[:, None].astype(float)
    tokens, rows = np.full(shape, np.nan), np.full(shape, np.nan)
    for number in np.unique(window[np.isfinite(window)]):
        inside = table.real & (window == number)
        tokens[inside], rows[inside] = inside.sum(), inside.any(1).sum()
    return [tokens, rows * lengths, rows, np.where(np.isfinite(rows), 1.0, np.nan)]


def expected(kl: float, samples: int, declared: Mapping[str, Any]) -> float | None:
    """The factor that a proportional controller gives; None where target or horizon are not declared."""
    target, horizon = declared.get("kl_target"), declared.get("kl_horizon")
    if not isinstance(target, (int, float)) or not isinstance(horizon, (int, float)) or target <= 0 or horizon <= 0:
        return None
    return 1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon

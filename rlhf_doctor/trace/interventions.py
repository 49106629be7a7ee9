"""Run a step from the same state with one thing changed, and see what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_doctor.facts import Broken
from rlhf_doctor.trace import changes
from rlhf_doctor.trace.calls import Change
from rlhf_doctor.trace.keep import Snapshot
from rlhf_doctor.trace.places import Placed
from rlhf_doctor.trace.runs import Run, Stepper
from rlhf_doctor.trace.spans import left_out
from rlhf_doctor.trace.table import Table, tabulate
from rlhf_doctor.trace.taps import nearby

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_doctor.setups import RLHFSetup

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

__all__ = ["Changed", "Experiment", "Experiments", "conduct"]

SMALL = 0.05  # nats or score units: far above float32's rounding, far below any clip range in use
POISON = 1e3
SEED = 20


@dataclass
class Experiment:
    """One changed run: what was added to what, and the table that came of it.

    ``amounts`` is (S,) for scores and (S, T) otherwise; ``touched`` (S,) the samples that were changed.
    """

    name: str
    amounts: Floats
    touched: Bools
    table: Table
    run: Run

    def moved(self, base: Table, name: str) -> Floats:
        """How far a field went from the unchanged run, (S, T), NaN where either is unknown."""
        return self.table[name] - base[name]


class Changed(Mapping[str, Experiment]):
    """Changed runs by name, each made when it is first asked for.

    Args:
        plan: name -> what makes it and puts it into ``made``, or says in the reasons why not.
    """

    def __init__(self, plan: dict[str, Callable[[], None]], made: dict[str, Experiment]) -> None:
        self.plan, self.made = plan, made

    def _settled(self, name: str) -> bool:
        make = self.plan.pop(name, None)
        if make is not None:
            make()
        return name in self.made

    def __getitem__(self, name: str) -> Experiment:
        self._settled(name)
        return self.made[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._settled(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in (*self.made, *self.plan) if self._settled(name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)  # a list would ask for its length first


@dataclass
class Experiments:
    """The unchanged runs and the changed ones by name; ``reasons`` says why one is not there."""

    base: Table
    first: Run
    real: Run | None
    repeat: Table | None
    second: Table | None  # of a second step after the first one's updates
    done: Mapping[str, Experiment] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    reproducible: bool = True
    noise: dict[str, float] = field(default_factory=dict)  # field -> largest difference over the field's range
    by_hand: bool = False
    runs: int = 0
    second_run: Run | None = None
    snapshot: Snapshot | None = None  # of the state that the runs began from


NOISY = 1e-5  # of a field's range: what reordered sums in float32 give, with a margin of a hundred


def conduct(
    setup: RLHFSetup, temperature: float, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> Experiments:
    """Run the setup's step unchanged, for real, and with one thing changed at a time; restores everything.

    Raises:
        Broken: the unchanged step raises, or never calls the policy.
    """
    progress("running the step")
    stepper = Stepper(setup, nearby(temperature))
    first = stepper.run()
    _require_policy(first)
    stepper.by_hand = first.written
    base = tabulate(first, setup, temperature)
    if _rounded_throughout(base, setup):
        first, base = _without_rounding(stepper, first, base, temperature)
    if stepper.by_hand:
        _first_update_alone(base)
    found = Experiments(base, first, None, None, None, by_hand=stepper.by_hand, snapshot=stepper.snapshot)
    progress("running the step with its updates, twice")
    real = stepper.run(hold=False, times=2, may_fail=True)
    found.real = real
    found.repeat = tabulate(real, setup, temperature, samples=base.samples)
    if stepper.by_hand:
        _first_update_alone(found.repeat)
    _second_step(found, real, setup, temperature)
    if real.error and not real.boundaries:
        raise Broken("loop", f"{real.error}: it cannot be run again; watch it instead (rlhf-doctor watch)")
    found.noise = _noise(base, found.repeat, stepper.by_hand)
    found.reproducible = _same_samples(base, found.repeat, real) and max(found.noise.values(), default=0.0) <= NOISY
    stepper.temperatures = (temperature,)  # what tokens were drawn at is asked of unchanged runs alone
    if found.reproducible and base.samples:
        windows = None if stepper.by_hand else _first_epoch(base)
        found.done = _Conductor(setup, temperature, stepper, base, found, windows, seed, progress).planned()
    elif base.samples:
        found.reasons["*"] = "two runs of the step from one state differ, so nothing can be told from a changed one"
    else:
        found.reasons["*"] = "no sample was seen: the policy was not called on token ids, or nothing was trained"
    found.runs = stepper.runs
    return found


def _rounded_throughout(base: Table, setup: RLHFSetup) -> bool:
    """Whether every pass of a float32 policy gives bfloat16 logits, as in autocast; their range is that of float32."""
    calls = [p.call for p in base.placed if p.call.role == "policy"]
    weights = getattr(setup.policy, "parameters", None)
    single = callable(weights) and all(p.dtype == torch.float32 for p in weights() if p.is_floating_point())
    return single and bool(calls) and all(call.rounding == torch.finfo(torch.bfloat16).eps for call in calls)


def _without_rounding(stepper: Stepper, first: Run, base: Table, temperature: float) -> tuple[Run, Table]:
    """The first run once more without autocast; the one that was made where that cannot be or changes nothing."""
    stepper.snapshot.exact = True
    try:
        run = stepper.run()
        table = tabulate(run, stepper.setup, temperature)
        if table.samples and table.rounding("policy") < base.rounding("policy"):
            run.moved.update(first.moved)
            return run, table
    except Broken:  # layers of several precisions, which only autocast brings together
        pass
    stepper.snapshot.exact = False
    return first, base


def _require_policy(first: Run) -> None:
    """A step must work on the objects of the setup, in this process.

    Raises:
        Broken: the policy was never called.
    """
    if any(call.role == "policy" for call in first.calls):
        return
    strangers = any(not roles for _, _, roles in first.steps)
    what = (
        "it trains other modules than the setup's: give those very objects"
        if strangers
        else "it works in another process, or on a copy: the step must call the setup's own objects in this process"
    )
    raise Broken("loop", f"loop: the step never calls the policy on token ids; {what}")


def _first_update_alone(table: Table) -> None:
    """Forget what was read after the first update: it was read at other weights."""
    for window, names in (
        ("window", ("weight", "logp", "temperature", "mixed", "offset", "action", "entropy_weight", "new_entropy")),
        ("value_window", ("value", "value_gradient")),
    ):
        later = ~(table[window] == 0)
        for name in names:
            if name in table.fields:
                table.fields[name][later] = np.nan


def _second_step(found: Experiments, real: Run, setup: RLHFSetup, temperature: float) -> None:
    if len(real.boundaries) < 2 or real.error:
        return
    start = real.boundaries[0]
    later = Run(
        [c for c in real.calls if c.order > start],
        [t for t in real.texts if t.order > start],
        [s for s in real.steps if s[0] > start],
        real.stopped, {}, [real.boundaries[1]], real.returned, real.error,
    )  # fmt: skip
    found.second_run = later
    found.second = tabulate(later, setup, temperature)


def _first_epoch(base: Table) -> int | None:
    """Optimizer steps until every sample was trained on once."""
    last = [int(w.max()) for w in base.windows.values() if len(w)]
    return max(last) + 1 if last and max(last) >= 0 else None


def _noise(base: Table, repeat: Table, by_hand: bool) -> dict[str, float]:
    found = {}
    for name in ("old_logp", "ref_logp", "old_value", "weight", "value_gradient"):
        a, b = base[name], repeat[name]
        if a.shape != b.shape:
            return {name: float("inf")}
        first = np.isfinite(a) & np.isfinite(b)
        if name in ("weight", "value_gradient"):  # without holding back, only the first minibatch is comparable
            window = base["window" if name == "weight" else "value_window"]
            first &= window == 0
        if first.any():
            span = max(float(np.ptp(a[first])), float(np.abs(a[first]).max()), 1e-12)
            found[name] = float(np.abs(a - b)[first].max()) / span
    both = np.isfinite(base.scores) & np.isfinite(repeat.scores)
    if both.any():
        size = max(float(np.abs(base.scores[both]).max()), 1e-12)
        found["scores"] = float(np.abs(base.scores - repeat.scores)[both].max()) / size
    return found


def _same_samples(base: Table, repeat: Table, real: Run) -> bool:
    """Whether the repeated run drew the same tokens before its first update: sampling is compared call by call."""
    b = [c for c in repeat.generation if c.order < _first_update(real)]
    a = base.generation[: len(b)]
    if len(a) != len(b) or (base.generation and not b):
        return False
    return all(x.ids.shape == y.ids.shape and bool((x.ids == y.ids).all()) for x, y in zip(a, b, strict=True))


def _first_update(run: Run) -> float:
    """The order of the first optimizer step, or of the first call at other weights than a role's first ones."""
    first = [order for order, _, _ in run.steps[:1]]
    before: dict[str, Any] = {}
    for call in run.calls:
        known = before.setdefault(call.role, call.weights)
        if known is not None and call.weights is not None and not bool((known == call.weights).all()):
            first.append(call.order)
            break
    return min(first, default=float("inf"))


class _Conductor:
    def __init__(
        self, setup: RLHFSetup, temperature: float, stepper: Stepper, base: Table, found: Experiments,
        windows: int | None, seed: int, progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.setup, self.temperature, self.stepper = setup, temperature, stepper
        self.made: dict[str, Experiment] = {}
        self.base, self.found, self.windows, self.progress = base, found, windows, progress
        self.seed = SEED + seed
        self.shape = base.tokens.shape
        first: dict[tuple[int, ...], int] = {}
        # Samples that are left out of the policy's loss do not show what is changed of them, unless a critic does.
        self.idle = left_out(base) & (not base.has("value_gradient"))
        # Samples of the same tokens cannot be told apart once rows are shuffled: they are changed alike.
        self.twin = np.array([first.setdefault(s.tokens, i) for i, s in enumerate(base.samples)], dtype=np.int64)
        self.groups = self._groups()[self.twin]

    def _groups(self) -> Any:
        """Every sample's group: a part is never touched, so that what moves there moved with the batch."""
        base = self.base
        seen = np.zeros(len(base.samples), dtype=bool)
        for name in ("weight", "value_gradient"):
            seen |= (np.isfinite(base[name]) & base.real).any(1)
        if (seen & ~self.idle).any():
            seen &= ~self.idle
        group = np.zeros(len(base.samples), dtype=np.int64)
        window = base.windows.get("policy", base.windows.get("value", group))
        for number in np.unique(window[seen]):
            rows = np.flatnonzero(seen & (window == number))
            rows = rows[np.argsort(-base.real[rows].sum(1), kind="stable")]
            group[rows] = np.arange(len(rows)) % 4
        return group

    def planned(self) -> Changed:
        """Every experiment that the setup allows, to be made when asked for."""
        plan: dict[str, Callable[[], None]] = {
            "rollout outputs": self._rollout_outputs,
            "poison": self._poison,
            "update values": self._update_values,
            "update logits": self._update_logits,
        }
        if np.isfinite(self.base.scores).any():
            plan |= {"one score": self._one_score, "all scores": self._all_scores}
            plan |= {"scores of other tokens": self._other_scores}
        else:
            self.found.reasons["one score"] = self.found.reasons["all scores"] = self._no_scores()
        return Changed(plan, self.made)

    def _no_scores(self) -> str:
        if self.setup.reward is None:
            return "the setup has no reward model"
        if not any(c.role == "reward" for c in self.found.first.calls) and not self.found.first.texts:
            return "the step never calls the reward model where it can be seen"
        return "the reward model's scores could not be matched to the samples"

    def _run(self, name: str, amounts: Floats, touched: Bools, *made: Change, text: Any = None) -> None:
        self.progress(f"running the step with other {name}")
        try:
            run = self.stepper.run(changes=made, last_window=self.windows, text_change=text)
        except Broken as broken:
            self.found.reasons[name] = f"the step raised with changed {name}: {broken.sentence}"
            return
        finally:
            self.found.runs = self.stepper.runs
        table = tabulate(run, self.setup, self.temperature, samples=self.base.samples)
        if self.stepper.by_hand:
            _first_update_alone(table)
        self.made[name] = Experiment(name, amounts, touched, table, run)

    def _scored(self, name: str, amounts: Floats) -> None:
        base, amounts = self.base, amounts[self.twin]
        texts = {scored.order: k for k, scored in enumerate(self.found.first.texts)}
        if any(order in texts for order, _ in base.score_rows):
            self._run(name, amounts, amounts != 0, text=changes.of_texts(base, texts, amounts))
        else:
            self._run(name, amounts, amounts != 0, changes.of_scores(base, amounts))
        made = self.made.get(name)
        if made is None:
            return
        moved = np.nan_to_num(made.table.scores - base.scores)
        if moved[made.touched].any():  # behind the head there may be a gain
            self.made[name] = replace(made, amounts=np.where(made.touched & (moved != 0), moved, amounts))
        else:
            del self.made[name]
            self.found.reasons[name] = "the reward model's scores could not be changed where the step reads them"

    def _one_score(self) -> None:
        base = self.base
        scores = base.scores
        lengths = base.real.sum(1)
        by_role = [base.windows.get(role, np.full(len(scores), -1)) for role in ("value", "policy")]
        trained = next((windows for windows in by_role if windows.max(initial=-1) >= 0), np.zeros(len(scores)))
        fit = np.isfinite(scores)
        for better in (~self.idle, trained == 0):
            if (fit & better).any():
                fit &= better
        middle = np.nanmedian(scores[fit])
        alone = np.bincount(self.twin, minlength=len(scores))[self.twin] == 1
        rank = np.where(fit, lengths - 5 * np.abs(scores - middle) + 100 * alone, -np.inf)
        ended = np.array([s.ended for s in base.samples], dtype=bool)
        for _ in range(2):
            chosen = int(np.argmax(rank))
            amounts = np.zeros(len(scores))
            amounts[self.twin[chosen]] = self._size(scores) * (1 if scores[chosen] <= middle else -1)
            self._scored("one score", amounts)
            rank = np.where(ended != ended[chosen], rank, -np.inf)
            if not self._still("one score") or not np.isfinite(rank).any():
                break  # a constant may stand for the scores of responses without an end, or of those with one

    def _still(self, name: str) -> bool:
        """Whether a changed score was read and moved nothing."""
        made = self.made.get(name)
        fields = ("weight", "value_gradient")
        return made is not None and not any(np.nan_to_num(made.moved(self.base, f)).any() for f in fields)

    def _all_scores(self) -> None:
        scores = self.base.scores
        size = self._size(scores)
        inward = np.where(scores > np.nanmedian(scores), -1, 1)
        amounts = size * np.random.default_rng(self.seed).uniform(0.2, 1.0, len(scores)) * inward
        self._scored("all scores", np.where(np.isfinite(scores), amounts, 0.0))

    def _other_scores(self) -> None:
        """The scores at every token but the last one of a response: no loop has anything to do with these."""
        amounts = np.where(np.isfinite(self.base.scores), self._size(self.base.scores), 0.0)[self.twin]
        change = changes.of_other_scores(self.base, amounts)
        if change is None:
            self.found.reasons["scores of other tokens"] = "the reward model gives one number a row"
            return
        self._run("scores of other tokens", amounts, amounts != 0, change)

    def _size(self, scores: Floats) -> float:
        """A quarter of the scores' spread: towards the middle, so that no clip of theirs is met."""
        spread = float(np.nanstd(scores))
        return 0.25 * spread if spread > 1e-6 else SMALL

    def _rollout_outputs(self) -> None:
        """Values of the rollout at one state of some samples, the reference's logits in others."""
        base, made = self.base, []
        touched = np.zeros(len(base.samples), dtype=bool)
        values = np.zeros(self.shape)
        if base.has("old_value"):
            lengths = base.real.sum(1)
            for s in np.flatnonzero((self.groups == 1) & (lengths > 1)):
                values[s, lengths[s] // 2] = SMALL * max(float(np.nanstd(base["old_value"])), 0.2)
            values = values[self.twin]
            if values.any():
                made.append(changes.at_states(base, "value", values, changes.is_old))
                touched |= self.groups == 1
        logits = np.zeros(self.shape)
        if base.has("ref_logp"):
            up = np.indices(self.shape).sum(0) % 2 == 0  # both ways, however few tokens there are
            pushes = np.random.default_rng(self.seed).uniform(0.2, 1.0, self.shape) * np.where(up, 1.0, -1.0)
            logits[self.groups == 2] = pushes[self.groups == 2]
            logits = logits[self.twin] * base.real
            if logits.any():
                made.append(changes.at_tokens(base, "reference", logits, lambda placed: True))
                touched |= self.groups == 2
        lengths = np.array([len(s.response) for s in base.samples] or [0])

        def outside(placed: Placed) -> Floats:
            # The reference away from the responses of group 3: what has no business in any KL.
            at = np.maximum(placed.sample, 0)
            away = (placed.sample >= 0) & (self.groups[at] == 3) & ((placed.state < 0) | (placed.state >= lengths[at]))
            return np.where(away, 1.0, 0.0)

        if any(p.call.role == "reference" and outside(p).any() for p in base.placed):
            made.append(changes.at_columns(base, "reference", outside, lambda placed: True))
            touched |= self.groups == 3
        if made:
            self._run("rollout outputs", values + logits, touched, *made)
        else:
            self.found.reasons["rollout outputs"] = "neither rollout values nor the reference's logits were seen"

    def _poison(self) -> None:
        """Large numbers in every slot of a rollout that no response token needs."""
        base, made = self.base, []
        lengths = np.array([len(s.response) for s in base.samples] or [0])

        def idle(placed: Placed) -> Floats:
            # States before the responses, and those past the state that follows the last token.
            at = np.maximum(placed.sample, 0)
            away = (placed.sample >= 0) & ((placed.state < -1) | (placed.state > lengths[at]))
            return np.where(away, POISON, 0.0)

        for role in ("value", "reference", "policy"):
            if any(p.call.role == role and idle(p).any() for p in base.placed):
                made.append(changes.at_columns(base, role, idle, lambda placed: True))
        if made:
            self._run("poison", np.zeros(self.shape), np.ones(len(base.samples), dtype=bool), *made)
        else:
            self.found.reasons["poison"] = "no output was seen outside of the responses"

    def _update_values(self) -> None:
        """The critic's outputs moved in the update alone."""
        base = self.base
        if not base.has("value_gradient"):
            self.found.reasons["update values"] = "no gradient was seen at the critic's head"
            return
        values = np.full(self.shape, SMALL * max(float(np.nanstd(base["value"])), 0.02)) * base.real
        change = changes.at_states(base, "value", values, changes.is_update)
        self._run("update values", values, np.ones(len(base.samples), dtype=bool), change)

    def _update_logits(self) -> None:
        """The policy's log-probabilities moved in the update alone."""
        base = self.base
        if not base.has("weight"):
            self.found.reasons["update logits"] = "no gradient was seen at the policy's head"
            return
        sizes = np.random.default_rng(self.seed).choice([-1.0, -0.4, -0.05, 0.05, 0.4, 1.0], self.shape)
        sizes = sizes[self.twin] * base.real
        change = changes.at_tokens(base, "policy", sizes, changes.is_update)
        self._run("update logits", sizes, np.ones(len(base.samples), dtype=bool), change)

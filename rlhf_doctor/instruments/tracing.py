"""The facts of the trace stage: one step watched and run again with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage

if TYPE_CHECKING:
    from rlhf_doctor.trace.interventions import Experiments
    from rlhf_doctor.trace.recover import Recovered
    from rlhf_doctor.trace.table import Table

__all__ = ["Traced", "traced"]


class Traced:
    """What a step does to the four models: the runs, and the algorithm recovered from them.

    Args:
        experiments: the runs.
        recovered: what they tell of the algorithm, or what works it out.
        temperature: the declared one.
        watched: whether the run went by once, by itself: nothing could be changed, and updates were not held back.
    """

    def __init__(
        self,
        experiments: Experiments,
        recovered: Recovered | Callable[[], Recovered],
        temperature: float,
        watched: bool = False,
    ) -> None:
        self.experiments, self.temperature, self.watched = experiments, temperature, watched
        self._recovered = recovered

    @property
    def recovered(self) -> Recovered:
        """The algorithm, worked out when it is first asked for: that takes runs of the step."""
        if callable(self._recovered):
            self._recovered = self._recovered()
        return self._recovered

    @property
    def base(self) -> Table:
        """The unchanged run, by sample and response token."""
        return self.experiments.base

    def needs(self, *names: str) -> None:
        """Go on only if these experiments were made.

        Raises:
            Unavailable: one of them was not, with the reason.
        """
        for name in names:
            if name not in self.experiments.done:
                reasons = self.experiments.reasons
                raise Unavailable(reasons.get(name) or reasons.get("*") or f"the run with changed {name} was not made")


@fact(Stage.TRACE)
def traced(setup: Any, options: Any, progress: Any = lambda text: None) -> Traced:
    """Watch one step, and run it again from the same state with one thing changed at a time.

    Raises:
        Unavailable: the setup has no step.
        Broken: the step raises, or trains none of the models that it was given with.
    """
    if setup.step is None:
        raise Unavailable("needs a step (one whole PPO iteration) in the setup")
    from rlhf_doctor.trace.interventions import conduct
    from rlhf_doctor.trace.recover import recover

    declared = setup.declared.get("temperature", 1.0)
    temperature = float(declared) if isinstance(declared, (int, float)) and declared > 0 else 1.0
    found = conduct(setup, temperature, options.seed, lambda part: progress(f"setup: traced, {part}"))
    return Traced(found, lambda: recover(found, dict(setup.declared)), temperature)

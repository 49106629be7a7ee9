"""Whether two identical calls agree, and what follows from the mode they were made in. Plain data in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity
from rlhf_doctor.instruments.readings import Invariance, Manifest, Parameters, Shift

__all__ = ["UNSTEADY", "dropout_rates", "random_in_eval", "repeat_fault"]

# The same call of the same batch runs the same kernels, so it agrees far better than two batches of other shapes do: a
# tenth of the tolerance between shapes is left for kernels on accelerators that add up in any order.
UNSTEADY = 0.1


@dataclass(frozen=True)
class _Repeat:
    shift: Shift
    mode: str

    @property
    def moved(self) -> bool:
        return not self.shift.largest <= UNSTEADY * self.shift.tolerance


def random_in_eval(invariance: Invariance) -> bool:
    """Whether two identical calls in eval mode differ."""
    shift = invariance.shifts.get("repeat in eval mode", invariance.shifts["repeat"])
    return _Repeat(shift, "eval").moved


def repeat_fault(
    role: Role, invariance: Invariance, parameters: Parameters | None, manifest: Manifest | None, *, has_step: bool
) -> Finding | None:
    """The finding for a model whose repeated call differs, None where it agrees.

    In eval mode it is always a fault. In train mode it is one as the model was handed over; where a loop is given too,
    the loop may call eval() itself, so it is only said.
    """
    given = _Repeat(invariance.shifts["repeat"], invariance.mode)
    in_eval = invariance.shifts.get("repeat in eval mode")
    stubborn = _Repeat(in_eval, "eval") if in_eval is not None else given
    active = parameters.active_dropout if parameters is not None else ()
    if stubborn.moved:
        return Finding(
            f"The {role} is random even in eval mode: two identical calls differ by {stubborn.shift.largest:.2g} nats "
            "a token. They should agree to the last bit: some dropout or noise in it does not listen to eval(); tie "
            "it to self.training, or set its rate to 0.",
            role=role,
            confidence=Confidence.PROVEN,
            evidence=(_evidence(role, stubborn, ()),),
        )
    if given.moved:
        modules = f" ({', '.join(active[:3])}{' …' if len(active) > 3 else ''})" if active else ""
        said = (
            f"The {role} was handed over in {given.mode} mode with dropout active{modules}, so two identical calls "
            f"differ by {given.shift.largest:.2g} nats a token. "
        )
        if has_step:
            said += "Whether the loop calls eval() before it takes log-probabilities is not known from here; it should."
        else:
            said += f"They should be the same: call {role}.eval(), or set every dropout rate to 0."
        return Finding(
            said,
            role=role,
            severity=Severity.INFO if has_step else None,
            confidence=Confidence.PROVEN,
            evidence=(_evidence(role, given, active),),
        )
    rates = dropout_rates(manifest)
    if not active and not (rates and parameters is not None and parameters.loaded_here):
        return None
    where = ", ".join(active[:3]) if active else ", ".join(f"{name} = {rate:g}" for name, rate in rates.items())
    return Finding(
        f"The {role} has dropout ({where}) that does nothing now and would as soon as it trains in train mode. In "
        "RLHF it is switched off: set the rates to 0, or keep the model in eval mode, which costs nothing but the "
        "dropout.",
        role=role,
        severity=Severity.INFO,
        confidence=Confidence.MEASURED,
        evidence=(Evidence("dropout rate", "0", "above 0", where=where),),
    )


def dropout_rates(manifest: Manifest | None) -> dict[str, float]:
    """Dropout rates above 0 in a model's config."""
    config: dict[str, Any] = dict(manifest.config) if manifest is not None else {}
    return {
        name: float(value)
        for name, value in config.items()
        if ("dropout" in name or name.endswith("pdrop"))
        and not name.startswith(("classifier", "summary"))
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value > 0
    }


def _evidence(role: Role, repeat: _Repeat, active: tuple[str, ...]) -> Evidence:
    return Evidence(
        "largest difference of a token's log-probability between two identical calls",
        expected="0",
        observed=f"{repeat.shift.largest:.3g} nats",
        tolerance=f"{UNSTEADY * repeat.shift.tolerance:.2g}",
        where=f"{repeat.mode} mode" + (f"; active dropout: {', '.join(active[:8])}" if active else ""),
        reproduce=f"{role}(ids) twice, without touching the mode it was handed over in",
    )

"""ROL001: tokens are drawn at the temperature that they are scored at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.rollout.sampling import bent
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.drawing import Drawing
from rlhf_doctor.instruments.tracing import Traced

APART = 0.2  # nats, of the middle token: dropout leaves some 0.05, another context 1 and more
OFF = 0.02  # of the temperature: twenty times what bfloat16 leaves of a slope over 32 logits


@check(
    "ROL001",
    "tokens are drawn at the temperature that they are scored at",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("ROL002", "ROL008", "ROL010", "ROL011"),
    explains=("ROL003", "MET002", "MET011", "LOS002"),
    across_roles=True,
)
def temperature_mismatch(traced: Traced, drawing: Drawing, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Two temperatures. That of the scored log-probabilities is read off their gradient, whose logarithm rises by 1/T
        with every logit, and compared with the declared one. That of the sampler is asked of the tokens it drew: their
        likelihood at other temperatures over that at the declared one, in both steps, and in more responses where
        the answer is close.

    Why it matters:
        If every pass leaves out the temperature, the ratio is 1 and the KL is 0 as they should be, and yet the gradient
        is that of another policy than the one that acted. Nothing in the curves shows it.

    What it looks like when broken:
        Healthy ratio, clip fraction and KL; the drawn tokens are on average less, or more, surprising than the entropy
        of the scored distribution says.

    How to fix:
        1. Divide the logits by the sampling temperature wherever log-probabilities are taken.
        2. Pass that temperature to the sampler explicitly, from one setting.
        3. Of an engine ask for log-probabilities of the tempered distribution, not of the raw logits.

    Source:
        https://github.com/huggingface/trl/pull/3029, https://github.com/NVIDIA-NeMo/RL/pull/316 and
        https://github.com/huggingface/trl/issues/4159. The alarm is at odds of a million to one; as a likelihood ratio
        has mean 1 in a healthy loop, such odds come up in one of a million at most, however often one looks
        (https://en.wikipedia.org/wiki/Ville%27s_inequality). A measured temperature may be 2 % off: rounding in
        bfloat16 moves it by a tenth of that.
    """
    from rlhf_doctor.trace import odds

    scored = odds.scoring_temperature(traced.base)
    said = setup.declared.get("temperature")
    if scored is not None:
        measured, spread, tokens = scored
        if abs(measured / traced.temperature - 1) > max(OFF, 4 * spread):
            if said is None:
                raise Unavailable(f"needs declared temperature: log-probabilities are taken at {measured:.3g}")
            yield Finding(
                f"Log-probabilities are taken at temperature {measured:.3g}, and {said:g} is declared for sampling. "
                "Both must be one: divide the logits by the sampling temperature in every pass.",
                role="loop",
                confidence=Confidence.MEASURED,
                evidence=(
                    Evidence(
                        "temperature of the trained log-probabilities, by their gradient",
                        f"{said:g}",
                        f"{measured:.4g}",
                        f"{OFF:.0%}",
                        f"median of {tokens} response tokens",
                    ),
                ),
            )
            return
    if bent(setup.declared):
        raise Unavailable("needs sampling from the whole distribution: top_k or top_p cut it, and likelihoods with it")
    heat = odds.heat(drawing)
    cut = odds.cut_odds(drawing)
    if heat.log_odds < odds.ALARM or (cut and cut[0] > heat.log_odds):
        return
    if odds.passes_apart(traced.base) > APART:
        raise Unavailable("needs the same log-probabilities before the update and in it: which were drawn from?")
    yield Finding(
        f"The drawn tokens are e^{heat.log_odds:.0f} times likelier at another temperature, best at "
        f"{heat.temperature:.2g}, than at the {traced.temperature:g} that their log-probabilities are taken at. "
        "Sample and score at one temperature.",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "odds of another temperature, as a logarithm",
                "around or below 0",
                f"{heat.log_odds:.1f}",
                f"{math.log(1e6):.1f}",
                f"{heat.tokens} drawn tokens",
            ),
            Evidence(
                "mean surprise of the drawn tokens in nats",
                f"{heat.entropy:.3f}, the entropy",
                f"{heat.surprise:.3f}",
                where="rollouts of both steps",
            ),
        ),
    )


@temperature_mismatch.fault("the sampler leaves the temperature out")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    parts = {"sample": rollout_faults.sample_at(2.0)}
    return reference_step(healthy, parts=parts, settings={"temperature": 0.5, "batch_size": 64})


@temperature_mismatch.fault("every pass but the sampler leaves the temperature out")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import rollout_faults
    from rlhf_doctor.selftest.loops import reference_step

    parts = {"logprobs": rollout_faults.logprobs_at_one}
    return reference_step(healthy, parts=parts, settings={"temperature": 0.7})

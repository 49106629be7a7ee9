"""REF006: the reference scores the same tokens as the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage

if TYPE_CHECKING:
    from rlhf_doctor.instruments.agreement import Agreement
    from rlhf_doctor.instruments.tracing import Traced
    from rlhf_doctor.trace.divergence import Divergence
    from rlhf_doctor.trace.reference import ReferenceView

ALIKE = 0.02  # relative: one temperature for both, whatever is declared
ROUNDINGS = 10  # from the mean over the vocabulary to the largest of single tokens


@check(
    "REF006", "the reference scores the same tokens as the policy", stage=Stage.TRACE, severity=Severity.ERROR,
    after=("REF002", "REF004"), explains=("KLD003", "REF005", "SYS008"), across_roles=True,
)  # fmt: skip
def reference_scores_other_tokens(
    reference_view: ReferenceView, kl_terms: Divergence, traced: Traced, setup: Any, agreement: Agreement | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The reference's passes in a step beside those that the policy is trained on: the ids, the mask over pads and
        text, the positions. Where both models are the same, as at the start of a run, their log-probabilities of the
        response tokens must be the same. The temperature is the one at which the reference's log-probabilities explain
        how rewards and gradients move when its logits are moved; it is beside the one that the policy is trained at.

    Why it matters:
        The KL compares two models on one text. If the reference reads pads, other positions, a text without its prompt,
        or is read at another temperature, the KL is above 0 with equal models, and the policy is pulled towards how a
        model behaves on broken input.

    What it looks like when broken:
        The KL is not 0 in the first step; it depends on the batch's padding; it falls while the policy gets worse.

    How to fix:
        1. Give the reference the same ids, attention mask and position ids as the policy.
        2. Divide its logits by the same temperature.
        3. Compare both once with equal weights: every log-probability must agree.

    Source:
        https://github.com/huggingface/trl/issues/469 (positions and masks); Huang et al. 2024,
        https://arxiv.org/abs/2403.17031, on the logits' temperature in every pass. Tolerance: ten times the square root
        of twice the KL that rounding in the models' dtype explains; pads that are read move a token by tenths of a nat.
    """
    from rlhf_doctor.trace.odds import scoring_temperature

    view, heat = reference_view, float(setup.declared.get("temperature") or 1.0)
    measured = scoring_temperature(traced.base)
    said, evidence = [], []
    if view.rows and view.others + view.altered >= max(1, view.rows // 2):
        count = view.others + view.altered
        said.append("is given other ids than the policy's, or a mask that hides the prompt")
        evidence.append(
            Evidence("rows with the sampled tokens", f"{view.rows}", f"{view.rows - count}", "none", "its passes")
        )
    same = agreement is not None and any(not gap.open for gap in agreement.gaps.values())
    if agreement is not None and same and view.gap is not None and not _dropping(setup.policy, traced):
        tolerance = ROUNDINGS * (2 * max(gap.tolerance for gap in agreement.gaps.values())) ** 0.5
        if view.gap > tolerance:
            said.append("gives other log-probabilities than the policy, which has the same weights")
            where = f"{view.tokens} response tokens of a step"
            evidence.append(Evidence("|log π − log π_ref| at most", "0", f"{view.gap:.3g}", f"{tolerance:.1g}", where))
    for name, count in view.differences.items() if evidence or not same else ():
        said.append(f"is given another {name}" if name == "mask" else f"is given other {name}")
        evidence.append(Evidence(f"responses with the policy's {name}", f"{view.samples}", f"{view.samples - count}"))
    for place, penalty in (("rewards", kl_terms.reward), ("loss", kl_terms.loss)):
        fit = None if penalty is None else penalty.best
        alike = fit is not None and measured is not None and abs(measured[0] / fit.temperature - 1) < ALIKE
        if fit is not None and fit.temperature != heat and not alike and penalty is not None:
            said.append(f"is read at temperature {fit.temperature:g} where the policy is at {heat:g}")
            where = f"{penalty.tokens} response tokens"
            told = f"temperature that explains the {place}"
            evidence.append(Evidence(told, f"{heat:g}", f"{fit.temperature:g}", f"misfit {fit.misfit:.1g}", where))
            break
    if evidence:
        yield Finding(
            f"The reference {', and '.join(said)}. It should score the very tokens that the policy is trained on: give "
            "it the same ids, mask, positions and temperature.",
            role="reference",
            confidence=Confidence.PROVEN,
            evidence=tuple(evidence),
        )
    elif view.gap is None:
        raise Unavailable("needs passes of the reference and the policy over the same responses")


def _dropping(policy: Any, traced: Traced) -> bool:
    """Whether the policy's own passes drop hidden states: then it is the policy that differs from its reference."""
    from rlhf_doctor.trace.twice import has_dropout

    calls = [placed.call for placed in traced.base.placed if placed.call.role == "policy"]
    return has_dropout(policy) and all(call.training for call in calls)


@reference_scores_other_tokens.fault("the reference is read at temperature 1")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    parts = {"logprobs": kl_faults.OtherInput(healthy, temperature=1.0)}
    return loops.reference_step(healthy, parts=parts, settings={"temperature": 0.7})


@reference_scores_other_tokens.fault("the reference does not see the prompt")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import kl_faults, loops

    return loops.reference_step(healthy, parts={"logprobs": kl_faults.OtherInput(healthy, prompt=False)})

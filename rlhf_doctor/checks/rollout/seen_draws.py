"""What the draws of a step tell of the sampler. No torch is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_doctor.finding import Confidence, Evidence, Finding
from rlhf_doctor.instruments.drawing import Drawing

__all__ = ["bent", "cut"]


def bent(drawing: Drawing) -> list[Finding]:
    """What tokens were seen to be drawn from is no softmax of the logits."""
    from rlhf_doctor.trace import sampler

    found = sampler.bends(drawing)
    if found is None:
        return []
    how = [f"leaves out up to {found.left_out:.0%} of it"] if found.left_out > sampler.LEFT_OUT else []
    how += [f"moves the odds of likely tokens by up to {found.nats:.2g} nats"] if found.nats else []
    return [
        Finding(
            f"The sampler does not draw from the distribution that log-probabilities are taken from: it "
            f"{' and '.join(how)}. Sample with top_k=0, top_p=1 and no penalties or suppressed tokens, each passed "
            "explicitly.",
            role="loop",
            confidence=Confidence.PROVEN,
            evidence=(
                Evidence(
                    "odds that tokens were drawn with, beside a softmax of the logits",
                    expected="no likely token at 0 or off the line",
                    observed=f"off at {found.tokens} of {found.of} drawn tokens",
                    tolerance=f"{sampler.LEFT_OUT:.0%} left out, {sampler.BENT:g} nats",
                    where="rollouts of both steps",
                ),
            ),
        )
    ]


def cut(drawing: Drawing) -> Iterator[Finding]:
    """The drawn tokens all lie among the likely ones."""
    from rlhf_doctor.trace import odds

    found = odds.cut_odds(drawing)
    if found is None or found[0] < odds.ALARM:
        return
    heat = odds.heat(drawing)  # after what is seen already: it draws more
    if not odds.ALARM <= heat.log_odds <= found[0]:
        return
    yield Finding(
        "No unlikely token was drawn: the sampler leaves out a part of the distribution that the log-probabilities are "
        "taken from. Sample with top_k=0, top_p=1 and no penalties, each passed explicitly.",
        role="loop",
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                "odds that unlikely tokens are left out, as a logarithm",
                expected="below 3",
                observed=f"{found[0]:.1f}; of some states {1 - found[1]:.0%} of the distribution",
                tolerance=f"{odds.ALARM:.1f}",
                where=f"{heat.tokens} drawn tokens",
            ),
        ),
    )

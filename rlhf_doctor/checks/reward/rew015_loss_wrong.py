"""REW015: the reward model's loss trains the scores that PPO reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.reward_training import RewardTraining


@check(
    "REW015", "the reward model's loss trains the scores that PPO reads", stage=Stage.TRACE, severity=Severity.ERROR,
    after=("REW001", "REW002"),
)  # fmt: skip
def reward_loss_wrong(reward_training: RewardTraining) -> Iterator[Finding]:
    """
    What it examines:
        The setup's reward_loss, called with the reward model and a few of its preferences: lists of texts, prompt and
        response joined by a space; where it wants others, lists of (prompt, response), or padded tensors. The gradient
        that comes back to the scalar head must reach the last token of every text, where PPO reads the score, and no
        pad; it must pull the chosen up. With the scores moved 300 apart, either way, loss and gradient must be finite.

    Why it matters:
        The policy is trained on one number, the score at the last token. A loss that reads another position trains a
        number that nobody uses; one that counts pads trains it on the batch's shape; one that overflows turns all
        weights into NaN with the first pair that the model is sure about.

    What it looks like when broken:
        Accuracy on held-out pairs near chance although the loss falls; accuracy that changes with the batch size; NaN
        after some thousand steps.

    How to fix:
        1. Gather the score at each text's last token that is no pad, the end of sequence included, as PPO does.
        2. Use logsigmoid(chosen - rejected), not log(sigmoid(...)).
        3. Keep the scores in the graph up to the loss.

    Source:
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1; pads in the loss:
        https://github.com/deepspeedai/DeepSpeedExamples/issues/316; an infinite one:
        https://github.com/deepspeedai/DeepSpeedExamples/issues/423. No tolerance: a gradient is 0 or is not; in float32
        sigmoid(-300) is 0 and its logarithm is not finite.
    """
    found = reward_training
    count = f"{found.texts} texts"

    def say(message: str, *evidence: Evidence) -> Finding:
        return Finding(message, role="reward", confidence=Confidence.PROVEN, evidence=evidence)

    if found.trained == 0:
        yield say(
            "The reward loss leaves the scalar head without a gradient. It should train it: keep the scores in the "
            "graph up to the loss.",
            Evidence("texts with a gradient at the head", f"{found.texts}", "0", "none", "one call of reward_loss"),
        )
        return
    if found.at_pads:
        yield say(
            f"The reward loss reads scores at pads, of {found.at_pads} of {count}. It should read each text's last "
            "token alone: gather there, or mask the pads.",
            Evidence("texts with a gradient at pads", "0", f"{found.at_pads}", "none", "one call of reward_loss"),
        )
    elif found.at_last is not None and found.at_last < found.trained:
        yield say(
            f"The reward loss does not read the last token of {found.trained - found.at_last} of {count}, where PPO "
            "reads the score. Read it there.",
            Evidence(
                "texts with a gradient at their last token", f"{found.trained}", f"{found.at_last}", "none",
                "one call of reward_loss",
            ),
        )  # fmt: skip
    if found.pulled is not None and found.pulled > 0:
        yield say(
            "The reward loss pulls the rejected responses' scores up and the chosen ones' down. Turn its sign.",
            Evidence(
                "gradient of the chosen scores less the rejected ones'", "below 0", f"{found.pulled:.3g}", "its sign",
                "one call of reward_loss",
            ),
        )  # fmt: skip
    for margin, (loss, finite) in found.extremes.items():
        if not finite:
            yield say(
                f"The reward loss or its gradient is not finite where scores are {abs(margin):g} apart. It should be: "
                "use logsigmoid of the difference.",
                Evidence(f"loss with scores moved by {margin:+g}", "finite", f"{loss:g}", "none", "reward_loss"),
            )
            return


@reward_loss_wrong.fault("log of sigmoid")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, naive=True))


@reward_loss_wrong.fault("read in the batch's last column")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, at="column"))


@reward_loss_wrong.fault("the mean over all columns, pads included")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, pads=True))


@reward_loss_wrong.fault("read at the first token")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, at="first"))


@reward_loss_wrong.fault("detached scores")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, detached=True))


@reward_loss_wrong.fault("the rejected are preferred")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import reward_losses

    return healthy.but(reward_loss=reward_losses.pairwise(healthy.tokenizer, sign=-1))

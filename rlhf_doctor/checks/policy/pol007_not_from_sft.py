"""POL007: a policy that is said to come from supervised fine-tuning knows its language."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.text_loss import TextLoss


@check(
    "POL007",
    "a policy that is said to come from SFT knows its language",
    stage=Stage.PROBE,
    severity=Severity.WARNING,
    after=("SYS005", "SYS007", "POL002", "POL003", "PRE004"),
)
def policy_not_from_sft(setup: Any, policy_text_loss: TextLoss) -> Iterator[Finding]:
    """
    What it examines:
        The mean loss of the policy per token of the preferred responses after their prompts, against the logarithm of
        its vocabulary, which is the loss of a guess that knows nothing. It is examined where policy_init is declared to
        be "sft". With prompts alone a bad loss is only mentioned, since fine-tuning may have masked them.

    Why it matters:
        RL sharpens what a policy does sometimes. One that has learnt nothing never does it, so no reward tells good
        from bad; and the KL penalty holds it to the reference, which is a copy of it.

    What it looks like when broken:
        Gibberish rollouts, a flat reward, entropy near the logarithm of the vocabulary. The cause is weights that were
        not loaded, another tokenizer than the one of SFT, or a checkpoint of the wrong step.

    How to fix:
        1. Look at the loader's warnings about missing or newly initialised weights.
        2. Encode with the tokenizer that is saved beside the SFT checkpoint.
        3. Generate a few responses from the checkpoint alone before RL starts.
        4. If the policy is meant to start untrained, declare policy_init="base".

    Source:
        Ouyang et al. 2022, https://arxiv.org/abs/2203.02155 (the policy starts from SFT); Huang et al. 2024,
        https://arxiv.org/abs/2403.17031. A trained language model's loss is a third of log V or less, and one with
        random weights is at log V or above, so 0.95 log V tells them apart without a text that fits well.
    """
    if setup.declared.get("policy_init") != "sft":
        raise Unavailable('needs policy_init="sft" to be declared')
    t = policy_text_loss
    if not t.ignorant:
        return
    what = "preferred responses" if t.source == "preferences" else "prompts"
    yield Finding(
        f"The policy is declared to come from SFT, and predicts the {what} no better than a uniform guess: "
        f"{t.nll:.2f} nats a token, where knowing nothing gives {t.uniform:.2f}. Check that its weights were loaded "
        "and that the tokenizer is the one of SFT.",
        role="policy",
        severity=None if t.source == "preferences" else Severity.INFO,
        confidence=Confidence.MEASURED,
        evidence=(
            Evidence(
                f"mean loss per token of the {what}",
                expected=f"well below {t.uniform:.2f}",
                observed=f"{t.nll:.3f}",
                tolerance=f"{0.95 * t.uniform:.2f}",
                where=f"{t.tokens} tokens",
                reproduce="cross_entropy(policy(ids).logits[:, :-1], ids[:, 1:]) over the response",
            ),
        ),
    )


@policy_not_from_sft.fault("a Hugging Face policy with fresh weights")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.fresh(healthy.policy)
    return policies.paired(healthy, policy).but(declared={"policy_init": "sft"})


@policy_not_from_sft.fault("a hand-written policy with fresh weights")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy)
    return policies.paired(healthy, policy).but(declared={"policy_init": "sft"})

"""PRE001: updates are larger than what the weights' precision can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.precision import LostUpdates

MOST = 0.5
FP16_SMALLEST = 6e-8  # the smallest positive float16; an epsilon below half of it is 0 there


@check(
    "PRE001",
    "updates are larger than what the weights' precision can hold",
    stage=Stage.STATIC,
    severity=Severity.ERROR,
    after=("PRE003", "PRE004"),
    explains=("OPT002",),
)
def low_precision_update(
    policy_lost_updates: LostUpdates | None = None,
    value_lost_updates: LostUpdates | None = None,
    reward_lost_updates: LostUpdates | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Trained weights that are stored in bfloat16 or float16 and stepped in place by an optimizer of Adam's kind,
        whose step is about as large as its learning rate. Counted are the weights for which that is less than half of
        their last binary digit, so that adding it changes nothing. An optimizer that keeps float32 master weights,
        rounds stochastically or carries the remainder is sound, and so is an adapter in float32 over a half-precision
        base. The reward's weights count where its own training is examined.

    Why it matters:
        bfloat16 has 8 significant bits: the neighbours of 0.02 are 6e-5 to 1.2e-4 away. A step of 1e-6 is rounded off,
        in every update anew, so small gradients never add up.

    What it looks like when broken:
        Loss and gradient norm look alive, the ratio stays exactly 1 for most tokens, the reward does not move, weights
        after a hundred updates are those before. In float16 Adam's epsilon may become 0: NaN after one step.

    How to fix:
        1. Keep trained weights in float32 and compute in bfloat16 by autocast.
        2. Or use an optimizer with float32 master weights: FSDP's MixedPrecision, DeepSpeed, Megatron.
        3. With LoRA, keep the adapter in float32; the frozen base may stay in bfloat16.
        4. Or round stochastically (torchao's optimizers).

    Source:
        Micikevicius et al. 2018, "Mixed precision training", https://arxiv.org/abs/1710.03740, section 3.1 (master
        weights); Zamirai et al. 2020, "Revisiting BFloat16 training", https://arxiv.org/abs/2010.06192 (updates that
        round to nothing). float16: https://github.com/hpcaitech/ColossalAI/issues/3490. With more than half of the
        weights lost the model cannot follow its gradient; a healthy adapter in bfloat16 at 1e-4 loses about a tenth.
    """
    found = {"policy": policy_lost_updates, "value": value_lost_updates, "reward": reward_lost_updates}
    if all(f is None for f in found.values()):
        raise Unavailable(
            "needs --stage probe, models in memory, and the optimizers where weights are in half precision"
        )
    for role, f in found.items():
        if f is None or not f.scalars or f.keeper:
            continue
        vanished_epsilon = f.dtype == "float16" and f.eps is not None and f.eps < FP16_SMALLEST / 2
        if f.share <= MOST and not vanished_epsilon:
            continue
        said = (
            f"{f.share:.0%} of its {f.dtype} weights cannot take a step of {f.lr:g}"
            if f.share > MOST
            else f"{f.optimizer}'s epsilon of {f.eps:g} is 0 in float16, so weights without a gradient become NaN"
        )
        yield Finding(
            f"The {'critic' if role == 'value' else role}'s updates are lost in rounding: {said}, and "
            f"{f.optimizer} keeps no float32 master weights. Train "
            "float32 weights under autocast, or use an optimizer with master weights.",
            role=role,  # type: ignore[arg-type]  # all keys are roles
            confidence=Confidence.MEASURED,
            evidence=(
                Evidence(
                    "share of trained weights with half a last digit above the learning rate",
                    expected="near 0",
                    observed=f"{f.share:.1%} of {f.scalars:,}",
                    tolerance=f"{MOST:.0%}",
                    where=f"{f.optimizer}, lr {f.lr:g}, {f.dtype}",
                    reproduce="(w + lr == w).float().mean()",
                ),
            ),
        )


@low_precision_update.fault("a Hugging Face policy in bfloat16 under plain AdamW")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies

    policy = copy.deepcopy(healthy.policy).bfloat16()
    setup = policies.paired(healthy, policy)
    return setup.but(
        optimizers=[torch.optim.AdamW([*policy.parameters(), *healthy.value.parameters()], lr=1e-6)],
    )


@low_precision_update.fault("a hand-written critic in bfloat16 under plain Adam")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import policies, specimens

    critic = specimens.hand_written_critic(healthy).bfloat16()
    both = [*critic.parameters(), *healthy.policy.parameters()]
    return policies.alone(healthy, value=critic).but(optimizers=[torch.optim.Adam(both, lr=3e-6)])


@low_precision_update.fault("a reward trained in float16 under AdamW with its default epsilon")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies
    from rlhf_doctor.selftest.reward_losses import pairwise

    reward = copy.deepcopy(healthy.reward).half().requires_grad_(True)
    return policies.alone(healthy, reward=reward, policy=None, reference=None, value=None).but(
        reward_loss=pairwise(healthy.tokenizer), optimizers=[torch.optim.AdamW(reward.parameters(), lr=1e-5)]
    )

"""REF003: nothing trains the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.reach import is_adapter
from rlhf_doctor.instruments.readings import Parameters


@check("REF003", "nothing trains the reference", stage=Stage.PROBE, severity=Severity.ERROR, after=("PRE004",))
def reference_trainable(
    setup: Any, reference_parameters: Parameters, policy_parameters: Parameters | None = None
) -> Iterator[Finding]:
    """
    What it examines:
        The reference's own parameters, those that it shares with the policy left to SYS003: whether an optimizer of the
        setup holds any, and whether any require gradients. In an optimizer they are a fault. A reference that was
        frozen except for a few tensors is one too, unless the given optimizers leave those out. One that requires
        gradients everywhere, as every freshly loaded model does, is only mentioned: many loops run it under no_grad.

    Why it matters:
        The reference is the anchor of the KL penalty. If it is trained along, it follows the policy, and the penalty
        fades without any sign of it in the log.

    What it looks like when broken:
        KL stays small while the text changes; the weights of the reference after a step are not those before it. Left
        with gradients but no optimizer, it costs memory for activations only.

    How to fix:
        1. reference.requires_grad_(False), after it is complete: a head that is copied later needs it as well.
        2. Build optimizers from the policy's and the critic's parameters, not from a container of all models.
        3. Call the reference under torch.no_grad().

    Source:
        https://github.com/CarperAI/trlx/pull/140 (a frozen branch whose copied head was left trainable);
        https://github.com/huggingface/trl/issues/2046; Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.
    """
    r = reference_parameters
    if r.loaded_here:
        return
    shared = set(policy_parameters.storages) & set(r.storages) if policy_parameters else set()
    borrowed = {r.storages[storage] for storage in shared}
    trainable = [name for name in r.trainable_names if name not in borrowed]
    loose = [name for name in r.trainable_not_in_optimizer if name not in borrowed]
    known = r.in_optimizer is not None
    in_optimizer = [n for n in trainable if known and n not in loose] + [
        n for n in r.frozen_in_optimizer if n not in borrowed
    ]
    kept = set(policy_parameters.trainable_names) if policy_parameters else set()
    forgotten = kept - set(trainable) and set(trainable) < kept and not all(is_adapter(n) for n in trainable)
    if in_optimizer and trainable:
        said = f"An optimizer holds {len(in_optimizer)} parameters of the reference, so it is trained with the policy. "
        names, severity = in_optimizer, None
    elif trainable and forgotten:
        said = f"The reference is frozen except for {len(trainable)} parameters. "
        names, severity = trainable, Severity.WARNING if known else None
    elif trainable or in_optimizer:
        said = "The reference requires gradients. " if trainable else "An optimizer holds frozen reference parameters. "
        said += "That is harmless while no optimizer trains it and the loop runs it under no_grad. "
        names, severity = trainable or in_optimizer, Severity.INFO
    else:
        return
    yield Finding(
        said + "It should be fixed for the whole run: call reference.requires_grad_(False) and leave it out of every "
        "optimizer.",
        role="reference",
        severity=severity,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "parameters of the reference that require gradients, and that an optimizer holds",
                expected="0 and 0",
                observed=f"{len(trainable)} and {len(in_optimizer) if known else 'unknown (no optimizers given)'}",
                where=", ".join(names[:4]) + (" …" if len(names) > 4 else ""),
                reproduce="[n for n, p in reference.named_parameters() if p.requires_grad]",
            ),
        ),
    )


@reference_trainable.fault("a Hugging Face reference in the policy's optimizer")
def _(healthy: Any) -> Any:
    import copy

    import torch

    from rlhf_doctor.selftest import policies

    reference = copy.deepcopy(healthy.policy)
    both = [*healthy.policy.parameters(), *healthy.value.parameters(), *reference.parameters()]
    setup = policies.alone(healthy, reference=reference)
    return setup.but(optimizers=[torch.optim.AdamW(both, lr=1e-5)])


@reference_trainable.fault("a hand-written reference whose head was copied after freezing")
def _(healthy: Any) -> Any:
    import copy

    from rlhf_doctor.selftest import policies

    policy = policies.hand_written(healthy)
    reference = policies.frozen(policy)
    reference.out = copy.deepcopy(policy.out)
    return policies.alone(healthy, policy=policy, reference=reference)

"""REF001: the reference is a Transformer decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Finding, Severity, Stage
from rlhf_doctor.instruments.decoders import shape_fault
from rlhf_doctor.instruments.readings import Architecture, Census, Influence, Invariance, Manifest


@check(
    "REF001",
    "the reference is a Transformer decoder",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("SYS004", "REF002"),
)
def reference_not_transformer_decoder(
    reference_manifest: Manifest,
    reference_architecture: Architecture | None = None,
    reference_census: Census | None = None,
    reference_influence: Influence | None = None,
    reference_invariance: Invariance | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Which operations mix positions in a forward pass of the reference, on which tokens each of its outputs depends,
        and, where that is not a decoder that gives a distribution after every prefix, what it is instead.

    Why it matters:
        The reference is the policy from before RL. The KL penalty compares the two distributions after the same
        prefix, so the reference must give one from the same prefix, and from nothing else. A reference of another
        architecture was never the policy.

    What it looks like when broken:
        A large KL in the first step that no coefficient tames; the policy is pulled towards a model that it never was.
        With a reference that sees later tokens the KL is taken against a model that has read the answer.

    How to fix:
        1. Make the reference a frozen copy of the policy: copy.deepcopy(policy).requires_grad_(False).eval().
        2. Or load the same checkpoint a second time.
        3. With LoRA, use the policy with its adapter disabled.

    Source:
        Ziegler et al. 2019, "Fine-tuning language models from human preferences", https://arxiv.org/abs/1909.08593
        (the penalty is taken to the pretrained model that the policy starts from); Ouyang et al. 2022,
        https://arxiv.org/abs/2203.02155.
    """
    fault = shape_fault("reference", reference_manifest, reference_architecture, reference_census, reference_influence)
    neighbours = reference_invariance.shifts.get("neighbours") if reference_invariance else None
    if neighbours is not None and neighbours.moved and reference_architecture and reference_architecture.is_transformer:
        raise Unavailable("rows of a batch reach each other, so their influences cannot be told apart (POL004)")
    if fault is not None:
        yield fault
    elif reference_architecture is None:
        raise Unavailable("needs a reference that can be called")


@reference_not_transformer_decoder.fault("a convolutional reference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    reference = policies.ConvolutionalPolicy(specimens.vocabulary(healthy))
    return policies.alone(healthy, reference=reference.eval().requires_grad_(False))


@reference_not_transformer_decoder.fault("a Mamba as the reference")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.alone(healthy, reference=policies.mamba(healthy).requires_grad_(False))

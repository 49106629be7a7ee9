"""POL001: the policy is a Transformer decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Finding, Severity, Stage
from rlhf_doctor.instruments.decoders import shape_fault
from rlhf_doctor.instruments.readings import Architecture, Census, Influence, Manifest


@check(
    "POL001",
    "the policy is a Transformer decoder",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("POL003", "POL004", "POL006", "POL007", "REF001", "REF002", "SYS004"),
    across_roles=True,
)
def policy_not_transformer_decoder(
    policy_manifest: Manifest,
    policy_architecture: Architecture | None = None,
    policy_census: Census | None = None,
    policy_influence: Influence | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Which operations mix positions in a forward pass of the policy (attention, convolution over time, recurrence,
        a carried state), and on which tokens each output depends. Class names are quoted, never used, but for two
        kinds that files tell apart and measurements do not: an encoder, and an encoder-decoder.

    Why it matters:
        The four models of RLHF share one architecture. The policy is sampled token by token and then scored in one
        pass over the whole text; both give the same probabilities only in a decoder. A convolution or a recurrence
        also sees less of the prompt, and pads differently, than the reference and the reward model it is judged by.

    What it looks like when broken:
        A CNN's influence map is a band, an encoder's a full square, a recurrence's fades with distance. Training runs,
        the text stays local or repeats itself, the KL to a Transformer reference starts large.

    How to fix:
        1. Use a decoder-only language model as the policy, and make the reference a copy of it.
        2. If it is meant to be one, look at the operation named in the evidence and at where it comes from.
        3. An encoder-decoder can be aligned, with other conventions: prompts are padded on the right and end in EOS,
           and the response starts at the decoder's start token. Tell the rest of the setup so.

    Source:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
        https://arxiv.org/abs/2203.02155 (every model of the four is a GPT); encoder-decoder conventions:
        https://github.com/CarperAI/trlx/pull/287 and https://github.com/huggingface/trl/pull/262.
    """
    fault = shape_fault("policy", policy_manifest, policy_architecture, policy_census, policy_influence)
    if fault is not None:
        yield fault
    elif policy_architecture is None:
        raise Unavailable("needs a policy that can be called")


@policy_not_transformer_decoder.fault("a recurrent policy that returns a tuple")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    policy = policies.RecurrentPolicy(specimens.vocabulary(healthy)).eval()
    return policies.paired(healthy, policy)


@policy_not_transformer_decoder.fault("a convolutional policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies, specimens

    return policies.paired(healthy, policies.ConvolutionalPolicy(specimens.vocabulary(healthy)).eval())


@policy_not_transformer_decoder.fault("a BERT as the policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.bert(healthy))


@policy_not_transformer_decoder.fault("a Mamba as the policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.mamba(healthy))


@policy_not_transformer_decoder.fault("a T5 as the policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import policies

    return policies.paired(healthy, policies.t5(healthy))

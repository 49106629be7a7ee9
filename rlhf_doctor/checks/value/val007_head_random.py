"""VAL007: the critic starts from what the setup says it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.heads import absent_head, new_heads, renamed_head
from rlhf_doctor.finding import Confidence, Evidence, Finding, Severity, Stage
from rlhf_doctor.instruments.fingerprint import Fingerprint, cosine, likeness
from rlhf_doctor.instruments.readings import Loading, Manifest
from rlhf_doctor.instruments.stored_head import StoredHead
from rlhf_doctor.instruments.variation import Variation

FRESH = ("fresh", "policy", "sft", "base", "random")
SAME_BODY, SAME_HEAD = 0.9, 0.9


@check(
    "VAL007",
    "the critic starts from what the setup says it starts from",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    after=("SYS002", "VAL001"),
    explains=("SYS007", "VAL015"),
)
def value_head_random(
    value_manifest: Manifest,
    setup: Any,
    value_loading: Loading | None = None,
    value_variation: Variation | None = None,
    value_fingerprint: Fingerprint | None = None,
    reward_fingerprint: Fingerprint | None = None,
    policy_fingerprint: Fingerprint | None = None,
    reward_stored_head: StoredHead | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        For a checkpoint folder: whether it holds a head of one output under the name that its class reads, and what the
        loader made up. A new head is normal, and told as such, where ``value_init`` is fresh or the policy. With the
        models at hand: whether the head shares memory with the token embedding, and, where ``value_init`` is the reward
        (or the policy), whether the critic's matrices are that model's: 128 entries of each are compared.

    Why it matters:
        A critic that starts from the reward model already predicts the scores; one that starts with a random head
        spends the first updates learning the mean, and its random values push the policy about meanwhile. A critic
        tied to the embedding changes its values whenever the embedding trains.

    What it looks like when broken:
        "newly initialized: score" for the critic in a run that meant to load it; a value loss that jumps at a restart;
        values that look like the logit of one token.

    How to fix:
        1. Load the critic from the reward model's checkpoint with the same class; across classes check the head's name
           (GPT-2 and GPT-NeoX call it classifier in one class and score in the other).
        2. Save the critic too, when a run is to be resumed.
        3. Give the critic a linear layer of its own (tie_word_embeddings concerns language models only).
        4. If a fresh head is what you want, say value_init = "fresh", and let the critic warm up before the policy
        moves.

    Source:
        Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, and Ouyang et al. 2022,
        https://arxiv.org/abs/2203.02155 (the value function starts from the reward model);
        https://github.com/hiyouga/LlamaFactory/issues/4135 (lost at a restart),
        https://github.com/radixark/miles/pull/2878 (tied), https://github.com/THUDM/slime/pull/2259 (loose loading),
        https://github.com/Jiayi-Pan/TinyZero/issues/90 (a fresh head, normal).
        Cosines of unrelated matrices lie within 0.1 of 0; training moves them by thousandths: 0.9 is between.
    """
    declared = str(setup.declared.get("value_init") or "").lower()
    m = value_manifest
    problem = None if declared in FRESH else renamed_head(m) or absent_head(m)
    if problem is None and declared not in FRESH and value_loading is not None:
        lost = new_heads(value_loading, m)
        if lost:
            problem = (
                "does not restore its head",
                Evidence("heads that loading had to make up", "none", ", ".join(lost), where=m.path or ""),
            )
    if problem is not None:
        said = f"value_init is {declared!r}" if declared else "no value_init says that a fresh one is meant"
        yield _finding(
            f"The critic's checkpoint {problem[0]}, so its head starts random; {said}. It should hold the head to "
            "start from.",
            problem[1],
        )
    elif declared in FRESH and (new := renamed_head(m) or absent_head(m)):
        yield _finding(
            f"The critic's checkpoint {new[0]}, so its head starts random, as value_init={declared!r} says: that is "
            "normal. Let the critic warm up before the policy moves.",
            new[1],
            Severity.INFO,
        )
    tied = value_variation.projection.tied_to if value_variation and value_variation.projection else ""
    if tied and m.head("scalar") is None:
        yield _finding(
            "The critic's output is computed with the token embedding's own weight: it is a language model's head in "
            "another place. It should have a linear layer of one output of its own.",
            Evidence("memory of the last projection's weight", "its own", f"shared with the embedding {tied!r}"),
        )
    if reward_stored_head is not None and reward_stored_head.replaced:
        return  # the reward's own head is new: REW003's
    source = {"reward": reward_fingerprint, "policy": policy_fingerprint}.get(declared)
    if source is not None and value_fingerprint is not None and problem is None:
        yield from _origin(declared, value_fingerprint, source)


def _origin(declared: str, value: Fingerprint, source: Fingerprint) -> Iterator[Finding]:
    body = likeness(value, source)
    if body is None:
        return  # other shapes: SYS004's
    if body < SAME_BODY:
        yield _finding(
            f"The critic was not started from the {declared} model, as value_init declares: their matrices have "
            f"nothing in common. It should hold the {declared} model's weights, or value_init should say what is "
            "meant.",
            Evidence(
                f"median cosine between the critic's and the {declared} model's matrices",
                expected="1",
                observed=f"{body:.3f}",
                tolerance=f"{SAME_BODY}",
            ),
        )
        return
    if declared != "reward" or not any(source.head) or len(source.head) != len(value.head):
        return
    head = cosine(value.head, source.head)
    if head < SAME_HEAD and any(value.head):
        yield _finding(
            "The critic has the reward model's body and another head, although value_init declares the reward: the "
            "head was made anew. It should be the reward model's, so that V starts as the expected score.",
            Evidence(
                f"cosine between {value.head_name} and the reward's {source.head_name}",
                expected="1",
                observed=f"{head:.3f}",
                tolerance=f"{SAME_HEAD}",
            ),
        )


def _finding(message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role="value", severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


@value_head_random.fault("the checkpoint lacks its head")
def _(healthy_files: Any) -> Any:
    from rlhf_doctor.selftest.folders import rewrite_tensors

    def change(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith("score.")]:
            tensors.pop(name)

    rewrite_tensors(healthy_files.path("value"), change)
    return healthy_files


@value_head_random.fault("the head is random although the reward's is declared")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers

    return healthy.but(value=scorers.with_new_head(healthy.value), declared={"value_init": "reward"})


@value_head_random.fault("nothing of the declared reward model is in the critic")
def _(healthy: Any) -> Any:
    import copy

    import torch

    value = copy.deepcopy(healthy.value)
    generator = torch.Generator().manual_seed(5)
    for parameter in value.base_model.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return healthy.but(value=value, declared={"value_init": "reward"})


@value_head_random.fault("values are the first logit of a language model with tied embeddings")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import scorers, specimens

    return healthy.but(value=scorers.TiedCritic(specimens.vocabulary(healthy)), declared={"value_init": "policy"})

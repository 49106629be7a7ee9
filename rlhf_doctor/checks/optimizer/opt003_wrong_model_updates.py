"""OPT003: a step changes only what the optimizers train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.tracing import Traced

TRAINED: tuple[Role, ...] = ("policy", "value")


@check(
    "OPT003",
    "a step changes only what the optimizers train",
    stage=Stage.TRACE,
    severity=Severity.ERROR,
    after=("SYS003", "REF003", "REW008"),
    explains=("REF002", "SYS008", "REF005"),
    across_roles=True,
)
def wrong_model_updates(traced: Traced, setup: Any) -> Iterator[Finding]:
    """
    What it examines:
        Every parameter of the four models, bit by bit, before and after two steps: reference and reward model must be
        as they were, and so must parameters that require no gradient. Then before and after a step whose optimizers
        are held back: whatever changes now was changed by a pass that only generates or scores. And what one update
        has left is where the next one must begin: a head that is at its first numbers again was put back.

    Why it matters:
        A reference that follows the policy makes the KL penalty an empty word. A reward model that changes moves the
        goal. Weights that are merged, unmerged, cast or perturbed for generation drift by rounding, unnoticed by any
        loss.

    What it looks like when broken:
        A KL that stays small while the texts change; scores of one and the same text that differ between steps; a base
        model that is another one after training an adapter.

    How to fix:
        1. Never load the policy's weights into the reference, and give the optimizer no parameter of it.
        2. Merge an adapter into a copy, or keep the base's weights and put them back, rather than add and subtract.
        3. Cast a copy for generation; casting to bfloat16 and back rounds the weights themselves.
        4. Write what scales scores into the loop, not into the reward model's head.
        5. A head that is swapped for scoring: save the current one before, and load that one after.

    Source:
        https://github.com/huggingface/trl/pull/982 (reward adapter that trains along) and
        https://github.com/deepspeedai/DeepSpeed/issues/3363 (base weights that train beside an adapter);
        https://github.com/hiyouga/ChatGLM-Efficient-Tuning/issues/255 (a head that is put back after each scoring). A
        critic's head that is multiplied by one number is none: https://arxiv.org/abs/1602.07714 (PopArt).
    """
    found = traced.experiments
    if traced.watched or found.real is None or not found.real.moved:
        raise Unavailable("needs a step that changes something" if found.real else "needs a step that can be repeated")
    moved, held = found.real.moved, found.first.moved
    policy = _owners(setup.policy)
    for role in MODEL_ROLES:
        if role == "value" and setup.value is setup.policy:
            continue  # one module, and the policy's finding says it
        names = dict(moved.get(role, {}))
        if role in TRAINED:
            frozen = {n for n, p in _owners(getattr(setup, role)).items() if not p.requires_grad}
            names = {n: size for n, size in names.items() if n in frozen}
        else:
            trained = {id(p) for p in policy.values()}
            own = _owners(getattr(setup, role))
            names = {n: size for n, size in names.items() if n in own and id(own[n]) not in trained}
        if names:
            base = role == "policy" and setup.reference == "adapter-off"
            said = "The policy's base, which is the reference with the adapter off," if base else _said(role)
            yield _finding("reference" if base else role, f"{said} has changed", "two whole steps", names)
        elif role == "value" and role in held and not found.first.written:
            continue  # PopArt keeps what the values mean where the targets' scale moves
        elif role in TRAINED and role in held and any(role in roles for _, _, roles in found.first.steps):
            yield _finding(
                role,
                f"{_said(role)} changes although no optimizer step is made: generating or scoring writes into it",
                "a step with its optimizers held back",
                held[role],
            )
        elif role in TRAINED and (count := found.real.put_back(role)):
            yield _put_back(role, count)


def _owners(model: Any) -> Mapping[str, Any]:
    return dict(model.named_parameters()) if hasattr(model, "named_parameters") else {}


def _said(role: Role) -> str:
    return {"policy": "The policy", "reference": "The reference", "reward": "The reward model", "value": "The critic"}[
        role
    ]


def _put_back(role: Role, count: int) -> Finding:
    return Finding(
        f"{_said(role)} is put back: updates begin at the very weights of the start although earlier ones had left "
        "them, in its head or elsewhere. Whatever swaps weights in to score or to generate must put back those that it "
        "found, not those that it knew first.",
        role=role,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "watched parameters that are at their first numbers again when a later update begins",
                expected="0",
                observed=f"{count}",
                tolerance="bit for bit",
                where="between one update's end and the next one's start, in two whole steps",
            ),
        ),
    )


def _finding(role: Role, said: str, after: str, names: Mapping[str, float]) -> Finding:
    size = max((x for x in names.values() if x < float("inf")), default=1.0)
    few = ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Finding(
        f"{said}, in {len(names)} parameters, by up to {size:.1e} of their size. It should be bit for "
        "bit what it was: find what writes into it, and let that work on a copy.",
        role=role,
        confidence=Confidence.PROVEN,
        evidence=(
            Evidence(
                "parameters that should stay and are other than before",
                expected="0",
                observed=f"{len(names)}, by up to {size:.1e} of the largest entry",
                tolerance="bit for bit",
                where=f"{few}, after {after}",
                reproduce=f"before = [p.clone() for p in {role}.parameters()]; step(); compare",
            ),
        ),
    )


@wrong_model_updates.fault("the reference follows the policy")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.after_step(healthy, loss_faults.follow_the_policy)


@wrong_model_updates.fault("the reward model's head is rescaled by its scores")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.after_step(healthy, loss_faults.rescale_the_reward)


@wrong_model_updates.fault("the policy is cast to bfloat16 and back for generation")
def _(healthy: Any) -> Any:
    from rlhf_doctor.selftest import loss_faults

    return loss_faults.reference_step(
        healthy, policy=loss_faults.copied(healthy.policy), parts={"sample": loss_faults.sample_in_bfloat16}
    )

"""CFG005: a resumed run goes on where it stopped, in all its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.facts import Unavailable
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.algorithms import algorithm_kind
from rlhf_doctor.instruments.moments import ForeignMoments
from rlhf_doctor.instruments.readings import Manifest
from rlhf_doctor.instruments.run_state import RunState


@check(
    "CFG005",
    "a resumed run goes on in all its parts",
    stage=Stage.STATIC,
    severity=Severity.WARNING,
    explains=("VAL007", "ROL008"),
)
def checkpoint_or_resume_trap(
    setup: Any,
    manifest: Mapping[Role, Manifest],
    run_state: Mapping[Role, RunState] | None = None,
    foreign_moments: ForeignMoments | None = None,
) -> Iterator[Finding]:
    """
    What it examines:
        Whether the policy's folder is a checkpoint of an RL run (trainer_state.json with RL columns and a step above
        0), and then where the others come from: a reference in the same folder, or in a later checkpoint of the run; a
        critic that is the reward model's checkpoint again; a best checkpoint that was chosen by its loss. With the
        models and optimizers in memory: whether the critic's optimizer has steps behind it, two at least, while every
        matrix that it holds is still bit for bit the reward model's (or the reference's, or the policy's).

    Why it matters:
        The reference must stay the model from before RL: taken from the resumed checkpoint, KL starts at 0 again and
        every resume grants the policy a new budget to drift. Most trainers save the policy and drop the critic, so a
        resumed run values a trained policy with an untrained critic. A new run that loads the optimizer of another one
        scales its first updates by stale moments and may start in the middle of a schedule.

    What it looks like when broken:
        KL falls to 0 at the resume; the value loss jumps and the explained variance drops there.

    How to fix:
        1. Pass the SFT checkpoint as reference in every run, the resumed one included.
        2. Save critic and optimizer with the policy, and load them; else give the critic a warm-up.
        3. Start a new run with a new optimizer and schedule, whatever its models are loaded from.
        4. Choose the best checkpoint by reward or by evaluation, not by the surrogate loss.

    Source:
        https://github.com/NVIDIA-NeMo/RL/pull/3722 (reference re-anchored);
        https://github.com/huggingface/trl/issues/3293 and https://github.com/hiyouga/LlamaFactory/issues/4135 (critic
        dropped); https://github.com/modelscope/ms-swift/issues/9730 (best checkpoint by loss);
        https://github.com/NVIDIA-NeMo/RL/pull/4213 (moments of another run).
    """
    if run_state is None and foreign_moments is None:
        raise Unavailable("needs the trainer_state.json of a run in a role's folder, or the critic's optimizer")
    if foreign_moments is not None and foreign_moments.source is not None:
        yield _moments(foreign_moments, foreign_moments.source)
    policy = run_state.get("policy") if run_state else None
    reference = run_state.get("reference") if run_state else None
    if reference is not None and reference.rl and reference.step > 0:
        same = policy is not None and policy.path == reference.path
        yield _finding(
            "reference",
            f"The reference is {'the same' if same else 'a'} checkpoint of an RL run, at step {reference.step}"
            f"{', that the policy resumes from' if same else ''}: KL starts at 0 again and the policy may drift "
            "further. Use the model from before RL.",
            Evidence("RL steps behind the reference", "0", str(reference.step), where=str(reference.path)),
        )
    if policy is None or not policy.rl or policy.step < 1:
        return
    value, reward = setup.path("value"), setup.path("reward")
    restarted = value is not None and reward is not None and value.resolve() == reward.resolve()
    kept = manifest["policy"].head("scalar") is not None if "policy" in manifest else False
    if restarted and not kept and algorithm_kind(setup.declared) != "critic-free":
        yield _finding(
            "value",
            f"The policy resumes at RL step {policy.step} and the critic starts again from the reward model. Load the "
            "critic of that step, or warm it up before the policy trains.",
            Evidence("RL steps behind the critic", str(policy.step), "0", where=str(value)),
        )
    if policy.chosen_by_loss:
        yield _finding(
            "loop",
            "The best checkpoint of this RL run is chosen by its loss, which says nothing about quality in RL. Choose "
            "it by reward or evaluation.",
            Evidence("metric of the best checkpoint", "a reward", f"loss {policy.best_metric}", where=str(policy.path)),
            Severity.INFO,
        )


def _moments(found: ForeignMoments, source: Role) -> Finding:
    return _finding(
        "value",
        f"The critic's optimizer has {found.steps} steps behind it and the critic is still the {spoken(source)}, bit "
        "for bit: those are the moments of another run. Start with a new optimizer and schedule, or load the critic "
        "that belongs to them.",
        Evidence(
            "steps behind a critic that has not moved",
            "0",
            str(found.steps),
            where=f"{found.matrices} matrices that the optimizer holds",
        ),
    )


def _finding(role: Role, message: str, evidence: Evidence, severity: Severity | None = None) -> Finding:
    return Finding(message, role=role, severity=severity, confidence=Confidence.PROVEN, evidence=(evidence,))


def _resumed(healthy_files: Any) -> Any:
    import json

    state = {"global_step": 300, "log_history": [{"step": 300, "objective/kl": 4.2, "loss/policy_avg": -0.01}]}
    (healthy_files.path("policy") / "trainer_state.json").write_text(json.dumps(state))
    return healthy_files


@checkpoint_or_resume_trap.fault("the reference is the checkpoint that the policy resumes from")
def _(healthy_files: Any) -> Any:
    return _resumed(healthy_files).but(reference=healthy_files.path("policy"))


@checkpoint_or_resume_trap.fault("a resumed policy with a critic that starts again")
def _(healthy_files: Any) -> Any:
    return _resumed(healthy_files).but(value=healthy_files.path("reward"))


@checkpoint_or_resume_trap.fault("a new critic with the moments of another run")
def _(healthy: Any) -> Any:
    import torch

    optimizer = torch.optim.Adam(healthy.value.parameters(), lr=1e-5)
    for parameter in healthy.value.parameters():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(300.0), **moments}
    return healthy.but(optimizers=(*healthy.optimizers[:1], optimizer), step=None)

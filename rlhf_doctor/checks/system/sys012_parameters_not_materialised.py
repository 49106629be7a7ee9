"""SYS012: every weight is in memory before the first forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_doctor.check import check
from rlhf_doctor.checks.roles_said import spoken
from rlhf_doctor.finding import Confidence, Evidence, Finding, Role, Severity, Stage
from rlhf_doctor.instruments.materials import Materials


@check(
    "SYS012",
    "every weight is in memory before the first forward pass",
    stage=Stage.PROBE,
    severity=Severity.ERROR,
    explains=("PRE004", "SYS007"),
    across_roles=True,
)
def parameters_not_materialised(materials: Mapping[Role, Materials]) -> Iterator[Finding]:
    """
    What it examines:
        Every parameter of every model as it is when the loop would call it first: on the meta device, of size 0
        (sharded away and not gathered), lazily shaped, or a body in which at least half of the weight matrices hold
        one single number. Heads and adapters may start at zero and are left out.

    Why it matters:
        Loading in steps (meta device, then weights; shard, then gather) leaves gaps when one step is forgotten for
        one of four models. An empty tensor raises; memory that nobody wrote to does not.

    What it looks like when broken:
        "Cannot copy out of meta tensor", a size mismatch with 0, or a reference whose distribution is flat from the
        first step on.

    How to fix:
        1. Load the model's weights after it was built on the meta device (from_pretrained does both).
        2. Gather sharded parameters around every forward pass, also those of reference and reward.
        3. Call a lazily shaped module once, before its optimizer is made.

    Source:
        PyTorch on the meta device: https://docs.pytorch.org/docs/stable/meta.html; on lazily initialised modules:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.modules.lazy.LazyModuleMixin.html; DeepSpeed on
        gathering partitioned parameters: https://deepspeed.readthedocs.io/en/latest/zero3.html. That half of the
        matrices are constant is beyond any known initialisation, which breaks symmetry in all but output layers.
    """
    for role, found in materials.items():
        if found.absent:
            why = ", ".join(f"{count} {word}" for word, count in Counter(found.absent.values()).items())
            yield Finding(
                f"Parameters of the {spoken(role)} are not in memory: {why}. "
                "Load or gather them before the first forward.",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence("parameters that are not there", "0", str(len(found.absent)), where=_listed(found.absent)),
                ),
            )
        elif found.matrices and 2 * len(found.constant) >= found.matrices:
            yield Finding(
                f"{len(found.constant)} of the {spoken(role)}'s {found.matrices} weight matrices hold one single "
                "number: they were never initialised or loaded. Load the checkpoint into them.",
                role=role,
                confidence=Confidence.PROVEN,
                evidence=(
                    Evidence("constant weight matrices", "0", str(len(found.constant)), where=_listed(found.constant)),
                ),
            )


def _listed(names: Any) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (" …" if len(shown) > 4 else "")


@parameters_not_materialised.fault("a reward model on the meta device")
def _(healthy: Any) -> Any:
    import copy

    return healthy.but(reward=copy.deepcopy(healthy.reward).to("meta"))


@parameters_not_materialised.fault("a hand-written critic whose parameters were sharded away")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import specimens

    critic = specimens.hand_written_critic(healthy)
    for p in critic.parameters():
        p.data = torch.empty(0)
    return healthy.but(value=critic, optimizers=())


@parameters_not_materialised.fault("a reference that was never loaded")
def _(healthy: Any) -> Any:
    import copy

    import torch

    reference = copy.deepcopy(healthy.reference)
    for p in reference.parameters():
        torch.nn.init.zeros_(p)
    return healthy.but(reference=reference)


@parameters_not_materialised.fault("a critic whose head has no shape yet")
def _(healthy: Any) -> Any:
    import torch

    from rlhf_doctor.selftest import specimens

    critic = specimens.hand_written_critic(healthy)
    critic.out = torch.nn.LazyLinear(1)
    return healthy.but(value=critic, optimizers=())

"""Whatever happens in a step, everything is bit for bit what it was afterwards."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from rlhf_doctor.examine import Options
from rlhf_doctor.facts import Broken
from rlhf_doctor.instruments.tracing import traced
from rlhf_doctor.setups import RLHFSetup

STYLES = ("joined_v_head", "micro_batches", "backbone_direct", "lora_adapter_off", "right_padded_sums", "plain_modules")


class Crash(RuntimeError):
    """A step's own error."""


def fingerprint(setup: RLHFSetup) -> dict[str, Any]:
    """Parameters, buffers, gradients, flags, hooks, optimizers, generators, all by their bits."""
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [x.tobytes() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "step": torch.optim.Adam.step,
    }
    for role in setup.present:
        module = setup.model(role)
        if not isinstance(module, torch.nn.Module):
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            gradient = None if tensor.grad is None else bits(tensor.grad)
            found[f"{role} {name}"] = (id(tensor), bits(tensor), gradient, tensor.requires_grad)
        found[f"{role} flags"] = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in module.modules()
        ]
    for i, optimizer in enumerate(setup.optimizers):
        if isinstance(optimizer, torch.optim.Optimizer):
            found[f"optimizer {i}"] = [
                {k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for s in optimizer.state.values()
            ]
            found[f"groups {i}"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            found[f"vars {i}"] = sorted(vars(optimizer))
    return found


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's own bytes."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@contextmanager
def raising(setup: RLHFSetup, at: int, error: BaseException) -> Iterator[None]:
    """The ``at``-th forward of any of the setup's models from now on raises."""
    left = [at]

    def hook(module: Any, args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def loops() -> Callable[[str], RLHFSetup]:
    """Loops that have made a step already, so that optimizers have moments and parameters gradients."""
    made: dict[str, RLHFSetup] = {}

    def loop(style: str) -> RLHFSetup:
        if style not in made:
            setup = RLHFSetup.from_mapping(importlib.import_module(f"loops.{style}").build())
            assert setup.step is not None
            setup.step()
            made[style] = setup
        return made[style]

    return loop


@pytest.mark.parametrize("style", STYLES)
def test_an_examination_changes_nothing(style: str, loops: Callable[[str], RLHFSetup]) -> None:
    setup = loops(style)
    before = fingerprint(setup)
    traced(setup, Options())
    assert fingerprint(setup) == before


@settings(max_examples=12)
@given(
    style=st.sampled_from(STYLES),
    at=st.integers(1, 4000),
    error=st.sampled_from([Crash("in the middle"), KeyboardInterrupt(), SystemExit(3), MemoryError("no more")]),
)
def test_a_crash_at_any_point_changes_nothing(
    loops: Callable[[str], RLHFSetup], style: str, at: int, error: BaseException
) -> None:
    setup = loops(style)
    before = fingerprint(setup)
    with raising(setup, at, error), suppress(Broken, KeyboardInterrupt, SystemExit):
        traced(setup, Options())
    assert fingerprint(setup) == before


def test_two_examinations_see_the_same(loops: Callable[[str], RLHFSetup]) -> None:
    """The loop's own counters and generators are put back too."""
    setup = loops("backbone_direct")
    one, two = (traced(setup, Options()) for _ in range(2))
    assert (one.base.tokens == two.base.tokens).all()
    assert np.array_equal(one.base["weight"], two.base["weight"], equal_nan=True)


def test_the_loops_own_counters_are_put_back() -> None:
    """Closures, instances, iterators and generators that a step moves on."""
    parts = iter(range(100))
    generator = torch.Generator().manual_seed(3)
    numbers = np.random.default_rng(1)
    counted = {"steps": 0, "seen": []}

    class Loop:
        def __init__(self) -> None:
            self.calls = 0
            self.average = torch.zeros(2)

        def step(self) -> tuple[Any, ...]:
            self.calls += 1
            self.average.mul_(0.9).add_(1)
            counted["steps"] += 1
            counted["seen"].append(self.calls)
            return next(parts), torch.rand(1, generator=generator).item(), numbers.random(), random.random()

    from rlhf_doctor.trace.keep import Snapshot, run_kept

    loop = Loop()
    setup = RLHFSetup(policy=torch.nn.Linear(2, 2), step=loop.step)
    snapshot = Snapshot(setup)
    seen = []
    for _ in range(2):
        with run_kept(snapshot):
            seen.append(loop.step())
    assert seen[0] == seen[1]
    assert loop.calls == 0
    assert counted == {"steps": 0, "seen": []}
    assert loop.average.tolist() == [0, 0]


def test_attributes_that_raise_other_errors_are_left_alone() -> None:
    """Dicts whose keys are attributes often raise a KeyError for one that is not there."""

    class Batch(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    from rlhf_doctor.trace.keep import Snapshot, run_kept

    kept = Batch(seen=[1])

    def step() -> None:
        kept.seen.append(2)

    with run_kept(Snapshot(RLHFSetup(policy=torch.nn.Linear(2, 2), step=step))):
        step()
    assert kept == {"seen": [1]}


def test_autocast_is_off_inside_and_on_again_afterwards() -> None:
    from rlhf_doctor.trace.keep import without_autocast

    x, region = torch.ones(2, 2), torch.autocast("cpu", dtype=torch.bfloat16)
    with without_autocast(), region:
        assert (x @ x).dtype == torch.float32
    with region:
        assert (x @ x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")

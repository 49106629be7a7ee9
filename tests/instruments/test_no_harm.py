"""After any examination the user's objects are bit for bit what they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.selftest import specimens


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that an examination might disturb."""
    return {
        "bits": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "same": {name: tensor.data_ptr() for name, tensor in [*module.named_parameters(), *module.named_buffers()]},
        "grads": {name: (id(p.grad), p.grad.clone()) for name, p in module.named_parameters() if p.grad is not None},
        "needs": {name: p.requires_grad for name, p in module.named_parameters()},
        "modes": {name: child.training for name, child in module.named_modules()},
        "hooks": {
            name: [len(h) for h in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)]
            for name, child in module.named_modules()
        },
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in before["bits"].items():
        assert torch.equal(tensor, after["bits"][name]), name
    for name, (identity, gradient) in before["grads"].items():
        assert after["grads"][name][0] == identity
        assert torch.equal(gradient, after["grads"][name][1])
    for key in ("same", "needs", "modes", "hooks"):
        assert before[key] == after[key]
    assert before["grads"].keys() == after["grads"].keys()


class Restless(nn.Module):
    """A critic that counts its calls in a buffer, keeps batch statistics, draws numbers, and may raise or exit."""

    def __init__(self, *, raises_at: int | None, kind: type[BaseException]) -> None:
        super().__init__()
        self.emb = nn.Embedding(zoo.VOCAB, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.raises_at = raises_at
        self.kind = kind
        self.seen = 0

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.calls += 1
        random.random()
        np.random.rand()
        if self.raises_at is not None and self.seen >= self.raises_at:
            raise self.kind("stop here")
        x = self.norm(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.drop(x))[..., 0]  # type: ignore[no-any-return]


@settings(max_examples=15, deadline=None)
@given(
    training=st.booleans(),
    raises_at=st.none() | st.integers(1, 14),
    kind=st.sampled_from([RuntimeError, ValueError, SystemExit, MemoryError]),
    seed=st.integers(0, 3),
)
def test_models_and_generators_are_restored(
    training: bool, raises_at: int | None, kind: type[BaseException], seed: int
) -> None:
    policy = zoo.decoder("llama").train(training)
    policy.lm_head.weight.grad = torch.ones_like(policy.lm_head.weight)
    critic = Restless(raises_at=raises_at, kind=kind).train(training)
    critic.drop.eval()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    before = state_of(policy), state_of(critic)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    examine(RLHFSetup(policy=policy, value=critic, tokenizer=zoo.tokenizer()))
    assert_same(before[0], state_of(policy))
    assert_same(before[1], state_of(critic))
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    assert np.array_equal(generators[2], np.random.get_state()[1])


def test_an_interrupt_leaves_everything_as_it_was() -> None:
    critic = Restless(raises_at=3, kind=KeyboardInterrupt).train()
    before = state_of(critic)
    with pytest.raises(KeyboardInterrupt):
        examine(RLHFSetup(value=critic, tokenizer=zoo.tokenizer()))
    assert_same(before, state_of(critic))


def test_one_role_that_raises_leaves_the_others_examined() -> None:
    setup = RLHFSetup(
        policy=zoo.decoder("llama"),
        reward=specimens.ConvolutionalScorer(zoo.VOCAB),
        value=Restless(raises_at=1, kind=RuntimeError),
        tokenizer=zoo.tokenizer(),
    )
    examination = examine(setup)
    assert [role for role, _ in examination.errors] == ["value"]
    assert examination.shown["policy_architecture"].kind == "transformer decoder"
    assert examination.shown["reward_architecture"].kind == "convolutional"

"""A call that cannot be guessed is learnt from the loop itself, and the loop's effects are undone."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import nn

from rlhf_doctor import RLHFSetup, examine


class Peculiar(nn.Module):
    """forward(scale, places, visible, words): nobody would guess it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(zoo.VOCAB, 16), nn.Embedding(64, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, width)

    def forward(self, scale: float, words: torch.Tensor, places: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        if not isinstance(scale, float) or visible.dtype != torch.bool:
            raise TypeError("scale, words, places, visible")
        q, k, v = self.qkv(self.emb(words) * scale + self.pos(places)).chunk(3, -1)
        length = words.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & visible[:, None, :]
        allowed = allowed | torch.eye(length, dtype=torch.bool)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed))  # type: ignore[no-any-return]


class Counter:
    """Loop state without state_dict."""

    def __init__(self) -> None:
        self.steps = 0


def build() -> tuple[RLHFSetup, dict[str, Any]]:
    torch.manual_seed(0)
    policy, value, count = Peculiar(zoo.VOCAB), Peculiar(1), Counter()
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-3)

    def step() -> None:
        count.steps += 1
        words = torch.randint(4, zoo.VOCAB, (2, 6))
        places, visible = torch.arange(6).expand(2, 6) + 1, torch.ones(2, 6, dtype=torch.bool)
        for model in (policy, value):
            loss = model(1.5, words, places, visible).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    setup = RLHFSetup(
        policy=policy, value=value, tokenizer=zoo.tokenizer(), step=step, optimizers=[optimizer], state=[count]
    )
    return setup, {"count": count, "optimizer": optimizer}


def test_the_call_is_learnt_from_the_step() -> None:
    setup, _ = build()
    examination = examine(setup)
    assert not examination.errors
    for role in ("policy", "value"):
        assert examination.shown[f"{role}_architecture"].is_decoder
        assert "as its step does" in examination.shown[f"{role}_output"].call
    assert examination.shown["value_output"].kind == "scalar per token"


def test_the_steps_effects_are_undone() -> None:
    setup, loop = build()
    setup.step()  # type: ignore[misc]  # it is one
    weights = {n: p.clone() for n, p in setup.policy.named_parameters()}
    moments = {k: v["exp_avg"].clone() for k, v in loop["optimizer"].state_dict()["state"].items()}
    generator = torch.get_rng_state()
    examine(setup)
    assert all(torch.equal(p, weights[n]) for n, p in setup.policy.named_parameters())
    after = loop["optimizer"].state_dict()["state"]
    assert all(torch.equal(moments[k], after[k]["exp_avg"]) for k in moments)
    assert loop["count"].steps == 1
    assert torch.equal(generator, torch.get_rng_state())


def test_without_a_step_the_role_is_named() -> None:
    setup, _ = build()
    examination = examine(setup.but(step=None))
    assert {role for role, _ in examination.errors} == {"policy", "value"}

"""The loops of TRL, of an adapter, of packed rows, of plain modules and of groups run, and healthy they are right.

What is right is written out here once more, row by row and without padding: log-probabilities, the return as a mixture
of n-step returns, advantages as a sum of errors, the loss, and its gradient at every update of a step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

NAMES = ["lora_adapter_off", "right_padded_sums", "plain_modules", "grpo_groups"]
HAS_TRL = importlib.util.find_spec("trl") is not None and importlib.util.find_spec("trl.experimental") is not None
WITH_TRL = [*NAMES, "trl_ppo"] if HAS_TRL else NAMES
EOS = {"lora_adapter_off": 2, "right_padded_sums": 1, "plain_modules": 1, "grpo_groups": 1}
MAX_NORM = {"lora_adapter_off": 1.0}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's and PEFT's, of transformers


def loop(name: str) -> ModuleType:
    return importlib.import_module(f"loops.{name}")


@pytest.fixture(autouse=True)
def _one_thread_and_own_generator() -> Iterator[None]:
    threads, numpys = torch.get_num_threads(), np.random.get_state()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    np.random.set_state(numpys)
    torch.set_num_threads(threads)


def parameters(setup: dict[str, Any]) -> Tensor:
    models = [setup[role] for role in ("policy", "reference", "reward", "value")]
    return torch.cat([p.detach().flatten() for m in models if hasattr(m, "parameters") for p in m.parameters()])


def after(name: str, fault: str | None, steps: int, **options: Any) -> Tensor:
    setup = loop(name).build(fault, **options)
    torch.manual_seed(5)
    np.random.seed(5)  # TRL shuffles with it
    for _ in range(steps):
        setup["step"]()
    return parameters(setup)


@functools.cache
def healthy_after(name: str, epochs: int, **options: Any) -> Tensor:
    assert epochs == loop(name).EPOCHS
    return after(name, None, 2, **options)


def faults(names: list[str]) -> list[tuple[str, str]]:
    return [(name, fault) for name in names for fault in loop(name).FAULTS]


@pytest.mark.skipif(HAS_TRL, reason="TRL is here")
def test_trl_is_absent_so_its_loop_is_skipped() -> None:
    pytest.skip("trl is not installed")


@pytest.mark.parametrize("name", WITH_TRL)
def test_every_fault_names_a_code_and_a_role(name: str) -> None:
    module = loop(name)
    for code, role in module.FAULTS.values():
        assert len(code) == 6
        assert role in {"policy", "reference", "reward", "value", "loop", "setup"}
    assert {*module.ALSO, *module.EDGE, *module.NOT_FINITE} <= {*module.FAULTS}
    with pytest.raises(ValueError, match="unknown fault"):
        module.build("no_such_fault")


@pytest.mark.parametrize("name", WITH_TRL)
def test_healthy_steps_are_finite_and_repeatable(name: str) -> None:
    once = after(name, None, 2)
    assert torch.isfinite(once).all()
    assert torch.equal(once, healthy_after(name, 2))
    assert not torch.equal(once, parameters(loop(name).build()))


@pytest.mark.parametrize(("name", "fault"), faults(WITH_TRL))
def test_a_faulty_loop_runs_and_differs(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = loop(name)
    if fault in module.NOT_FINITE:
        assert not torch.isfinite(after(name, fault, 1)).all()
        return
    epochs = 2 if module.FAULTS[fault][0] in {"LOS002", "OPT006", "ROL008"} else 1  # one epoch takes half the time
    monkeypatch.setattr(module, "EPOCHS", epochs)
    options = {"reward": "texts"} if fault.startswith("text_") else {}
    bad = after(name, fault, 2)
    assert torch.isfinite(bad).all()
    if fault not in module.EDGE and module.FAULTS[fault][0] != "SYS009":
        assert not torch.allclose(bad, healthy_after(name, epochs, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WITH_TRL)
def test_building_is_repeatable_and_leaves_the_generator_alone(name: str) -> None:
    torch.manual_seed(9)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = loop(name).build(), loop(name).build()
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()
    assert torch.equal(parameters(first), parameters(second))


def ids_of_two_runs(setup: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same step twice from the same state, as far as the setup names it."""
    kept = [x for x in (setup["policy"], *setup["state"]) if hasattr(x, "state_dict")]
    saved = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in x.state_dict().items()} for x in kept]
    seen = []
    for _ in range(2):
        for x, state in zip(kept, saved, strict=True):
            x.load_state_dict(state)
        torch.manual_seed(2)
        seen.append(setup["step"]()["ids"])
    return seen[0], seen[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_function_of_the_named_state(name: str) -> None:
    assert torch.equal(*ids_of_two_runs(loop(name).build()))


@pytest.mark.parametrize(("name", "fault"), [(n, f) for n, f in faults(NAMES) if loop(n).FAULTS[f][0] == "SYS009"])
def test_a_step_with_hidden_state_is_not(name: str, fault: str) -> None:
    one, other = ids_of_two_runs(loop(name).build(fault))
    assert one.shape != other.shape or not torch.equal(one, other)


# ---- PPO, written out ------------------------------------------------------------------------------------------------


class Row:
    """One response, its prompt, and what the models say of them without any padding."""

    def __init__(self, name: str, setup: dict[str, Any], got: dict[str, Any], row: int) -> None:
        if name == "right_padded_sums":
            self.prompt = got["ids"][row, : got["starts"][row]]
            said = got["ids"][row, got["starts"][row] :]
        else:
            width = got["responses"].shape[1]
            self.prompt = got["ids"][row, :-width][got["attention"][row, :-width].bool()]
            said = got["ids"][row, -width:]
        ends = (said == EOS[name]).nonzero()
        self.ended = len(ends) > 0
        self.setup, self.d = setup, setup["declared"]
        self.said = said[: int(ends[0]) + 1 if self.ended else self.d["response_length"]]
        self.text = torch.cat([self.prompt, self.said])[None]
        self.names = ("ids", "mask") if name == "plain_modules" else ("input_ids", "attention_mask")

    def call(self, model: Any) -> Tensor:
        out = model(**dict(zip(self.names, (self.text, torch.ones_like(self.text)), strict=True)))
        return getattr(out, "logits", out)

    def log_p(self, role: str = "policy") -> Tensor:
        """(T, V): the distribution each token of the response was drawn from."""
        model, off = self.setup[role], contextlib.nullcontext()
        if isinstance(model, str):
            model, off = self.setup["policy"], self.setup["policy"].disable_adapter()
        with off:
            logits = self.call(model)[0, len(self.prompt) - 1 : -1]
        return (logits / self.d["temperature"]).log_softmax(-1)

    def picked(self, role: str = "policy") -> Tensor:
        return self.log_p(role)[torch.arange(len(self.said)), self.said]

    def values(self) -> Tensor:
        each = self.call(self.setup["value"])
        return (each[..., 0] if each.dim() == 3 else each)[0, len(self.prompt) - 1 : -1]

    def score(self) -> float:
        reward = self.setup["reward"]
        if not hasattr(reward, "parameters"):
            texts = self.setup["tokenizer"].batch_decode([self.prompt, self.said], skip_special_tokens=True)
            score = reward([texts[0]], [texts[1]])[0]
        else:
            score = self.call(reward).item()
        clip = self.d.get("reward_clip", math.inf)
        return max(-clip, min(clip, score)) - self.d.get("missing_eos_penalty", 0.0) * (not self.ended)

    def rewards(self) -> list[float]:
        beta = self.d["kl_coef"] if self.d["kl_in"] == "reward" else 0.0
        r = (-beta * (self.picked() - self.picked("reference"))).tolist()
        r[-1] += self.score()
        return r

    def returns(self) -> list[float]:
        """G_t = r_t + gamma ((1 - lambda) V_t+1 + lambda G_t+1), nothing after the last token."""
        v, r, gamma, lam = self.values().tolist(), self.rewards(), self.d["gamma"], self.d["lam"]
        g = [r[-1]]
        for t in reversed(range(len(r) - 1)):
            g.insert(0, r[t] + gamma * ((1 - lam) * v[t + 1] + lam * g[0]))
        return g

    def advantages(self) -> list[float]:
        """A_t = sum_k (gamma lambda)^k delta_t+k"""
        v, r, gamma, lam = self.values().tolist(), self.rewards(), self.d["gamma"], self.d["lam"]
        ahead = [*v[1:], 0.0]
        delta = [r[t] + gamma * ahead[t] - v[t] for t in range(len(r))]
        return [sum((gamma * lam) ** k * x for k, x in enumerate(delta[t:])) for t in range(len(r))]


def moved(name: str, **options: Any) -> dict[str, Any]:
    """A setup whose policy has left its reference, so that there is a KL."""
    setup = loop(name).build(**options)
    drawn = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in setup["policy"].parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=drawn))
    return setup


def trained(setup: dict[str, Any]) -> dict[str, Tensor]:
    models = [(role, setup[role]) for role in ("policy", "value") if setup[role] is not None]
    return {f"{role}.{n}": p for role, m in models for n, p in m.named_parameters() if p.requires_grad}


def watched(setup: dict[str, Any]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Parameters and gradients right before every update, filled while the step runs."""
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def look(*_: Any) -> None:
        here = trained(setup)
        seen.append(({k: p.detach().clone() for k, p in here.items()}, {k: p.grad.clone() for k, p in here.items()}))

    if "optimizers" in setup:
        setup["optimizers"][0].register_step_pre_hook(look)
    else:
        adam = setup["state"][0]
        step = adam.step
        adam.step = lambda: (look(), step())
    return seen


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in NAMES), ("plain_modules", {"reward": "texts"})])
def test_healthy_is_the_algorithm(name: str, options: dict[str, Any]) -> None:
    setup, twin = moved(name, **options), moved(name, **options)
    d = twin["declared"]
    updates = watched(setup)
    torch.manual_seed(3)
    got = setup["step"]()
    batch = d["batch_size"]
    rows = [Row(name, twin, got, i) for i in range(batch)]
    assert 0 < sum(r.ended for r in rows) < batch  # both kinds of ending are in it

    with torch.no_grad():
        old = [r.picked() for r in rows]
        ref = [r.picked("reference") for r in rows]
        scores = torch.tensor([r.score() for r in rows])
        if d["algorithm"] == "grpo":
            groups = [scores[i : i + d["group_size"]] for i in range(0, batch, d["group_size"])]
            flat = torch.cat([(g - g.mean()) / (g.std() + 1e-4) for g in groups])
            advantages = [a.expand(len(r.said)) for a, r in zip(flat, rows, strict=True)]
            v_old = returns = None
        else:
            v_old = [r.values() for r in rows]
            returns = [torch.tensor(r.returns()) for r in rows]
            advantages = [torch.tensor(r.advantages()) for r in rows]
            if d["whiten_advantages"]:
                together = torch.cat(advantages)
                mean = sum(together.tolist()) / len(together)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in together.tolist()) / len(together))
                advantages = [(a - mean) / deviation for a in advantages]

    # 1. the numbers of the rollout
    mask = got["mask"]
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=2e-5)
    assert mask.sum(1).tolist() == [len(r.said) for r in rows]
    close(got["old"][mask], torch.cat(old))
    close(got["ref"][mask], torch.cat(ref))
    close(got["scores"], scores)
    if returns is None:
        close(got["advantages"], flat)
    else:
        close(got["values"][mask], torch.cat(v_old))
        close(got["rewards"][mask], torch.tensor([x for r in rows for x in r.rewards()]))
        close(got["returns"][mask], torch.cat(returns))
        close(got["advantages"][mask], torch.cat(advantages))

    # 2. before the first update the ratio is 1
    first = got["updates"][0]
    close(first["ratio"][mask[first["rows"]]], torch.ones(int(mask[first["rows"]].sum())), atol=1e-5)

    # 3. each update follows the gradient of the loss, over every sample once an epoch
    assert len(updates) == len(got["updates"]) == d["ppo_epochs"] * d["num_minibatches"]
    for epoch in range(d["ppo_epochs"]):
        some = got["updates"][epoch * d["num_minibatches"] : (epoch + 1) * d["num_minibatches"]]
        assert sorted(i for u in some for i in u["rows"].tolist()) == list(range(batch))
    here = trained(twin)
    for (parameters_then, gradients), update in zip(updates, got["updates"], strict=True):
        with torch.no_grad():
            for k, p in here.items():
                p.copy_(parameters_then[k])
        per_row = []
        for i in update["rows"].tolist():
            log_p = rows[i].log_p()
            new = log_p[torch.arange(len(log_p)), rows[i].said]
            ratio, a = (new - old[i]).exp(), advantages[i]
            each = -torch.minimum(ratio * a, ratio.clamp(1 - d["clip_range"], 1 + d["clip_range"]) * a)
            if d["kl_in"] == "loss":
                x = ref[i] - new
                each = each + d["kl_coef"] * (x.exp() - 1 - x)
            each = each + d["ent_coef"] * (log_p.exp() * log_p).sum(-1)
            if v_old is not None and returns is not None:
                v, g, c = rows[i].values(), returns[i], d.get("clip_range_value", math.inf)
                near = torch.minimum(torch.maximum(v, v_old[i] - c), v_old[i] + c)
                each = each + d["vf_coef"] * 0.5 * torch.maximum((v - g) ** 2, (near - g) ** 2)
            per_row.append(each)
        loss = {
            "token-mean": lambda x: torch.cat(x).mean(),
            "seq-mean": lambda x: torch.stack([r.mean() for r in x]).mean(),
            "seq-sum": lambda x: torch.stack([r.sum() for r in x]).mean(),
        }[d["loss_aggregation"]](per_row)
        close(update["loss"], loss.detach(), atol=1e-4)
        expected = dict(zip(here, torch.autograd.grad(loss, list(here.values()), allow_unused=True), strict=True))
        expected = {k: torch.zeros_like(here[k]) if g is None else g for k, g in expected.items()}
        norm = torch.cat([g.flatten() for g in expected.values()]).norm().item()
        shrink = min(1.0, MAX_NORM.get(name, math.inf) / norm)
        for k, g in expected.items():
            close(gradients[k], g * shrink, rtol=2e-3, atol=1e-4 * max(1.0, norm * shrink))

"""What the taps keep of a call, and that a step is as it was once they are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch.overrides import _get_current_function_mode_stack

from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.trace.taps import Recorder, nearby

IDS = torch.arange(2, 26).reshape(2, 12)


def recorder(policy: Any) -> Recorder:
    return Recorder(RLHFSetup(policy=policy), temperatures=nearby(0.7))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_call_keeps_the_sums_of_its_logits(family: str, dtype: torch.dtype) -> None:
    policy = zoo.decoder(family).to(dtype)
    taps = recorder(policy)
    with taps.watching(), torch.no_grad():
        given = policy(input_ids=IDS).logits
    assert [call.role for call in taps.calls] == ["policy"]
    call, logits = taps.calls[0], given.reshape(IDS.numel(), -1).double()
    assert set(call.lse) == {*nearby(0.7), 1.0}
    for temperature, kept in call.lse.items():
        torch.testing.assert_close(kept.double(), (logits / temperature).logsumexp(-1), rtol=2e-6, atol=2e-6)
    odds = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(call.entropy.double(), -(odds * odds.log()).sum(-1), rtol=1e-5, atol=1e-5)


def test_filtered_logits_are_summed_too() -> None:
    policy = zoo.decoder("llama")
    head = policy.lm_head.forward

    def filtered(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        return logits.masked_fill(logits < logits.topk(5).values[..., -1:], -torch.inf)

    policy.lm_head.forward = filtered
    taps = recorder(policy)
    with taps.watching(), torch.no_grad():
        logits = policy(input_ids=IDS).logits.reshape(IDS.numel(), -1).double()
    odds = (logits / 0.7).softmax(-1)
    expected = -torch.special.xlogy(odds, odds).sum(-1)
    torch.testing.assert_close(taps.calls[-1].entropy.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_text_is_summed_at_other_temperatures_once() -> None:
    policy = zoo.decoder("llama")
    taps = recorder(policy)
    with taps.watching():
        with torch.no_grad():
            policy(input_ids=IDS)
        policy(input_ids=IDS[:1]).logits.sum().backward()
        policy(input_ids=IDS + 1).logits.sum().backward()
    assert [len(call.lse) for call in taps.calls] == [7, 2, 7]


def test_layers_are_not_listened_to() -> None:
    heard = []

    class Listening(Recorder):
        def __torch_function__(self, func: Any, *rest: Any) -> Any:
            heard.append(func)
            return super().__torch_function__(func, *rest)

    policy = zoo.decoder("llama")
    with Listening(RLHFSetup(policy=policy)).watching(), torch.no_grad():
        policy(input_ids=IDS)
    assert torch.nn.functional.linear in heard  # the head
    assert torch.nn.functional.scaled_dot_product_attention not in heard


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_within_a_layer_leaves_nothing_behind(error: type[BaseException]) -> None:
    policy = zoo.decoder("llama")
    inner = policy.model.layers[1].mlp

    def stopped(*args: Any) -> None:
        raise error

    inner.forward = stopped
    with pytest.raises(error), recorder(policy).watching():
        policy(input_ids=IDS)
    assert _get_current_function_mode_stack() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.modules())


def test_a_default_device_holds_within_layers() -> None:
    policy = zoo.decoder("llama")
    seen = []
    policy.model.layers[0].register_forward_hook(lambda *_: seen.append(torch.zeros(1).device.type))
    with torch.device("meta"), recorder(policy).watching(), torch.no_grad():
        policy(input_ids=IDS.to("cpu"), attention_mask=torch.ones_like(IDS), position_ids=None)
    assert seen == ["meta"]

"""Whatever a model returns, the examination ends: no check crashes, and the other roles are judged all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from foreign import plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rlhf_doctor import RLHFSetup, examine
from rlhf_doctor.finding import Errored

ROLES = ("policy", "reference", "reward", "value")
SIZES = {
    "none": lambda b, t: 0,
    "one": lambda b, t: 1,
    "two": lambda b, t: 2,
    "batch": lambda b, t: b,
    "batch and one": lambda b, t: b + 1,
    "tokens": lambda b, t: t,
    "tokens but one": lambda b, t: t - 1,
    "all tokens": lambda b, t: b * t,
    "vocabulary": lambda b, t: plain.VOCAB,
    "width": lambda b, t: plain.WIDTH,
}
FILLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as computed": lambda x: x,
    "constant": lambda x: x * 0,
    "detached": lambda x: x.detach(),
    "nan": lambda x: x * float("nan"),
    "infinite": lambda x: x / 0,
    "nan at the end": lambda x: torch.where(torch.arange(x.numel()).reshape(x.shape) == x.numel() - 1, torch.nan, x),
    "huge": lambda x: x * 1e38,
    "noise": lambda x: x + torch.rand_like(x),
    "sign": torch.sign,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)


@dataclasses.dataclass
class Held:
    logits: Any


CONTAINERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "tuple with a loss": lambda x: (x.sum(), x),
    "list": lambda x: [x, x],
    "dict": lambda x: {"out": x},
    "logits": lambda x: {"logits": x, "cache": None},
    "values": lambda x: {"values": x, "logits": x.reshape(-1)},
    "nested": lambda x: {"a": ({"scores": [x]}, None)},
    "object": Held,
    "numpy": lambda x: x.detach().resolve_conj().float().numpy() if not x.is_complex() else x.detach().numpy(),
    "plain numbers": lambda x: x.detach().reshape(-1).tolist(),
    "generator": lambda x: (row for row in (x,)),
    "empty dict": lambda x: {},
    "empty tuple": lambda x: (),
    "text": lambda x: "logits",
    "number": lambda x: 0.5,
    "none": lambda x: None,
}


class Odd(nn.Module):
    """A decoder's body whose hidden states are cut and filled up to any shape, dtype, content and container."""

    def __init__(self, shape: list[str], fill: str, dtype: torch.dtype, container: str) -> None:
        super().__init__()
        self.body = plain.Body()
        self.shape, self.fill, self.dtype, self.container = shape, fill, dtype, container

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
        sizes = [SIZES[name](*tokens.shape) for name in self.shape]
        count = 1
        for size in sizes:
            count *= size
        flat = self.body(tokens, mask).reshape(-1)
        flat = flat.repeat(count // flat.numel() + 1)[:count].reshape(sizes)
        return CONTAINERS[self.container](FILLS[self.fill](flat).to(self.dtype))


odd = st.builds(
    Odd,
    st.lists(st.sampled_from(sorted(SIZES)), max_size=4).filter(lambda s: s.count("vocabulary") < 3),
    st.sampled_from(sorted(FILLS)),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(CONTAINERS)),
)


def healthy() -> dict[str, Any]:
    return plain.CASES["all_is_well"][0]()


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(role=st.sampled_from(ROLES), model=odd)
def test_any_output_is_survived(role: str, model: Odd) -> None:
    examination = examine(RLHFSetup.from_mapping({**healthy(), role: model}))
    crashed = [o.traceback for o in examination.outcomes.values() if isinstance(o, Errored)]
    assert not crashed, f"{len(crashed)} crashed, the first: {crashed[0]}"
    for about, sentence in examination.errors:
        assert about == role, sentence
        assert "\n" not in sentence
    others = [other for other in ROLES if other != role]
    assert all(f"{other}_influence" in examination.shown for other in others)

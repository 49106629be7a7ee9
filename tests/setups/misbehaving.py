"""Setups whose code does everything that code should not do, at loading time and in a model's forward pass."""

import ctypes
import os
import signal
import sys
import time

import torch
from torch import nn

VOCAB, WIDTH = 40, 16


class Decoder(nn.Module):
    """A one-layer attention decoder: (B, T) ids -> (B, T, width), or (B,) where it pools."""

    def __init__(self, width, pool=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, width)
        self.pool = pool

    def forward(self, input_ids, attention_mask):
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        x = self.embed_tokens(input_ids) + self.places(places)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=future, need_weights=False)[0]
        if self.pool:
            last = attention_mask.shape[1] - 1 - attention_mask.flip(-1).argmax(-1)
            x = x[torch.arange(x.shape[0]), last]
        out = self.head(x)
        return out.squeeze(-1) if out.shape[-1] == 1 else out


class Misbehaving(Decoder):
    """A critic whose forward does ``act(output)`` at its end."""

    def __init__(self, act):
        super().__init__(1)
        self.act = act

    def forward(self, input_ids, attention_mask):
        return self.act(super().forward(input_ids, attention_mask))


def _raise(error):
    raise error


def _sleep(_):
    while True:
        time.sleep(1)


ACTS = {
    "raises": lambda values: _raise(ZeroDivisionError("no such state")),
    "returns_none": lambda values: None,
    "nan": lambda values: values * float("nan"),
    "wrong_batch": lambda values: values[:2],
    "absurd_memory": lambda values: values + torch.empty(10**15),
    "hangs": _sleep,
    "exits": lambda values: sys.exit(4),
    "exits_at_once": lambda values: os._exit(5),
    "interrupts": lambda values: _raise(KeyboardInterrupt()),
    "segfaults": lambda values: ctypes.string_at(0),
    "is_killed": lambda values: os.kill(os.getpid(), signal.SIGKILL),
}


def healthy():
    policy = Decoder(VOCAB)
    reference = Decoder(VOCAB).requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    reward = Decoder(1, pool=True, seed=1).requires_grad_(False)
    value = Decoder(1, seed=2)
    return {"policy": policy, "reference": reference, "reward": reward, "value": value}


def _with(act):
    return lambda: {**healthy(), "value": Misbehaving(ACTS[act])}


raises, returns_none, nan, wrong_batch = map(_with, ("raises", "returns_none", "nan", "wrong_batch"))
absurd_memory, hangs, exits, exits_at_once = map(_with, ("absurd_memory", "hangs", "exits", "exits_at_once"))
interrupts, segfaults, is_killed = map(_with, ("interrupts", "segfaults", "is_killed"))


def two_roles_exit():
    return {**healthy(), "reward": Misbehaving(ACTS["exits_at_once"]), "value": Misbehaving(ACTS["segfaults"])}


def prints_much():
    for number in range(200_000):
        print("noise", number)
        print("more noise", number, file=sys.stderr)
    return healthy()


def load_raises():
    raise RuntimeError("the data is gone")


def load_exits():
    sys.exit("bye")


def load_exits_at_once():
    print("last words before the end")
    os._exit(0)


def load_is_interrupted():
    raise KeyboardInterrupt


def load_hangs():
    while True:
        pass


def load_gives_a_list():
    return [1, 2]


def load_leaves_children():
    if os.fork() == 0:
        time.sleep(600)
    return healthy()


def load_closes_everything():
    os.closerange(0, 64)
    return healthy()


def load_asks():
    input("what is your name? ")

"""One process or many: PyTorch's own FSDP2 under `torchrun`, on CPU (gloo) or GPU (nccl), on one node or several.

Every process draws the same prompts and the same random numbers, and holds the whole batch of ids, log-probabilities
and values, which are small. Only what is large is divided: the parameters of each model, and the rows that go through
it. So statistics over the batch need no communication, and no result depends on the number of processes.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

F = TypeVar("F", bound=Callable[..., Any])


def start(device: str | None = None) -> torch.device:
    """Joins the processes that `torchrun` started, if it did; returns this one's device, a GPU where there is one."""
    kind, here = device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(here := torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return here


def finish() -> None:
    """Leaves the processes that `start` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; number 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(model: Any) -> Any:
    """The model itself, its parameters divided among the processes: each decoder layer by itself, and all the rest.
    Nothing happens with one process. Optimizers are made afterwards; and only a function wrapped in `forward` may then
    call the model: all of roles.py but hidden_states is. Weights go between two sharded models by their state dicts."""
    if world() > 1 and not isinstance(model, FSDPModule):
        mesh = init_device_mesh(model.device.type, (world(),))
        layers = next(x for x in model.base_model.modules() if isinstance(x, torch.nn.ModuleList))
        for part in (*layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        type(model).run = lambda self, function, *arguments, **options: function(self, *arguments, **options)
        register_fsdp_forward_method(model, "run")
    return model


def forward(function: F) -> F:
    """function(model, …), which may call the model's body and its head, as one forward call of a sharded model."""

    @wraps(function)
    def call(model: Any, *arguments: Any, **options: Any) -> Any:
        run: Any = getattr(model, "run", None) if isinstance(model, FSDPModule) else None
        return run(function, *arguments, **options) if run else function(model, *arguments, **options)

    return call  # type: ignore[return-value]


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Within it a sharded model's parameters are whole: generation calls it often, and gathers them once."""
    shards: list[Any] = [x for x in model.modules() if isinstance(x, FSDPModule)]
    for part in shards:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def backward(loss: Tensor) -> None:
    """Adds the gradient of the sum of all processes' losses; FSDP takes their mean."""
    torch.autograd.backward(loss * world())


def clip_gradients(model: Any, norm: float) -> float:
    """Scales the gradient of all the model's parameters together to at most `norm`; returns the norm it had."""
    return float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), norm)))


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be divided among the processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def assign(parameter: Tensor, value: Tensor) -> None:
    """Gives a parameter, which may be divided among the processes, a value that is whole in each of them."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Matrix products in `dtype` ("float32", "bfloat16"); parameters, their updates and all statistics stay float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


def my_rows(rows: int) -> slice:
    """This process's share of so many rows, every `world`-th; raises ValueError where they do not divide evenly."""
    if rows % world():
        raise ValueError(f"{rows} rows do not divide evenly among {world()} processes")
    return slice(rank(), None, world())


def gather_rows(mine: Tensor) -> Tensor:
    """Every process's share (n, …) put together, (world · n, …): the inverse of taking `my_rows`."""
    if world() == 1:
        return mine
    shares = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(shares, mine.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def all_sum(x: Tensor) -> Tensor:
    """The sum of every process's x, of any shape, in all of them."""
    if world() > 1:
        dist.all_reduce(x)
    return x

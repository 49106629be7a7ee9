"""The census: which operations mix positions in a forward pass, found by what they do."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Census, Inputs

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.instruments.models import Live, Models

__all__ = ["CENSUS_LENGTHS", "census"]

# Two lengths that are no usual width of anything; an axis that has both is an axis of positions.
CENSUS_LENGTHS = (11, 23)
FUSED_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
NON_LINEAR_OR_MATRIX = ("Tanh", "Sigmoid", "Relu", "Gelu", "Silu", "Softplus", "Addmm", "Mm", "Bmm", "Mv", "Linear",
                        "FusedGruCell", "FusedLstmCell", "Hardtanh", "Elu")  # fmt: skip


@role_fact(Stage.PROBE)
def census(role: str, models: Models, inputs: Inputs) -> Census:
    """Operations of two forward passes, at 11 and 23 tokens, and the longest autograd path of each.

    Raises:
        Unavailable: the role is a function.
        Broken: the model cannot be called.
    """
    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    _ = live.module
    runs = [_one_pass(live, inputs, length) for length in CENSUS_LENGTHS]
    both = [dict(runs[0][0][kind] & runs[1][0][kind]) for kind in KINDS]
    found = dict(zip(KINDS, both, strict=True))
    added = runs[1][2] - runs[0][2]
    steps = (CENSUS_LENGTHS[1] - CENSUS_LENGTHS[0]) // 2
    growing = {name: n for name, n in added.items() if n >= steps}
    recurrent = dict(found["recurrent"])
    scan = dict(found["scan"])
    if any(name.startswith(NON_LINEAR_OR_MATRIX) for name in growing):
        recurrent |= growing
    elif any(name.startswith(("Mul", "Addcmul", "Lerp")) for name in growing):
        scan |= growing
    return Census(
        attention=found["attention"] or found["product"],
        convolution=found["convolution"],
        recurrent=recurrent,
        scan=scan,
        pooling=found["pooling"],
        lengths=CENSUS_LENGTHS,
        depth=(runs[0][1], runs[1][1]),
        kernel_widths=tuple(sorted(runs[0][3])),
    )


KINDS = ("attention", "product", "convolution", "recurrent", "scan", "pooling")


def _one_pass(live: Live, inputs: Inputs, length: int) -> tuple[dict[str, Counter[str]], int, Counter[str], set[int]]:
    """Operations by kind, the autograd path's length, its operations, and the widths of kernels over time."""
    import torch

    from rlhf_doctor.instruments.tapping import EmbeddingTap

    flat = [token for sequence in inputs.sequences for token in sequence]
    ids = torch.tensor([flat[:length], flat[-length:]][: 1 if live.large else 2], device=live.device)
    seen: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    widths: set[int] = set()
    with live.kept(), torch.enable_grad():
        with _recorder(length, seen, widths), EmbeddingTap(ids):
            called = live.read(ids, torch.ones_like(ids))
        depth, path = _longest_path(called.tensor.grad_fn)
    return seen, depth, path, widths


def _recorder(length: int, seen: dict[str, Counter[str]], widths: set[int]) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            kind = kind_of(name, args, result, length)
            if kind:
                seen[kind][name] += 1
            if kind == "convolution" and len(args) > 1 and isinstance(args[1], torch.Tensor):
                widths.update(_widths(args[0], args[1], length))
            return result

    return Recorder()  # type: ignore[no-untyped-call]


def kind_of(name: str, args: tuple[Any, ...], result: Any, length: int) -> str | None:
    """Which way of mixing positions an operation is at this length, None for none.

    A softmax counts as attention where queries and keys are both positions, as pooling where only the keys are. A
    product of features that gives a square of positions is attention with another normalisation.
    """
    import torch

    given = [a for a in args if isinstance(a, torch.Tensor)]
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(first, torch.Tensor) or not given:
        return None
    if "scaled_dot_product" in name or "flash_attention" in name or "flex_attention" in name:
        return "attention" if given[0].dim() >= 3 and length in given[0].shape[-2:-1] else None
    if name in FUSED_RECURRENT:
        return "recurrent"
    if "softmax" in name and "backward" not in name and first.dim() >= 2:
        sides = sum(size == length for size in first.shape)
        if sides >= 2:
            return "attention"
        return "pooling" if length in first.shape[-1:] or (length in first.shape and first.shape[-1] == 1) else None
    if name in ("bmm", "mm", "baddbmm") and first.shape[-2:] == (length, length) and given[0].shape[-1] != length:
        return "product"
    if "convolution" in name and len(given) > 1:
        return "convolution" if _widths(given[0], given[1], length) else None
    if name == "im2col" and length in given[0].shape:
        return "convolution"
    if name == "unfold" and len(args) > 2 and isinstance(args[1], int) and given[0].dim():
        along, width = given[0].shape[args[1]], args[2]
        return "convolution" if 1 < width < along and length <= along <= length + 4 * width else None
    if name in ("_fft_r2c", "_fft_c2c") and len(args) > 1:  # a product there is a convolution over all positions
        return "convolution" if {given[0].shape[d] for d in args[1]} & {length, 2 * length - 1, 2 * length} else None
    if name == "cumsum" and first.is_floating_point() and first.dim() >= 3:
        return "scan"
    if name in ("mean", "sum", "amax", "max") and first.is_floating_point() and length in given[0].shape:
        return "pooling" if first.dim() < given[0].dim() and length not in first.shape else None
    return None


def _widths(given: torch.Tensor, kernel: torch.Tensor, length: int) -> list[int]:
    """Sizes above 1 of a kernel along axes that run over (padded) positions, not the whole of an axis at once."""
    return [
        int(k)
        for n, k in zip(given.shape[2:], kernel.shape[2:], strict=False)
        if 1 < k < n and length <= n <= length + 4 * k
    ]


def _longest_path(root: Any) -> tuple[int, Counter[str]]:
    """Length and operations of the longest path of the autograd graph below ``root``; no recursion."""
    if root is None:
        return 0, Counter()
    order: list[Any] = []
    state: dict[Any, bool] = {}
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in state:
            state[node] = False
            stack.extend(child for child, _ in node.next_functions if child is not None and child not in state)
        else:
            stack.pop()
            if not state[node]:
                state[node] = True
                order.append(node)
    best: dict[Any, tuple[int, Any]] = {}
    for node in order:
        children = [child for child, _ in node.next_functions if child is not None]
        below = max(((best[c][0], c) for c in children if c in best), key=lambda pair: pair[0], default=(0, None))
        best[node] = (below[0] + 1, below[1])
    path: Counter[str] = Counter()
    node = root
    while node is not None:
        path[str(node.name()).removesuffix("Backward0").removesuffix("Backward1")] += 1
        node = best[node][1]
    return best[root][0], path

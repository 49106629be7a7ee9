"""The live models: loaded when first asked for, called safely, released, and left as they were found."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Broken, Unavailable
from rlhf_doctor.finding import Role
from rlhf_doctor.instruments.calling import Called, Caller, pick, takes_texts

if TYPE_CHECKING:
    import torch

    from rlhf_doctor.examine import Options
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Live", "Models", "generator_states", "generators_kept", "padded", "set_generators"]

SMALL = 20_000_000  # parameters: a laptop's core takes about a hundredth of a second for a text of 16 tokens


@contextmanager
def generators_kept(seed: int | None = None) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators as they were afterwards; seeded inside where a seed is given."""
    import torch

    states = generator_states()
    if seed is not None:
        torch.manual_seed(seed)
        random.seed(seed)
    try:
        yield
    finally:
        set_generators(states)


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, to be given to ``set_generators``."""
    import torch

    numpy = sys.modules.get("numpy")
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state() if numpy else None,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Put the global generators into the states that ``generator_states`` gave."""
    import torch

    random.setstate(states["python"])
    if states["numpy"] is not None:
        sys.modules["numpy"].random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def module_kept(module: torch.nn.Module) -> Iterator[None]:
    """Training flags, requires_grad flags, gradients and buffers of a module bit for bit as they were afterwards."""
    import torch

    flags = [(child, child.training) for child in module.modules()]
    trainable = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag
        for parameter, flag, gradient in trainable:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        with torch.no_grad():
            for child, name, buffer, copy in buffers:
                if child._buffers.get(name) is not buffer:
                    child._buffers[name] = buffer
                if not _same_bits(buffer, copy):
                    buffer.copy_(copy)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)))
    return bool(torch.equal(a, b))


def padded(
    sequences: Sequence[Sequence[int]], pad_id: int, side: str, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, both (B, T) int64, of sequences padded on one side to the longest or to ``length``."""
    import torch

    width = max(length or 0, *(len(s) for s in sequences)) if sequences else 0
    ids, mask = [], []
    for sequence in sequences:
        pads, ones = [pad_id] * (width - len(sequence)), [1] * len(sequence)
        zeros = [0] * len(pads)
        ids.append([*pads, *sequence] if side == "left" else [*sequence, *pads])
        mask.append(zeros + ones if side == "left" else ones + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def _hollow(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter has a shape and no data."""
    return parameter.is_meta


def _shapeless(model: Any) -> bool:
    """Whether a module has parameters without a shape yet: a forward pass would fill them in for good."""
    from torch.nn.parameter import is_lazy

    return any(is_lazy(parameter) for parameter in model.parameters())


class Misshapen(Broken):
    """The output cannot be read row by row: what it is, is in ``called``."""

    def __init__(self, role: Role, sentence: str, called: Called) -> None:
        super().__init__(role, sentence)
        self.called = called


class Live:
    """A model that can be called. ``loaded_here`` says that it was read from a path for this examination alone."""

    def __init__(self, role: Role, model: Any, caller: Caller, *, loaded_here: bool, seed: int) -> None:
        import torch

        self.role = role
        self.model = model
        self.caller = caller
        self.loaded_here = loaded_here
        self.seed = seed
        self.is_module = isinstance(model, torch.nn.Module)
        self.texts = not self.is_module and takes_texts(model)
        self.score_head: Any = None
        self.remembered: tuple[torch.Tensor, torch.Tensor, Called] | None = None

    @property
    def large(self) -> bool:
        """Whether every pass costs so much that a probe should make do with fewer and shorter texts."""
        return self.is_module and sum(p.numel() for p in self.module.parameters()) > SMALL

    def let_go(self) -> None:
        """Drop every reference to the model; nothing can be called afterwards."""
        self.model = self.score_head = self.remembered = None
        self.caller.forget()

    @property
    def module(self) -> torch.nn.Module:
        """The module.

        Raises:
            Unavailable: the role is a plain function.
        """
        if not self.is_module:
            raise Unavailable(f"the {self.role} is a function, not a model")
        assert self.model is not None
        return self.model  # type: ignore[no-any-return]  # is_module says that it is one

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        import torch

        parameter = next(self.module.parameters(), None) if self.is_module else None
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device

    @contextmanager
    def kept(self, *, evaluating: bool = True) -> Iterator[None]:
        """Call inside this: eval mode unless told otherwise, everything restored afterwards."""
        with ExitStack() as stack:
            stack.enter_context(generators_kept(self.seed))
            if self.is_module:
                stack.enter_context(module_kept(self.module))
                if evaluating:
                    for child in self.module.modules():
                        child.training = False
            yield

    def raw(self, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
        """What the model returns.

        Raises:
            Unavailable: its parameters are not in memory, or it pools by a pad token that is not defined.
            Broken: it raises, or returns nothing.
        """
        if self.is_module and any(_hollow(p) for p in self.module.parameters()):
            raise Unavailable(f"needs the {self.role}'s parameters in memory")
        try:
            raw = self.caller(ids.to(self.device), mask.to(self.device), **more)
        except (Unavailable, Broken, KeyboardInterrupt):
            raise
        except MemoryError as error:
            raise Broken(self.role, f"{self.role}: out of memory in the forward pass ({error})") from error
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())[:300]
            if self.is_module and any(p.numel() == 0 for p in self.module.parameters()):
                raise Unavailable(f"needs the {self.role}'s parameters in memory, not sharded away") from error
            if "no padding token is defined" in said:
                raise Unavailable(f"needs a pad token in the {self.role}'s config") from error
            kind = type(error).__name__
            memory = "out of memory" in said.lower() or "can't allocate memory" in said.lower()
            what = "ran out of memory in the forward pass" if memory else "raised in the forward pass"
            raise Broken(self.role, f"{self.role}: the model {what}: {kind}: {said}") from error
        if raw is None:
            raise Broken(self.role, f"{self.role}: the model returned None")
        return raw

    def read_once(self, ids: torch.Tensor, mask: torch.Tensor) -> Called:
        """``read`` without gradients, of a model that was loaded here: the last such batch's output is remembered.

        Raises:
            Broken: see ``read``.
        """
        known = self.remembered
        if known is None or not (ids.equal(known[0]) and mask.equal(known[1])):
            known = (ids.clone(), mask.clone(), self.read(ids, mask))
            self.remembered = known if self.loaded_here else None
        return known[2]

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> Called:
        """The role's output for a batch, both arguments (B, T) int64; a critic's read at its head where its forward
        pools (the usual sequence classifier, whose head a loop calls directly).

        Raises:
            Broken: the model raises, or returns nothing readable.
            Misshapen: it returns another batch size.
        """
        batch, length = ids.shape
        caught: list[Any] = []
        handle = None
        if self.score_head is not None:
            handle = self.score_head.register_forward_hook(lambda module, args, output: caught.append(output))
        raw: Any = None
        try:
            raw = self.raw(ids, mask)
        except (Unavailable, Broken):
            if not caught:  # a loop that reads the head does not care how the pooling behind it ends
                raise
        finally:
            if handle is not None:
                handle.remove()
        called = pick(self.role, caught[-1] if caught else raw, batch, length)
        if called is None:
            raise Broken(
                self.role, f"{self.role}: the model returned {type(raw).__name__} without any floating-point tensor"
            )
        if not called.tensor.numel():
            shape = tuple(called.tensor.shape)
            raise Broken(self.role, f"{self.role}: the model returned a tensor without any number, of shape {shape}")
        if not called.tensor.dim() and batch == 1:  # a squeeze took the batch along
            called = dataclasses.replace(called, tensor=called.tensor.reshape(1))
        if not called.tensor.dim() or called.tensor.shape[0] not in (batch, batch * length):
            raise Misshapen(
                self.role,
                f"{self.role}: the model returned shape {tuple(called.tensor.shape)} for a batch of "
                f"{batch} sequences of {length} tokens: the first axis should be {batch}",
                called,
            )
        if caught:
            return Called(called.tensor, f"the head {self.head_name!r}", raw, called.all_shapes)
        return called

    @property
    def head_name(self) -> str:
        """The name of the scalar head that is read directly."""
        return next((n for n, m in self.module.named_modules() if m is self.score_head), "score")


class Models:
    """The setup's models by role, loaded when first asked for.

    Entering and leaving keeps the global generators; every call keeps the model.
    """

    def __init__(self, setup: RLHFSetup, options: Options) -> None:
        self.setup = setup
        self.options = options
        self.live: dict[Role, Live] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Models:
        self.stack.enter_context(generators_kept(self.options.seed))
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.clear()
        self.stack.close()

    def get(self, role: Role) -> Live:
        """The live model of a role.

        Raises:
            Unavailable: the setup has none.
            Broken: it cannot be loaded.
        """
        if role not in self.live:
            self.live[role] = self._make(role)
        return self.live[role]

    def release(self, role: Role) -> None:
        """Let go of a model that was loaded here."""
        if role not in self.live or not self.live[role].loaded_here:
            return
        live = self.live.pop(role)
        first = next(live.module.parameters(), None) if live.is_module else None
        witness = weakref.ref(first) if first is not None else None
        live.let_go()
        del live, first
        if witness is not None and witness() is not None:  # something refers to it in a circle
            gc.collect()

    def _make(self, role: Role) -> Live:
        import torch

        given = self.setup.model(role)
        if given is None:
            raise Unavailable(f"needs a {role} model")
        if isinstance(given, str) and given == "adapter-off":
            raise Unavailable("the reference is the policy with its adapter off")
        path = self.setup.path(role)
        if path is not None:
            from rlhf_doctor.instruments.loading import load_model

            model = load_model(role, path, self.setup, self.options)
        else:
            model = getattr(given, "_orig_mod", given)  # torch.compile's wrapper hides operations from instruments
        if not isinstance(model, torch.nn.Module) and not callable(model):
            raise Broken(role, f"{role}: {type(model).__name__} is neither a module, a path nor a function")
        if isinstance(model, torch.nn.Module) and _shapeless(model):
            raise Unavailable(f"needs the {role}'s parameters in memory: some were never initialised")
        live = Live(
            role,
            model,
            Caller(role, model, self.setup.calls.get(role), self._learner(model)),
            loaded_here=path is not None,
            seed=self.options.seed,
        )
        if role == "value" and role not in self.setup.calls:
            live.score_head = pooled_score_head(model)
        return live

    def _learner(self, model: Any) -> Any:
        import torch

        if self.setup.step is None or not isinstance(model, torch.nn.Module):
            return None

        def learn() -> Any:
            from rlhf_doctor.instruments.watching import learn_call

            return learn_call(self.setup, model)

        return learn


def pooled_score_head(model: Any) -> Any:
    """The per-token scalar head of a sequence classifier whose backbone and head a loop calls directly.

    It is the contract of TRL's PPOTrainer: ``getattr(model, model.base_model_prefix)`` and ``model.score``.
    None for any other model.
    """
    for candidate in (model, getattr(model, "get_base_model", lambda: None)()):
        prefix = getattr(candidate, "base_model_prefix", None)
        head = getattr(candidate, "score", None)
        # PEFT wraps a head that is trained in full; the wrapper is what the loop calls.
        width = getattr(head, "out_features", None) or getattr(
            getattr(head, "original_module", None), "out_features", None
        )
        if isinstance(prefix, str) and hasattr(candidate, prefix) and width == 1:
            return head
    return None

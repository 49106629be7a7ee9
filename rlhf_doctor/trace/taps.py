"""Taps at the embeddings and heads of the four models: what goes in, what comes out, and which gradient comes back.

Everything is reduced as it passes, so that what is kept is a few dozen numbers per token and never a second copy of
the logits. Nothing in the loop changes, unless a ``Change`` asks for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from rlhf_doctor.finding import MODEL_ROLES, Role
from rlhf_doctor.instruments.calling import pick
from rlhf_doctor.trace.calls import Call, Change, Lookup, ScoredTexts
from rlhf_doctor.trace.head_rows import grid_of, rows_of
from rlhf_doctor.trace.listening import as_scores, eager, function_tapped, like, optimizers_tapped, replaced
from rlhf_doctor.trace.parts import (
    bodies,
    layers_without,
    mask_and_positions,
    other_tables,
    scalar_heads,
    token_table,
    vocabulary_heads,
)
from rlhf_doctor.trace.reduced import Reducer
from rlhf_doctor.trace.sampler import shown

if TYPE_CHECKING:
    from rlhf_doctor.setups import RLHFSetup

__all__ = ["Enough", "Recorder", "nearby"]

LOOKUPS = frozenset({torch.nn.functional.embedding, torch.embedding, torch.Tensor.__getitem__, torch.index_select})
# They move rows about and compute none: what they give says where rows went, and not where they came from.
MOVES = frozenset(
    {"index_select", "gather", "__getitem__", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "flip",
     "contiguous", "clone", "detach", "to", "type", "float", "half", "bfloat16", "double", "roll", "take_along_dim",
     "squeeze", "unsqueeze", "narrow", "select", "split", "chunk", "cat", "expand", "masked_select", "index_put",
     "scatter", "where", "type_as", "expand_as", "view_as", "cpu", "cuda", "movedim", "swapaxes", "t", "unbind"}
)  # fmt: skip
DRAWS = frozenset({torch.multinomial, torch.Tensor.multinomial, torch.searchsorted})  # the last: of cumulated odds
WEIGHED = frozenset({torch.multinomial, torch.Tensor.multinomial})  # of odds as they are
PEAKS = frozenset({torch.argmax, torch.Tensor.argmax})  # of noisy or greedy scores
PROJECTIONS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.addmm,
        torch.einsum,
    }
)

LISTENED = PROJECTIONS | LOOKUPS | DRAWS | PEAKS


class Enough(BaseException):
    """Ends a step as soon as all that is wanted was seen; no ``except Exception`` of the loop catches it."""


def _cut_from(head: Call, tensor: Tensor, batch: int) -> bool:
    """Whether (batch, n) numbers are the scalar head's (batch, more) from some column on, or 0 where masked."""
    scalar = head.scalar
    if scalar is None or tensor.numel() % batch or not 0 < tensor.numel() < scalar.numel() or scalar.numel() % batch:
        return False
    with torch.no_grad(), torch._C.DisableTorchFunction():
        part, whole = tensor.detach().reshape(batch, -1), scalar.reshape(batch, -1).to(tensor)
        short = part.shape[1]
        if short < 2:
            return False
        return any(
            bool(((part == whole[:, at : at + short]) | (part == 0)).all()) and bool(part.any())
            for at in range(whole.shape[1] - short + 1)
        )


def nearby(temperature: float) -> tuple[float, ...]:
    """The declared temperature, and those around it that tokens may have been drawn at instead."""
    return (temperature, *(temperature * factor for factor in (0.5, 0.7, 0.85, 1.2, 1.5)))


class Recorder(TorchFunctionMode):
    """Records the calls of the four models while it is active: ``with recorder.watching(): step()``.

    Args:
        setup: its models are tapped; nothing of it is changed.
        temperatures: at which log-probabilities are wanted, the declared one first.
        changes: outputs to replace.
        hold: whether optimizers' steps are left out.
        last_window: raise ``Enough`` once so many optimizer steps were asked for on every trained role; None: never.
        text_change: (order of the call, scores) -> scores, for a reward that is a function.
        known_optimizers: those that exist already.
        trained: roles that are known to be trained; ``last_window`` waits for them.
    """

    def __init__(
        self,
        setup: RLHFSetup,
        *,
        temperatures: Sequence[float] = (1.0,),
        changes: Sequence[Change] = (),
        hold: bool = False,
        last_window: int | None = None,
        text_change: Callable[[int, list[float]], list[float]] | None = None,
        known_optimizers: Sequence[Any] = (),
        trained: frozenset[Role] = frozenset(),
    ) -> None:
        super().__init__()
        self.setup = setup
        self.reducer = Reducer(temperatures)
        self.changes = tuple(changes)
        self.hold = hold
        self.last_window = last_window
        self.text_change = text_change
        self.known_optimizers = tuple(known_optimizers)
        self.trained = trained
        self.around: list[tuple[Role, bool, Tensor]] = []  # (role, after a step, a few numbers of its parameters)
        self.calls: list[Call] = []
        self.texts: list[ScoredTexts] = []
        self.steps: list[tuple[int, Any, frozenset[Role]]] = []  # (order, optimizer, roles it steps)
        self.order = 0
        self.optimizers: list[Any] = []
        self._stack: list[frozenset[Role]] = []
        self._lookups: dict[Role, Lookup] = {}
        self._seen_heads: dict[Role, Call] = {}
        self._given: dict[Role, tuple[Tensor | None, Tensor | None]] = {}
        self._modules: dict[Role, torch.nn.Module] = {}
        self._adapted: list[torch.nn.Module] = []
        self._adapter: frozenset[int] = (
            frozenset()
        )  # ids of the policy's parameters that are no other library's adapter
        self._adapter_used = False  # since the last lookup of tokens
        self._tokens: dict[int, set[Role]] = {}
        self._heads: dict[int, set[Role]] = {}
        self._others: dict[int, set[Role]] = {}
        self._owners: dict[int, set[Role]] = {}
        self._kept: list[Any] = []  # parameters whose ids are keys
        self._count: dict[Role, int] = {}
        self._marks: dict[Role, list[Tensor]] = {}
        self._widths: set[int] = set()
        self._vocabulary: int | None = None  # rows of the policy's table of tokens
        self._hushed: torch.nn.Module | None = None  # the layer that is being run
        for role in MODEL_ROLES:
            self._learn(role)
        if setup.reference == "adapter-off" and not self._adapted:
            self._adapter = self._written_by_hand()
        self._climbed = {role for optimizer in setup.optimizers for role in self._maximised(optimizer)}

    # ---- what belongs to whom ----------------------------------------------------------------------------------

    def _learn(self, role: Role) -> None:
        given = self.setup.model(role)
        if isinstance(given, str) and given == "adapter-off":
            given = self.setup.policy
        module = getattr(given, "_orig_mod", given)
        if not isinstance(module, torch.nn.Module):
            return
        if given is not self.setup.policy or role != "reference":
            self._modules[role] = module
        self._adapted += [m for m in module.modules() if hasattr(m, "disable_adapters") and hasattr(m, "lora_A")][:1]
        tokens = token_table(module, self._vocabulary)
        if role == "policy" and tokens:
            self._vocabulary = tokens[0].shape[0]
        heads = vocabulary_heads(module, tokens) if role in ("policy", "reference") else scalar_heads(module)
        for parameter in module.parameters():
            self._owners.setdefault(id(parameter), set()).add(role)
            self._kept.append(parameter)
        for table, weights in (
            (self._tokens, tokens),
            (self._heads, heads),
            (self._others, other_tables(module, tokens)),
        ):
            for weight in weights:
                table.setdefault(id(weight), set()).add(role)
        self._widths |= {w.shape[-1] for w in heads}
        trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad and p.numel() > 1]
        if role == "value":  # whose head may be rescaled between updates
            trained = [p for p in trained if all(p is not head for head in heads)] or trained
        trained = trained or list(heads)
        self._marks[role] = [trained[0], trained[len(trained) // 2], trained[-1]] if trained else []

    def _written_by_hand(self) -> frozenset[int]:
        """The policy's trained parameters, where these are neither its tables nor its heads: what it has besides."""
        policy = self._modules.get("policy")
        trained = {id(p) for p in policy.parameters() if p.requires_grad} if policy is not None else set[int]()
        plain = {i for table in (self._tokens, self._heads, self._others) for i in table if "policy" in table[i]}
        return frozenset[int]() if trained & plain else frozenset(trained)

    def _one_role(self, roles: set[Role]) -> Role | None:
        """Whose call this is, of those that own the weights."""
        if roles >= {"policy", "reference"} and (self._adapted or self._adapter):
            roles = roles - ({"policy"} if self._adapters_off else {"reference"})
        for active in reversed(self._stack):
            if active & roles:
                roles = active & roles  # type: ignore[assignment]
                break
        for role in ("policy", "value", "reward", "reference"):
            if role in roles:
                return role
        return None

    @property
    def _adapters_off(self) -> bool:
        if self._adapter:
            return not self._adapter_used
        return any(bool(getattr(m, "disable_adapters", False)) for m in self._adapted)

    def _acting(self, roles: frozenset[Role]) -> frozenset[Role]:
        """The roles that a module plays now: a policy with its adapter off is the reference."""
        if (self._adapted or self._adapter) and "policy" in roles and self._adapters_off:
            return (roles - {"policy"}) | {"reference"}
        return roles

    def _may_act(self, roles: frozenset[Role]) -> frozenset[Role]:
        """The same before its pass, which alone tells whether an adapter that was written by hand takes part."""
        return roles | {"reference"} if self._adapter and "policy" in roles else self._acting(roles)

    # ---- the tap -----------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self._adapter and not self._adapter_used:
            self._adapter_used = any(id(a) in self._adapter for a in (*args, *(kwargs or {}).values()))
        if func in LISTENED:
            result = self._listened(func, args, kwargs, result)
        if self._lookups and type(result) is Tensor:
            shape = result.shape
            if len(shape) > 1 and shape[-1] in self._widths and getattr(func, "__name__", "") not in MOVES:
                self._hidden(result)
        return result

    def _listened(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None, result: Any
    ) -> Any:
        if func in PROJECTIONS:
            roles = self._owned(self._heads, (*args, *(kwargs or {}).values()))
            if roles and isinstance(result, Tensor) and result.is_floating_point():
                given = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
                return self._head_called(roles, given, result)
        if func in LOOKUPS:
            self._looked_up((*args, *(kwargs or {}).values()), result)
        if func in DRAWS or func in PEAKS:
            self._drew(args[0] if args else next(iter((kwargs or {}).values()), None), result, func)
        return result

    def _hidden(self, result: Tensor) -> None:
        """Keep what may be the hidden states behind a model's last layer."""
        if result.is_floating_point():
            tokens = result.shape[:-1].numel()
            for lookup in self._lookups.values():
                if tokens == lookup.ids.numel():
                    lookup.hidden = result

    def _hush(self, module: torch.nn.Module, args: Any) -> None:
        """Within a layer there is nothing to listen to: its operations need not pass through here."""
        if self._hushed is None and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self.__exit__(None, None, None)
            self._hushed = module

    def _unhush(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._hushed is not module:
            return
        self._hushed = None
        self.__enter__()  # type: ignore[no-untyped-call]
        given = output[0] if isinstance(output, tuple) and output else output
        with torch._C.DisableTorchFunction():
            if isinstance(given, Tensor) and given.dim() > 1 and given.shape[-1] in self._widths:
                self._hidden(given)

    def _drew(self, given: Any, result: Any, func: Callable[..., Any]) -> None:
        """Keep one token a row, drawn from something as wide as the vocabulary after the policy's last call."""
        call = next((c for c in reversed(self.calls[-3:]) if c.role == "policy"), None)
        if call is None or call.with_grad or not isinstance(given, Tensor) or not isinstance(result, Tensor):
            return
        wide = given.is_floating_point() and given.dim() and given.shape[-1] == call.size
        if wide and result.numel() == len(call.ids) and (func in DRAWS or call.drew is None):
            call.drew = result.detach().reshape(-1).clone()
            call.shown = shown(call, given.reshape(-1, call.size)) if func in WEIGHED and given.dim() < 3 else None

    def _owned(self, table: Mapping[int, set[Role]], values: Sequence[Any]) -> set[Role] | None:
        for value in values:
            if isinstance(value, Tensor):
                found = table.get(id(value))
                if found is None and value._base is not None:
                    found = table.get(id(value._base))
                if found is not None:
                    return found
        return None

    def _looked_up(self, values: Sequence[Any], result: Any) -> None:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return
        ids = next((a for a in values if isinstance(a, Tensor) and not a.is_floating_point() and a.dim()), None)
        if ids is None or ids.dtype == torch.bool:
            return
        ids = ids if ids.dim() == 2 else ids.reshape(1, -1) if ids.dim() == 1 else ids.flatten(0, -2)
        roles = self._owned(self._tokens, values)
        if roles is not None:
            lookup = Lookup(ids.detach().clone())  # loops write the next tokens into the same tensor
            shared = self._shared(roles)
            for role in shared:
                if ids.shape[1] > 1:
                    lookup.mask, lookup.positions = self._given.get(role, (None, None))
                self._lookups[role] = lookup
                self._seen_heads.pop(role, None)
            return
        for role in self._owned(self._others, values) or ():
            if role in self._lookups and ids.shape[-1] == self._lookups[role].ids.shape[-1]:
                self._lookups[role].positions = ids.detach()

    def _shared(self, roles: set[Role]) -> set[Role]:
        """All roles that this embedding now works for: several heads on one trunk, or one model's two roles."""
        if self._adapter and roles >= {"policy", "reference"}:
            self._adapter_used = False  # what is behind it tells which of the two this is
            return roles
        chosen = self._one_role(set(roles))
        if chosen in ("policy", "reference"):
            return (roles - {"policy", "reference"}) | {chosen}
        return roles

    def _head_called(self, roles: set[Role], given: Tensor | None, result: Tensor) -> Tensor:
        role = self._one_role(set(roles))
        lookup = self._lookups.get(role) if role else None
        if role is None or lookup is None:
            return result
        rows = rows_of(given, lookup)
        if rows is None:
            return result
        call = self._make(role, lookup, rows[0], rows[1])
        call.foreign = None if rows[2] else self._whose(role, given)
        result = self._changed(call, result)
        self._read(call, result)
        call.read_from = weakref.ref(result)
        self._seen_heads[role] = call
        return result

    def _whose(self, role: Role, given: Tensor | None) -> Role | None:
        """The other role whose last hidden states a head was given."""
        assert given is not None
        flat = given.detach().reshape(-1, given.shape[-1])
        for other, lookup in self._lookups.items():
            hidden = lookup.hidden
            if lookup is not self._lookups.get(role) and hidden is not None and hidden.shape[-1] == flat.shape[1]:
                seen = hidden.detach().reshape(-1, flat.shape[1]).to(flat.dtype)
                if len(seen) == len(flat) and torch.equal(seen[:, :4], flat[:, :4]):
                    return other
        return None

    def _make(self, role: Role, lookup: Lookup, rows: Tensor, columns: Tensor) -> Call:
        self.order += 1
        module = self._modules.get(role) or self._modules.get("policy")
        window = sum(role in stepped for _, _, stepped in self.steps)
        training = bool(module.training) if module is not None else False
        self._count[role] = nth = self._count.get(role, -1) + 1
        before = next((c for c in reversed(self.calls[-3:]) if c.role == role), None)
        if before is not None and before.tail is not None and not before.with_grad and lookup.ids.shape[1] == 1:
            before.likeliest, before.tail = before.tail.argmax(-1), None  # decoded on: B rows of logits a token add up
        call = Call(role, self.order, nth, lookup, rows, columns, False, training, window, given=(rows, columns))
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if lookup.unpacked is not None and lookup.ids.shape[1] > 1:
                call.source, held = lookup.unpacked
                call.rows, call.columns = held.row[rows, columns], held.column[rows, columns]
            few = [p.detach().reshape(-1)[:2].float() for p in self._marks.get(role, ())]
            call.weights = torch.cat(few) if few else None
        self.calls.append(call)
        return call

    def _changed(self, call: Call, result: Tensor) -> Tensor:
        for change in self.changes:
            if change.role == call.role:
                call.with_grad = result.requires_grad
                new = change.apply(call, result)
                result = result if new is None else new
        return result

    def _read(self, call: Call, output: Tensor) -> None:
        """Reduce an output to what is kept, and listen for its gradient."""
        call.with_grad = output.requires_grad
        with torch.no_grad(), torch._C.DisableTorchFunction():
            flat = output.detach()
            call.rounding = torch.finfo(flat.dtype).eps if flat.is_floating_point() else 0.0
            if call.role in ("policy", "reference"):
                self.reducer.logits(call, flat.reshape(len(call.rows), -1))
            else:
                call.scalar = flat.reshape(-1).clone() if flat.numel() == len(call.rows) else None
        if output.requires_grad:

            def caught(gradient: Tensor, call: Call = call) -> None:
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    call.backwards += 1
                    self.reducer.gradient(call, -gradient if call.role in self._climbed else gradient)

            call.handle = output.register_hook(caught)  # type: ignore[no-untyped-call]

    def _maximised(self, optimizer: Any) -> set[Role]:
        """Roles whose loss an optimizer climbs: it is read as minus that loss, descended."""
        groups = [group for group in getattr(optimizer, "param_groups", ()) if group.get("maximize")]
        return set[Role]().union(*(self._owners.get(id(p), set()) for group in groups for p in group["params"]))

    # ---- whole forwards ----------------------------------------------------------------------------------------

    def _entered(self, roles: frozenset[Role]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            self._stack.append(roles)
            mask, positions = mask_and_positions(args, kwargs)
            for role in self._may_act(roles):
                self._given[role] = (mask, positions)
                self._seen_heads.pop(role, None)
                self._lookups.pop(role, None)

        return hook

    def _left(self, roles: frozenset[Role]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._stack and self._stack[-1] == roles:
                self._stack.pop()
            for role in self._acting(roles) if output is not None else ():
                output = self._output_of(role, output)
                self._given.pop(role, None)
            return output

        return hook

    def _output_of(self, role: Role, output: Any) -> Any:
        """Read what the whole model returned where it is not just what its head gave."""
        lookup = self._lookups.get(role)
        if lookup is None:
            return output
        batch, length = lookup.ids.shape
        head = self._seen_heads.get(role)
        with torch._C.DisableTorchFunction():
            picked = pick(role, output, batch, length)
        if picked is None or not isinstance(picked.tensor, Tensor) or not picked.tensor.dim():
            return output
        tensor = picked.tensor
        if head is not None and head.read_from is not None and head.read_from() is tensor and head.size:
            return output  # just what the head gave
        width = tensor.shape[-1] if role in ("policy", "reference") else 1
        count = tensor.numel() // max(width, 1)
        if head is not None and (head.size not in (0, width) or _cut_from(head, tensor, batch)):
            return output  # log-probabilities, or the head's numbers at some places: its gradient says it all
        if role in ("policy", "reference") and (tensor.dim() < 2 or width < 4):
            return output
        if head is not None and count == len(head.rows):
            assert head.given is not None
            rows, columns = head.given
        elif count == batch * length:
            rows, columns = grid_of(batch, length)
        elif count % batch == 0 and 0 < count // batch < length and role in ("policy", "reference", "value"):
            rows, columns = grid_of(batch, count // batch)
            columns = columns + length - count // batch
        elif count == batch:
            rows, columns = torch.arange(batch), torch.full((batch,), -1)
        else:
            return output
        call = self._make(role, lookup, rows, columns)
        call.pooled = count == batch and length > 1 and role in ("reward", "value")
        if head is None:
            new = self._changed(call, tensor)
            if new is not tensor:
                output = replaced(output, tensor, new)
                tensor = new
        elif count == len(head.rows):  # the same numbers further on: nearer to the loss
            if head.handle is not None:
                head.handle.remove()
            if head in self.calls:
                self.calls.remove(head)
            call.nth, self._count[role] = head.nth, self._count[role] - 1
        self._read(call, tensor)
        self._seen_heads[role] = call
        return output

    # ---- optimizers --------------------------------------------------------------------------------------------

    def stepped(self, optimizer: Any) -> None:
        """An optimizer steps, or would have."""
        if all(known is not optimizer for known in self.optimizers):
            self.optimizers.append(optimizer)
        owned = [self._owners.get(id(p), set()) for group in optimizer.param_groups for p in group["params"]]
        self.order += 1
        self.steps.append((self.order, optimizer, frozenset[Role]().union(*owned)))
        self.note_weights(self.steps[-1][2], after=False)
        if self.last_window is not None and self._complete(self.last_window):
            raise Enough

    def note_weights(self, roles: frozenset[Role], *, after: bool) -> None:
        """Keep a few numbers of these roles' parameters, their scalar heads among them, before or after a step."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for role in sorted(roles):
                heads = [p for p in self._kept if p.requires_grad and role in self._heads.get(id(p), ())]
                marks = {id(p): p for p in (*self._marks.get(role, ()), *heads)}
                if marks:
                    few = [p.detach().reshape(-1)[:2].float().cpu() for p in marks.values()]
                    self.around.append((role, after, torch.stack([torch.cat([x, x])[:2] for x in few])))

    def _complete(self, windows: int) -> bool:
        trained = {c.role for c in self.calls if c.backwards} | self.trained
        done = [sum(role in roles for _, _, roles in self.steps) for role in trained]
        return bool(done) and min(done) >= windows

    # ---- entering ----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Tapped inside, untouched afterwards."""
        watched = {*self._tokens, *self._heads, *self._others, *self._adapter}
        with ExitStack() as stack:
            modules: dict[int, tuple[torch.nn.Module, set[Role]]] = {}
            for role, module in self._modules.items():
                modules.setdefault(id(module), (module, set()))[1].add(role)
            for module, roles in modules.values():
                named = frozenset(roles)
                stack.callback(module.register_forward_pre_hook(self._entered(named), with_kwargs=True).remove)
                stack.callback(
                    module.register_forward_hook(self._left(named), with_kwargs=True, always_call=True).remove
                )
                for inner in bodies(module):
                    stack.callback(inner.register_forward_pre_hook(self._noted(named), with_kwargs=True).remove)
            stack.enter_context(eager())
            stack.enter_context(optimizers_tapped(self))
            if self.setup.reward is not None and "reward" not in self._modules:
                stack.enter_context(function_tapped(self, self.setup.reward))
            for layer in {id(m): m for module, _ in modules.values() for m in layers_without(module, watched)}.values():
                stack.callback(layer.register_forward_pre_hook(self._hush).remove)
                stack.callback(layer.register_forward_hook(self._unhush, always_call=True).remove)
            self.__enter__()  # type: ignore[no-untyped-call]
            try:
                yield self
            finally:
                if self._hushed is None:
                    self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._hushed = None
            for call in self.calls:
                if call.handle is not None:
                    call.handle.remove()

    def _noted(self, roles: frozenset[Role]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            mask, positions = mask_and_positions(args, kwargs)
            for role in self._may_act(roles):
                inside = any(role in active for active in self._stack)
                before = self._given.get(role, (None, None)) if inside else (None, None)
                self._given[role] = (before[0] if mask is None else mask, before[1] if positions is None else positions)

        return hook

    def texts_scored(self, arguments: tuple[Any, ...], returned: Any) -> Any:
        """A reward function has answered; gives what the loop is to get."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            scores = as_scores(returned)
            if scores is None:
                return returned
            if self.text_change is not None:
                changed = self.text_change(len(self.texts), scores.tolist())
                if changed != scores.tolist():
                    scores = torch.tensor(changed, dtype=torch.float64)
                    returned = like(returned, scores)
            self.order += 1
            self.texts.append(ScoredTexts(self.order, arguments, scores))
        return returned

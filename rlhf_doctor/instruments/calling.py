"""Call a model of any signature with token ids and a mask, and find its output in whatever it returns."""

from __future__ import annotations

import dataclasses
import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["CACHES", "Called", "Caller", "cache_argument", "float_tensors", "pick", "takes_texts"]

IDS_NAMES = ("input_ids", "ids", "token_ids", "tokens", "idx", "x", "input", "inputs", "sequences", "seq")
TEXT_NAMES = ("prompts", "prompt", "responses", "response", "completions", "completion", "texts", "text", "queries")
# What a forward calls its key-value cache; transformers said past_key_values until 5.24, and cache since.
CACHES = ("past_key_values", "cache", "past_key_value", "past", "kv_cache", "kv", "layer_past", "past_kv")
SKIPPED_OUTPUTS = (
    *CACHES,
    "hidden_states",
    "attentions",
    "cache_params",
    "loss",
    "aux_loss",
    "router_logits",
)
PREFERRED = {
    "policy": ("logits", "lm_logits"),
    "reference": ("logits", "lm_logits"),
    "reward": ("end_scores", "end_score", "chosen_end_scores", "score", "scores", "reward", "rewards", "logits"),
    "value": ("value", "values", "v", "vpred", "vpreds", "state_values"),
}


@dataclasses.dataclass(frozen=True)
class Called:
    """An output picked out of what a model returned. ``tensor`` keeps its graph."""

    tensor: torch.Tensor
    where: str
    raw: Any
    all_shapes: Mapping[str, tuple[int, ...]]


def cache_argument(parameters: Collection[str]) -> tuple[str | None, bool]:
    """The parameter of a forward that takes its key-value cache, and whether it is transformers' own convention."""
    name = next((n for n in CACHES if n in parameters), None)
    return name, name in ("past_key_values", "cache") and "use_cache" in parameters


def takes_texts(function: Callable[..., Any]) -> bool:
    """Whether a reward function's parameters ask for texts rather than token ids."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True
    names = [p.name.lower() for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if any(name in IDS_NAMES[:4] or "mask" in name for name in names):
        return False
    return any(name in TEXT_NAMES for name in names) or len(names) != 1


def float_tensors(raw: Any, name: str = "output", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor in an output, with the name under which it is found; caches and losses left out."""
    import torch

    if isinstance(raw, torch.Tensor):
        if raw.is_floating_point():
            yield name, raw
        return
    if raw is None or depth > 2 or isinstance(raw, (str, bytes, int, float)):
        return
    if isinstance(raw, Mapping):
        items = [(str(key), value) for key, value in raw.items()]
    elif isinstance(raw, (list, tuple)):
        fields = getattr(raw, "_fields", None)
        items = [(fields[i] if fields else f"{name}[{i}]", value) for i, value in enumerate(raw)]
    elif dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        items = [(f.name, getattr(raw, f.name, None)) for f in dataclasses.fields(raw)]
    else:
        items = list(getattr(raw, "__dict__", {}).items())
    for key, value in items:
        if key not in SKIPPED_OUTPUTS:
            yield from float_tensors(value, key, depth + 1)


def pick(role: str, raw: Any, batch: int, length: int) -> Called | None:
    """The tensor that a role's output is read from.

    By the field's names first; then by shape: a policy's is the widest over the last axis, a critic's the one that is
    (B, T) or (B, T, 1), a reward's the one that is (B,) or (B, 1). None where there is no float tensor.
    """
    import torch

    if isinstance(raw, (list, tuple)) and raw and all(isinstance(v, (int, float)) for v in raw):
        raw = torch.tensor([float(v) for v in raw])
    found = list(float_tensors(raw))
    if not found and hasattr(raw, "__array__") and not isinstance(raw, torch.Tensor):
        array = raw.__array__()
        found = [("output", torch.as_tensor(array, dtype=torch.float32))] if array.dtype.kind in "fiu" else []
    if not found:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in found}
    by_name = dict(reversed(found))
    for name in PREFERRED[role]:
        if name in by_name:
            return Called(by_name[name], _where(name), raw, shapes)
    per_state = [(n, t) for n, t in found if tuple(t.shape) in ((batch, length), (batch, length, 1))]
    per_sequence = [(n, t) for n, t in found if tuple(t.shape) in ((batch,), (batch, 1))]
    if role == "value" and per_state:
        name, tensor = per_state[0]
    elif role == "reward" and (per_sequence or per_state):
        name, tensor = (per_sequence or per_state)[0]
    elif role in ("policy", "reference"):
        name, tensor = max(found, key=lambda nt: (nt[1].dim() == 3, nt[1].shape[-1] if nt[1].dim() else 0))
    else:
        name, tensor = found[0]
    return Called(tensor, _where(name), raw, shapes)


def _where(name: str) -> str:
    return f"forward's {name}" if not name.startswith("output") else name.replace("output", "forward's output", 1)


def _reads_third(function: Callable[..., Any]) -> bool:
    """Whether a function of (model, ids, mask) looks at the mask; True where its code does not show it."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount < 3:
        return True
    mask = code.co_varnames[2]
    named = (i.argval if isinstance(i.argval, tuple) else (i.argval,) for i in dis.get_instructions(code))
    return mask in code.co_cellvars or any(mask in names for names in named)


class Caller:
    """Calls one model the same way every time, once a way that works has been found.

    Args:
        role: whose model it is.
        model: an ``nn.Module`` or a function.
        custom: the setup's own ``calls[role]``.
        learn: gives the call that the setup's step makes, asked only when every usual call fails.
    """

    def __init__(
        self,
        role: str,
        model: Any,
        custom: Callable[..., Any] | None = None,
        learn: Callable[[], tuple[Callable[..., Any], str]] | None = None,
    ) -> None:
        self.role = role
        self.model = model
        self.custom = custom
        self.learn = learn
        self.style: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
        self.description = "calls[...] of the setup" if custom else ""
        self.takes_mask = custom is None or _reads_third(custom) or any("mask" in name for name in self.signature)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
        """The model's raw output for ids and mask, both (B, T) int64.

        Raises:
            Exception: whatever the model raises when called in the most likely way.
        """
        if self.custom is not None:
            return self.custom(self.model, ids, mask)
        if self.style is not None:
            return self.style(ids, mask, **more)
        first_error: Exception | None = None
        for style, description, takes_mask in self._styles():
            try:
                raw = style(ids, mask, **more)
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError, KeyError) as error:
                first_error = first_error or error
                continue
            self.style, self.description, self.takes_mask = style, description, takes_mask
            return raw
        assert first_error is not None
        if self.learn is None:
            raise first_error
        try:
            self.style, self.description = self.learn()
        except Unavailable:
            raise first_error from None
        return self.style(ids, mask, **more)

    def forget(self) -> None:
        """Drop the model and the way to call it, which refer to each other in a circle."""
        self.model = self.custom = self.style = None

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the model's forward; of the adapted model's where a wrapper hides them."""
        target = getattr(self.model, "forward", self.model)
        base = getattr(self.model, "get_base_model", None)
        try:
            parameters = dict(inspect.signature(target).parameters)
            hidden = all(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
            if callable(base) and (hidden or "position_ids" not in parameters):
                parameters = {**inspect.signature(base().forward).parameters, **parameters}
        except (TypeError, ValueError):
            return {}
        return parameters

    def _styles(self) -> Iterator[tuple[Callable[..., Any], str, bool]]:
        parameters = self.signature
        named = self._named(parameters)
        if named:
            description = ", ".join(named)
            yield (
                lambda ids, mask, **more: self.model(**{k: f(ids, mask) for k, f in named.items()}, **more),
                f"forward({description})",
                any("mask" in key or "len" in key for key in named),
            )
        if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            yield (
                lambda ids, mask, **more: self.model(input_ids=ids, attention_mask=mask, **more),
                "forward(input_ids, attention_mask)",
                True,
            )
        required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if not parameters or len(required) >= 2 or any("mask" in name for name in parameters):
            yield lambda ids, mask, **more: self.model(ids, mask, **more), "forward(ids, mask)", True
        yield lambda ids, mask, **more: self.model(ids, **more), "forward(ids)", False

    def _named(
        self, parameters: Mapping[str, inspect.Parameter]
    ) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
        plain = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        ids_name = next((n for n in IDS_NAMES if n in parameters), plain[0].name if plain else None)
        if ids_name is None:
            return {}
        named: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {ids_name: lambda ids, mask: ids}
        for parameter in plain:
            name = parameter.name.lower()
            if name == "decoder_input_ids" and getattr(
                getattr(self.model, "config", None), "is_encoder_decoder", False
            ):
                named[parameter.name] = lambda ids, mask: ids
            if parameter.name == ids_name or name.startswith(("decoder_", "cross_", "head_", "encoder_")):
                continue
            if name in ("key_padding_mask", "src_key_padding_mask", "padding_mask", "pad_mask"):
                named[parameter.name] = lambda ids, mask: mask == 0
            elif name in ("attention_mask", "mask", "attn_mask", "masks"):
                named[parameter.name] = lambda ids, mask: mask
            elif name in ("position_ids", "positions", "pos", "pos_ids", "input_pos"):
                named[parameter.name] = lambda ids, mask: (mask.cumsum(-1) - 1).clamp(min=0)
            elif name in ("lengths", "seq_lens", "seq_lengths", "lens"):
                named[parameter.name] = lambda ids, mask: mask.sum(-1)
            elif name == "use_cache":
                named[parameter.name] = lambda ids, mask: False
        return named

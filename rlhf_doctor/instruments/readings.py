"""What the instruments give: plain frozen data, without torch. Checks read these and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = [
    "Architecture",
    "Census",
    "Head",
    "HeadRange",
    "Influence",
    "Inputs",
    "Invariance",
    "Loading",
    "Manifest",
    "Output",
    "Parameters",
    "Reading",
    "Shift",
    "TensorInfo",
    "TokenizerInfo",
]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header (or the live module) gives it. ``dtype`` in safetensors' words: F32, BF16, F16, I64 …"""

    shape: tuple[int, ...]
    dtype: str
    file: str = ""


@dataclass(frozen=True)
class Head:
    """An output head found among the tensors: ``vocabulary`` (V × H) or ``scalar`` (1 × H, or an MLP ending in 1),
    ``labels`` (K × H, K small and not 1)."""

    kind: Literal["vocabulary", "scalar", "labels"]
    name: str
    width: int


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer as its files (or the live object) give it. Ids are None where undefined.

    ``size`` counts every id that it can produce (largest id + 1). ``fingerprint`` is a hash of its token -> id map.
    """

    where: str
    size: int
    pad: str | None
    pad_id: int | None
    bos: str | None
    bos_id: int | None
    eos: str | None
    eos_id: int | None
    unk: str | None
    padding_side: str | None
    truncation_side: str | None
    model_max_length: int | None
    adds_bos: bool | None
    adds_eos: bool | None
    chat_template: str | None
    fingerprint: str
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a role is, as far as its files (or, for a module in memory, its names, shapes and config) tell.

    ``config`` is config.json (or ``model.config.to_dict()``), with a nested text config merged over the outer one;
    ``raw_config`` is as it stands. ``tensors`` maps parameter and buffer names to their headers. ``adapter`` is
    adapter_config.json of a PEFT folder; ``adapter_tensors`` are its tensors, and then ``tensors`` are the base
    model's where the base is on disk. ``missing_shards`` are files that an index names and that are not there;
    ``pickles`` are weight files that are not safetensors; ``problems`` are sentences about files that cannot be read;
    ``unloadable`` is the first of them that keeps the model from being loaded, "" where none does.
    ``max_positions`` None means unlimited or unknown.
    """

    role: str
    origin: Literal["checkpoint", "module", "callable", "adapter-off"]
    path: str | None
    class_name: str
    config: Mapping[str, Any]
    raw_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: TokenizerInfo | None
    tensors: Mapping[str, TensorInfo]
    heads: tuple[Head, ...]
    adapter: Mapping[str, Any] | None = None
    adapter_tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    missing_shards: tuple[str, ...] = ()
    pickles: tuple[str, ...] = ()
    needs_remote_code: bool = False
    problems: tuple[str, ...] = ()
    unloadable: str = ""
    model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None
    embedding_rows: int | None = None
    max_positions: int | None = None
    weight_dtypes: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_causal_lm(self) -> bool:
        """An LM head, or a class that has one, and no scalar head."""
        kinds = {head.kind for head in self.heads}
        named = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in self.architectures)
        if self.adapts_classifier:
            return False
        return "scalar" not in kinds and "labels" not in kinds and ("vocabulary" in kinds or named)

    @property
    def adapts_classifier(self) -> bool:
        """A PEFT adapter that was trained on a classifier, whatever its base's own class is."""
        return (self.adapter or {}).get("task_type") in ("SEQ_CLS", "TOKEN_CLS")

    @property
    def architectures(self) -> tuple[str, ...]:
        """config.json's ``architectures``, else the class name."""
        given = self.raw_config.get("architectures") or ()
        return tuple(str(name) for name in given) or ((self.class_name,) if self.class_name else ())

    def head(self, kind: str) -> Head | None:
        """The head of that kind, None where there is none."""
        return next((head for head in self.heads if head.kind == kind), None)


@dataclass(frozen=True)
class Loading:
    """What happened when a checkpoint was loaded, by parameter name.

    ``missing`` were not in the checkpoint and are random now; ``unexpected`` are in it and were dropped; ``built`` says
    what was built from it, and by which rule.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    built: str


@dataclass(frozen=True)
class Inputs:
    """The probe's token sequences: real prompts and responses where a tokenizer and prompts are given.

    ``sequences`` are of different lengths, without padding, ending in ``eos_id`` where there is one. ``vocab_size``
    is the smallest embedding among the roles that take the policy's ids. ``from_prompts`` says whether they are text.
    ``others`` are the tokenizers of roles that have one of their own.
    """

    sequences: tuple[tuple[int, ...], ...]
    pad_id: int
    eos_id: int | None
    bos_id: int | None
    vocab_size: int
    padding_side: str
    from_prompts: bool
    others: Mapping[str, TokenizerInfo] = field(default_factory=dict)

    def for_role(self, role: str) -> Inputs:
        """The same with the special tokens of the role's own tokenizer, none of which stands inside of a text."""
        own = self.others.get(role)
        if own is None:
            return self
        special = {i for i in (own.pad_id, own.bos_id, own.eos_id) if i is not None}
        ordinary = [i for i in range(self.vocab_size) if i not in special]
        texts = (tuple(ordinary[t % len(ordinary)] if t in special else t for t in text) for text in self.sequences)
        return replace(
            self,
            sequences=tuple(texts),
            pad_id=self.pad_id if own.pad_id is None else own.pad_id,
            eos_id=own.eos_id,
            bos_id=own.bos_id,
            padding_side=own.padding_side or self.padding_side,
        )


@dataclass(frozen=True)
class Output:
    """What a role's model gives for a batch of B sequences of T tokens.

    ``kind``: "vocabulary" (B, T, V), "scalar per token" (B, T) or (B, T, 1), "vector per token" (B, T, K),
    "scalar per sequence" (B,) or (B, 1), "vector per sequence" (B, K), "none" (no float tensor) or "other".
    ``where`` is how it was read: "forward.logits", "output[2]", "head score". ``per_sequence_pooled`` says that the
    model's forward pools per-token scalars of its head into one per sequence (the usual sequence classifier), so a
    loop that reads the head directly gets one scalar per state.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    where: str
    batch: int
    length: int
    vocab_size: int
    finite: bool
    minimum: float
    maximum: float
    std_over_states: float
    std_over_sequences: float
    all_shapes: Mapping[str, tuple[int, ...]]
    call: str
    class_name: str
    training: bool
    per_sequence_pooled: bool = False
    sums_to_one: bool = False

    @property
    def meaningless(self) -> bool:
        """Whether it holds NaN, or infinities beyond a vocabulary's masked logits: nothing can be concluded from it."""
        if self.finite:
            return False
        masked = self.kind.startswith("vocabulary") and self.maximum < float("inf")
        return self.minimum != self.minimum or self.maximum == float("-inf") or not masked


@dataclass(frozen=True)
class Census:
    """Operations that ran in a forward pass, found by what they do to tensors whose sizes grow with the length.

    Each mapping counts operation names. ``attention``: fused attention or a softmax over a square of positions.
    ``convolution``: kernels wider than 1 over the time axis. ``recurrent``: fused recurrent layers, and non-linear or
    matrix operations on the autograd path that grows with the length. ``scan``: linear operations on such a path, or
    cumulative sums over time. ``depth`` is the longest autograd path at each of the two ``lengths``.
    """

    attention: Mapping[str, int]
    convolution: Mapping[str, int]
    recurrent: Mapping[str, int]
    scan: Mapping[str, int]
    pooling: Mapping[str, int]
    lengths: tuple[int, int]
    depth: tuple[int, int]
    kernel_widths: tuple[int, ...] = ()

    @property
    def depth_per_token(self) -> float:
        """Autograd operations that each further token adds to the longest path; 0 for a Transformer."""
        (short, long), (shallow, deep) = self.lengths, self.depth
        return (deep - shallow) / (long - short)


@dataclass(frozen=True)
class Influence:
    """|∂ output_t / ∂ embedding_s| for all t (rows) and s (columns), each row divided by its largest entry.

    ``tokens``: T × T, of the output per token, else of the last per-position activation inside the model
    (``tokens_of`` says which). ``score``: the one row of an output per sequence, None otherwise. ``method`` is
    "gradient" or "substitution" (a token exchanged). Entries below ``floor`` count as no influence.
    """

    tokens: tuple[tuple[float, ...], ...]
    tokens_of: str
    score: tuple[float, ...] | None
    method: str
    floor: float

    @property
    def sees_future(self) -> float:
        """The largest entry above the diagonal."""
        return max((v for t, row in enumerate(self.tokens) for v in row[t + 1 :]), default=0.0)

    @property
    def coverage(self) -> float:
        """Share of the lower triangle, diagonal included, that has influence: 1 for a decoder."""
        lower = [v > self.floor for t, row in enumerate(self.tokens) for v in row[: t + 1]]
        return sum(lower) / len(lower) if lower else 0.0

    @property
    def reach(self) -> int:
        """How many positions back the farthest influence comes from."""
        return max((t - s for t, row in enumerate(self.tokens) for s, v in enumerate(row) if v > self.floor), default=0)

    @property
    def causal(self) -> bool:
        """No output depends on a later token."""
        return self.sees_future <= self.floor


@dataclass(frozen=True)
class Architecture:
    """What a model was measured to be.

    ``kind``: "transformer decoder", "transformer encoder", "state space", "hybrid state space", "convolutional",
    "recurrent", "bag of tokens", "per-token", "unknown", or "function" (a reward without a model).
    ``sentence`` is the reason in plain words.
    """

    kind: str
    sentence: str
    causal: bool | None
    class_name: str

    @property
    def is_decoder(self) -> bool:
        """A Transformer whose outputs see only the past."""
        return self.kind == "transformer decoder"

    @property
    def is_transformer(self) -> bool:
        """Any model whose positions are mixed by attention alone."""
        return self.kind.startswith("transformer")


@dataclass(frozen=True)
class Shift:
    """How far an output moved when something was changed that should not matter.

    ``largest`` is the largest absolute difference over real tokens (log-probabilities, values or scores);
    ``tolerance`` what rounding explains in this dtype; ``scale`` the output's own standard deviation or 1.
    """

    largest: float
    tolerance: float
    scale: float
    detail: str = ""

    @property
    def moved(self) -> bool:
        """Beyond rounding, NaN included."""
        return not self.largest <= self.tolerance


@dataclass(frozen=True)
class Invariance:
    """Name of the change -> what it did: "left padding", "right padding", "neighbours", "repeat", "cache".

    A change that cannot be made has its reason in ``undecided``. ``mode`` says in which mode "repeat" ran.
    """

    shifts: Mapping[str, Shift]
    undecided: Mapping[str, str]
    mode: str


@dataclass(frozen=True)
class HeadRange:
    """Where an output goes when the last projection to it is driven to ±``drive`` times its size.

    ``low`` and ``high`` are the extremes reached; ``bounded`` says that they do not follow the drive;
    ``activations`` are operations between the last projection and the output, such as sigmoid.
    """

    low: float
    high: float
    drive: float
    bounded_below: bool
    bounded_above: bool
    activations: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """Positions of a padded sequence that a score is read from: the largest position with influence on it.

    ``cases`` maps a case ("alone", "right padding", "left padding", "eos inside the prompt", "eos at the end", "bos at
    the start") to (position read, last real position, length of the padded row).
    """

    cases: Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Parameters:
    """A role's parameters as they are in memory. Counts are of scalars.

    ``in_optimizer`` counts those that one of the setup's optimizers holds, None without optimizers. ``non_finite``
    and ``not_materialised`` name parameters. ``storages`` identify memory, empty for a model that was loaded for this
    examination alone. ``dtypes`` of the trainable ones when there are any.
    """

    total: int
    trainable: int
    in_optimizer: int | None
    trainable_not_in_optimizer: tuple[str, ...]
    frozen_in_optimizer: tuple[str, ...]
    trainable_names: tuple[str, ...]
    not_materialised: tuple[str, ...]
    non_finite: tuple[str, ...]
    storages: Mapping[int, str]
    dtypes: Mapping[str, int]
    training: bool
    active_dropout: tuple[str, ...]
    loaded_here: bool

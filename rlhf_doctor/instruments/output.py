"""What a role's model emits: its shape, its range, where it was read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_doctor.facts import role_fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Inputs, Manifest, Output

if TYPE_CHECKING:
    from rlhf_doctor.instruments.models import Models

__all__ = ["output"]


@role_fact(Stage.PROBE)
def output(role: str, models: Models, inputs: Inputs, manifest: Manifest) -> Output:
    """The output for the three probe sequences, right-padded to B = 3, T = 16.

    Another batch size is read as it is, so that its shape can be judged.

    Raises:
        Broken: the model raises, or returns no tensor.
    """
    import torch

    from rlhf_doctor.instruments.models import Misshapen, padded

    live = models.get(role)  # type: ignore[arg-type]  # a role fact is only measured for model roles
    if live.texts:
        return _of_function(live, inputs)
    ids, mask = padded(inputs.sequences, inputs.pad_id, "right")
    with live.kept(), torch.no_grad():
        try:
            called = live.read_once(ids, mask)
        except Misshapen as strange:
            if not strange.called.tensor.dim():
                raise
            called = strange.called
    tensor = called.tensor.detach().float().cpu()
    vocab_size = manifest.embedding_rows or manifest.vocab_size or inputs.vocab_size
    kind = kind_of(tuple(tensor.shape), ids.shape[0], ids.shape[1], vocab_size)
    keep = mask.bool()
    real = tensor[keep] if tensor.shape[:2] == ids.shape else tensor
    finite = bool(torch.isfinite(real).all())
    per_sequence = tensor.reshape(tensor.shape[0], -1)
    return Output(
        kind=kind,
        shape=tuple(tensor.shape),
        dtype=str(called.tensor.dtype).removeprefix("torch."),
        where=called.where,
        batch=ids.shape[0],
        length=ids.shape[1],
        vocab_size=vocab_size,
        finite=finite,
        minimum=float(real.min()) if real.numel() else float("nan"),
        maximum=float(real.max()) if real.numel() else float("nan"),
        std_over_states=_std(real),
        std_over_sequences=_std(per_sequence[:, -1:]),
        all_shapes=called.all_shapes,
        call=live.caller.description,
        class_name=type(live.model).__name__,
        training=bool(getattr(live.model, "training", False)),
        per_sequence_pooled=live.score_head is not None,
        sums_to_one=_sums_to_one(real, kind),
    )


def _of_function(live: Any, inputs: Inputs) -> Output:
    from rlhf_doctor.instruments.scoring import score_texts_of_ids

    scores = score_texts_of_ids(live, inputs)
    spoken = [s for s in scores if s == s]  # a function may abstain on some texts, and these are no texts at all
    batch = len(inputs.sequences)
    return Output(
        kind="scalar per sequence",
        shape=(len(scores),),
        dtype="float",
        where="the function's result",
        batch=batch,
        length=max(len(s) for s in inputs.sequences),
        vocab_size=inputs.vocab_size,
        finite=bool(spoken) and all(abs(s) != float("inf") for s in spoken),
        minimum=min(spoken, default=float("nan")),
        maximum=max(spoken, default=float("nan")),
        std_over_states=0.0,
        std_over_sequences=0.0,
        all_shapes={"result": (len(scores),)},
        call="function(prompts, responses)",
        class_name=getattr(live.model, "__name__", type(live.model).__name__),
        training=False,
    )


def kind_of(shape: tuple[int, ...], batch: int, length: int, vocab_size: int) -> str:
    """The name of an output shape, see ``Output.kind``.

    A last axis at least half the vocabulary is a vocabulary: some heads are padded, some are cut.
    """
    if shape in ((batch,), (batch, 1)):
        return "scalar per sequence"
    if shape in ((batch, length), (batch, length, 1), (batch * length,), (batch * length, 1)):
        return "scalar per token"
    if len(shape) == 3 and shape[:2] == (batch, length):
        return "vocabulary" if shape[2] >= max(vocab_size // 2, 4) else "vector per token"
    if len(shape) == 2 and shape[0] == batch * length and shape[1] >= max(vocab_size // 2, 4):
        return "vocabulary"
    if len(shape) == 2 and shape[0] == batch:
        return "vocabulary per sequence" if shape[1] >= max(vocab_size // 2, 4) else "vector per sequence"
    return "other"


def _std(tensor: Any) -> float:
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    return float(rows.std(dim=0).mean()) if rows.shape[0] > 1 else 0.0


def _sums_to_one(real: Any, kind: str) -> bool:
    if kind not in ("vector per token", "vector per sequence", "vocabulary") or not real.numel():
        return False
    sums = real.reshape(-1, real.shape[-1]).sum(-1)
    return bool(((sums - 1).abs() < 1e-3).all() and (real >= 0).all())

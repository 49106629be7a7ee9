"""The token sequences that the probes feed to every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_doctor.facts import Unavailable, fact
from rlhf_doctor.finding import Stage
from rlhf_doctor.instruments.readings import Inputs, Manifest

__all__ = ["PROBE_LENGTHS", "inputs"]

# Three lengths, all different from each other and from the batch size, so that no axis can be taken for another.
PROBE_LENGTHS = (9, 13, 16)


@fact(Stage.PROBE)
def inputs(setup: Any, options: Any, manifest: Mapping[str, Manifest]) -> Inputs:
    """Three sequences of 9, 13 and 16 tokens: the setup's own prompts where it has some, filled up with other tokens.

    Raises:
        Unavailable: neither a vocabulary size nor a tokenizer is known.
    """
    import torch

    rows = [m.embedding_rows or m.vocab_size for m in manifest.values() if m.embedding_rows or m.vocab_size]
    tokenizer = next((m.tokenizer for m in manifest.values() if m.tokenizer), None)
    size = min([r for r in rows if r] + ([tokenizer.size] if tokenizer else []), default=0)
    if size < 4:
        raise Unavailable("needs a vocabulary size: a tokenizer, or a model with an embedding")
    special = {i for i in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) if i is not None} if tokenizer else {0}
    ordinary = [i for i in range(size) if i not in special]
    generator = torch.Generator().manual_seed(options.seed)
    prompts, from_prompts = _prompt_ids(setup, size)
    sequences = []
    for index, length in enumerate(PROBE_LENGTHS):
        draw = torch.randint(len(ordinary), (length,), generator=generator).tolist()
        filler = [ordinary[i] for i in draw]
        start = [t for t in prompts[index % len(prompts)] if t not in special] if prompts else []
        sequences.append(tuple([*start, *filler][:length]) if len(start) < length else tuple(start[:length]))
    pad = tokenizer.pad_id if tokenizer and tokenizer.pad_id is not None and tokenizer.pad_id < size else 0
    side = (tokenizer.padding_side if tokenizer else None) or "right"
    return Inputs(
        sequences=tuple(sequences),
        pad_id=pad,
        eos_id=tokenizer.eos_id if tokenizer else None,
        bos_id=tokenizer.bos_id if tokenizer else None,
        vocab_size=size,
        padding_side=side,
        from_prompts=from_prompts,
        others={
            role: m.tokenizer
            for role, m in manifest.items()
            if m.tokenizer and tokenizer and m.tokenizer.fingerprint != tokenizer.fingerprint
        },
    )


def _prompt_ids(setup: Any, size: int) -> tuple[list[list[int]], bool]:
    """Ids of up to three prompts, and whether there were any."""
    prompts = setup.prompts
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        mask = prompts.get("attention_mask")
        rows = [[int(t) for t in row] for row in prompts["input_ids"][:3]]
        if mask is not None:
            rows = [
                [t for t, m in zip(row, keep, strict=True) if int(m)] for row, keep in zip(rows, mask[:3], strict=True)
            ]
        return [[t for t in row if t < size] for row in rows], True
    if prompts and callable(setup.tokenizer):
        rows = [list(setup.tokenizer(text)["input_ids"]) for text in list(prompts)[:3] if isinstance(text, str)]
        return [[int(t) for t in row if int(t) < size] for row in rows], bool(rows)
    return [], False

"""Checkpoint folders to measure on: 70B as real headers over sparse files, 124M with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

ROLES = ("policy", "reference", "reward", "value")
HEADS = {"policy": "lm_head", "reference": "lm_head", "reward": "score", "value": "score"}
CLASSES = {
    "policy": "LlamaForCausalLM",
    "reference": "LlamaForCausalLM",
    "reward": "LlamaForSequenceClassification",
    "value": "LlamaForTokenClassification",
}
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SHARD_BYTES = 5_000_000_000
SHARDS = 29


def labels(role: str) -> dict[str, object]:
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if HEADS[role] == "score" else {}


def llama_tensors(role: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a 70B Llama."""
    hidden, wide, keys = 8192, 28672, 1024
    yield "model.embed_tokens.weight", (32000, hidden)
    for layer in range(80):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield at + "mlp.gate_proj.weight", (wide, hidden)
        yield at + "mlp.up_proj.weight", (wide, hidden)
        yield at + "mlp.down_proj.weight", (hidden, wide)
        yield at + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield f"{HEADS[role]}.weight", (32000 if HEADS[role] == "lm_head" else 1, hidden)
    if role == "value":
        yield "score.bias", (1,)


def write_70b(folder: Path) -> dict[str, Path]:
    """Four 70B checkpoints in bfloat16: 29 shards each, every header real, every byte of data a hole."""
    made = {}
    for role in ROLES:
        made[role] = folder / role
        made[role].mkdir(parents=True)
        config = {**LLAMA_70B, "architectures": [CLASSES[role]], "dtype": "bfloat16", **labels(role)}
        (made[role] / "config.json").write_text(json.dumps(config))
        shards: list[dict[str, dict[str, object]]] = [{}]
        filled = 0
        for name, shape in llama_tensors(role):
            size = 2
            for n in shape:
                size *= n
            if filled + size > SHARD_BYTES:
                shards.append({})
                filled = 0
            shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [filled, filled + size]}
            filled += size
        places = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            places |= dict.fromkeys(shard, file)
            header = json.dumps(shard).encode()
            end = max(entry["data_offsets"][1] for entry in shard.values())  # type: ignore[index]
            with open(made[role] / file, "wb") as out:
                out.write(len(header).to_bytes(8, "little") + header)
                out.truncate(8 + len(header) + end)
        (made[role] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert len(shards) == SHARDS
        write_tokenizer(made[role])
    return made


def write_tokenizer(folder: Path) -> None:
    """A BPE tokenizer of 32 000 tokens, in the two files that transformers writes."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [chr(0x4E00 + i) for i in range(240)]
    pairs = [(a, b) for a in letters for b in letters][: 32000 - len(special) - len(letters)]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *(a + b for a, b in pairs)])}
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, t in enumerate(special)]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocabulary, "merges": [list(pair) for pair in pairs]}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_124m(folder: Path) -> dict[str, Path]:
    """Four Llamas of GPT-2 small's size (12 layers of 768, 32 000 tokens, float32), policy and reference the same."""
    import torch
    import transformers

    from rlhf_doctor.instruments.loading import quiet

    made = {}
    for role in ROLES:
        made[role] = folder / role
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2560,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
            **({"num_labels": 1} if labels(role) else {}),
        )
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(HEADS[role] == "score")
            getattr(transformers, CLASSES[role])(config).save_pretrained(made[role])
        write_tokenizer(made[role])
    return made

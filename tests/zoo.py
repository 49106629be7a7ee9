"""Small models of many families, built from configs with random weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from rlhf_doctor.setups import RLHFSetup

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "gpt2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}),
    "neox": ("GPTNeoX", {"intermediate_size": 64}),
    "qwen2": ("Qwen2", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "moe": (
        "Mixtral",
        {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
SUFFIX = {"causal": "ForCausalLM", "sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


def decoder(family: str, kind: str = "causal", *, attention: str = "sdpa", seed: int = 0, **options: Any) -> Any:
    """A decoder of a family as causal LM, sequence classifier or token classifier, in eval mode."""
    prefix, own = DECODERS[family]
    labels = {"num_labels": 1} if kind != "causal" else {}
    config = getattr(transformers, f"{prefix}Config")(
        **COMMON, **own, **labels, **options, attn_implementation=attention
    )
    name = "GPT2LMHeadModel" if (family, kind) == ("gpt2", "causal") else prefix + SUFFIX[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, name)(config).eval()


class WithScalarHead(nn.Module):
    """A causal LM with a scalar head of any name: tuple of (logits, None, values), as value-head models return."""

    def __init__(self, lm: Any, name: str = "v_head") -> None:
        super().__init__()
        self.lm = lm
        self.name = name
        self.add_module(name, nn.Linear(lm.config.hidden_size, 1))

    @property
    def config(self) -> Any:
        """The language model's."""
        return self.lm.config

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """(B, T) -> (B, T, V), None, (B, T)."""
        out = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            output_hidden_states=True,
            use_cache=False,
        )
        values = getattr(self, self.name)(out.hidden_states[-1])
        return out.logits, None, values[..., 0]


def healthy_setup(
    family: str,
    *,
    head: str = "score",
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    shared: bool = False,
    side: str = "left",
    attention: str = "sdpa",
    seed: int = 0,
) -> RLHFSetup:
    """A healthy setup of one family in one of the usual layouts."""
    policy = decoder(family, attention=attention, seed=seed).to(dtype)
    reference = copy.deepcopy(policy).requires_grad_(False)
    reward = decoder(family, "sequence", attention=attention, seed=seed + 1).to(dtype).requires_grad_(False)
    if head == "score":
        kind = "token" if family != "neox" else "sequence"
        value = decoder(family, kind, attention=attention, seed=seed + 1).to(dtype)
    else:
        value = WithScalarHead(decoder(family, attention=attention, seed=seed + 1), head).to(dtype).eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():  # about its own settings for GPT-2's transposed linear layers
            warnings.simplefilter("ignore")
            policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)).eval()
    if shared:
        policy = value = WithScalarHead(policy, head if head != "score" else "v_head").to(dtype).eval()
    return RLHFSetup(
        policy=policy,
        reference="adapter-off" if lora and not shared else reference,
        reward=reward,
        value=value,
        tokenizer=tokenizer(side),
        prompts=[f"t{i} t{i + 3} t{i + 5}" + " t9" * (i % 3) for i in range(10, 20)],
        declared={"algorithm": "ppo", "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "temperature": 1.0}
        | ({"shared_trunk": True} if shared else {}),
    )


def tokenizer(side: str = "left") -> Any:
    """A word-level tokenizer over the zoo's vocabulary: pad 0, bos 1, eos 2."""
    import tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"t{i}": i for i in range(4, VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=side,
        model_max_length=128,
    )


class CausalConvolution(nn.Module):
    """A causal CNN over tokens: (ids) -> (B, T)."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 24)
        self.conv = nn.Conv1d(24, 24, 3)
        self.head = nn.Linear(24, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(self.emb(ids).transpose(1, 2), (2, 0))
        return self.head(torch.relu(self.conv(x)).transpose(1, 2))  # type: ignore[no-any-return]


class LSTMLanguageModel(nn.Module):
    """An LSTM with a vocabulary head: (ids) -> (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 24)
        self.lstm = nn.LSTM(24, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.emb(ids))[0])  # type: ignore[no-any-return]


class TimeFirstGRU(nn.Module):
    """A GRU whose input is (T, B): (ids) -> (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, 24)
        self.gru = nn.GRU(24, 24)
        self.head = nn.Linear(24, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.emb(ids.T))
        return self.head(states)[..., 0].T  # type: ignore[no-any-return]


def bert(kind: str = "token") -> Any:
    """A BERT with one label per token or per sequence."""
    config = transformers.BertConfig(
        **COMMON,
        intermediate_size=64,
        num_labels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, f"Bert{SUFFIX[kind]}")(config).eval()


def mamba() -> Any:
    """A Mamba language model."""
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    ).eval()


def mamba2() -> Any:
    """A Mamba-2 language model."""
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1,
            chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def hybrid() -> Any:
    """A Jamba language model: attention in one layer of two, a state space in the other."""
    return transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **COMMON, intermediate_size=64, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False,
            mamba_d_state=8, mamba_dt_rank=4,
        )
    ).eval()  # fmt: skip


ZOO: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"{family} ({attention})": (
            lambda family=family, attention=attention: decoder(family, attention=attention),
            "transformer decoder",
        )
        for family in DECODERS
        for attention in ("eager", "sdpa")
    },
    "llama classifier": (lambda: decoder("llama", "sequence"), "transformer decoder"),
    "gpt2 token classifier": (lambda: decoder("gpt2", "token"), "transformer decoder"),
    "bert": (bert, "transformer encoder"),
    "bert classifier": (lambda: bert("sequence"), "transformer encoder"),
    "mamba": (mamba, "state space"),
    "mamba2": (mamba2, "state space"),
    "jamba": (hybrid, "hybrid state space"),
    "causal CNN": (CausalConvolution, "convolutional"),
    "LSTM": (LSTMLanguageModel, "recurrent"),
    "time-first GRU": (TimeFirstGRU, "recurrent"),
}

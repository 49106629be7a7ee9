"""Policies that are healthy or sick in a known way, in the style of plain modules and of wrapped Hugging Face models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rlhf_doctor.selftest.specimens import HandWrittenDecoder, vocabulary

__all__ = [
    "AlwaysDropping",
    "CachedDecoder",
    "ConvolutionalPolicy",
    "HalfHead",
    "RecurrentPolicy",
    "Wrapped",
    "alone",
    "frozen",
    "hand_written",
    "paired",
]


def alone(setup: Any, **changes: Any) -> Any:
    """The setup with other models; the loop and the optimizers, which hold the old ones, are left out.

    A policy that is changed is declared to be untrained, unless ``declared`` says otherwise.
    """
    if "policy" in changes:
        changes["declared"] = {"policy_init": "base", **changes.get("declared", {})}
    return setup.but(step=None, optimizers=(), state=(), **changes)


def paired(setup: Any, policy: nn.Module) -> Any:
    """The setup with another policy and a frozen copy of it as the reference."""
    return alone(setup, policy=policy, reference=frozen(policy))


def frozen(model: nn.Module) -> Any:
    """An independent copy in eval mode that requires no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def hand_written(setup: Any, **options: Any) -> Any:
    """A hand-written language model over the setup's vocabulary, in eval mode."""
    size = vocabulary(setup)
    return HandWrittenDecoder(size, size, **options).eval()


class Wrapped(nn.Module):
    """A language model of Hugging Face behind another call.

    Args:
        lm: the model.
        way: "plain"; "maskless" drops the mask; "counted" drops the position ids that follow from it; "open" lets every
            token see every other; "ahead" mixes the next position's logits in; "probabilities" ends in a softmax;
            "hidden" ends before the head; "last" keeps the last position alone; "log-softmax" gives log-probabilities
            in bfloat16.
    """

    def __init__(self, lm: Any, way: str = "plain") -> None:
        super().__init__()
        self.lm = lm
        self.way = way

    @property
    def config(self) -> Any:
        """The language model's."""
        return self.lm.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, T) -> {"logits": (B, T, V)}."""
        mask: torch.Tensor | None = attention_mask
        places: torch.Tensor | None = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if self.way in ("maskless", "counted"):
            places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if self.way == "maskless":
            mask = None
        if self.way == "open":
            mask = attention_mask[:, None, None].bool().expand(-1, 1, input_ids.shape[1], -1)
        out = self.lm(
            input_ids=input_ids, attention_mask=mask, position_ids=places, use_cache=False, output_hidden_states=True
        )
        logits = out.logits
        if self.way == "ahead":
            logits = logits + 0.5 * torch.cat([logits[:, 1:], logits[:, -1:]], 1)
        elif self.way == "probabilities":
            logits = logits.softmax(-1)
        elif self.way == "hidden":
            logits = out.hidden_states[-1][..., : logits.shape[-1] // 3]
        elif self.way == "last":
            logits = logits[:, -1:]
        elif self.way == "log-softmax":
            logits = logits.bfloat16().log_softmax(-1)
        return {"logits": logits}


class ConvolutionalPolicy(nn.Module):
    """A causal CNN with a vocabulary head: (ids) -> (B, T, V)."""

    def __init__(self, vocab: int, hidden: int = 24, kernel: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.conv = nn.Conv1d(hidden, hidden, kernel)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        x = nn.functional.pad(self.table(ids).transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        out: torch.Tensor = self.out(torch.relu(self.conv(x)).transpose(1, 2))
        return out


class RecurrentPolicy(nn.Module):
    """A GRU with a vocabulary head: (ids) -> (logits (B, T, V), state)."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) -> (B, T, V), (1, B, H)."""
        states, last = self.rnn(self.table(tokens))
        return self.out(states), last


class AlwaysDropping(nn.Module):
    """Dropout that does not listen to eval(), after another module."""

    def __init__(self, inner: nn.Module, p: float = 0.1) -> None:
        super().__init__()
        self.inner = inner
        self.p = p

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``inner`` gives, a share of it dropped."""
        return nn.functional.dropout(self.inner(*args, **kwargs), self.p, training=True)


class HalfHead(nn.Module):
    """A hand-written float32 trunk whose vocabulary product runs in bfloat16."""

    def __init__(self, body: HandWrittenDecoder, vocab: int, scale: float = 1.0) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.out.out_features, vocab, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V) bfloat16."""
        logits: torch.Tensor = self.body(ids, mask).bfloat16() @ self.head.weight.bfloat16().T
        return logits


class CachedDecoder(nn.Module):
    """A hand-written decoder of one layer with its own cache: (ids, mask, cache) -> (logits, cache).

    Args:
        vocab: rows of the embedding.
        forgets: how the cache is wrong: "" for not at all, "position" counts every call from 0, "oldest" drops the
            first cached token at each step.
    """

    def __init__(self, vocab: int, hidden: int = 24, forgets: str = "") -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocab, hidden), nn.Embedding(256, hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, vocab)
        self.forgets = forgets

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """ids (B, t), mask (B, t_past + t) -> (B, t, V), keys and values (B, t_past + t, H)."""
        new = ids.shape[1]
        counted = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        places = counted
        if self.forgets == "position" and cache is not None:
            places = torch.arange(new)[None]
        x = self.table(ids) + self.places(places)
        q, k, v = self.qkv(x).chunk(3, -1)
        if cache is not None:
            drop = 1 if self.forgets == "oldest" and cache[0].shape[1] > 1 else 0
            k, v = torch.cat([cache[0][:, drop:], k], 1), torch.cat([cache[1][:, drop:], v], 1)
        total = k.shape[1]
        allowed = torch.ones(new, total, dtype=torch.bool).tril(total - new) & mask[:, None, -total:].bool()
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9).softmax(-1)
        return self.out(x + weights @ v), (k, v)


def _marks(setup: Any) -> dict[str, Any]:
    t = setup.tokenizer
    return {"pad_token_id": t.pad_token_id, "bos_token_id": t.bos_token_id, "eos_token_id": t.eos_token_id}


def _sizes(setup: Any) -> dict[str, Any]:
    return {"vocab_size": vocabulary(setup), "hidden_size": 32, "num_hidden_layers": 2, **_marks(setup)}


def bert(setup: Any) -> Any:
    """A BERT with its language-model head."""
    import transformers

    config = transformers.BertConfig(
        **_sizes(setup), num_attention_heads=4, intermediate_size=64, hidden_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config).eval()


def mamba(setup: Any) -> Any:
    """A Mamba language model."""
    import transformers

    return transformers.MambaForCausalLM(transformers.MambaConfig(**_sizes(setup), state_size=8)).eval()


def t5(setup: Any) -> Any:
    """A T5, encoder and decoder."""
    import transformers

    config = transformers.T5Config(
        vocab_size=vocabulary(setup),
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **_marks(setup),
    )
    return transformers.T5ForConditionalGeneration(config).eval()


class BatchNormalised(nn.Module):
    """A language model whose logits are centred over the rows of the batch: (ids, mask) -> (B, T, V)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        logits: torch.Tensor = self.inner(ids, mask)
        return logits - 0.5 * logits.mean(0)


def forget_positions(lm: Any) -> Any:
    """A Hugging Face language model that is told position 0 for the first token of every call."""
    inner = lm.forward

    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        **more: Any,
    ) -> Any:
        if past_key_values is not None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **more,
        )

    lm.forward = forward
    return lm


def fresh(lm: Any, seed: int = 5) -> Any:
    """A Hugging Face model of the same configuration with random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return type(lm)(copy.deepcopy(lm.config)).eval()


def adapted(lm: Any, *, trained: bool = False, seed: int = 3, **options: Any) -> Any:
    """A copy of a Hugging Face model under a LoRA adapter, fresh (B = 0) or with something learnt, in eval mode."""
    import warnings

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about layers that store their weights transposed
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
        made = get_peft_model(copy.deepcopy(lm), config).eval()
        if trained:
            with torch.no_grad():
                for name, parameter in made.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
    return made


class Muted(nn.Module):
    """A language model that gives one token, its EOS, almost no probability: (ids, mask) -> (B, T, V)."""

    def __init__(self, lm: Any, token: int) -> None:
        super().__init__()
        self.lm = lm
        self.token = token

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits: torch.Tensor = self.lm(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        quiet = torch.zeros(logits.shape[-1], device=logits.device)
        quiet[self.token] = 20.0
        return logits - quiet


class TwoHeads(nn.Module):
    """A hand-written policy and critic on one trunk: (ids, mask) -> (logits (B, T, V), values (B, T))."""

    def __init__(self, vocab: int, hidden: int = 24) -> None:
        super().__init__()
        self.trunk = HandWrittenDecoder(vocab, hidden, hidden=hidden)
        self.lm_head = nn.Linear(hidden, vocab)
        self.v_head = nn.Linear(hidden, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) -> (B, T, V), (B, T)."""
        states = self.trunk(ids, mask)
        return self.lm_head(states), self.v_head(states)[..., 0]

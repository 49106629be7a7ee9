"""Language models of Hugging Face that are healthy or sick in a known way."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from rlhf_doctor.selftest.specimens import vocabulary

__all__ = ["Muted", "Wrapped", "adapted", "bert", "forget_positions", "fresh", "mamba", "t5"]


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


def forget_positions(lm: Any) -> Any:
    """A Hugging Face language model that is told position 0 for the first token of every call."""
    inner = lm.forward
    name = "cache" if "cache" in inspect.signature(inner).parameters else "past_key_values"  # renamed in 5.24

    def forward(
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: Any = None,
        **more: Any,
    ) -> Any:
        if cache is not None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{name: cache},
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

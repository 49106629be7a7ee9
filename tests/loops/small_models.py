"""Tiny Llamas with the habits of trained ones, a tokenizer of whole words and prompts of several lengths.

Nothing here touches the global random generators.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, Literal

import tokenizers
import torch
import transformers
from torch.utils.checkpoint import checkpoint

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "VOCAB",
    "checkpoint_reentrantly",
    "prompts",
    "standardise",
    "teach_to_end",
    "tiny_llama",
    "tokenizer",
]

SPOKEN = (
    "the a film book song story plot actor was is seems felt very quite rather too good great fine fresh dull bad slow "
    "flat long short warm cold please write about tell review of this that one and but or not never always we they you "
    "liked loved hated saw heard read again once well badly"
)
WORDS = SPOKEN.split()
PAD, BOS, EOS, UNK = 0, 1, 2, 3
VOCAB = 4 + len(WORDS)
WIDTH = 32


def tokenizer(side: str = "left") -> Any:
    """A word-level tokenizer: pad 0, bos 1 (set before every text), eos 2."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK}
    words = special | {word: 4 + i for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
        model_max_length=64,
    )


def prompts() -> list[str]:
    """Eight texts of two to six words."""
    return [
        "please write about the film",
        "tell about that song",
        "review the book",
        "write of the actor please",
        "this story",
        "you saw the film please write",
        "please review this short plot",
        "the song was",
    ]


def tiny_llama(seed: int, head: Literal["lm", "score", "tokens"] = "lm") -> Any:
    """A Llama of 2 layers and width 32 in eval mode, a function of its seed.

    ``lm`` ends a text after about eight tokens and never says pad. ``score`` gives one number per text, of mean 0 and
    standard deviation 1 over texts; ``tokens`` one number per token.
    """
    return copy.deepcopy(_built(seed, head))


@functools.cache
def _built(seed: int, head: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    if head != "lm":
        config.num_labels = 1
        config.classifier_dropout = 0.0
    kind = {
        "lm": transformers.LlamaForCausalLM,
        "score": transformers.LlamaForSequenceClassification,
        "tokens": transformers.LlamaForTokenClassification,
    }[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        if head == "lm":
            teach_to_end(model.model, model.model.embed_tokens, model.lm_head)
        else:
            standardise(model.model, model.score)
    return model


def checkpoint_reentrantly(model: Any) -> None:
    """Blocks are computed anew in the backward pass, in the old way that needs inputs with a gradient."""

    def quietly(function: Any, *args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no input has a gradient
            return checkpoint(function, *args, use_reentrant=True)

    model._set_gradient_checkpointing(gradient_checkpointing_func=quietly)


@torch.no_grad()
def teach_to_end(trunk: Any, embedding: torch.nn.Embedding, lm_head: torch.nn.Linear) -> None:
    """One direction that all states share lets the head say eos once in ten tokens, and pad never.

    ``lm_head`` must not be tied to the embedding; what it says otherwise gets logits of standard deviation 1.2.
    """
    shared = torch.randn(embedding.embedding_dim)
    embedding.weight += 1.5 * embedding.weight.std() * len(shared) ** 0.5 * shared / shared.norm()
    hidden = _states(trunk)
    mean, head = hidden.mean(0), lm_head.weight
    head -= (head @ mean / (mean @ mean))[:, None] * mean
    head *= 1.2 / (hidden @ head.T).std()
    head[PAD] = -15 * mean / (mean @ mean)
    rest = (hidden @ head.T).logsumexp(-1).mean()
    head[EOS] = (rest - 2.3) * mean / (mean @ mean) + 0.5 * head[EOS]


@torch.no_grad()
def standardise(trunk: Any, score: torch.nn.Linear) -> None:
    """Scores of mean 0 and standard deviation 1 over random texts."""
    hidden = _states(trunk)
    mean, head = hidden.mean(0), score.weight[0]
    head -= (head @ mean) / (mean @ mean) * mean
    head /= (hidden @ head).std()


def _states(trunk: Any) -> torch.Tensor:
    """The last hidden states of 64 random texts."""
    return trunk(input_ids=torch.randint(4, VOCAB, (64, 12))).last_hidden_state[:, -1]  # type: ignore[no-any-return]

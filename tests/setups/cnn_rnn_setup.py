"""A team's setup: Llama-style policy and reference, and, for speed, a CNN as reward model and a GRU as critic."""

import copy

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "film",
    "book",
    "was",
    "is",
    "very",
    "quite",
    "good",
    "great",
    "dull",
    "bad",
    "long",
    "short",
    "please",
    "write",
    "review",
    "of",
    "about",
    "summary",
    "music",
    "story",
    "plot",
    "acting",
    "slow",
    "fast",
    "funny",
    "sad",
    "and",
    "but",
    "not",
    "really",
    "never",
    "always",
]


class CNNRewardModel(nn.Module):
    """Embeddings, two convolutions over time, the maximum over time, one score: (B, T) ids -> (B,)."""

    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.convolutions = nn.Sequential(
            nn.Conv1d(width, width, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv1d(width, width, kernel_size=3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.score = nn.Linear(width, 1)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[:, None, :].float()
        features = self.convolutions(self.embedding(input_ids).transpose(1, 2) * mask) * mask
        return self.score(features.amax(dim=-1)).squeeze(-1)


class GRUCritic(nn.Module):
    """Embeddings, a GRU, one value per token: (B, T) ids -> (B, T)."""

    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.v_head = nn.Linear(width, 1)

    def forward(self, input_ids, attention_mask=None):
        states, _ = self.gru(self.embedding(input_ids))
        return self.v_head(states).squeeze(-1)


def build():
    """The setup as a dict of RLHFSetup's fields."""
    torch.manual_seed(0)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", model_max_length=128,
    )  # fmt: skip
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    reward = CNNRewardModel(len(tokenizer)).eval().requires_grad_(False)
    return {
        "policy": policy,
        "reference": reference,
        "reward": reward,
        "value": GRUCritic(len(tokenizer)),
        "tokenizer": tokenizer,
        "prompts": ["please write a review of the film", "a summary of the book", "write about music"],
        "declared": {"algorithm": "ppo", "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05},
    }

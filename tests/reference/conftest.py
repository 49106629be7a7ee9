"""Models for the reference's tests: random ones made anew, and one trained setup a session."""

import pytest
import torch
import transformers

import reference_impl
from reference_impl import setup, task


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than one only get into each other's way at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def models():
    """Four models with random weights; the policy has moved a little from the reference."""
    made = setup.build_models(0, trained=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.policy.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return made


@pytest.fixture(scope="session")
def trained():
    """The healthy setup. Tests must not change its models."""
    return reference_impl.build_setup(0)


STYLES = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "neox": ("GPTNeoX", {}),
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory):
    """A folder for a style, with policy/, reward/ and prompts.txt: random weights, and dropout when in training."""
    words, made = setup.build_tokenizer(), {}

    def make(style):
        if style not in made:
            name, options = STYLES[style]
            sizes = {} if style == "gpt2" else SMALL | {"max_position_embeddings": 64}
            ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(words)}
            made[style] = folder = tmp_path_factory.mktemp(style)
            torch.manual_seed(0)
            for role, kind, head in (("policy", "LMHeadModel" if style == "gpt2" else "ForCausalLM", {}),
                                     ("reward", "ForSequenceClassification", {"num_labels": 1})):  # fmt: skip
                config = getattr(transformers, f"{name}Config")(**ids, **sizes, **options, **head)
                getattr(transformers, name + kind)(config).save_pretrained(folder / role)
                words.save_pretrained(folder / role)
            (folder / "prompts.txt").write_text("\n".join(task.prompts()[:8]) + "\n")
        return made[style]

    return make

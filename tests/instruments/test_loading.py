"""Every layout of checkpoint loads as what it is, offline and quietly; what cannot be loaded says why."""

from __future__ import annotations

import pickle
import socket
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints as made
import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import DECODERS, decoder

from rlhf_doctor.examine import Options, examine
from rlhf_doctor.facts import Broken
from rlhf_doctor.instruments.loading import NOTE, load_model
from rlhf_doctor.instruments.models import Models
from rlhf_doctor.instruments.readings import Loading
from rlhf_doctor.setups import RLHFSetup

IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 4, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
SUFFIX = {"causal": "policy", "sequence": "reward", "token": "value"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError(f"tried to reach {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(*a))


def load(role: Any, path: Path, **options: Any) -> Any:
    trust = options.pop("trust_remote_code", False)
    return load_model(role, path, RLHFSetup(**{role: path}, trust_remote_code=trust), Options(**options))


def note(model: Any) -> Loading:
    found: Loading = model.__dict__[NOTE]
    return found


def expected_values(head_bias: float = 0.5) -> torch.Tensor:
    """(B, T): the backbone of the tiny Llama through the head that the checkpoints have."""
    with torch.no_grad():
        hidden = decoder("llama").model(IDS, attention_mask=MASK).last_hidden_state
        return (hidden @ made.HEAD[0]) + head_bias


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["causal", "sequence", "token"])
def test_the_classes_of_transformers_come_back_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    if (family, kind) == ("moe", "token"):
        kind = "sequence"
    original = decoder(family, kind)
    model = load(SUFFIX[kind], made.save(original, tmp_path / "c"))
    assert type(model) is type(original)
    assert not model.training
    assert note(model).missing == note(model).unexpected == ()
    got, want = model.state_dict(), original.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen2"])
def test_shards_and_pickles_hold_the_same_model(family: str, tmp_path: Path) -> None:
    original = decoder(family)
    sharded = made.save(original, tmp_path / "s", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = made.as_pickle(made.save(original, tmp_path / "p"))
    for path in (sharded, pickled):
        model = load("policy", path)
        assert note(model).missing == ()
        assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_dtype_is_the_checkpoints_own_unless_asked_otherwise(tmp_path: Path) -> None:
    path = made.save(decoder("llama").to(torch.bfloat16), tmp_path / "c")
    assert load("policy", path).dtype == torch.bfloat16
    assert load("policy", path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("write", [made.trl_value_head, made.llamafactory_value_head])
def test_a_value_head_beside_the_language_model_gives_values(write: Callable[[Path], Path], tmp_path: Path) -> None:
    model = load("value", write(tmp_path / "c"))
    torch.testing.assert_close(model(IDS, attention_mask=MASK), expected_values(), atol=1e-6, rtol=0)
    assert dict(model.named_parameters())["v_head.summary.weight"].shape == (1, 32)
    assert note(model).missing == ()


def test_the_same_folder_as_policy_is_the_language_model(tmp_path: Path) -> None:
    model = load("policy", made.trl_value_head(tmp_path / "c"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model(IDS).logits.shape == (2, 5, 97)


@pytest.mark.parametrize("family", ["gpt2", "neox", "moe"])
def test_a_value_head_works_on_every_backbone(family: str, tmp_path: Path) -> None:
    model = load("value", made.trl_value_head(tmp_path / "c", family))
    backbone = decoder(family).base_model
    with torch.no_grad():
        want = backbone(IDS, attention_mask=MASK).last_hidden_state @ made.HEAD[0] + 0.5
        places = (MASK.cumsum(-1) - 1).clamp(min=0)
        got = model(IDS, attention_mask=MASK, position_ids=places)
        torch.testing.assert_close(got * MASK, want * MASK, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "write",
    [made.deepspeed_chat, made.openrlhf, lambda path: made.openrlhf(path, "value_head")],
    ids=["deepspeed-chat", "openrlhf", "openrlhf value_head"],
)
def test_reward_models_of_frameworks_score_at_the_last_token(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    last = expected_values(0.0)[torch.arange(2), torch.tensor([4, 3])]
    with torch.no_grad():
        torch.testing.assert_close(load("reward", path)(IDS, MASK), last, atol=1e-6, rtol=0)
        torch.testing.assert_close(load("value", path)(IDS, MASK), expected_values(0.0), atol=1e-6, rtol=0)
    assert note(load("reward", path)).missing == ()
    assert note(load("reward", path)).unexpected == ()


def test_a_normalised_reward_is_normalised_with_its_own_numbers(tmp_path: Path) -> None:
    path = made.openrlhf(tmp_path / "c", normalize_reward=True, mean=2.0, std=4.0)
    last = expected_values(0.0)[torch.arange(2), torch.tensor([4, 3])]
    with torch.no_grad():
        torch.testing.assert_close(load("reward", path)(IDS, MASK), (last - 2) / 4, atol=1e-6, rtol=0)
        torch.testing.assert_close(load("value", path)(IDS, MASK), expected_values(0.0), atol=1e-6, rtol=0)


def test_a_head_of_two_layers_is_built(tmp_path: Path) -> None:
    path = made.save(decoder("llama"), tmp_path / "c")
    tensors = load_file(path / "model.safetensors")
    first, second = torch.eye(32), made.HEAD.clone()
    tensors |= {"v_head.0.weight": first, "v_head.0.bias": torch.zeros(32), "v_head.2.weight": second}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        hidden = decoder("llama").model(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(load("value", path)(IDS, MASK), hidden.relu() @ made.HEAD[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("role", "ending"), [("reward", "ForSequenceClassification"), ("value", "ForTokenClassification")]
)
def test_a_language_model_as_reward_or_value_gets_a_new_head_and_says_so(
    role: str, ending: str, tmp_path: Path
) -> None:
    model = load(role, made.save(decoder("llama"), tmp_path / "c"))
    assert type(model).__name__ == f"Llama{ending}"
    assert "score.weight" in note(model).missing
    assert model.config.num_labels == 1  # as loops do that make a critic of a language model


def test_a_head_of_one_row_without_id2label_is_not_made_to_fit(tmp_path: Path) -> None:
    path = made.edit(made.save(decoder("llama", "sequence"), tmp_path / "c"), id2label=None, label2id=None)
    with pytest.raises(Broken, match=r"score\.weight.*\(1, 32\).*\(2, 32\).*id2label") as failure:
        load("reward", path)
    assert str(path) in failure.value.sentence


def test_an_adapter_sits_on_its_base(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    model = load("policy", made.lora(tmp_path / "a", base))
    assert type(model).__name__.startswith("PeftModel")
    assert note(model) == Loading((), (), "LlamaForCausalLM with an adapter")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, decoder("llama")(IDS).logits)


def test_an_adapted_reward_keeps_the_head_it_was_trained_with(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    path = made.lora(tmp_path / "a", base, "SEQ_CLS", "AutoModelForSequenceClassification", num_labels=1)
    model = load("reward", path)
    assert model(IDS).logits.shape == (2, 1)
    assert note(model).missing == ()
    saved = load_file(path / "adapter_model.safetensors")
    live = next(p for n, p in model.named_parameters() if "score.modules_to_save" in n)
    assert torch.equal(live, next(t for n, t in saved.items() if "score" in n))


def test_an_adapted_reward_without_its_head_says_what_is_missing(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    path = made.lora(tmp_path / "a", base, "SEQ_CLS", "AutoModelForSequenceClassification", num_labels=1)
    tensors = load_file(path / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if "score" not in n}
    save_file(kept, path / "adapter_model.safetensors", {"format": "pt"})
    assert any("score" in name for name in note(load("reward", path)).missing)


def test_an_adapter_with_a_value_head_gives_values(tmp_path: Path) -> None:
    base = made.save(decoder("llama"), tmp_path / "base")
    path = made.lora(tmp_path / "a", base)
    head = {"v_head.summary.weight": made.HEAD.clone(), "v_head.summary.bias": torch.tensor([0.5])}
    save_file(head, path / "value_head.safetensors", {"format": "pt"})
    with torch.no_grad():
        values = load("value", path)(IDS, MASK)
        plain = expected_values()
    assert values.shape == (2, 5)
    assert not torch.allclose(values, plain)  # the adapter is in the backbone
    hidden = load("policy", path).get_base_model().model(IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(values, hidden @ made.HEAD[0] + 0.5, atol=1e-6, rtol=0)


def test_an_adapter_without_its_base_says_so(tmp_path: Path) -> None:
    path = made.lora(tmp_path / "a", made.save(decoder("llama"), tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(Broken, match="no folder on this machine"):
        load("policy", path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "plain pickle"])
def test_code_in_a_pickle_is_never_run(how: str, tmp_path: Path) -> None:
    path = made.as_pickle(made.save(decoder("llama"), tmp_path / "c"))
    trap = {"model.norm.weight": torch.ones(32), "x": Malicious(tmp_path / "owned")}
    if how == "torch.save":
        torch.save(trap, path / "pytorch_model.bin")
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(Broken) as failure:
        load("policy", path)
    assert str(path / "pytorch_model.bin") in failure.value.sentence
    assert "\n" not in failure.value.sentence
    assert not (tmp_path / "owned").exists()
    if how == "torch.save":
        assert "code" in failure.value.sentence
        torch.load(path / "pytorch_model.bin", weights_only=False)
        assert (tmp_path / "owned").exists()  # the trap would have worked


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 and no more", b"\x80\x05."])
def test_a_damaged_pickle_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = made.as_pickle(made.save(decoder("llama"), tmp_path / "c"))
    (path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(Broken) as failure:
        load("policy", path)
    assert str(path / "pytorch_model.bin") in failure.value.sentence
    assert "\n" not in failure.value.sentence


REMOTE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_that_a_checkpoint_brings_along_runs_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    path = made.save(decoder("llama"), tmp_path / "c")
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    made.edit(path, model_type="odd", architectures=["OddForCausalLM"], auto_map=auto_map)
    (path / "modeling_odd.py").write_text(REMOTE.format(mark=str(tmp_path / "ran")))
    with pytest.raises(Broken, match="--trust-remote-code"):
        load("policy", path)
    assert not (tmp_path / "ran").exists()
    assert type(load("policy", path, trust_remote_code=True)).__name__ == "OddForCausalLM"
    assert (tmp_path / "ran").exists()


def test_a_truncated_file_is_the_sentence_that_the_manifest_has(tmp_path: Path) -> None:
    path = made.save(decoder("llama"), tmp_path / "c")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Broken, match="is truncated") as failure:
        load("policy", path)
    assert str(weights) in failure.value.sentence


def test_an_unknown_kind_of_model_is_one_sentence(tmp_path: Path) -> None:
    path = made.edit(made.save(decoder("llama"), tmp_path / "c"), model_type="unheard-of")
    with pytest.raises(Broken) as failure:
        load("policy", path)
    assert str(path) in failure.value.sentence
    assert "\n" not in failure.value.sentence


def test_loading_says_nothing_and_leaves_the_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    path = made.save(decoder("llama"), tmp_path / "c")  # as a reward its head is new, which transformers reports
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    load("reward", path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)) == before


def test_models_are_let_go_of_one_by_one_even_where_a_measurement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, Any] = {}
    release = Models.release

    def released(self: Models, role: Any) -> None:
        found = self.live.get(role)
        if found is not None:
            alive[role] = weakref.ref(next(found.module.parameters()))
        del found
        release(self, role)
        assert [r for r, parameter in alive.items() if parameter() is not None] == []

    monkeypatch.setattr(Models, "release", released)
    path = made.with_tokenizer(made.save(decoder("llama"), tmp_path / "c"))
    made.save(decoder("llama"), tmp_path / "critic")  # a language model has no scalar head: many facts fail
    found = examine(RLHFSetup(policy=path, reference=path, value=tmp_path / "critic"))
    assert list(alive) == ["policy", "reference", "value"]
    assert found.errors == ()

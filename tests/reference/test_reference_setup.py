"""The setup of the reference itself, as a user of it sees it, and the pipeline that writes it to disk."""

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import reference_impl
from reference_impl import ppo, reward_modeling, rollout, setup, sft, task

PACKAGE = Path(reference_impl.__file__).parent
CLASSES = {
    "policy": "AutoModelForCausalLM",
    "reference": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "value": "AutoModelForTokenClassification",
}


def drawn(built, repeats=4):
    prompt, mask = rollout.encode_prompts(built["tokenizer"], built["prompts"] * repeats)
    torch.manual_seed(1)
    return rollout.sample(built["policy"], prompt, mask, T=task.RESPONSE_LENGTH, temperature=1.0, eos=2, pad=0)


def test_importing_the_package_loads_no_torch():
    code = "import sys, reference_impl; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_package_stands_alone_and_stays_small():
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    assert sum(lines.values()) < 1500
    assert lines["ppo.py"] < 300
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "rlhf_doctor" for name in names), path


def test_the_dict_has_the_fields_and_nothing_else(trained):
    assert list(trained) == [
        *setup.ROLES,
        "tokenizer",
        "prompts",
        "preferences",
        "step",
        "optimizers",
        "state",
        "declared",
    ]
    assert len(trained["prompts"]) >= 16
    assert len(trained["preferences"]) >= 32
    declared = trained["declared"]
    assert declared["batch_size"] % declared["num_minibatches"] == 0
    assert declared["prompt_length"] == 10
    assert trained["policy"].config.max_position_embeddings >= declared["prompt_length"] + declared["response_length"]


def test_the_policy_has_learnt_the_demonstrations_and_to_end(trained):
    texts = task.demonstrations(128, random.Random(99))
    with torch.no_grad():
        loss = sft.sft_loss(trained["policy"], trained["tokenizer"], texts).item()
        untrained = sft.sft_loss(setup.build_models(0, trained=False).policy, trained["tokenizer"], texts).item()
    assert loss < 1.25
    assert untrained > 3.5
    assert drawn(trained).ended.double().mean() > 0.95


def test_the_reference_is_an_independent_copy_of_the_policy(trained):
    policy, reference = trained["policy"], trained["reference"]
    pairs = list(zip(policy.parameters(), reference.parameters(), strict=True))
    assert all(torch.equal(p, q) and p.data_ptr() != q.data_ptr() for p, q in pairs)
    assert all(p.requires_grad and not q.requires_grad for p, q in pairs)


def test_the_reward_model_ranks_and_is_on_scale(trained):
    reward, tokenizer, pairs = trained["reward"], trained["tokenizer"], trained["preferences"]
    assert reward_modeling.accuracy(reward, tokenizer, pairs) > 0.9
    assert reward_modeling.accuracy(reward, tokenizer, pairs, eos=False) > 0.9
    r = drawn(trained)
    scores = rollout.score(reward, r)
    assert abs(scores.mean()) < 0.3
    assert 0.7 < scores.std() < 1.4
    lengths = r.mask.sum(1).float()
    assert abs(torch.corrcoef(torch.stack([scores, lengths]))[0, 1]) < 0.3


def test_normalizing_undoes_any_scale_and_shift():
    models = setup.build_models(0, trained=False)
    prompt, mask = rollout.encode_prompts(models.tokenizer, task.prompts())
    torch.manual_seed(0)
    r = rollout.sample(models.reference, prompt, mask, T=20, temperature=1.0, eos=2, pad=0)
    with torch.no_grad():
        models.reward.score.weight.mul_(5)
    before = rollout.score(models.reward, r)
    mean, deviation = reward_modeling.normalize(models.reward, r)
    assert abs(mean) > 0.5
    assert (mean, deviation) == pytest.approx((before.mean().item(), before.std().item()), rel=1e-4)
    after = rollout.score(models.reward, r)
    assert after.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert after.std().item() == pytest.approx(1.0, abs=1e-4)
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.9


def test_the_end_of_sequence_hardly_turns_a_ranking(trained):
    texts = [(p, c) for p, c, _ in trained["preferences"]] + [(p, r) for p, _, r in trained["preferences"]]
    with torch.no_grad():
        finished, cut = reward_modeling.score_texts(trained["reward"], trained["tokenizer"], texts)
    first, second = ((chosen > rejected) for chosen, rejected in (finished.chunk(2), cut.chunk(2)))
    assert (first != second).double().mean() < 0.05


def test_the_value_model_starts_as_the_reward_model(trained):
    ids = trained["tokenizer"](trained["prompts"], padding=True, return_tensors="pt")["input_ids"]
    values, scores = trained["value"](input_ids=ids).logits, trained["reward"](input_ids=ids).logits
    assert values.shape == (*ids.shape, 1)
    torch.testing.assert_close(values[:, -1], scores)  # padded on the left, so the last column is the last token
    assert all(weight.requires_grad for weight in trained["value"].parameters())


def test_tokens_survive_decoding_and_encoding(trained):
    tokenizer, r = trained["tokenizer"], drawn(trained)
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 4
    for ids, mask in zip(r.response, r.mask, strict=True):
        kept = [i for i in ids[mask].tolist() if i not in special]
        text = tokenizer.decode(ids[mask], skip_special_tokens=True)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == kept
    odd = torch.isin(r.response, torch.tensor([0, 1, 3])) & r.mask
    assert odd.any(1).double().mean() < 0.02  # special tokens in the middle of a response are rare
    for role in setup.ROLES:
        config = trained[role].config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_building_is_deterministic_and_leaves_the_generators_alone(trained):
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    again = reference_impl.build_setup(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    for role in ("policy", "reward"):
        pairs = zip(trained[role].parameters(), again[role].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    other = setup.build_models(1, trained=False).policy
    same = setup.build_models(0, trained=False).policy
    assert not torch.equal(other.lm_head.weight, same.lm_head.weight)

    # The setup made again may be changed: a few steps raise the score.
    again["step"]()
    settings = ppo.Settings(learning_rate=5e-4, critic_learning_rate=1e-3)
    quick = setup.assemble(
        setup.Models(*(again[name] for name in (*setup.ROLES, "tokenizer"))), again["prompts"], [], settings
    )
    scores = [quick["step"]()["score"] for _ in range(12)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.4


def test_checkpoints_load_as_they_were_saved(tmp_path):
    built = reference_impl.build_setup(3, trained=False)
    folders = reference_impl.save_checkpoints(built, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(setup.ROLES) == set(folders)
    for role, folder in folders.items():
        loaded = getattr(transformers, CLASSES[role]).from_pretrained(folder).state_dict()
        saved = built[role].state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = built["prompts"][0]
        assert tokenizer(text)["input_ids"] == built["tokenizer"](text)["input_ids"]
        assert tokenizer.padding_side == "left"
        assert (folder / "model.safetensors").exists()

"""The command: what it writes, on the built-in task and on models from disk, and what it says of bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
import transformers

from reference_impl import __main__ as pipeline
from reference_impl import curves, loading, roles, setup

QUICK = ["--iterations", "2", "--batch-size", "8", "--response-length", "6"]
CLASSES = {
    "policy": "AutoModelForCausalLM",
    "reference": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "value": "AutoModelForTokenClassification",
}


def disk(folder, out, *more):
    given = {"out": out, "policy": folder / "policy", "reward": folder / "reward", "prompts": folder / "prompts.txt"}
    return [*(x for name, path in given.items() for x in (f"--{name}", str(path))), *QUICK, *more]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder, role):
    return getattr(transformers, CLASSES[role]).from_pretrained(folder).state_dict()


def refusal(arguments):
    with pytest.raises(SystemExit) as stop:
        pipeline.main([str(x) for x in arguments])
    assert isinstance(stop.value.code, str)  # Python prints it and exits with 1
    (line,) = stop.value.code.splitlines()
    return line


# ---- what is written


def test_the_pipeline_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "run"
    pipeline.main(["--out", str(out), "--iterations", "2", "--batch-size", "16", "--pairs", "512"])
    assert [row["step"] for row in rows(out)] == [1, 2]
    assert all(-2 <= row["gold"] <= 1 and row["eos_rate"] > 0.8 for row in rows(out))
    assert json.loads((out / "settings.json").read_text())["batch_size"] == 16
    assert all((out / role / "model.safetensors").exists() for role in setup.ROLES)
    assert all((out / role / "tokenizer.json").exists() for role in setup.ROLES)
    state = json.loads((out / "policy" / "trainer_state.json").read_text())
    assert (state["global_step"], state["log_history"]) == (2, rows(out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gain"] == pytest.approx(
        (summary["gold_after"] - summary["gold_before"]) / (1 - summary["gold_before"])
    )
    assert 0.8 < summary["ceiling"] < 0.95
    said = capsys.readouterr().out
    assert "clean_accuracy" in said
    assert "gold" in said


@pytest.mark.parametrize("style", ["gpt2", "neox", "llama", "qwen2"])
def test_any_models_from_disk_are_trained(style, on_disk, tmp_path):
    folder, out = on_disk(style), tmp_path / "run"
    pipeline.main(disk(folder, out, "--learning-rate", "1e-3", "--kl-coef", "0.1"))
    assert [row["first_ratio"] for row in rows(out)] == pytest.approx([1.0, 1.0], abs=1e-5)  # no dropout
    assert all("gold" not in row and math.isfinite(row["kl"]) for row in rows(out))
    before, after = weights(folder / "policy", "policy"), weights(out / "policy", "policy")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    reference, reward = weights(out / "reference", "reference"), weights(out / "reward", "reward")
    assert all(torch.equal(before[name], reference[name]) for name in before)
    assert all(torch.equal(x, reward[name]) for name, x in weights(folder / "reward", "reward").items())
    value = transformers.AutoModelForTokenClassification.from_pretrained(out / "value")
    body = value.base_model.state_dict()
    assert any(not torch.equal(x, body[n]) for n, x in loaded(folder, "reward").base_model.state_dict().items())
    pipeline.main(disk(folder, tmp_path / "again", "--value", str(out / "value")))  # as a critic it can be given back


def loaded(folder, role):
    return getattr(transformers, CLASSES[role]).from_pretrained(folder / role)


@pytest.mark.parametrize("style", ["gpt2", "neox", "llama", "qwen2"])
def test_the_critic_starts_as_the_reward_model(style, on_disk):
    folder = on_disk(style)
    models = loading.load_models(folder / "policy", folder / "reward")
    ids = torch.tensor([[1, 7, 9, 11, 5]])
    theirs = [loaded(folder, "reward").eval()(input_ids=ids[:, :n]).logits.item() for n in range(1, 6)]
    assert roles.scalars(models.value, ids, torch.ones_like(ids))[0].tolist() == pytest.approx(theirs, abs=1e-5)
    assert models.value(input_ids=ids).logits[0, :, 0].tolist() == pytest.approx(theirs, abs=1e-5)
    assert all(p.requires_grad for p in models.policy.parameters())
    assert not any(p.requires_grad for m in (models.reference, models.reward) for p in m.parameters())
    assert not any(m.training for m in (models.policy, models.reference, models.reward, models.value))


def test_prompts_are_lines_or_json_lines(on_disk, tmp_path):
    folder = on_disk("llama")
    models = loading.load_models(folder / "policy", folder / "reward")
    (lines := tmp_path / "p.txt").write_text("describe the fox :\n\nwhat is the owl like ?\n")
    (objects := tmp_path / "p.jsonl").write_text('{"prompt": "describe the fox :", "id": 1}\n{"prompt": "x\\ny"}\n')
    assert loading.load_prompts(lines, models, 8) == ["describe the fox :", "what is the owl like ?"]
    assert loading.load_prompts(objects, models, 8) == ["describe the fox :", "x\ny"]


# ---- what is refused


def test_a_reward_model_with_another_vocabulary_is_refused(on_disk, tmp_path):
    folder = on_disk("llama")
    other = shutil.copytree(folder / "reward", tmp_path / "reward")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["fox"], words["cat"] = words["cat"], words["fox"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    said = refusal(disk(folder, tmp_path / "out", "--reward", other))
    assert "another vocabulary" in said
    assert str(other) in said


def test_a_reward_model_with_too_few_tokens_is_refused(on_disk, tmp_path):
    folder = on_disk("llama")
    config = transformers.LlamaConfig(vocab_size=20, num_labels=1, pad_token_id=0, hidden_size=8, intermediate_size=8,
                                      num_hidden_layers=1, num_attention_heads=1)  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    assert "the reward model reads 20 tokens" in refusal(
        disk(folder, tmp_path / "out", "--reward", tmp_path / "reward")
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--policy", "{none}"], "there is no checkpoint in {none}"),
        (["--reward", "{policy}"], "no weights for score.weight"),
        (["--value", "{policy}"], "no weights for score"),
        (["--tokenizer", "{none}"], "no tokenizer in {none}"),
        (["--prompts", "{none}"], "No such file"),
        (["--prompts", "{empty}"], "no prompt to answer (prompts: {empty})"),
        (["--prompts", "{bad}"], 'one JSON object with "prompt" a line'),
        (
            ["--prompts", "{long}"],
            "prompts of 61 tokens and 6 more do not fit the policy model's context of 64 (prompts: {long})",
        ),
        (["--response-length", "60"], "60 more do not fit the policy model's context of 64"),
        (["--out", "{empty}"], "File exists"),
        (["--resume"], "no saved state"),
        (["--learning-rate", "inf"], "stopped before an update that is not finite: policy loss"),
    ],
)
def test_bad_input_is_one_sentence(change, expected, on_disk, tmp_path):
    folder = on_disk("llama")
    paths = {name: tmp_path / name for name in ("none", "empty", "long")} | {"bad": tmp_path / "bad.jsonl"}
    paths["policy"] = folder / "policy"
    paths["empty"].write_text("\n \n")
    paths["long"].write_text("describe the fox :\n" + "the fox " * 30 + "\n")
    paths["bad"].write_text('{"text": "describe the fox :"}\n')
    said = refusal(disk(folder, tmp_path / "out", *(x.format(**paths) for x in change)))
    assert expected.format(**paths) in said


def test_a_model_that_does_more_than_its_head_is_refused(on_disk, tmp_path):
    folder = on_disk("llama")
    config = transformers.CohereConfig(vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                       num_attention_heads=2, pad_token_id=0, logit_scale=0.5)  # fmt: skip
    transformers.CohereForCausalLM(config).save_pretrained(tmp_path / "policy")
    setup.build_tokenizer().save_pretrained(tmp_path / "policy")
    assert "more than its head" in refusal(disk(folder, tmp_path / "out", "--policy", tmp_path / "policy"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--iterations", "many"], "--iterations"),
        (["--policy", "x"], "go together"),
        (["--batch-size", "10"], "batch_size 10"),
    ],
)
def test_a_wrong_option_is_named(wrong, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pipeline.main(["--out", str(tmp_path), *wrong])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_every_setting_is_an_option():
    given, settings = pipeline.parse(
        ["--out", "x", "--lam", "0.5", "--no-whiten-advantages", "--micro-batch-size", "2"]
    )
    assert (settings.lam, settings.whiten_advantages, settings.micro_batch_size) == (0.5, False, 2)
    assert settings.batch_size == setup.TASK.batch_size
    assert given.resume is False


def test_as_a_command_it_exits_with_1_and_no_traceback(tmp_path):
    call = [sys.executable, "-m", "reference_impl", "--out", str(tmp_path), "--resume"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("python -m reference_impl: there is no saved state")
    assert "Traceback" not in done.stderr


# ---- curves


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    logged = [{"step": i, "score": i / 7, "gold": 0.5, "kl": math.nan if i == 3 else i} for i in range(1, 9)]
    page = curves.page("a <run>", "note", {"one & two": logged, "other": logged[:1]})
    assert "<run>" not in page
    assert "a &lt;run&gt;" in page
    assert "one &amp; two" in page
    assert not re.search(r"https?:|src=|url\(|@import", page)
    drawn = [ET.fromstring(x) for x in re.findall("<svg.*?</svg>", page)]
    assert len(drawn) == 3  # what has no value has no chart
    assert [x.get("aria-label") for x in drawn] == ["score", "gold", "kl"]
    assert all([t.text for t in x.iter("text")][5:] == ["1", "2.75", "4.5", "6.25", "8"] for x in drawn)
    assert "in nats a response" in page
    assert "PPO iterations" in page


def test_a_curve_runs_from_corner_to_corner():
    rows = [{"step": 1, "kl": 0.0}, {"step": 2, "kl": math.nan}, {"step": 11, "kl": 10.0}]
    drawn = ET.fromstring(curves.svg({"run": rows}, "kl"))
    run = next(x for x in drawn.iter("path") if x.get("class") == "run")
    points = [float(x) for x in re.findall(r"[\d.]+", run.get("d"))]
    assert points == [curves.LEFT, curves.BOTTOM, curves.RIGHT, curves.TOP]

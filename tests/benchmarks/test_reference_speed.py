"""The reference beside TRL's PPOTrainer: faster, in no more memory; and what the comparison rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import ppo_side, reference_gpu, reference_vs_trl, sections

NOISE = 0.1  # of CPU seconds: two runs of one side differ by as much where other work shares the machine


@pytest.mark.slow
@pytest.mark.parametrize("size", reference_vs_trl.SIZES, ids=lambda size: size.name)
def test_reference_against_trl(request: pytest.FixtureRequest, size: reference_vs_trl.Size) -> None:
    here = Path(__file__).parent
    if not any(here in (path := Path(named.split("::")[0]).resolve(), *path.parents) for named in request.config.args):
        pytest.skip("takes minutes, and installs TRL: run it with pytest tests/benchmarks -k reference")
    try:
        python = reference_vs_trl.trl_python()
    except reference_vs_trl.TRLUnavailable as reason:
        pytest.skip(f"needs TRL: {reason}")
    found = reference_vs_trl.compare(size, python)
    rows = reference_vs_trl.rows(size, found)
    assert reference_vs_trl.ratio(found, "cpu") > 1 - NOISE, rows
    assert [row for row in rows if "memory" in row.what and row.kept is False] == []
    missed = [f"{row.what}: {row.measured}, not {row.target}" for row in rows if row.kept is False]
    if missed:
        pytest.xfail("; ".join(missed))


def test_the_floor_counts_what_the_reference_multiplies(tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from reference_impl import roles, rollout

    size = replace(reference_vs_trl.SIZES[0], batch=4)
    reference_vs_trl.write_models(size, tmp_path)
    models, tokenizer = ppo_side.load(tmp_path)
    texts = [text for text in reference_vs_trl.prompts(size) if len(text.split()) == size.prompt][: size.batch]
    ids, _ = rollout.encode_prompts(tokenizer, texts)
    assert ids.shape == (size.batch, size.prompt)
    assert tokenizer.eos_token_id == size.vocabulary  # which no model can draw
    floor = ppo_side.floors(roles.Models(**models, tokenizer=tokenizer), {**vars(size), "prompts": texts})
    whole, real = torch.ones(4, size.prompt + size.response, dtype=torch.long), torch.ones(4, 56, dtype=torch.long)

    def counted(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    linear = counted(lambda: roles.scalars(models["reward"], whole, real))
    attention = 4 * 2 * 4.0 * 64 * 56 * 57 / 2
    assert linear == pytest.approx(floor["score"]["flops"] - attention, rel=0.01)
    T = size.response

    def learn() -> None:
        roles.response_logprobs(models["policy"], whole, real, T, 1.0).sum().backward()
        roles.scalars(models["value"], whole[:, :-1], real[:, :-1]).sum().backward()

    attention = 3 * 2 * size.epochs * 4 * 2 * 4.0 * 64 * 55 * 56 / 2
    assert size.epochs * counted(learn) == pytest.approx(floor["update"]["flops"] - attention, rel=0.02)


def test_a_section_of_the_page_leaves_the_others() -> None:
    page = sections.put(sections.put("", "a", "## A\n"), "b", "## B")
    assert page.startswith("# Benchmarks\n\n<!-- a: begin -->\n## A\n<!-- a: end -->\n\n<!-- b: begin -->\n## B\n")
    assert sections.put(page, "a", r"\1 again") == page.replace("## A", r"\1 again")


def test_a_gpus_promises_are_judged_by_its_data_sheet() -> None:
    card = reference_gpu.Card(operations=1e12, bandwidth=1e9)
    size = replace(reference_gpu.BILLION, hidden=100, intermediate=300, layers=2, vocabulary=1000, batch=1)
    least = 2 * (2 * (4 * 100**2 + 3 * 100 * 300) + 100 * 1000) / 1e9  # seconds, keys and values left out
    phases = {"update": [[2.0, 9.0]], "generate": [[size.response * least * 4, 9.0]]}
    floor = {name: {"seconds": 1.0, "cpu": 1.0, "flops": 0.9e12} for name in phases}
    sides = {"seconds": [10.0], "peak": 4e9}
    reference = {"phases": phases, "floor": floor, **sides}
    found = {"reference": [reference], "trl": [{**sides, "seconds": [25.0], "peak": 3e9}]}
    update, bare, decoding, ratio, memory = reference_gpu.rows(size, found, card)
    assert update.measured.startswith("45% (0 of 1 TFLOP/s)")
    assert update.kept
    assert bare.measured == "90%"
    # With keys and values of about 380 tokens, the floor is somewhat more than the weights': 25% and then some.
    assert 0.25 < float(decoding.measured.split("%")[0]) / 100 < 0.5
    assert decoding.kept is False
    assert ratio.measured == "2.50 ×"
    assert ratio.kept
    assert memory.kept is False
    assert reference_gpu.card_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    with pytest.raises(ValueError, match="the peak of GeForce is not known"):
        reference_gpu.card_of("GeForce")


def test_the_bytes_of_a_step_are_those_of_the_model(tmp_path: Path) -> None:
    size = replace(reference_vs_trl.SIZES[0], batch=3)
    reference_vs_trl.write_models(size, tmp_path)
    model = ppo_side.load(tmp_path)[0]["policy"]
    linear = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    texts = reference_vs_trl.prompts(size)
    length = sum(len(text.split()) for text in texts) / len(texts) + size.response / 2
    config = model.config
    cache = 3 * length * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    assert reference_gpu.read_by_a_step(size) == pytest.approx(2 * (linear + cache))


def test_the_side_that_a_gpu_runs_runs_here_too(tmp_path: Path) -> None:
    size = replace(reference_vs_trl.SIZES[0], batch=4, micro=2, epochs=1, iterations=2, dtype="bfloat16")
    reference_vs_trl.write_models(size, tmp_path)
    case = {**vars(size), "prompts": reference_vs_trl.prompts(size), "threads": 1, "seed": 0}
    found = ppo_side.reference_side(tmp_path, case)
    assert all(len(found["phases"][name]) == 1 for name in ppo_side.PHASES)
    whole = ppo_side.reference_side(tmp_path, {**case, "micro": None, "dtype": "float32"})
    assert found["floor"]["update"]["flops"] == pytest.approx(whole["floor"]["update"]["flops"], rel=0.02)

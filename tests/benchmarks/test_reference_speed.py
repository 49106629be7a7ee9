"""The reference beside TRL's PPOTrainer: faster, in no more memory; and what the comparison rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import ppo_side, reference_vs_trl, sections


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
    assert reference_vs_trl.ratio(found, "cpu") > 1, rows
    assert [row for row in rows if "memory" in row.what and row.kept is False] == []
    missed = [f"{row.what}: {row.measured}, not {row.target}" for row in rows if row.kept is False]
    if missed:
        pytest.xfail("; ".join(missed))


def test_the_floor_counts_what_the_reference_multiplies(tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from reference_impl import roles, rollout

    size = replace(reference_vs_trl.SIZES[0], batch=4, micro=2)
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

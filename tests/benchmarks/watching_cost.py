"""What watching a training step costs at 124M parameters, and how many steps a whole examination costs at 30M.

Run it from the repository's root: ``python tests/benchmarks/watching_cost.py``. Plain and watched steps alternate in
one process; peak memory is measured in a process each. The section goes into reports/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIZES = {  # hidden, layers, heads, vocabulary, rows, prompt, response, epochs
    "124M": (768, 12, 12, 50257, 4, 448, 64, 1),
    "30M": (384, 6, 6, 50257, 4, 448, 64, 1),
    "tiny": (64, 2, 2, 1000, 4, 24, 8, 1),
}


def build(size: str, epochs: int | None = None) -> dict[str, Any]:
    """A plain PPO step on GPT-2s of that size: sample, score, one minibatch an epoch."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2LMHeadModel,
    )

    hidden, layers, heads, vocabulary, rows, prompt, response, given = SIZES[size]
    epochs = epochs or given
    config = GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocabulary, n_positions=1024, num_labels=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, pad_token_id=0, eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval().requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    reward = GPT2ForSequenceClassification(config).eval().requires_grad_(False)
    value = GPT2ForTokenClassification(config).eval()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (policy, value)]
    questions = torch.randint(2, vocabulary, (rows, prompt))

    def logp(model: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, prompt - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]

    def step() -> None:
        with torch.no_grad():
            ids = policy.generate(
                questions, attention_mask=torch.ones_like(questions), do_sample=True, top_k=0,
                min_new_tokens=response, max_new_tokens=response,
            )  # fmt: skip
            old, ref = logp(policy, ids), logp(reference, ids)
            score = reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
            v = value(input_ids=ids).logits[:, prompt - 1 : -1, 0]
            r = -0.05 * (old - ref)
            r[:, -1] += score
            advantage, last = torch.zeros_like(r), torch.zeros(rows)
            for t in reversed(range(response)):
                following = v[:, t + 1] if t + 1 < response else torch.zeros(rows)
                last = r[:, t] + following - v[:, t] + 0.95 * last
                advantage[:, t] = last
            returns = advantage + v
        for _ in range(epochs):
            ratio = (logp(policy, ids) - old).exp()
            loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
            now = value(input_ids=ids).logits[:, prompt - 1 : -1, 0]
            optimizers[1].zero_grad()
            (0.05 * (now - returns).square().mean()).backward()
            optimizers[1].step()

    return {
        "policy": policy, "reference": reference, "reward": reward, "value": value, "step": step,
        "optimizers": optimizers, "declared": {"gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "temperature": 1.0},
    }  # fmt: skip


def setup_of(size: str, epochs: int | None = None) -> Any:
    """The same as an ``RLHFSetup``."""
    from rlhf_doctor.setups import RLHFSetup

    return RLHFSetup.from_mapping(build(size, epochs))


def timed(run: Any) -> tuple[float, float]:
    """(wall, CPU) seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def watching(size: str, pairs: int) -> dict[str, float]:
    """Median wall and CPU seconds of plain and of watched steps."""
    from rlhf_doctor.trace.taps import Recorder

    setup = setup_of(size)

    def watched() -> None:
        with Recorder(setup).watching():
            setup.step()

    setup.step()
    plain, seen = [], []
    for _ in range(pairs):
        plain.append(timed(setup.step))
        seen.append(timed(watched))
    return {
        "plain": statistics.median(w for w, _ in plain),
        "watched": statistics.median(w for w, _ in seen),
        "ratio": statistics.median(b[1] / a[1] for a, b in zip(plain, seen, strict=True)),
    }


def peak(size: str, watched: bool) -> float:
    """Peak resident bytes of a process that runs two steps."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from benchmarks.watching_cost import setup_of\n"
        "from rlhf_doctor.trace.taps import Recorder\n"
        f"setup = setup_of({size!r})\n"
        "for _ in range(2):\n"
        + ("    with Recorder(setup).watching():\n        setup.step()\n" if watched else "    setup.step()\n")
        + "print([int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def changed_runs(size: str, epochs: int) -> dict[str, float]:
    """What the step adds to a whole examination, in CPU seconds of plain steps, and how often it was run for it."""
    from rlhf_doctor.examine import Options, examine

    setup, runs = setup_of(size, epochs), SimpleQueue[None]()  # a queue is nothing that an examination puts back

    def counted() -> None:
        runs.put(None)
        setup.step()

    setup.step()
    step = statistics.median(timed(setup.step)[1] for _ in range(2))
    alone = timed(lambda: examine(setup.but(step=None), options=Options(show=False)))[1]
    whole = timed(lambda: examine(setup.but(step=counted), options=Options(show=False)))[1]
    return {"steps": (whole - alone) / step, "runs": runs.qsize(), "epochs": epochs}


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="124M", help="of the models that are watched")
    parser.add_argument("--changed", choices=list(SIZES), default="30M", help="of those whose step is run again")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print and write nothing")
    given = parser.parse_args()
    cost = watching(given.size, given.pairs)
    memory = [peak(given.size, watched) for watched in (False, True)]
    sets = [changed_runs(given.changed, epochs) for epochs in (1, 4)]
    rows = [
        ("watching: the step's CPU seconds, in those of an unwatched one", 1.03, cost["ratio"]),
        ("watching: peak memory, in that of an unwatched run", 1.05, memory[1] / memory[0]),
    ]
    for one in sets:
        rows.append(
            (
                f"all runs of a step of {one['epochs']:.0f} epochs ({one['runs']:.0f}, most of them cut short): "
                "CPU seconds, in plain steps",
                8,
                one["steps"],
            )
        )
    text = ["## Watching a training step", ""]
    text += [
        f"GPT-2 of size {given.size}, and of size {given.changed} for the runs with one thing changed; 50k tokens, "
        "4 × 512 tokens. Measured with `python tests/benchmarks/watching_cost.py` on a CPU; watched and plain steps "
        "alternate, and ratios are medians of neighbours.",
        "",
    ]
    text += ["| what | at most | measured | kept |", "|---|---|---|---|"]
    for what, target, number in rows:
        text.append(f"| {what} | {target} | {number:.3f} | {'yes' if number <= target else '**no**'} |")
    text += [
        "",
        "These runs are: one with the updates held back, two steps in a row with them, six with one thing changed (a "
        "score, all scores, values and reference of the rollout, slots that no response needs, values of the update, "
        "log-probabilities of the update), and those that a single check asks for: draws with other random numbers, "
        "one value alone, values beyond their clip, equal scores, far ratios. Each samples and scores anew, since what "
        "it changes may change that, and is cut short after the last update that it is run for, which saves nothing "
        "where a step has one epoch: so many steps are the least that they can cost. What is beyond is reading the "
        "logits of 50k entries and comparing the runs' tables.",
    ]
    print("\n".join(text), json.dumps({**cost, "memory": memory, "sets": sets}), sep="\n")
    if not given.dry:
        from benchmarks import sections

        sections.write("watching", "\n".join(text))


if __name__ == "__main__":
    main()

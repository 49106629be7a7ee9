"""Measure the reference against TRL's PPOTrainer: samples per second, peak memory, and each phase against its floor.

Run it from the repository's root: ``python tests/benchmarks/reference_vs_trl.py``; it writes a section of
reports/benchmarks.md. TRL runs in an environment of its own: the one that ``--trl-python`` or TRL_PYTHON names, or one
made here. Both sides start from the same weights on disk and do the same work; their runs alternate, so that other work
on the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import ppo_side, sections  # noqa: E402  # found through the line above when this file is run as a script
from benchmarks.measure import WORDS, Row  # noqa: E402

COMMAND = "python tests/benchmarks/reference_vs_trl.py"
TRL = "1.12.0"  # the newest with a PPOTrainer
THREADS = 2
SIDES = ("trl", "reference")
UPDATE = 1.5  # the promise: the update's time, in its floor's


@dataclass(frozen=True)
class Size:
    """The four models' size, how much of it is run, and what is promised."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    faster: float  # the promise: samples per second, in TRL's
    iterations: int  # of a run; the first is left out
    repeats: int  # runs of each side
    batch: int = 32
    micro: int | None = None  # of a backward pass; None: the whole batch
    epochs: int = 4  # TRL's default
    prompt: int = 24  # tokens of the longest; half are shorter
    response: int = 32
    temperature: float = 0.7  # TRL's default
    rate: float = 1e-5
    device: str = "cpu"
    dtype: str = "float32"


SIZES = (
    Size("64 × 2, 300 tokens", 64, 192, 2, 4, 300, faster=3.0, iterations=7, repeats=3),
    Size("256 × 4, 8k tokens", 256, 704, 4, 4, 8192, faster=3.0, iterations=4, repeats=2),
    Size(
        "768 × 12, 50k tokens",
        768,
        2048,
        12,
        12,
        50304,
        faster=2.0,
        iterations=3,
        repeats=2,
        batch=8,
        epochs=2,
    ),
)


class TRLUnavailable(Exception):
    """TRL could not be installed here; the message says why."""


def trl_python(given: str | None = None) -> str:
    """An interpreter that can import TRL's PPOTrainer: the one given, TRL_PYTHON's, or that of an environment made now.

    Raises TRLUnavailable where pip fails.
    """
    named = given or os.environ.get("TRL_PYTHON")
    if named:
        return named
    home = Path.home() / ".cache" / "rlhf-doctor" / f"trl-{TRL}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        import torch
        import transformers

        venv.create(home, clear=True, with_pip=True)
        same = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
        for wanted in ([same[0], "numpy"], [f"trl=={TRL}", same[1]]):
            call = [str(python), "-m", "pip", "install", "--quiet", *wanted]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise TRLUnavailable(f"pip install {' '.join(wanted)} failed: {done.stderr.strip()[-500:]}")
        (home / "complete").touch()
    return str(python)


def write_models(size: Size, folder: Path, seed: int = 0) -> None:
    """Policy and reference alike, reward and value alike, with random weights; and a tokenizer of one token a word.

    The end of sequence is the one token that the models' vocabulary lacks: on both sides every response is full.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", *(f"w{i}" for i in range(2, size.vocabulary)), "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder / "tokenizer")
    config = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.prompt + size.response,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        scalar = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config, num_labels=1))
    for role in ppo_side.ROLES:
        (policy if role in ("policy", "reference") else scalar).save_pretrained(folder / role)


def prompts(size: Size, seed: int = 0, count: int = 256) -> list[str]:
    """Half of the longest length, the others down to two thirds of it."""
    rng = Random(seed)
    lengths = [size.prompt if i % 2 else rng.randint(size.prompt * 2 // 3, size.prompt) for i in range(count)]
    return [" ".join(f"w{rng.randrange(2, size.vocabulary)}" for _ in range(n)) for n in lengths]


def run(side: str, python: str, folder: Path, case: Path) -> dict[str, Any]:
    """What one side measured, in a fresh interpreter."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "MKL_NUM_THREADS": str(THREADS),
        "PYTHONPATH": "" if side == "trl" else str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    call = [python, ppo_side.__file__, side, str(folder), str(case)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["threads"] == THREADS
    return result


def compare(size: Size, python: str, sides: Sequence[str] = SIDES) -> dict[str, list[dict[str, Any]]]:
    """What each run measured, by side; they take turns at being first."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_models(size, folder)
        case = folder / "case.json"
        for i in range(size.repeats):
            case.write_text(json.dumps({**asdict(size), "prompts": prompts(size), "threads": THREADS, "seed": i}))
            for side in sorted(found, reverse=bool(i % 2)):
                found[side].append(run(side, python if side == "trl" else sys.executable, folder, case))
    versions = {(one["torch"], one["transformers"]) for runs in found.values() for one in runs}
    assert len(versions) == 1, f"the sides must share torch and transformers: {versions}"
    return found


def middle(runs: Sequence[dict[str, Any]], what: str) -> float:
    """The median over all iterations of all runs."""
    return statistics.median(x for one in runs for x in one[what])


def ratio(found: dict[str, list[dict[str, Any]]], what: str) -> float:
    """TRL's time in the reference's: of two neighbouring runs each, the median of these."""
    pairs = zip(found["trl"], found["reference"], strict=True)
    return statistics.median(middle([a], what) / middle([b], what) for a, b in pairs)


def busy(found: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether other work kept either side from as much as one core: wall time then tells of that work."""
    return min(middle(found[side], "cpu") / middle(found[side], "seconds") for side in ("trl", "reference")) < 0.9


def rows(size: Size, found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """The promises about one size."""
    trl, reference = found["trl"], found["reference"]
    wall, cpu = ratio(found, "seconds"), ratio(found, "cpu")
    rates = [size.batch / middle(runs, "seconds") for runs in (reference, trl)]
    used = [middle(runs, "cpu") / size.batch for runs in (reference, trl)]
    peaks = [max(one["peak"] for one in runs) / 1e6 for runs in (reference, trl)]
    update = phase(reference, "update")
    floor = sum(phase(reference, name)["cpu floor"] for name in ppo_side.PHASES)
    floors, cpu_floors = update["seconds"] / update["floor"], update["cpu"] / update["cpu floor"]
    disturbed = busy(found)
    note = "; other work on the machine: judged by CPU seconds" if disturbed else ""
    return [
        Row(f"{size.name}: samples a second, in TRL's", f"{size.faster:.0f} ×",
            f"{wall:.2f} × ({rates[0]:.3g} against {rates[1]:.3g}){note}",
            (cpu if disturbed else wall) >= size.faster),
        Row(f"{size.name}: CPU seconds a sample, TRL's in the reference's", "none set",
            f"{cpu:.2f} × ({used[0]:.3g} against {used[1]:.3g})", None),
        Row(f"{size.name}: the same, if the reference did its matrix products and nothing else", "none set",
            f"{used[1] * size.batch / floor:.2f} ×", None),
        Row(f"{size.name}: peak memory above imports", "no more than TRL's",
            f"{peaks[0]:.0f} MB against {peaks[1]:.0f} MB", peaks[0] <= peaks[1]),
        Row(f"{size.name}: the update's time, in that of its matrix products alone", f"at most {UPDATE}",
            f"{floors:.2f}; in CPU seconds {cpu_floors:.2f}", (cpu_floors if disturbed else floors) <= UPDATE),
    ]  # fmt: skip


def phase(runs: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """One phase of the reference beside its floor: medians over iterations, and over runs."""
    spent = [pair for one in runs for pair in one["phases"][name]]
    floor = {what: statistics.median(one["floor"][name][what] for one in runs) for what in ("seconds", "cpu", "flops")}
    seconds, cpu = (statistics.median(pair[i] for pair in spent) for i in (0, 1))
    return {
        "seconds": seconds,
        "cpu": cpu,
        "floor": floor["seconds"],
        "cpu floor": floor["cpu"],
        "flops": floor["flops"],
    }


def phase_lines(size: Size, runs: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of the second table."""
    lines = []
    for name in ppo_side.PHASES:
        x = phase(runs, name)
        cells = [size.name, name, f"{x['flops'] / 1e9:.1f}", f"{x['flops'] / x['floor'] / 1e9:.0f}"]
        cells += [f"{x['seconds']:.3f}", f"{x['floor']:.3f}", f"{x['seconds'] / x['floor']:.2f}"]
        cells.append(f"{x['cpu'] / x['cpu floor']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share_line(size: Size, runs: Sequence[dict[str, Any]]) -> str:
    """A row of the third table: medians over the runs."""
    shares = (statistics.median(one["shares"][kind] for one in runs) for kind in runs[0]["shares"])
    return f"| {size.name} | {' | '.join(f'{x:.0%}' for x in shares)} |"


def section(measured: dict[Size, dict[str, list[dict[str, Any]]]]) -> str:
    """The section of reports/benchmarks.md."""
    size = next(iter(measured))
    one = measured[size]["trl"][0]
    python = platform.python_version()
    torch, transformers, version, P, T = one["torch"], one["transformers"], one["version"], size.prompt, size.response
    shape = "- {0.name}: {0.batch} responses an iteration, {0.epochs} epochs; "
    shape += "{0.repeats} runs of {0.iterations} iterations"
    return "\n".join([
        "## The reference against TRL's PPOTrainer",
        "",
        f"Measured with `{COMMAND}`: TRL {version} and",
        f"`reference_impl`, both on torch {torch} and transformers {transformers}, Python {python}, in float32 on",
        f"{THREADS} threads of a CPU. The same four Llama models from disk; prompts of up to {P} tokens, full",
        f"responses of {T}. An iteration's responses are one minibatch, read and learnt from in one pass,",
        "without gradient checkpointing. The first iteration of each run is left out; generation, scoring and updates",
        "are counted. Medians; a ratio is of neighbouring runs.",
        "",
        *(shape.format(s) for s in measured),
        "",
        "| what | target | measured | kept |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.target} | {row.measured} | {WORDS[row.kept]} |"
          for size, found in measured.items() for row in rows(size, found)),
        "",
        "Where the reference's time goes. The floor is the phase's matrix products alone, with the same weights, run",
        "after it in the same process.",
        "",
        "| size | phase | GFLOP | floor's GFLOP/s | seconds | floor | in floors | in floors, CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(line for size, found in measured.items() for line in phase_lines(size, found["reference"])),
        "",
        "And by operation, as torch's profiler sees one more iteration of it:",
        "",
        f"| size | {' | '.join(ppo_side.KINDS)} | everything else |",
        "|---|---|---|---|---|",
        *(share_line(size, found["reference"]) for size, found in measured.items()),
    ])  # fmt: skip


def main() -> None:
    """Measure the sizes, write the section, print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="an interpreter with TRL; default: TRL_PYTHON, or one made in ~/.cache")
    parser.add_argument("--size", type=int, action="append", choices=range(len(SIZES)), help="only these; not written")
    given = parser.parse_args()
    python = trl_python(given.trl_python)
    measured = {SIZES[i]: compare(SIZES[i], python) for i in given.size or range(len(SIZES))}
    text = section(measured)
    if given.size is None:
        sections.write("reference against TRL", text)
    print(text)
    sys.exit(1 if any(row.kept is False for size, found in measured.items() for row in rows(size, found)) else 0)


if __name__ == "__main__":
    main()

"""Stopping and going on: the same bits as without a stop, and a good state whatever happens while one is written."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import reference_impl
from reference_impl import __main__ as pipeline
from reference_impl import checkpoints

ROOT = Path(reference_impl.__file__).parents[1]


def arguments(folder, out, iterations, *more):
    given = {"out": out, "policy": folder / "policy", "reward": folder / "reward", "prompts": folder / "prompts.txt",
             "iterations": iterations, "batch-size": 8, "response-length": 6, "learning-rate": 1e-3,
             "critic-learning-rate": 1e-3, "kl-target": 0.01, "kl-horizon": 20}  # fmt: skip
    return [*(str(x) for name, value in given.items() for x in (f"--{name}", value)), *more]


def files(out):
    return {
        name: (out / name).read_bytes()
        for name in ("metrics.jsonl", "policy/model.safetensors", "value/model.safetensors")
    }


@pytest.fixture(scope="module")
def unbroken(on_disk, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    pipeline.main(arguments(on_disk("llama"), out, 5))
    return out


def test_a_run_that_was_stopped_gives_the_same_bits(on_disk, unbroken, tmp_path):
    pipeline.main(arguments(on_disk("llama"), tmp_path, 2))
    assert files(tmp_path) != files(unbroken)
    pipeline.main(arguments(on_disk("llama"), tmp_path, 5, "--resume"))
    assert files(tmp_path) == files(unbroken)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert len({row["kl_coef"] for row in rows}) > 3  # the controller moved, so it had to be kept


def test_tied_weights_are_kept_too(on_disk, tmp_path):
    pipeline.main(arguments(on_disk("gpt2"), tmp_path / "whole", 2))
    pipeline.main(arguments(on_disk("gpt2"), tmp_path / "halves", 1))
    pipeline.main(arguments(on_disk("gpt2"), tmp_path / "halves", 2, "--resume"))
    assert files(tmp_path / "halves") == files(tmp_path / "whole")


def test_the_built_in_task_goes_on_without_training_its_models_again(tmp_path):
    def call(out, iterations, *more):
        pipeline.main(
            ["--out", str(tmp_path / out), "--iterations", str(iterations), "--batch-size", "8", "--pairs", "64", *more]
        )

    call("whole", 2)
    call("halves", 1)
    call("halves", 2, "--resume")
    assert files(tmp_path / "halves") == files(tmp_path / "whole")


def test_other_settings_are_refused(on_disk, unbroken):
    with pytest.raises(SystemExit, match="begun with other settings"):
        pipeline.main(arguments(on_disk("llama"), unbroken, 6, "--resume", "--kl-coef", "0.7"))


def test_only_the_newest_state_is_kept(on_disk, tmp_path):
    pipeline.main(arguments(on_disk("llama"), tmp_path, 4, "--save-every", "1"))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000004.pt"]


def in_another_process(body, *given):
    """Runs the pipeline there, with `body` in front of it."""
    code = (
        textwrap.dedent(body)
        + f"\nimport sys\nfrom reference_impl.__main__ import main\nmain({[str(x) for x in given]!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_killed_while_saving_the_last_good_state_stands(on_disk, unbroken, tmp_path):
    killed = in_another_process(
        """
        import os, signal, torch
        save, saves = torch.save, []

        def deadly(state, file):
            saves.append(save(state, file))
            if len(saves) == 2:
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = deadly
        """,
        *arguments(on_disk("llama"), tmp_path, 5, "--save-every", "1"),
    )
    assert killed.returncode == -9
    states = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert states == ["000001.pt", "000002.partial"]
    assert checkpoints.latest(tmp_path / "state").name == "000001.pt"
    pipeline.main(arguments(on_disk("llama"), tmp_path, 5, "--resume"))
    assert files(tmp_path) == files(unbroken)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000005.pt"]


def test_a_full_disk_is_one_sentence_and_the_last_good_state_stands(on_disk, unbroken, tmp_path, monkeypatch):
    pipeline.main(arguments(on_disk("llama"), tmp_path, 2))

    def full(_, file):
        file.write(b"the beginning")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(SystemExit) as stop:
            pipeline.main(arguments(on_disk("llama"), tmp_path, 5, "--resume", "--save-every", "1"))
    (said,) = stop.value.code.splitlines()
    assert "No space left on device" in said
    assert f"the last good state is {tmp_path / 'state' / '000002.pt'}" in said
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000002.pt"]
    pipeline.main(arguments(on_disk("llama"), tmp_path, 5, "--resume"))
    assert files(tmp_path) == files(unbroken)


@pytest.mark.parametrize("limit", [2_000, 60_000])  # bytes a file: first the models do not fit, then the state
def test_a_real_limit_on_file_size_is_one_sentence(limit, on_disk, tmp_path):
    stopped = in_another_process(
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
        *arguments(on_disk("llama"), tmp_path, 2),
    )
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert "File too large" in stopped.stderr.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_go_on_from_two_or_one(on_disk, unbroken, tmp_path):
    def torchrun(out, iterations, *more, processes=2):
        call = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "reference_impl",
        ]
        done = subprocess.run(
            [*call, *arguments(on_disk("llama"), out, iterations, *more)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def metrics(out):
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def alike(out):
        for row, expected in zip(metrics(out), metrics(unbroken), strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)

    torchrun(tmp_path / "whole", 5)
    alike(tmp_path / "whole")
    torchrun(tmp_path / "halves", 2)
    torchrun(tmp_path / "halves", 5, "--resume")
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    torchrun(tmp_path / "mixed", 2)
    pipeline.main(arguments(on_disk("llama"), tmp_path / "mixed", 5, "--resume"))
    alike(tmp_path / "mixed")

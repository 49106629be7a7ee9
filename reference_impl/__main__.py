"""Four-model RLHF from one command: SFT, reward modelling and PPO on the built-in task, or PPO on models from disk.

  python -m reference_impl --out DIR
  python -m reference_impl --out DIR --policy DIR --reward DIR --prompts FILE
  torchrun --nproc-per-node 2 -m reference_impl --out DIR

A run that was stopped goes on with the same command and --resume. DIR gets the four models in Hugging Face's format,
metrics.jsonl with a row an iteration, curves.html and settings.json; in DIR/state is what --resume needs.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from reference_impl import checkpoints, curves, loading, ppo, roles, rollout, scale, setup, task

SHOWN = ("gold", "score", "kl", "entropy", "explained_variance", "clip_fraction", "eos_rate")
FIELDS = [field.name for field in dataclasses.fields(ppo.Settings)]


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ppo.Settings]:
    """The options; every field of ppo.Settings is one. Its defaults are the task's, or those for models from disk."""
    parser = argparse.ArgumentParser(
        "python -m reference_impl", None, __doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all that the run writes")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in DIR/state")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="iterations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=50, help="of PPO (default: %(default)s)")
    disk = parser.add_argument_group("models from disk, instead of the built-in task")
    for role in ("policy", "reward", "value", "tokenizer"):
        disk.add_argument(f"--{role}", type=Path, metavar="DIR")
    disk.add_argument("--prompts", type=Path, metavar="FILE", help="one a line; or .jsonl, objects with 'prompt'")
    built_in = parser.add_argument_group("built-in task")
    built_in.add_argument("--demonstrations", type=int, default=4096, help="for SFT (default: %(default)s)")
    built_in.add_argument("--pairs", type=int, default=6144, help="for reward modelling (default: %(default)s)")
    built_in.add_argument("--noise", type=float, default=0.25, help="of their labels (default: %(default)s)")
    algorithm = parser.add_argument_group("PPO")
    algorithm.add_argument("--static", action="store_true", help="sample in fixed shapes; on one GPU as a CUDA graph")
    algorithm.add_argument("--kl-target", type=float, metavar="X", help="nats a response; adapts the KL coefficient")
    algorithm.add_argument("--kl-horizon", type=int, default=10000, metavar="X", help="default: %(default)s")
    for name in FIELDS:
        default, on_task, on_disk = (getattr(s, name) for s in (ppo.Settings(), setup.TASK, setup.DISK))
        kind: dict[str, Any] = {"type": int if default is None else type(default), "metavar": "X"}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        told = f"default: {on_task}" + (f", from disk {on_disk}" if on_task != on_disk else "")
        algorithm.add_argument("--" + name.replace("_", "-"), help=told, default=argparse.SUPPRESS, **kind)
    given = parser.parse_args(arguments)
    if len({given.policy is None, given.reward is None, given.prompts is None}) > 1:
        parser.error("--policy, --reward and --prompts go together")
    changed = {name: x for name, x in vars(given).items() if name in FIELDS}
    try:
        return given, dataclasses.replace(setup.DISK if given.policy else setup.TASK, **changed)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the pipeline. Whatever stops it that the user can mend is said in one sentence, with exit code 1."""
    given, settings = parse(arguments)
    try:
        run(given, settings)
    except (loading.Unusable, FloatingPointError, OSError) as error:
        sys.exit(f"python -m reference_impl: {error}")
    except KeyboardInterrupt:
        sys.exit("python -m reference_impl: stopped; the same command with --resume goes on from the last saved state")
    finally:
        scale.finish()


def run(given: argparse.Namespace, s: ppo.Settings) -> None:
    """The pipeline, in the order it runs. Raises Unusable, OSError or FloatingPointError with one sentence."""
    begun, out, device, first = time.perf_counter(), given.out, scale.start(), scale.rank() == 0
    saved = checkpoints.latest(out / "state") if given.resume else None
    if given.resume and saved is None:
        raise loading.Unusable(f"there is no saved state in {out / 'state'} to go on from")
    if s.batch_size // s.num_minibatches % scale.world():
        raise loading.Unusable(f"minibatches of {s.batch_size // s.num_minibatches} do not divide among the processes")
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()

    def say(text: str) -> None:
        if first:
            print(f"{time.perf_counter() - begun:6.1f} s  {text}", flush=True)

    # 1. The models: from disk, or from supervised fine-tuning and reward modelling.
    prompts, summary = task.prompts(), dict[str, float]()
    if given.policy:
        models = loading.load_models(given.policy, given.reward, given.value, given.tokenizer)
        prompts = loading.load_prompts(given.prompts, models, s.response_length)
    elif saved:
        models = loading.load_models(out / "reference", out / "reward")
    else:
        sizes = {name: getattr(given, name) for name in ("demonstrations", "pairs", "noise")}
        say("supervised fine-tuning and reward modelling")
        models = setup.build_models(given.seed, trained=True, **sizes, rate=2e-3)
        summary = setup.judge_reward(models, given.seed, given.noise)
        say("reward " + "  ".join(f"{name} {x:.3f}" for name, x in summary.items()))
    if saved is None:
        shutil.rmtree(out / "state", ignore_errors=True)
        setup.save_checkpoints(vars(models), out, ("reference", "reward"))
    for role in roles.ROLES:
        scale.shard(getattr(models, role).to(device))

    # 2. PPO. On the task the gold score of every response is kept beside the reward model's.
    gold = list[float]()

    def sample(*arguments: Any, **options: Any) -> rollout.Rollout:
        drawn = rollout.sample(*arguments, **options, static=given.static)
        gold[:] = [] if given.policy else setup.gold_scores(models.tokenizer, drawn)
        return drawn

    control = ppo.AdaptiveKL(s.kl_coef, given.kl_target, given.kl_horizon) if given.kl_target else None
    whole = setup.assemble(models, prompts, [], s, ppo.Parts(sample=sample), control)
    moving, done, rows = (models, whole["optimizers"], whole["state"]), 0, list[dict[str, float]]()
    told, metrics = json.dumps({"seed": given.seed, **whole["declared"]}, indent=2), out / "metrics.jsonl"
    torch.manual_seed(given.seed)
    if saved:
        if (out / "settings.json").read_text() != told:
            raise loading.Unusable(f"{out} was begun with other settings; {out / 'settings.json'} tells which")
        done = checkpoints.load(saved, *moving)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()[:done]]
        say(f"going on after iteration {done}")
    if first:
        (out / "settings.json").write_text(told)
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(done + 1, given.iterations + 1):
        rows.append({"step": i, **whole["step"](), **({"gold": sum(gold) / len(gold)} if gold else {})})
        last = i == given.iterations
        if first:
            with metrics.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if i % given.save_every == 0 or last:
            checkpoints.save(out / "state", i, *moving)
        if i % 10 == 0 or last:
            shown = "  ".join(f"{name} {rows[-1][name]:.2f}" for name in SHOWN if name in rows[-1])
            say(f"ppo {i:4d}/{given.iterations}  {shown}")
            if first:
                page = curves.page(f"PPO, seed {given.seed}", f"{i} iterations.", {"run": rows})
                (out / "curves.html").write_text(page)

    # 3. The models that were trained, with the run's log as transformers' Trainer writes it; and on the task, what PPO
    #    has gained.
    log = json.dumps({"global_step": given.iterations, "log_history": rows}, indent=2) + "\n"
    for folder in setup.save_checkpoints(vars(models), out, ("policy", "value")).values():
        if first:
            (folder / "trainer_state.json").write_text(log)
    say(f"policy, reference, reward and value are in {out}")
    if not given.policy:
        before, after = (setup.mean_gold(model, models.tokenizer) for model in (models.reference, models.policy))
        gain = (after - before) / (task.OPTIMUM - before)
        say(f"gold {before:.3f} before PPO and {after:.3f} after it: {gain:.0%} of the way to the optimum")
        summary |= {"gold_before": before, "gold_after": after, "gain": gain}
    summary |= {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time()}
    if first:
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()

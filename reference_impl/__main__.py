"""The whole pipeline on the built-in task: python -m reference_impl --out DIR."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """SFT, reward modelling, PPO; writes the four checkpoints, settings.json and a log of each phase as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m reference_impl", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=150, help="of PPO (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="responses an iteration (default: %(default)s)")
    parser.add_argument("--kl-coef", type=float, default=0.05, help="weight of the KL penalty (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=8192, help="for reward modelling (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.1, help="share of turned labels (default: %(default)s)")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)

    import torch

    from reference_impl import ppo, reward_modeling, rollout, setup, task

    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s  {text}", flush=True)

    # 1. Supervised fine-tuning and reward modelling.
    logs = {name: open(given.out / f"{name}.jsonl", "w") for name in ("sft", "reward", "metrics")}  # noqa: SIM115

    def report(phase: str, i: int, loss: float) -> None:
        logs[phase].write(json.dumps({"step": i, "loss": loss}) + "\n")
        if i % 32 == 0:
            say(f"{phase:<6} batch {i:4d}  loss {loss:.3f}")

    try:
        models = setup.build_models(given.seed, trained=True, pairs=given.pairs, noise=given.noise, report=report)
        pairs = task.preference_pairs(512, Random(f"held out {given.seed}"))
        right = reward_modeling.accuracy(models.reward, models.tokenizer, pairs)
        say(f"reward accuracy {right:.3f} on unseen pairs with clean labels")

        # 2. PPO, with the gold score of every response beside the reward model's.
        gold = list[float]()

        def score(reward: Any, drawn: rollout.Rollout, **options: Any) -> torch.Tensor:
            decode, P = models.tokenizer.batch_decode, drawn.ids.shape[1] - drawn.mask.shape[1]
            texts = (decode(ids, skip_special_tokens=True) for ids in (drawn.ids[:, :P], drawn.response))
            gold.extend(map(task.gold_score, *texts))
            return rollout.score(reward, drawn, **options)

        s = ppo.Settings(batch_size=given.batch_size, critic_learning_rate=3e-4, kl_coef=given.kl_coef)
        whole = setup.assemble(models, task.prompts(), pairs, s, ppo.Parts(score=score))
        (given.out / "settings.json").write_text(json.dumps(whole["declared"], indent=2) + "\n")
        torch.manual_seed(given.seed)
        for i in range(1, given.iterations + 1):
            gold.clear()
            row = {"step": i, "gold": 0.0, **whole["step"]()}
            row["gold"] = sum(gold) / len(gold)
            logs["metrics"].write(json.dumps(row) + "\n")
            if i % 10 == 0 or i == given.iterations:
                shown = ("gold", "score", "kl", "entropy", "explained_variance", "eos_rate")
                say(f"ppo    {i:4d}  " + "  ".join(f"{name} {row[name]:.2f}" for name in shown))
    finally:
        for log in logs.values():
            log.close()

    # 3. The four models, each with the tokenizer.
    for role, folder in setup.save_checkpoints(whole, given.out).items():
        say(f"{role} in {folder}")


if __name__ == "__main__":
    main()

"""What a checkpoint folder tells of the training run that wrote it. No torch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_doctor.facts import Unavailable, role_fact
from rlhf_doctor.finding import Role, Stage
from rlhf_doctor.instruments.files import BadFile, read_json

__all__ = ["RunState", "run_state"]

# Columns that a log of RL has and one of supervised training has not.
RL_COLUMNS = ("objective/", "ppo/", "policy/", "val/ratio", "reward", "kl", "actor/", "critic/", "completions/")


@dataclass(frozen=True)
class RunState:
    """``step`` of the run; ``rl``: its log has columns of RL. ``best_metric`` is the value that the best checkpoint was
    chosen by, ``chosen_by_loss`` whether that value is an evaluation loss of the log. ``settings`` is args.json."""

    path: Path
    step: int
    rl: bool
    best_metric: float | None
    chosen_by_loss: bool
    settings: Mapping[str, Any]


@role_fact(Stage.STATIC)
def run_state(role: Role, setup: Any) -> RunState:
    """trainer_state.json, and args.json where there is one, in a checkpoint folder.

    Raises:
        Unavailable: the role has no folder, or no such file is in it.
    """
    folder = setup.path(role)
    if folder is None or not (folder / "trainer_state.json").is_file():
        raise Unavailable(f"needs the trainer_state.json of a run in the {role}'s folder")
    state = _object(folder / "trainer_state.json")
    log = [row for row in state.get("log_history") or () if isinstance(row, dict)]
    step, best = state.get("global_step"), state.get("best_metric")
    losses = [row["eval_loss"] for row in log if isinstance(row.get("eval_loss"), (int, float))]
    settings = _object(folder / "args.json") if (folder / "args.json").is_file() else {}
    metric = settings.get("metric_for_best_model")
    by_loss = metric in ("loss", "eval_loss") if metric else isinstance(best, (int, float)) and best in losses
    return RunState(
        folder.resolve(),
        step if isinstance(step, int) else 0,
        any(str(column).startswith(RL_COLUMNS) for row in log for column in row),
        float(best) if isinstance(best, (int, float)) else None,
        by_loss,
        settings,
    )


def _object(path: Path) -> Mapping[str, Any]:
    try:
        given = read_json(path)
    except BadFile as bad:
        raise Unavailable(str(bad)) from bad
    return given if isinstance(given, dict) else {}

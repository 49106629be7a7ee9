"""The command line: parse, call, print, exit code. Nothing here or above imports torch."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from rlhf_doctor.nearest import did_you_mean

__all__ = ["cli", "main"]

FORMATS = ("terminal", "html", "json", "markdown")
STAGES = ("static", "probe", "trace")
SEVERITIES = ("error", "warning", "info")
DTYPES = ("float32", "bfloat16", "float16")


class Commands(click.Group):
    """Commands; a mistyped one gets the nearest real one suggested."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first argument."""
        name = str(args[0])
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            is_target = ".py" in name or os.path.exists(name)
            hint = f"; did you mean 'rlhf-doctor check {name}'?" if is_target else did_you_mean(name, self.commands)
            ctx.fail(f"there is no command {name!r}{hint}")
        return super().resolve_command(ctx, args)


def one_of(*allowed: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback that lets these words through, one or a comma list of them, and suggests the nearest to another."""

    def chosen(ctx: click.Context, parameter: click.Parameter, given: Any) -> Any:
        if given is None:
            return None
        words = split_lists(given) if isinstance(given, tuple) else [given]
        for word in words:
            if word not in allowed:
                hint = did_you_mean(word, allowed) or f"; one of {', '.join(allowed)}"
                raise click.BadParameter(f"{word!r} is not known{hint}", ctx, parameter)
        return tuple(dict.fromkeys(words)) if isinstance(given, tuple) else given

    return chosen


def split_lists(given: tuple[str, ...]) -> list[str]:
    """Repeated options and comma lists alike."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Find what is wrong with an RLHF setup before the GPUs are booked.

    \b
    Exit codes: 0 healthy; 1 findings at or above --fail-on; 2 the setup could
    not be read or judged; 3 this tool failed; 130 interrupted.
    """


@cli.command()
@click.argument("targets", metavar="[TARGET]...", nargs=-1)
@click.option("--policy", metavar="DIR", help="Checkpoint folder of the policy.")
@click.option("--reference", metavar="DIR", help='... of the reference, or the word "adapter-off".')
@click.option("--reward", metavar="DIR", help="... of the reward model.")
@click.option("--value", metavar="DIR", help="... of the value model (critic).")
@click.option("--tokenizer", metavar="DIR", help="Folder of the tokenizer that feeds the models.")
@click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Declare a setting, as gamma=0.99.")
@click.option("--stage", metavar="|".join(STAGES), default="trace", show_default=True, callback=one_of(*STAGES),
              help="How deep to look: files alone; forward and backward passes; the training step too.")  # fmt: skip
@click.option("--select", metavar="CODES", multiple=True, help="Only these checks: codes, slugs or families.")
@click.option("--ignore", metavar="CODES", multiple=True, help="Not these checks.")
@click.option("--format", "formats", metavar="|".join(FORMATS), multiple=True, callback=one_of(*FORMATS),
              help="Repeat it, or give a comma list.  [default: terminal,html]")  # fmt: skip
@click.option("-o", "--output", metavar="PATH", help="File or folder of the report, - for stdout.  [default: reports/]")
@click.option("--fail-on", metavar="|".join(SEVERITIES), default="error", show_default=True,
              callback=one_of(*SEVERITIES), help="Least severity of a finding that gives exit code 1.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Warnings and skipped checks give exit code 1 too.")
@click.option("--suspected", is_flag=True, help="Show findings that are only suspected.")
@click.option("--seed", default=0, show_default=True, help="Seed of the probes.")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="Where models from folders are put.")
@click.option("--dtype", metavar="|".join(DTYPES), callback=one_of(*DTYPES),
              help="Load models from folders as this.  [default: as saved]")  # fmt: skip
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), default=600,
              show_default=True, help="Most that loading, or any one measurement, may take.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that a checkpoint brings along.")
@click.option("-q", "--quiet", is_flag=True, help="Write the files and set the exit code; print nothing but failures.")
@click.pass_context
def check(ctx: click.Context, /, **given: Any) -> None:
    """Examine a setup and report what is wrong with it.

    TARGET is file.py:name, a function or object that gives an RLHFSetup or a dict of its fields, or a folder with
    the subfolders policy, reference, reward and value. Several targets describe one setup. Without any target or
    model, the built-in reference is examined.
    """
    from rlhf_doctor import delivery

    job = _job(given)
    try:
        deliveries = delivery.plan(given["formats"], given["output"], job.name or "reference")
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--output: {error}") from error
    record = _examined(job, given["timeout"], quiet=given["quiet"])
    for one in deliveries:
        _deliver(one, record, quiet=given["quiet"])
    ctx.exit(_exit_code(record, given))


@cli.command(context_settings={"allow_interspersed_args": False})
@click.argument("program", metavar="-- python train.py [ARGUMENT]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--steps", metavar="N", type=click.IntRange(min=1),
              help="Record so many optimizer steps.  [default: one iteration, and the start of the next]")  # fmt: skip
@click.option("--stop-after", is_flag=True, help="End the program once enough was seen.")
@click.option("--set", "assignments", metavar="NAME=VALUE", multiple=True, help="Declare a setting, as gamma=0.99.")
@click.option("--select", metavar="CODES", multiple=True, help="Only these checks: codes, slugs or families.")
@click.option("--ignore", metavar="CODES", multiple=True, help="Not these checks.")
@click.option("--format", "formats", metavar="|".join(FORMATS), multiple=True, callback=one_of(*FORMATS),
              help="Repeat it, or give a comma list.  [default: terminal,html]")  # fmt: skip
@click.option("-o", "--output", metavar="PATH", help="File or folder of the report, - for stdout.  [default: reports/]")
@click.option("--fail-on", metavar="|".join(SEVERITIES), default="error", show_default=True,
              callback=one_of(*SEVERITIES), help="Least severity of a finding that gives exit code 1.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Warnings and skipped checks give exit code 1 too.")
@click.option("--suspected", is_flag=True, help="Show findings that are only suspected.")
@click.option("--seed", default=0, show_default=True, help="Seed of the probes.")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), default=600,
              show_default=True, help="Most that any one measurement may take afterwards.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Write the files and set the exit code; print nothing but failures.")
@click.pass_context
def watch(ctx: click.Context, /, **given: Any) -> None:
    """Run a training program as it is, and report what is wrong with what it does.

    Its models are found while it runs, the first iteration is recorded, and nothing in it is changed: it trains on
    bit for bit as without. What needs a step to be run again is skipped; for that give a step to 'check'.
    """
    from rlhf_doctor import delivery
    from rlhf_doctor.progress import Lines
    from rlhf_doctor.watching_child import Watched
    from rlhf_doctor.watching_command import NotWatchable, planned, watched_record

    if not given["program"]:
        raise click.UsageError("which program? As in 'rlhf-doctor watch -- python train.py'")
    try:
        interpreter, program = planned(given["program"])
    except NotWatchable as error:
        raise click.UsageError(str(error)) from error
    job = Watched(program=program, steps=given["steps"], stop_after=given["stop_after"], **_wanted(given))
    name = program[1] if program[0] == "-m" else program[0]
    try:
        deliveries = delivery.plan(given["formats"], given["output"], name)
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--output: {error}") from error
    record = watched_record(
        interpreter,
        job,
        limit=given["timeout"],
        progress=(lambda text: None) if given["quiet"] else Lines(),
        to_stderr=any(one.path is None and one.format != "terminal" for one in deliveries),
    )
    for one in deliveries:
        _deliver(one, record, quiet=given["quiet"])
    ctx.exit(_exit_code(record, given))


def _wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `check` and `watch` have in common."""
    from rlhf_doctor.pages import codes_named
    from rlhf_doctor.setups import DECLARED_NAMES
    from rlhf_doctor.sources.scalars import parse_assignments

    try:
        declared = parse_assignments(given["assignments"])
        select, ignore = (codes_named(split_lists(given[name])) for name in ("select", "ignore"))
    except (KeyError, ValueError) as error:
        raise click.UsageError(str(error.args[0])) from error
    for name in declared:
        if name not in DECLARED_NAMES:
            click.echo(f"note: no check reads the setting {name!r}{did_you_mean(name, DECLARED_NAMES)}", err=True)
    return {
        "declared": declared,
        "select": tuple(select),
        "ignore": tuple(ignore),
        "seed": given["seed"],
        "suspected": given["suspected"],
        "command": shlex.join(["rlhf-doctor", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _job(given: Mapping[str, Any]) -> Any:
    from rlhf_doctor.finding import MODEL_ROLES
    from rlhf_doctor.worker import Job

    return Job(
        targets=given["targets"],
        folders={name: given[name] for name in (*MODEL_ROLES, "tokenizer") if given[name]},
        **{name: given[name] for name in ("stage", "device", "dtype", "trust_remote_code")},
        **_wanted(given),
    )


def _examined(job: Any, timeout: float, *, quiet: bool) -> dict[str, Any]:
    """Files alone are read here; whatever runs the setup's code or torch runs in a child process."""
    from rlhf_doctor.progress import shown_progress
    from rlhf_doctor.sources.python_file import is_python_target

    files_alone = job.stage == "static" and job.name and not any(map(is_python_target, job.targets))
    with shown_progress(quiet=quiet) as progress:
        if files_alone:
            from rlhf_doctor.worker import examined

            return examined(job, progress, progress)
        from rlhf_doctor.supervise import supervise

        return supervise(job, limit=timeout, progress=progress)


def _deliver(one: Any, record: Mapping[str, Any], *, quiet: bool) -> None:
    if one.path is None:
        if one.format != "terminal" or not quiet:
            click.echo(one.render(record).rstrip("\n"))
        return
    try:
        one.write(record)
    except OSError as error:
        raise click.UsageError(f"the report could not be written: {error}") from error
    if not quiet:
        click.echo(f"{one.format}: {one.path}")


def _exit_code(record: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    from rlhf_doctor.finding import Severity
    from rlhf_doctor.report.record import exit_code

    if given["quiet"]:
        for error in record["errors"]:
            click.echo(f"rlhf-doctor: {error['message']}", err=True)
    return exit_code(record, Severity(given["fail_on"]), strict=given["strict"])


@cli.command()
@click.argument("name", metavar="CODE")
def explain(name: str) -> None:
    """Show the page of one check, by its code or its slug."""
    from rlhf_doctor.pages import check_named, page_text

    try:
        click.echo(page_text(check_named(name)))
    except KeyError as error:
        raise click.UsageError(str(error.args[0])) from error


@cli.command()
@click.argument("families", metavar="[FAMILY]...", nargs=-1)
@click.option("--format", "fmt", metavar="table|json|markdown", default="table", show_default=True,
              callback=one_of("table", "json", "markdown"), help="How to print the list.")  # fmt: skip
def rules(families: tuple[str, ...], fmt: str) -> None:
    """List the checks, all of them or those of some families."""
    import json

    from rlhf_doctor.pages import markdown_table, print_table, rows

    try:
        table = rows(families)
    except KeyError as error:
        raise click.UsageError(str(error.args[0])) from error
    if fmt == "table":
        print_table(table)
    else:
        click.echo(json.dumps(table, indent=2) if fmt == "json" else markdown_table(table))


@cli.command()
@click.option("--select", metavar="CODES", multiple=True, help="Only these checks: codes, slugs or families.")
@click.option("-q", "--quiet", is_flag=True, help="Print only what went wrong.")
@click.pass_context
def selftest(ctx: click.Context, select: tuple[str, ...], quiet: bool) -> None:
    """Run every shipped fault and its healthy twin on this machine.

    Exit code 0: each fault was found and the healthy setups were silent. 1: not so.
    """
    from rlhf_doctor.pages import codes_named
    from rlhf_doctor.progress import shown_progress

    try:
        codes = codes_named(split_lists(select))
    except KeyError as error:
        raise click.UsageError(str(error.args[0])) from error
    from rlhf_doctor.selftest.run import run, summary

    started = time.perf_counter()
    with shown_progress(quiet=quiet) as progress:
        trials = run(codes, progress)
    text = summary(trials, time.perf_counter() - started, quiet=quiet)
    if text:
        click.echo(text)
    ctx.exit(0 if all(trial.passed for trial in trials) else 1)


@cli.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        click.echo(f"rlhf-doctor {installed('rlhf-doctor')}")
    except PackageNotFoundError:
        click.echo("rlhf-doctor, run from its sources without being installed")


def main() -> None:
    """The console script: whatever happens ends as a sentence and an exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = cli.main(prog_name="rlhf-doctor", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:  # as in `rlhf-doctor rules | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception:  # a fault of this tool
        click.echo(f"{traceback.format_exc()}rlhf-doctor itself failed; no verdict was reached", err=True)
        code = 3
    sys.exit(code or 0)

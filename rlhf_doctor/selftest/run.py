"""Run every fault that the checks ship with, and their healthy twins, in as many processes as there are cores."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rlhf_doctor.check import Check, Fault, registry
from rlhf_doctor.examine import Examination, Options, examine
from rlhf_doctor.finding import MODEL_ROLES, Confidence, Errored, Found, Severity, Skipped, Stage
from rlhf_doctor.setups import RLHFSetup

__all__ = ["Patients", "Trial", "healthy_trials", "run", "summary", "try_fault", "try_healthy"]

Progress = Callable[[str], None]
GRAVE = (Severity.ERROR, Severity.WARNING)


@dataclass(frozen=True)
class Trial:
    """One fault that must be found, or one healthy setup that must be silent; ``said`` is why it was not so."""

    code: str
    title: str
    said: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all was as it must be."""
        return not self.said


class Patients:
    """The healthy setups that faults start from, built once: four models in memory, and the same four saved."""

    def __init__(self, folder: Path) -> None:
        import reference_impl

        fields = reference_impl.build_setup()
        self.folder = folder
        self.healthy = RLHFSetup.from_mapping(fields, origin="the built-in reference")
        self.saved = folder / "saved"
        reference_impl.save_checkpoints(fields, self.saved)
        self.copies = 0
        self.digest = self.fingerprint()

    @property
    def healthy_files(self) -> RLHFSetup:
        """A fresh copy of the saved four, which a fault may edit."""
        self.copies += 1
        copy = self.folder / f"copy-{self.copies}"
        shutil.copytree(self.saved, copy)
        policy, reference, reward, value = (str(copy / role) for role in MODEL_ROLES)
        return RLHFSetup(
            policy=policy,
            reference=reference,
            reward=reward,
            value=value,
            tokenizer=deepcopy(self.healthy.tokenizer),
            prompts=self.healthy.prompts,
            preferences=self.healthy.preferences,
            declared=dict(self.healthy.declared),
            origin="the built-in reference, saved",
        )

    def fingerprint(self) -> str:
        """A hash of the four models' weights, gradients and modes: no fault may change the shared setup."""
        digest = hashlib.sha256()
        for role in MODEL_ROLES:
            module = self.healthy.model(role)
            for name, tensor in module.state_dict().items():
                digest.update(name.encode() + tensor.detach().contiguous().view(-1).numpy().tobytes())
            for name, parameter in module.named_parameters():
                digest.update(f"{name}{parameter.requires_grad}{parameter.grad is None}".encode())
            digest.update(str([child.training for child in module.modules()]).encode())
        return digest.hexdigest()

    def drop_copies(self) -> None:
        """Delete the folders that faults have edited."""
        for copy in self.folder.glob("copy-*"):
            shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def patients() -> Iterator[Patients]:
    """The patients, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-selftest-") as folder:
        yield Patients(Path(folder))


def run(codes: Sequence[str] = (), progress: Progress = lambda _: None, workers: int | None = None) -> list[Trial]:
    """Try the faults of these checks or families, of all where none is named, and the healthy setups.

    Args:
        codes: of checks, or names of families.
        progress: is told what is tried.
        workers: processes; as many as there are cores where there is much to do.

    Raises:
        KeyError: a name is neither a code nor a family.
    """
    checks = registry()
    chosen = [c for c in checks.values() if not codes or {c.code, c.family, c.code[:3]} & set(codes)]
    jobs: list[Job] = [("", 0, tuple(codes)), ("", 1, tuple(codes))]
    jobs += [(one.code, n, ()) for one in chosen for n in range(len(one.faults))]
    if workers is None:
        workers = min(os.cpu_count() or 1, len(jobs) // WORTH_A_PROCESS + 1)
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-selftest-") as folder:
        progress("building the healthy setup")
        if workers == 1:
            with quiet_libraries():
                shared = Patients(Path(folder))
                return [_told(_tried(job, shared), progress) for job in jobs]
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(folder,))
        with pool:
            return [_told(trial, progress) for trial in pool.map(_tried_here, jobs)]


WORTH_A_PROCESS = 25  # trials: as long as it takes to start one and train the healthy setup in it
Job = tuple[str, int, tuple[str, ...]]  # (code, which of its faults; "" for a healthy setup, its codes)
_HERE: list[Patients] = []
_QUIET: list[AbstractContextManager[None]] = []  # let go of, it would end


def _begin(folder: str) -> None:
    """Build the healthy setup of this process, on one thread: processes are as many as there are cores."""
    import torch

    torch.set_num_threads(1)
    _QUIET.append(quiet_libraries())
    _QUIET[0].__enter__()
    _HERE.append(Patients(Path(folder) / str(os.getpid())))


def _tried_here(job: Job) -> Trial:
    return _tried(job, _HERE[0])


def _tried(job: Job, shared: Patients) -> Trial:
    code, number, codes = job
    if code:
        one = registry()[code]
        trial = try_fault(one, one.faults[number], shared)
    else:
        trial = healthy_trials(shared, codes)[number].run()
    shared.drop_copies()
    if shared.fingerprint() != shared.digest:
        trial = Trial(trial.code, trial.title, "it changed the shared healthy setup", trial.seconds)
    return trial


def _told(trial: Trial, progress: Progress) -> Trial:
    progress(f"{trial.code}: {trial.title}" if trial.code else trial.title)
    return trial


@dataclass(frozen=True)
class Planned:
    """A trial still to be run."""

    title: str
    run: Callable[[], Trial]


def healthy_trials(shared: Patients, codes: Sequence[str] = ()) -> list[Planned]:
    """The healthy setups in memory and as files, which every check must pass over in silence."""
    return [
        Planned("healthy, in memory", lambda: try_healthy("healthy, in memory", shared.healthy, codes)),
        # Without a tokenizer, as on the command line: each folder has its own. Copied when it is run, deleted after.
        Planned(
            "healthy, as files",
            lambda: try_healthy("healthy, as files", shared.healthy_files.but(tokenizer=None), codes),
        ),
    ]


def try_healthy(title: str, setup: RLHFSetup, codes: Sequence[str] = ()) -> Trial:
    """Every chosen check on a healthy setup: no error, no warning, nothing unreadable, no crash."""
    started = time.perf_counter()
    examination = examine(setup, select=codes, options=Options(show=False))
    checks = registry()
    alarms = [
        f"false alarm {code}: {f.message}"
        for code, f in examination.findings
        if (f.severity or checks[code].severity) in GRAVE and f.confidence is not Confidence.SUSPECTED
    ]
    said = "; ".join([*alarms, *_failures(examination)])
    return Trial("", title, said, time.perf_counter() - started)


def try_fault(one: Check, fault: Fault, shared: Patients) -> Trial:
    """A faulty setup must get the check's finding, also when the checks that come before it have run.

    What those wait for themselves can only silence them, so it is left out where the check is heard without it, and so
    are the stages after the check's earliest one.
    """
    started = time.perf_counter()
    try:
        setup = fault.make(**{name: getattr(shared, name) for name in fault.wants})
        near, every, said = (one.code, *one.after), tuple(_with_earlier(one)), ""
        for stage, codes in dict.fromkeys(((one.earliest, near), (Stage.TRACE, near), (Stage.TRACE, every))):
            said = _missed(one, examine(setup, select=codes, options=Options(stage=stage, show=False)))
            if not said:
                break
    except Exception:  # a fault that cannot even be made is a failed trial, and the others go on
        said = traceback.format_exc()
    return Trial(one.code, fault.title, said, time.perf_counter() - started)


def _with_earlier(one: Check) -> list[str]:
    """The code and those that come before it, before those, and so on."""
    checks = registry()
    codes: list[str] = []
    queue = [one.code]
    while queue:
        code = queue.pop()
        if code not in codes and code in checks:
            codes.append(code)
            queue += checks[code].after
    return codes


def _missed(one: Check, examination: Examination) -> str:
    outcome = examination.outcomes[one.code]
    if isinstance(outcome, Found):
        shown = any(f.confidence is not Confidence.SUSPECTED for f in outcome.findings)
        return "" if shown else "found, but only suspected, which is hidden"
    if isinstance(outcome, Skipped):
        unread = "; ".join(sentence for _, sentence in examination.errors)
        return f"skipped: {outcome.reason}" + (f" ({unread})" if unread else "")
    return outcome.traceback if isinstance(outcome, Errored) else "not found"


def _failures(examination: Examination) -> list[str]:
    crashed = [f"{o.code} crashed: {o.traceback}" for o in examination.outcomes.values() if isinstance(o, Errored)]
    return [sentence for _, sentence in examination.errors] + crashed


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the notices and bars of transformers, which are about models that are broken on purpose."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def summary(trials: Sequence[Trial], seconds: float, *, quiet: bool = False) -> str:
    """A table of the checks with their faults, and every trial that failed with the reason."""
    failed = [t for t in trials if not t.passed]
    lines = [f"FAILED {t.code or 'healthy'} {t.title}: {t.said}" for t in failed]
    if quiet:
        return "\n".join(lines)
    table = _by_code(trials)
    width = max((len(code) for code in table), default=0)
    rows = [f"{code:{width}}  {good}/{total} faults found" for code, (good, total) in table.items()]
    silent = [f"{t.title}: {'yes' if t.passed else 'NO'}" for t in trials if not t.code]
    total = sum(bool(t.code) for t in trials)
    found = sum(t.passed for t in trials if t.code)
    verdict = f"{found} of {total} faults found, {len(failed)} trials failed, in {seconds:.0f} seconds"
    return "\n".join([*rows, *silent, *lines, verdict])


def _by_code(trials: Sequence[Trial]) -> Mapping[str, tuple[int, int]]:
    table: dict[str, tuple[int, int]] = {}
    for trial in trials:
        if trial.code:
            good, total = table.get(trial.code, (0, 0))
            table[trial.code] = (good + trial.passed, total + 1)
    return table

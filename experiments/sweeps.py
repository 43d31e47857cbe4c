"""A sweep's members: what became of each, said at the end whichever launcher ran them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from merging.errors import InputError

# raised by joblib when a process of its pool ends without an answer
_KILLED = {"TerminatedWorkerError", "BrokenProcessPool"}
_NO_ANSWER = "its process ended without an answer; it may have been killed"


class JobFailed(Exception):
    """A job of a sweep failed and has said why: (exit code, sentence)."""


@dataclass(frozen=True)
class Member:
    """One job of a sweep: what set it apart from the command line's rest, and its outcome."""

    overrides: tuple[str, ...]
    outcome: JobReturn

    @property
    def failure(self) -> tuple[int, str] | None:
        """Exit code and sentence; None for a job that is done."""
        if self.outcome.status is JobStatus.COMPLETED:
            return None
        error = self.outcome._return_value
        if isinstance(error, JobFailed):
            return error.args
        return 1, f"{type(error).__name__}: {error}"

    @property
    def value(self) -> float | None:
        """What the command returned; None for a job that failed or was skipped."""
        return None if self.failure else self.outcome.return_value


class Recorder:
    """A launcher that keeps what its jobs returned, in the place of the one it wraps.

    found: what a member returned when an earlier sweep was at it, None where it is to be run;
        asked before jobs go to processes of their own, which take seconds to start.
    """

    def __init__(
        self,
        launcher: Launcher,
        config: DictConfig,
        found: Callable[[Sequence[str]], float | None] = lambda overrides: None,
    ) -> None:
        self.launcher, self.config, self.found = launcher, config, found
        self.members: list[Member] = []

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        """As `hydra.plugins.launcher.Launcher.launch`."""
        values = [self.found(own) if in_processes(self.config) else None for own in overrides]
        missing = [own for own, value in zip(overrides, values, strict=True) if value is None]
        self._announce(len(overrides), len(missing))
        launched = iter(self._launched(missing, initial_job_idx) if missing else ())
        outcomes = [
            next(launched) if value is None else _done(own, value)
            for own, value in zip(overrides, values, strict=True)
        ]
        self.members += [
            Member(tuple(filter_overrides(own)), outcome)
            for own, outcome in zip(overrides, outcomes, strict=True)
        ]
        return outcomes

    def _launched(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        try:
            with _killed_jobs_fail():
                return self.launcher.launch(overrides, initial_job_idx=initial_job_idx)
        except Exception as error:
            if type(error).__name__ in _KILLED:
                raise InputError(
                    "a process of the sweep ended without an answer; it may have been killed",
                    hint="finished runs are kept: start the sweep again, with fewer jobs at a time "
                    "if memory was short",
                ) from error
            raise

    def _announce(self, count: int, missing: int) -> None:
        if missing < count:
            sys.stderr.write(f"{count - missing} of {count} runs are done already\n")
        if missing and not self.members and (folder := _logs(self.config)):
            records = self.config.get("records")
            sys.stderr.write(
                f"{missing} jobs; their logs: {folder}"
                + (f", their records: {records}" if records else "")
                + "\n"
            )


def _done(overrides: Sequence[str], value: float) -> JobReturn:
    return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=value)


@contextmanager
def _killed_jobs_fail() -> Iterator[None]:
    """A job of submitit that was killed fails alone.

    Hydra's launcher asks one job after the other for its results; submitit raises for one that
    left none, and the answers of the others would be lost.
    """
    try:
        from submitit.core.core import Job
        from submitit.core.utils import UncompletedJobError
    except ImportError:
        yield
        return
    results = Job.results

    def told(job: Any) -> list[Any]:
        try:
            return results(job)
        except UncompletedJobError:
            sentence = f"{_NO_ANSWER}; its log: {job.paths.stderr}"
            return [JobReturn(status=JobStatus.FAILED, _return_value=JobFailed(1, sentence))]

    Job.results = told
    try:
        yield
    finally:
        Job.results = results


def in_processes(config: DictConfig) -> bool:
    """Whether each member runs in a process of its own."""
    return "BasicLauncher" not in config.hydra.launcher._target_


def _logs(config: DictConfig) -> Path | None:
    """Folder of the logs of jobs that print elsewhere than here."""
    folder = config.hydra.launcher.get("submitit_folder")
    return Path(str(folder)).parent if folder else None


@contextmanager
def tidied(recorder: Recorder) -> Iterator[None]:
    """Folders of runs are removed at a sweep's end; logs of failed jobs stay."""
    try:
        yield
    finally:
        logs = _logs(recorder.config)
        for member in recorder.members:
            if logs and member.failure is None and member.outcome.hydra_cfg:
                job = str(member.outcome.hydra_cfg.hydra.job.id).split("_")[0]
                shutil.rmtree(logs / job, ignore_errors=True)
        runs = Path(recorder.config.hydra.sweep.dir).glob("[0-9]*")
        for folder in [*runs, *([logs] if logs else [])]:
            with suppress(OSError):  # no folder, or something is in it
                folder.rmdir()


def conclude(recorder: Recorder) -> int:
    """Print the members' values, the best of a search, and last what failed; the exit code."""
    members = recorder.members
    shared = set.intersection(*(set(member.overrides) for member in members)) if members else set()
    names = [" ".join(o for o in member.overrides if o not in shared) for member in members]
    values = [(n, m.value) for n, m in zip(names, members, strict=True) if m.value is not None]
    if values:
        Console().print(_table(values))
    if values and "Optuna" in recorder.config.hydra.sweeper._target_:
        name, value = max(values, key=lambda pair: pair[1])
        print(f"best of {len(members)} trials: {name}, {100 * value:.2f}")
    failures = [(n, m.failure) for n, m in zip(names, members, strict=True) if m.failure]
    if not failures:
        return 0
    sys.stdout.flush()
    sys.stderr.write(f"{len(failures)} of {len(members)} failed:\n")
    for name, (_, sentence) in failures:
        sys.stderr.write(f"  {name or 'the only one'}: {sentence}\n")
    return min(code for _, (code, _) in failures)


def _table(values: Sequence[tuple[str, float]]) -> Table:
    table = Table(title="mean accuracy in percent", min_width=40)
    table.add_column("run")
    table.add_column("mean", justify="right")
    for name, value in values:
        table.add_row(Text(name), f"{100 * value:.2f}")
    return table

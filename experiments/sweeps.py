"""A sweep's members: what became of each, said at the end whichever launcher ran them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
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

# raised by joblib and submitit when a process of theirs ends without an answer
_KILLED = {"TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError", "FailedJobError"}


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
    """A launcher that keeps what its jobs returned, in the place of the one it wraps."""

    def __init__(self, launcher: Launcher, config: DictConfig) -> None:
        self.launcher, self.config = launcher, config
        self.members: list[Member] = []

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        """As `hydra.plugins.launcher.Launcher.launch`."""
        if not self.members and (folder := _logs(self.config)):
            sys.stderr.write(
                f"{len(overrides)} jobs; their logs: {folder}, "
                f"their records: {self.config.get('records')}\n"
            )
        try:
            outcomes = self.launcher.launch(overrides, initial_job_idx=initial_job_idx)
        except Exception as error:
            if type(error).__name__ in _KILLED:
                raise InputError(
                    "a process of the sweep ended without an answer; it may have been killed",
                    hint="finished runs are kept: start the sweep again, with fewer jobs at a time "
                    "if memory was short"
                    + (f"; logs of the jobs: {folder}" if (folder := _logs(self.config)) else ""),
                ) from error
            raise
        self.members += [
            Member(tuple(filter_overrides(own)), outcome)
            for own, outcome in zip(overrides, outcomes, strict=True)
        ]
        return outcomes


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
            if logs and member.failure is None:
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

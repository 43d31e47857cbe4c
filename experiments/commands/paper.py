"""`python -m experiments.paper NAME`: one published table, from the hub to the printed row."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown

from eval.backend import Unsupported
from experiments import preflight
from experiments.commands.run import COMMAND as RUN
from experiments.hydra_run import Command, composed
from experiments.measurement import measure
from experiments.report.paper import Paper, render_paper
from experiments.settings import Experiment
from merging.errors import InputError

log = logging.getLogger(__name__)
# Keys of this command; everything else on its command line is an override of every row's run.
OWN = ("paper", "dry_run", "records", "output", "published", "overrides")
# Settings of a run that say something of its suite.
OF_SUITE = ("suite", "protocol", "tasks", "heldout", "weights_on", "weights")


@dataclass
class Reproduce:
    """The keys of configs/reproduce.yaml."""

    paper: Paper | None = None
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    records: str = "runs/records"
    output: str = "results"
    published: str = "results/published"


def prepare(arguments: list[str]) -> list[str]:
    """NAME, name=NAME and --dry-run as the configuration's keys; overrides of runs into a list."""
    kept, given = [], []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument == "--dry-run":
            kept.append("dry_run=true")
        elif not sign and not argument.startswith("-"):
            kept.append(f"paper={argument}")
        elif key == "name":
            kept.append(f"paper={value}")
        elif argument.startswith("-") or key.lstrip("+~").partition(".")[0] in (*OWN, "hydra"):
            kept.append(argument)
        else:
            quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
            given.append(f"'{quoted}'")
    return kept + ([f"overrides=[{','.join(given)}]"] if given else [])


def check(settings: Reproduce, hydra: DictConfig) -> None:
    """InputError where no table is named, or its file says no runs."""
    if settings.paper is None:
        raise InputError(
            "no table is named",
            hint="python -m experiments.paper NAME, a file of configs/paper",
        )
    if not settings.paper.runs:
        raise InputError(f"table {settings.paper.name} names no runs")


def rows(settings: Reproduce) -> list[tuple[str, Experiment]]:
    """(what it is called, its run) of every row of the table, each run checked."""
    paper = settings.paper
    shared = [*paper.settings, *settings.overrides, f"records={settings.records}"]
    first = composed(RUN, [*shared, "method=average"])
    found = []
    for line in paper.runs:
        for own in expand(shlex.split(line)):
            run = _row(shared, own, first)
            if run.suite["name"] != paper.suite:
                raise InputError(
                    f"table {paper.name} is about suite {paper.suite}, "
                    f"its runs are of {run.suite['name']}"
                )
            if run.suite["family"] != paper.family:
                raise InputError(
                    f"table {paper.name} is about checkpoints of {paper.family!r}, "
                    f"its runs are of {run.suite['family']!r}",
                    hint="figures of different checkpoints are never compared; checkpoints of "
                    f"theirs that you have are named with suite.family={paper.family!r}",
                )
            found.append((" ".join(own).replace("method=", "", 1), run))
    return found


def _row(shared: Sequence[str], own: Sequence[str], first: Experiment) -> Experiment:
    """The run of a row, which has the suite of the first unless it says something of its own:
    composing a suite of many files takes longer than all the rest."""
    if any(map(_of_suite, own)):
        return composed(RUN, [*shared, *own])
    others = [override for override in shared if not _of_suite(override)]
    return replace(
        composed(RUN, [*others, *own]), **{name: getattr(first, name) for name in OF_SUITE}
    )


def _of_suite(override: str) -> bool:
    return re.match(rf"[+~]*({'|'.join(OF_SUITE)})\b", override) is not None


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of overrides with several values, "method=average,actmat"."""
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            key = override.get_key_element()
            values = override.sweep_iterator(transformer=Transformer.encode)
            choices.append([f"{key}={value}" for value in values])
        else:
            choices.append([override.input_line])
    return [list(combination) for combination in itertools.product(*choices)]


def reproduce(settings: Reproduce) -> Path | None:
    """Find out what the table takes; then every row that is missing, and the table.

    Returns its Markdown file, None after a dry run. Raises InputError, before any download or
    merge, for all that does not hold.
    """
    console = Console()
    runs = rows(settings)
    found = preflight.survey(settings.paper, runs)
    preflight.show(found, settings.paper, console)
    preflight.refuse(found, settings.paper.name)
    if settings.dry_run:
        console.print("dry run: nothing was started")
        return None
    records = []
    for name, run in runs:
        try:
            records.append(measure(run))
        except Unsupported as error:
            log.info("skipped: %s: %s", name, error.message)
    return render_paper(settings.paper, Path(settings.published), records, Path(settings.output))


def show(settings: Reproduce, written: Path | None) -> Any:
    """Print the table."""
    if written is not None:
        console = Console()
        console.print(Markdown(written.read_text()))
        console.print(f"written to {written}")


COMMAND = Command("reproduce", Reproduce, task=reproduce, show=show, check=check, prepare=prepare)

"""`python -m experiments.regimes`: methods in the regimes that merges meet, side by side.

A regime is a suite, a fine-tuning and a choice of tasks. Writes results/both_sides/: regimes.jsonl,
table.csv and a figure, and results/both_sides.md around them. Each difference is to the best rival
of the same regime, paired over tasks and seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

import merging
from experiments.hydra_run import Command
from experiments.measurement import measure
from experiments.report import both_sides, records
from experiments.report.figures import save
from experiments.report.records import Record
from experiments.settings import Experiment, check_choices
from merging.errors import InputError
from merging.formats.disk import write_synced
from merging.progress import track


@dataclass
class Regime:
    """One column of the table."""

    suite: str  # one of `Regimes.suites`
    finetuning: str = "full"
    tasks: list[str] | None = None


@dataclass
class Regimes:
    """The keys of configs/regimes.yaml."""

    suites: dict[str, dict[str, Any]]
    regimes: dict[str, Regime]
    methods: dict[str, dict[str, Any]]
    rivals: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    split: str = "validation"
    limit: int | None = 100
    known: list[str] = field(default_factory=list)
    run: bool = True
    records: str = "runs/records"
    output: str = "results"
    device: str = "auto"


def regimes(settings: Regimes) -> None:
    """Run what has no record yet, then tabulate and draw."""
    check(settings)
    console, folder = Console(), Path(settings.output) / "both_sides"
    if settings.run:
        _adopt(settings.known, Path(settings.records))
        runs = list(_runs(settings))
        found = [measure(run) for run in track(runs, "regimes")]
        folder.mkdir(parents=True, exist_ok=True)
        records.save_lines(folder / "regimes.jsonl", found)
    written = render(settings, folder)
    console.print(Markdown(written.read_text()))
    console.print(f"written to {written} and {folder}")


def check(settings: Regimes) -> None:
    """InputError for names that do not exist, before anything is computed."""
    check_choices(settings)
    for title, regime in settings.regimes.items():
        check_choices(regime)
        if regime.suite not in settings.suites:
            raise InputError(
                f"regime {title!r} is of an unknown suite {regime.suite!r}",
                f"known: {', '.join(settings.suites)}",
            )
    for method in settings.methods.values():
        merging.create(**method)
    if unknown := sorted(set(settings.rivals) - set(settings.methods)):
        raise InputError(f"rival {unknown[0]!r} is not among the methods")


def _adopt(known: Sequence[str], folder: Path) -> None:
    """Put finished records, of other tables, where a run with the same key looks for its own."""
    for path in known:
        for record in records.load_lines(Path(path)):
            own = records.record_path(folder, record["key"])
            if not own.exists():
                own.parent.mkdir(parents=True, exist_ok=True)
                records.save(own, record)


def _runs(settings: Regimes) -> Iterator[Experiment]:
    """Regime by regime and seed by seed, so that one seed's experts are in memory at a time."""
    for regime, seed in itertools.product(settings.regimes.values(), settings.seeds):
        for method in settings.methods.values():
            yield Experiment(
                suite=settings.suites[regime.suite],
                method=method,
                tracker={},
                finetuning=regime.finetuning,
                seed=seed,
                tasks=regime.tasks,
                split=settings.split,
                limit=settings.limit,
                device=settings.device,
                records=settings.records,
            )


def render(settings: Regimes, folder: Path) -> Path:
    """The page, its table and its figure from the records; returns the page."""
    path = folder / "regimes.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist", "run this without run=false first")
    frame = to_frame(records.load_lines(path), settings.regimes, settings.methods)
    table = both_sides.compare(frame, settings.rivals)
    write_synced(
        folder / "table.csv", table.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    )
    save(both_sides.figure(table), folder / "differences")
    page = folder.with_suffix(".md")
    write_synced(page, both_sides.page(table, settings.rivals))
    return page


def to_frame(
    found: Sequence[Record], titles: Mapping[str, Regime], methods: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """One line per record and task: regime, method, seed, task, count, accuracy in percent."""
    labels = {_key(merging.create(**own)): label for label, own in methods.items()}
    whole: dict[str, int] = {}
    for record in found:
        suite, tasks = record["key"]["suite"], record["key"]["tasks"]
        whole[suite] = max(whole.get(suite, 0), len(tasks))
    lines = []
    for (title, regime), record in itertools.product(titles.items(), found):
        key = record["key"]
        label = labels.get((key["method"], tuple(sorted(key["hyperparameters"].items()))))
        judged = len(key["tasks"]) == whole[key["suite"]]
        if regime.tasks is not None:
            judged = sorted(key["tasks"]) == sorted(regime.tasks)
        same = (key["suite"], key["finetuning"]) == (regime.suite, regime.finetuning)
        if not (same and judged and label):
            continue
        own = {"regime": title, "row": label, "seed": key["seed"], "split": key["split"]}
        for task, score in record["scores"].items():
            accuracy = {"task": task, "accuracy": 100 * score["accuracy"]}
            lines.append(own | accuracy | {"count": score["count"]})
    return pd.DataFrame(lines)


def _key(method: merging.Method) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return method.name, tuple(sorted(method.hyperparameters.items()))


COMMAND = Command("regimes", Regimes, task=regimes)

"""`python -m experiments.regimes`: methods in the regimes that merges meet, side by side.

A regime is a suite, a fine-tuning and a choice of tasks. Writes results/both_sides/: regimes.jsonl,
table.csv and a figure, and results/both_sides.md around them. Each difference is to the best rival
of the same regime, paired over seeds and examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
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

COLUMNS = ["regime", "row", "seed", "split", "task", "accuracy", "count", "correct"]


@dataclass
class Regime:
    """One column of the table; null is what the command's own key of that name says."""

    suite: str  # one of `Regimes.suites`
    finetuning: str = "full"
    tasks: list[str] | None = None
    seeds: list[int] | None = None
    limit: int | None = None


@dataclass
class Regimes:
    """The keys of configs/regimes.yaml."""

    suites: dict[str, dict[str, Any]]
    regimes: dict[str, Regime]
    methods: dict[str, dict[str, Any]]
    rivals: list[str] = field(default_factory=list)
    only: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
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
    path = folder / "regimes.jsonl"
    if settings.run:
        folder.mkdir(parents=True, exist_ok=True)
        _add(path, _known(settings, path))
        _adopt(records.load_lines(path), Path(settings.records))
        for run in track(list(_missing_runs(settings, path)), "regimes"):
            _add(path, [measure(run)])  # at once: whatever is finished is kept
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
    if unknown := sorted(set(settings.only or ()) - set(settings.regimes)):
        raise InputError(
            f"only names an unknown regime {unknown[0]!r}", f"known: {', '.join(settings.regimes)}"
        )


# --- runs and their records -----------------------------------------------------------------------


def _known(settings: Regimes, path: Path) -> list[Record]:
    """Finished records of other tables that belong into this one."""
    found = itertools.chain.from_iterable(
        records.load_lines(Path(table)) for table in settings.known
    )
    return [record for record in found if any(_cells(settings, record))]


def _add(path: Path, found: Sequence[Record]) -> None:
    """Put records among those of the table; another process may be at the same."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        present = records.load_lines(path) if path.exists() else []
        records.save_lines(path, records.merged(found, present))


def _adopt(found: Iterable[Record], folder: Path) -> None:
    """Put finished records where a run with the same key looks for its own."""
    for record in found:
        own = records.record_path(folder, record["key"])
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            records.save(own, record)


def _missing_runs(settings: Regimes, path: Path) -> Iterator[Experiment]:
    """Regime by regime and seed by seed, so that one seed's experts are in memory at a time."""
    done = {cell for record in records.load_lines(path) for cell in _cells(settings, record)}
    for title in settings.only or settings.regimes:
        regime = settings.regimes[title]
        for seed, (row, method) in itertools.product(
            _seeds(settings, regime), settings.methods.items()
        ):
            if (title, row, seed) not in done:
                yield Experiment(
                    suite=settings.suites[regime.suite],
                    method=method,
                    tracker={},
                    finetuning=regime.finetuning,
                    seed=seed,
                    tasks=regime.tasks,
                    split=settings.split,
                    limit=_limit(settings, regime),
                    device=settings.device,
                    records=settings.records,
                )


def _seeds(settings: Regimes, regime: Regime) -> Sequence[int]:
    return settings.seeds if regime.seeds is None else regime.seeds


def _limit(settings: Regimes, regime: Regime) -> int | None:
    return settings.limit if regime.limit is None else regime.limit


def _cells(settings: Regimes, record: Record) -> Iterator[tuple[str, str, int]]:
    """(regime, row, seed) of the cells that a record fills."""
    key = record["key"]
    if key["selection"] or key["split"] != settings.split:
        return
    try:
        own = _computation({"name": key["method"]} | key["hyperparameters"])
    except InputError:  # a reference, or a method that is no more
        return
    rows = [row for row, method in settings.methods.items() if _computation(method) == own]
    for title, regime in settings.regimes.items():
        tasks = _tasks(settings.suites[regime.suite]) if regime.tasks is None else regime.tasks
        if (
            key["suite"] == settings.suites[regime.suite]["name"]
            and key["finetuning"] == regime.finetuning
            and key["limit"] == _limit(settings, regime)
            and key["seed"] in _seeds(settings, regime)
            and (tasks is None or sorted(key["tasks"]) == sorted(tasks))
        ):
            yield from ((title, row, key["seed"]) for row in rows)


def _tasks(suite: Mapping[str, Any]) -> list[str] | None:
    """All tasks that a suite's configuration names."""
    named = (suite[key] for key in ("corpora", "datasets", "lm_tasks", "tasks") if key in suite)
    return next(map(list, named), None)


def _computation(method: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a method computes: some have a name of their own beside that of their family."""
    made = merging.create(**method)
    return made.function, tuple(sorted(made.arguments.items())), made.alpha


# --- the page -------------------------------------------------------------------------------------


def render(settings: Regimes, folder: Path) -> Path:
    """The page, its table and its figure from the records; returns the page."""
    path = folder / "regimes.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist", "run this without run=false first")
    frame = to_frame(records.load_lines(path), settings)
    if frame.empty:
        raise InputError(f"{path} holds no record of these regimes", "run this without run=false")
    found = both_sides.pairs(frame, settings.rivals)
    table = both_sides.compare(found, settings.rivals)
    write_synced(
        folder / "table.csv", table.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    )
    save(both_sides.figure(table), folder / "differences")
    page = folder.with_suffix(".md")
    write_synced(page, both_sides.page(found, settings.rivals, _missing(frame, settings)))
    return page


def to_frame(found: Sequence[Record], settings: Regimes) -> pd.DataFrame:
    """One line per cell and task: regime, row, seed, split, task, accuracy in percent, count,
    correct (which examples were right, as records have it; "" where a record does not say)."""
    lines = []
    for record in found:
        correct = record.get("correct", {})
        for (title, row, seed), (task, score) in itertools.product(
            _cells(settings, record), record["scores"].items()
        ):
            own = {"regime": title, "row": row, "seed": seed, "split": record["key"]["split"]}
            figures = {"accuracy": 100 * score["accuracy"], "count": score["count"]}
            lines.append(own | {"task": task} | figures | {"correct": correct.get(task, "")})
    frame = pd.DataFrame(lines, columns=COLUMNS)
    # where two records fill a cell, the one that says which examples were right
    frame = frame.sort_values("correct", key=lambda column: column != "", kind="stable")
    frame = frame.drop_duplicates(["regime", "row", "seed", "task"], keep="last")
    order = {title: i for i, title in enumerate(settings.regimes)}
    return frame.sort_values("regime", key=lambda column: column.map(order), kind="stable")


def _missing(frame: pd.DataFrame, settings: Regimes) -> list[str]:
    """The cells that no record fills, a line for each regime and choice of seeds."""
    done = set(zip(frame.regime, frame.row, frame.seed, strict=True))
    lines = []
    for title, regime in settings.regimes.items():
        rows: dict[str, list[str]] = {}
        for row in settings.methods:
            lacking = [seed for seed in _seeds(settings, regime) if (title, row, seed) not in done]
            if lacking:
                rows.setdefault(both_sides.numbered(lacking), []).append(f"`{row}`")
        for seeds, names in rows.items():
            every = len(names) == len(settings.methods)
            lines.append(f"{title}, {seeds}: {'every method' if every else ', '.join(names)}")
    return lines


COMMAND = Command("regimes", Regimes, task=regimes)

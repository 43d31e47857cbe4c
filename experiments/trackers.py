"""Where a finished run is reported beside its record: Weights & Biases, a CSV file, nowhere."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from eval.cache import digest
from experiments.report.markup import comma_separated
from experiments.report.records import Record
from merging.errors import InputError
from merging.formats.disk import write_synced

# (record, reference records by method name, settings of configs/tracker/<name>.yaml)
Tracker = Callable[[Record, Mapping[str, Record], Mapping[str, Any]], None]


def check_tracker(settings: Mapping[str, Any]) -> None:
    """InputError for a tracker there is none of, before anything is computed."""
    if settings.get("name") not in TRACKERS:
        raise InputError(
            f"unknown tracker {settings.get('name')!r}", f"known: {', '.join(sorted(TRACKERS))}"
        )


def track_run(
    record: Record, references: Mapping[str, Record], settings: Mapping[str, Any]
) -> None:
    """Report a run to the tracker that `settings["name"]` names.

    references: records of zero_shot and experts, for the table and the figure.
    Reporting the same record twice updates the first report.
    """
    TRACKERS[settings["name"]](record, references, settings)


def accuracy_rows(record: Record, references: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One row per score and one for the mean: {task, zero_shot, experts, <method>}, in percent.

    A score is a task's, or a benchmark's where a task is judged by several. Tasks that no merged
    expert has learnt follow the mean as "held out: task".
    """
    columns = dict(references) | {record["key"]["method"]: record}
    rows = [
        {"task": task} | {n: 100 * r["scores"][task]["accuracy"] for n, r in columns.items()}
        for task in scored(record)
    ]
    rows.append({"task": "mean"} | {n: 100 * r["mean"] for n, r in columns.items()})
    for task in record.get("heldout", {}):
        accuracy = {n: 100 * r["heldout"][task]["accuracy"] for n, r in columns.items()}
        rows.append({"task": f"held out: {task}"} | accuracy)
    return rows


def scored(record: Record) -> list[str]:
    """Names of a record's scores: those of tasks in the suite's order, then benchmarks by name."""
    tasks = [task for task in record["key"]["tasks"] if task in record["scores"]]
    return tasks + sorted(set(record["scores"]) - set(tasks))


def to_csv(record: Record, references: Mapping[str, Record], settings: Mapping[str, Any]) -> None:
    """One line per run in `settings["path"]`, replaced when the run is reported again."""
    key = record["key"]
    line = {"run": digest(key)}
    line |= {k: key[k] for k in ("suite", "method", "finetuning", "seed", "split")}
    line |= key["hyperparameters"]
    line |= {task: score["accuracy"] for task, score in record["scores"].items()}
    for task, score in record.get("heldout", {}).items():
        line[f"held out: {task}"] = score["accuracy"]
    line |= {k: record[k] for k in ("mean", "normalised", "peak_bytes")}
    line |= {f"{k}_seconds": v for k, v in record["seconds"].items()}

    path = Path(settings["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # jobs of a sweep may share the file
        lines: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                lines = [old for old in csv.DictReader(file) if old["run"] != line["run"]]
        lines.append(line)
        write_synced(path, comma_separated(lines))


def to_wandb(record: Record, references: Mapping[str, Record], settings: Mapping[str, Any]) -> None:
    """A W&B run with config, accuracy table, summary metrics and the rendered figure."""
    import wandb  # seconds of import, for those who asked for it

    from experiments.report.figures import as_image, run_figure

    key = record["key"]
    rows = accuracy_rows(record, references)
    figure = as_image(run_figure(record, references))
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"] or f"{key['suite']}-{key['finetuning']}",
        name=f"{key['method']}-{key['finetuning']}-{key['seed']}",
        id=digest(key),
        resume="allow",
        mode=settings["mode"],
        dir=str(folder),
        tags=[key["suite"], key["method"], key["finetuning"], *settings["tags"]],
        config=key | {k: record[k] for k in ("family", "data", "versions", "machine")},
        settings=wandb.Settings(silent=True, console="off"),
    ) as run:
        columns = list(rows[0])
        table = wandb.Table(columns, data=[[row[c] for c in columns] for row in rows])
        run.log({"accuracy": table, "figure": wandb.Image(figure)})
        run.summary.update(
            {"mean": record["mean"], "normalised": record["normalised"]}
            | {f"accuracy/{task}": score["accuracy"] for task, score in record["scores"].items()}
            | {f"seconds/{k}": v for k, v in record["seconds"].items()}
            | {"peak_bytes": record["peak_bytes"]}
        )


TRACKERS: dict[str, Tracker] = {"none": lambda *_: None, "csv": to_csv, "wandb": to_wandb}

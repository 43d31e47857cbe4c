"""`python -m experiments.run suite=... method=...`: merge, score, print, track."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.hydra_run import Command
from experiments.measurement import check, found, measure, references
from experiments.report.records import Record
from experiments.settings import UNMERGED, Experiment
from experiments.trackers import accuracy_rows, check_tracker, track_run
from merging.errors import InputError


def check_run(settings: Experiment, hydra: DictConfig) -> None:
    """InputError for what is wrong with a run, its tracker included, or with its sweep."""
    if hydra.mode is RunMode.MULTIRUN and "Optuna" in hydra.sweeper._target_:
        _refuse_optimising_on_test(settings)
    check_tracker(settings.tracker)
    check(settings)


def _refuse_optimising_on_test(settings: Experiment) -> None:
    if settings.split != "validation":
        raise InputError(
            "an Optuna sweep would choose hyperparameters by test accuracy",
            hint="add split=validation, then report the best with split=test",
        )


def show(settings: Experiment, record: Record) -> float:
    """Print and track a run. Returns the mean accuracy, which Optuna's sweeper maximises."""
    reference = references(settings)
    Console().print(accuracy_table(record, reference))
    track_run(record, reference, settings.tracker)
    return record["mean"]


def accuracy_table(record: Record, reference: Mapping[str, Record]) -> Table:
    """A run beside its references, in percent, one row per task or benchmark."""
    key = record["key"]
    broken = {t for t, score in reference["experts"]["scores"].items() if score["constant"]}
    rows = accuracy_rows(record, reference)
    name = key["method"]
    table = Table(
        title=f"{key['suite']}: {name}, {key['finetuning']}, seed {key['seed']}, {key['split']}",
        caption=_caption(record, broken),
    )
    table.add_column("task")
    for column in list(rows[0])[1:]:
        table.add_column(column.replace("_", " "), justify="right")
    table.add_column("normalised", justify="right")
    for row in rows:
        mean, score = row["task"] == "mean", record["scores"].get(row["task"])
        ratio = record["normalised"] if mean else score and _ratio(row[name], row["experts"])
        marked = bool(score and score["constant"])
        figures = [f"{value:.1f}" for value in list(row.values())[1:]]
        table.add_row(
            row["task"] + " †" * marked + " ‡" * (row["task"] in broken),
            *figures,
            "–" if ratio is None else f"{100 * ratio:.1f}",
            style="bold" if mean else None,
            end_section=row is rows[len(record["scores"]) - 1] or mean,
        )
    return table


def _ratio(value: float, expert: float) -> float | None:
    return value / expert if expert else None


def _caption(record: Record, broken: Collection[str]) -> str:
    seconds = record["seconds"]
    told = [f"merged in {seconds['merge']:.1f} s, peak {record['peak_bytes'] / 2**30:.1f} GiB"]
    if record["key"]["statistics"]:
        told.append(f"statistics {seconds['statistics']:.1f} s")
    told.append(f"data: {'–' if record['key']['method'] in UNMERGED else record['data']}")
    if record["selection"]:
        told.append(f"{record['selection']['parameter']} = {record['selection']['chosen']}")
    if any(score["constant"] for score in record["scores"].values()):
        told.append("† every prediction equal")
    if broken:
        told.append("‡ a broken expert, which answers every example alike: no figure of it counts")
    return "; ".join(told)


def name_weights(overrides: list[str]) -> list[str]:
    """weights.TASK=NUMBER without Hydra's `+` for a new key."""
    return [f"++{text}" if text.startswith("weights.") else text for text in overrides]


def mean_found(settings: Experiment) -> float | None:
    """The mean of a run that is done, references and all; a tracker is told by the run itself."""
    if settings.tracker.get("name") != "none":
        return None
    record = found(settings)
    return None if record is None else record["mean"]


COMMAND = Command(
    "experiment", Experiment,
    task=measure, show=show, check=check_run, found=mean_found, prepare=name_weights,
)  # fmt: skip

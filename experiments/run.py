"""`python -m experiments.run suite=... method=...`: merge, score, print, track."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table

from experiments.cli import command
from experiments.experiment import Experiment, measure, references
from experiments.report.records import Record
from experiments.trackers import accuracy_rows, check_tracker, track_run
from merging.errors import InputError


@command("experiment", Experiment)
def main(settings: Experiment) -> float:
    """One run. Returns the mean accuracy, which Optuna's sweeper maximises."""
    _refuse_optimising_on_test(settings)
    check_tracker(settings.tracker)
    record = measure(settings)
    reference = references(settings)
    Console().print(accuracy_table(record, reference))
    track_run(record, reference, settings.tracker)
    return record["mean"]


def _refuse_optimising_on_test(settings: Experiment) -> None:
    hydra = HydraConfig.get()
    optimises = "Optuna" in hydra.sweeper._target_ and hydra.mode is RunMode.MULTIRUN
    if optimises and settings.split != "validation":
        raise InputError(
            "an Optuna sweep would choose hyperparameters by test accuracy",
            hint="add split=validation, then report the best with split=test",
        )


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
        mean = row["task"] == "mean"
        ratio = record["normalised"] if mean else _ratio(row[name], row["experts"])
        marked = not mean and record["scores"][row["task"]]["constant"]
        figures = [f"{value:.1f}" for value in list(row.values())[1:]]
        table.add_row(
            row["task"] + " †" * marked + " ‡" * (row["task"] in broken),
            *figures,
            "–" if ratio is None else f"{100 * ratio:.1f}",
            style="bold" if mean else None,
            end_section=row is rows[-2],
        )
    return table


def _ratio(value: float, expert: float) -> float | None:
    return value / expert if expert else None


def _caption(record: Record, broken: Collection[str]) -> str:
    seconds = record["seconds"]
    told = [f"merged in {seconds['merge']:.1f} s, peak {record['peak_bytes'] / 2**30:.1f} GiB"]
    if record["key"]["statistics"]:
        told.append(f"statistics {seconds['statistics']:.1f} s")
    told.append(f"data: {record['data']}")
    if record["selection"]:
        told.append(f"{record['selection']['parameter']} = {record['selection']['chosen']}")
    if any(score["constant"] for score in record["scores"].values()):
        told.append("† every prediction equal")
    if broken:
        told.append("‡ a broken expert, which answers every example alike: no figure of it counts")
    return "; ".join(told)


if __name__ == "__main__":
    main()

"""`python -m experiments.tables suite=...`: tables and figures from records, and nothing else.

Writes results/<suite>/: records.jsonl (the runs' records, sorted), table.{md,csv,tex} (methods as
they stand or selected on validation, all tasks, every seed), sweeps.csv (runs that deviate from
that) and figures. With `paper=...` it renders a published table beside what was measured here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from eval.cache import digest
from experiments.hydra_run import Command
from experiments.report import figures, records
from experiments.report.frames import curves, summarise, to_frame
from experiments.report.markup import latex, markdown
from experiments.report.paper import Paper, render_paper
from experiments.report.records import Record
from experiments.settings import REFERENCES, UNMERGED
from experiments.suites import load_suite, under_protocol
from merging.errors import InputError
from merging.formats.disk import write_synced

log = logging.getLogger(__name__)
SUMMARY = 7  # columns up to the first task


@dataclass
class Tables:
    """The keys of configs/tables.yaml."""

    suite: dict[str, Any]
    protocol: str | None = None
    records: str | None = "runs/records"
    output: str = "results"
    baseline: str = "actmat"
    finetuning: str | None = None
    seeds: list[int] | None = None
    against: str | None = None
    committed: str | None = "results"
    paper: Paper | None = None
    published: str = "results/published"


def tables(settings: Tables) -> None:
    """Rebuild the tables of one suite, or one table of a paper."""
    console = Console()
    if settings.paper is not None:
        output = Path(settings.output)
        committed = output if settings.committed is None else Path(settings.committed)
        written = render_paper(settings.paper, Path(settings.published), committed, output)
        console.print(Markdown(written.read_text()))
    else:
        folder = Path(settings.output) / settings.suite["name"]
        found, notes = complete(gather(settings), settings.baseline)
        rows = render(found, folder, settings.baseline)
        for finetuning, part in rows.groupby("finetuning"):
            title = f"{settings.suite['name']}, {finetuning}"
            console.print(_short(part, title, settings.baseline))
        if settings.against is not None:
            committed = Path(settings.against) / settings.suite["name"] / "records.jsonl"
            others = records.load_lines(committed) if committed.exists() else []
            console.print(agreement(found, others, str(committed)))
        for note in notes:
            console.print(note, style="yellow", soft_wrap=True)
        written = folder / "table.md"
    console.print(f"written to {written}")


def _short(rows: pd.DataFrame, title: str, baseline: str) -> Table:
    """What fits a terminal: the table without its columns per task."""
    header, lines = cells(rows, baseline)
    table = Table(title=title, box=box.SIMPLE)
    for column in header[:SUMMARY]:
        text = column in {"method", "data"}
        table.add_column(column, justify="left" if text else "right", no_wrap=column == "method")
    for line in lines:
        best = line[0] not in UNMERGED and line[header.index("mean")].startswith("**")
        plain = [cell.replace("**", "") for cell in line[:SUMMARY]]
        table.add_row(*plain, style="bold" if best else None)
    return table


def gather(settings: Tables) -> list[Record]:
    """Reportable records of a suite: the committed ones, renewed by those of later runs."""
    name = settings.suite["name"]
    groups, searched = [], []
    if settings.committed is not None:
        committed = Path(settings.committed) / name / "records.jsonl"
        searched.append(str(committed))
        groups += [records.load_lines(committed)] if committed.exists() else []
    if settings.records is not None:
        searched.append(str(Path(settings.records) / name))
        groups.append(records.load_all(Path(settings.records) / name))
    found = [r for r in records.merged(*groups) if is_reportable(r)]
    found = of_one_protocol(settings, found)
    if settings.seeds is not None:
        found = [r for r in found if r["key"]["seed"] in settings.seeds]
    if settings.finetuning is not None:
        found = [r for r in found if r["key"]["finetuning"] == settings.finetuning]
    if not found:
        raise InputError(
            f"there are no records of finished test runs for suite {name!r} in "
            f"{' and '.join(searched) or 'no folder at all'}",
            hint=f"make them with: python -m experiments.run suite={name} method=...",
        )
    return found


def of_one_protocol(settings: Tables, found: list[Record]) -> list[Record]:
    """The records of the protocol that the suite's settings describe; others are counted aloud."""
    if "kind" not in settings.suite:
        return found
    suite = load_suite(under_protocol(settings.suite, settings.protocol), "cpu")
    wanted = suite.backend.protocol_key()
    chosen = [r for r in found if _protocol(r) == wanted]
    others = [_protocol(r) for r in found if _protocol(r) != wanted]
    if others:
        differ = sorted({k for o in others for k in o.keys() | wanted if o.get(k) != wanted.get(k)})
        told = f"{len(others)} records of another protocol (other {', '.join(differ)})"
        if not chosen:
            raise InputError(
                f"suite {settings.suite['name']!r} has only {told}",
                hint="give tables the suite's settings that the runs were given",
            )
        log.info("left out: %s", told)
    return chosen


def _protocol(record: Record) -> dict[str, Any]:
    """A record's protocol without what only methods with statistics depend on."""
    return {k: v for k, v in record["key"].get("protocol", {}).items() if k != "statistics"}


def agreement(found: Sequence[Record], others: Sequence[Record], where: str) -> str:
    """How far the means of these runs are from those of the same runs recorded elsewhere."""
    theirs = {digest(record["key"]): record["mean"] for record in others}
    ours = {digest(record["key"]): record["mean"] for record in found}
    gaps = [100 * abs(mean - theirs[run]) for run, mean in ours.items() if run in theirs]
    if not gaps:
        return f"none of these runs is in {where}"
    return (
        f"{len(gaps)} of these runs are in {where}: {gaps.count(0)} agree exactly, "
        f"the largest difference in the mean is {max(gaps):.2f} points"
    )


def is_reportable(record: Record) -> bool:
    """On the whole test split; validation runs and trials on part of it are not for tables."""
    return record["key"]["split"] == "test" and record["key"]["limit"] is None


def render(found: Sequence[Record], folder: Path, baseline: str = "actmat") -> pd.DataFrame:
    """Write everything under results/<suite> from these records; returns the table's rows.

    Raises InputError for records that must not stand in one table.
    """
    check_comparable(found)
    frame = to_frame(found)
    main = frame[frame.departs.map(len) == 0]
    rows = summarise(main, baseline)
    parts = {finetuning: part for finetuning, part in rows.groupby("finetuning")}

    records.save_lines(folder / "records.jsonl", found)
    _write_csv(rows, folder / "table.csv")
    text = f"# {found[0]['key']['suite']}\n\n{_preamble(found, baseline)}\n"
    for finetuning, part in parts.items():
        text += f"\n## Fine-tuning: {finetuning}\n\n{markdown(*cells(part, baseline))}"
    write_synced(folder / "table.md", text)
    write_synced(
        folder / "table.tex",
        "\n".join(f"% fine-tuning: {f}\n{latex(*cells(p, baseline))}" for f, p in parts.items()),
    )
    for finetuning, part in parts.items():
        figures.save(figures.accuracy_bars(part), folder / f"accuracy_{finetuning}")
        figures.save(figures.task_heatmap(part), folder / f"tasks_{finetuning}")
        figures.save(figures.accuracy_against_cost(part), folder / f"cost_{finetuning}")
    if {"full", "lora"} <= set(parts):
        figures.save(figures.full_against_lora(rows), folder / "full_against_lora")
    _render_selections(found, folder)
    _render_sweeps(frame, folder, baseline)
    return rows


def _render_selections(found: Sequence[Record], folder: Path) -> None:
    """A figure per parameter that was chosen on validation: how accuracy depended on it there."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(found, key=lambda r: (r["key"]["method"], r["key"]["seed"])):
        if record["selection"]:
            own = (record["selection"]["parameter"], record["key"]["finetuning"])
            groups.setdefault(own, []).append(record)
    for (parameter, finetuning), group in groups.items():
        figure = figures.selection_curves(group)
        figures.save(figure, folder / f"selection_{parameter}_{finetuning}")


def _render_sweeps(frame: pd.DataFrame, folder: Path, baseline: str) -> None:
    """sweeps.csv with the runs that depart from the defaults, and a line figure per parameter."""
    if not any(frame.departs):
        return
    rows = summarise(frame, baseline)
    departing = rows[~rows.row.isin(frame.row[frame.departs.map(len) == 0])]
    _write_csv(departing.drop(columns="constant"), folder / "sweeps.csv")
    for (parameter, finetuning), part in curves(frame).groupby(["parameter", "finetuning"]):
        if part.groupby("method").value.nunique().max() >= 3:
            figure = figures.sweep_lines(part)
            figures.save(figure, folder / f"sweep_{parameter}_{finetuning}")


def _write_csv(rows: pd.DataFrame, path: Path) -> None:
    write_synced(path, rows.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


# --- what may stand in one table ----------------------------------------------------------------


def check_comparable(found: Sequence[Record]) -> None:
    """InputError for mixed families, metrics or experts, and for selection on the test split."""
    for name in ("family", "metric"):
        values = sorted({record[name] for record in found})
        if len(values) > 1:
            raise InputError(
                f"records of different {name} cannot share a table: {', '.join(values)}",
                hint="tabulate each by itself",
            )
    experts: dict[tuple[str, int | None], Any] = {}
    for record in found:
        key, selection = record["key"], record["selection"]
        run = f"{key['method']}, {key['finetuning']}, seed {key['seed']}"
        if selection and selection["split"] != "validation":
            raise InputError(
                f"the record of {run} chose its {selection['parameter']} on the "
                f"{selection['split']} split",
                hint="remove it; hyperparameters are chosen on validation only",
            )
        judged = experts.setdefault(("protocol", None), _protocol(record))
        if judged != _protocol(record):
            raise InputError(
                f"the record of {run} was judged by another protocol than the records beside it",
                hint="tabulate each by itself",
            )
        own, recipe = (key["finetuning"], key["seed"]), (key["finetuning"], None)
        same = experts.setdefault(own, key["experts"]) == key["experts"]
        trained_by = key["experts"].get("recipe")  # may not change between seeds either
        if not same or experts.setdefault(recipe, trained_by) != trained_by:
            raise InputError(
                f"the record of {run} was made with other experts than the records beside it",
                hint="remove the outdated ones, or run them again",
            )


def complete(found: Sequence[Record], baseline: str) -> tuple[list[Record], list[str]]:
    """The records that can stand in full tables, and what was left out, with what completes it.

    A table's rows are paired by seed with each other and with the references. So a seed without a
    record of a reference or of the baseline is left out, and a row that lacks one of the seeds
    that are left. Raises InputError where nothing is left.
    """
    frame = to_frame(found)
    kept, notes = frame.index, []
    for finetuning, part in frame[frame.departs.map(len) == 0].groupby("finetuning"):
        needed = list(dict.fromkeys([*REFERENCES, baseline]))
        seeds = {row: set(part.seed[part.row == row]) for row in [*needed, *part.row]}
        shared = set.intersection(*(seeds[row] for row in needed))
        if dropped := sorted(set(part.seed) - shared):
            lacking = [(row, s) for s in dropped for row in needed if s not in seeds[row]]
            notes += [_left_out(found, finetuning, f"seed {s}", row, s) for row, s in lacking]
        short = [row for row in dict.fromkeys(part.row) if not shared <= seeds[row]]
        for row in short if shared else ():
            gone = min(shared - seeds[row])
            notes.append(_left_out(found, finetuning, row, row, gone))
        own = frame.finetuning == finetuning
        gone = own & (~frame.seed.isin(shared) | (frame.row.isin(short) if shared else False))
        kept = kept.difference(frame.index[gone])
    chosen = [found[i] for i in kept]
    if not chosen:
        raise InputError(f"no table can be made: {notes[0]}", hint=" ".join(notes[1:3]))
    return chosen, notes


def _left_out(found: Sequence[Record], finetuning: str, what: str, row: str, seed: int) -> str:
    """A note that names the missing record, and the command that makes it."""
    method = row.partition(" (")[0]
    extra = f" finetuning={finetuning} seed={seed}"
    if "selected" in row:
        extra += f" selection={row.partition('(')[2].split()[0]}"
    return (
        f"left out of {finetuning}: {what}, as there is no record of {row}, {finetuning}, seed "
        f"{seed}; make it with: python -m experiments.run suite={found[0]['key']['suite']} "
        f"method={method}{extra}"
    )


# --- rows to text -------------------------------------------------------------------------------


def _preamble(found: Sequence[Record], baseline: str) -> str:
    tasks = len(max((record["key"]["tasks"] for record in found), key=len))
    return (
        f"Checkpoints: {found[0]['family']}. {tasks} tasks, {found[0]['metric']} in percent on "
        f"the whole test split; ± is the standard error over fine-tuning seeds. Normalised: "
        f"mean over tasks of merged / expert. vs {baseline}: paired difference in the mean over "
        f"seeds. Seconds: to merge, statistics included. Data: what the method saw beside the "
        f"checkpoints."
    )


def cells(rows: pd.DataFrame, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and text of a table; the best merge of each column is marked **bold**."""
    fixed = list(rows.columns[: rows.columns.get_loc("constant") + 1])
    tasks = [
        column for column in rows.columns if column not in fixed and rows[column].notna().any()
    ]
    columns = {"mean": "mean", "normalised": "normalised", "difference": f"vs {baseline}"}
    columns |= {"seconds": "seconds"} | {task: task for task in tasks}
    merges = ~rows.method.isin(UNMERGED)
    rows = rows.assign(
        data=rows.data.where(merges, "–"),
        seconds=(rows.merge_seconds + rows.statistics_seconds).where(merges),
        difference=rows.difference.where(rows.row != baseline),
    )
    best = rows.loc[merges, ["mean", "normalised", *tasks]].max().to_dict()
    lines = []
    for _, row in rows.iterrows():
        line = [row.row, row.data, str(row.seeds)]
        for column in columns:
            sign = "+" if column == "difference" else ""
            text = _figure(row[column], row.get(f"{column}_se"), sign)
            text += " †" if column in row.constant.split() else ""
            leads = row.method not in UNMERGED and row[column] == best.get(column)
            line.append(f"**{text}**" if leads else text)
        lines.append(line)
    return ["method", "data", "seeds", *columns.values()], lines


def _figure(value: float, error: float | None, sign: str) -> str:
    if pd.isna(value):
        return "–"
    spread = "" if error is None or pd.isna(error) else f" ± {error:.1f}"
    return f"{value:{sign}.1f}{spread}"


COMMAND = Command("tables", Tables, task=tables)

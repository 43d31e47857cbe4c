"""A published table beside what was measured here: paper | ours | difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import pandas as pd

import merging
from experiments.report import records
from experiments.report.frames import to_frame
from experiments.report.markup import latex, markdown
from experiments.report.records import Record
from experiments.settings import UNMERGED
from merging.errors import InputError

NOT_MEASURED = "Methods without a line of ours were not measured here."


@dataclass
class Paper:
    """The keys of configs/paper/<name>.yaml: one published table.

    name: of the output files. title: what the table is, with paper and table number.
    published: file under results/published. where: the rows of it, {column: value}.
    family: of the published checkpoints; records of another family are refused.
    suite, finetuning: of the records to put beside it; protocol: its name there; null: any.
    methods: our row -> published name, where they differ; published methods that are not named
        keep their own.
    columns: our task -> {column: value} that picks its published figures, where names differ.
    unit: "percent", of accuracies, or "seconds" to merge, statistics included.
    marks: task (or "mean") -> why its published figures are not to be trusted.
    """

    name: str
    title: str
    published: str
    where: dict[str, str]
    family: str
    suite: str
    finetuning: str = "full"
    protocol: str | None = None
    methods: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    unit: str = "percent"
    marks: dict[str, str] = field(default_factory=dict)


def render_paper(paper: Paper, published: Path, committed: Path, output: Path) -> Path:
    """Write <output>/paper/<name>.{md,csv,tex} from records below `committed`; the Markdown."""
    ours = measured(paper, committed / paper.suite)
    frame = compare(paper, read_published(paper, published), ours)
    folder = output / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(
        folder / f"{paper.name}.csv", index=False, float_format="%.4f", lineterminator="\n"
    )
    table = cells(frame, paper.marks)
    notes = [f"‡ {task}: {reason}." for task, reason in paper.marks.items()]
    sources = "; ".join(frame.source.dropna().unique())
    text = f"# {paper.title}\n\nCheckpoints: {paper.family}. Figures in {paper.unit}. Data: what "
    text += "the method saw beside the checkpoints.\n\n"
    text += markdown(*table)
    notes += [NOT_MEASURED] * bool(frame.ours.isna().any())
    text += "".join(f"\n{note}\n" for note in notes)
    path = folder / f"{paper.name}.md"
    path.write_text(
        text + f"\nPublished figures: {sources} (results/published/{paper.published}).\n"
    )
    path.with_suffix(".tex").write_text(latex(*table))
    return path


def read_published(paper: Paper, folder: Path) -> pd.DataFrame:
    """Columns method, task, value (in the paper's unit), source; the mean is task "mean"."""
    path = folder / paper.published
    if not path.exists():
        raise InputError(f"{path} does not exist, expected the published figures")
    table = pd.read_csv(path)
    if "average" in table:  # a file of averages, already in percent
        table = table.assign(task="mean", value=table.average)
    else:
        scale = 100 if paper.unit == "percent" else 1
        table = table.assign(
            value=scale * table.value, task=table.task.replace({"average": "mean", "all": "mean"})
        )
    table = _pick(table, paper.where, path)
    if paper.columns:
        parts = [_pick(table, own, path).assign(task=task) for task, own in paper.columns.items()]
        table = pd.concat([*parts, table[table.task == "mean"]], ignore_index=True)
    again = table.duplicated(["method", "task"])  # a second source of the same row
    table.loc[again, "method"] += " (" + table.source + ")"
    by_method = table[table.task != "mean"].groupby("method", sort=False)
    have = set(table.method[table.task == "mean"])
    means = [
        {
            "method": method,
            "task": "mean",
            "value": part.value.mean(),
            "source": part.source.iloc[0],
        }
        for method, part in by_method
        if method not in have
    ]
    table = pd.concat([table, pd.DataFrame(means)], ignore_index=True)
    return table[["method", "task", "value", "source"]]


def _pick(table: pd.DataFrame, where: Mapping[str, str], path: Path) -> pd.DataFrame:
    """The rows with these values; InputError for a column or for values that are not there."""
    for column, value in where.items():
        if column not in table:
            raise InputError(
                f"{path} has no column {column!r}, expected {', '.join(table.columns)}"
            )
        table = table[table[column] == value]
    if table.empty:
        raise InputError(f"{path} has no row with {dict(where)}")
    return table


def measured(paper: Paper, folder: Path) -> dict[str, dict[str, float]]:
    """{row: {task or "mean": figure}}, means over seeds, from the committed records."""
    path = folder / "records.jsonl"
    found = records.load_lines(path) if path.exists() else []
    found = [
        r
        for r in found
        if r["key"]["finetuning"] == paper.finetuning
        and paper.protocol in (None, r["key"].get("protocol", {}).get("name"))
    ]
    for record in found:
        if record["family"] != paper.family:
            raise InputError(
                f"{path} holds records of checkpoint family {record['family']!r}, "
                f"the published figures are of {paper.family!r}",
                hint="figures of different checkpoints are never compared",
            )
    if not found:
        return {}
    figures = pd.DataFrame([_figures(record, paper.unit) for record in found])
    return {
        row: part.dropna(axis=1, how="all").mean().to_dict()
        for row, part in figures.groupby(to_frame(found).row)
    }


def _figures(record: Record, unit: str) -> dict[str, float]:
    if unit == "seconds":
        return {"mean": record["seconds"]["merge"] + record["seconds"]["statistics"]}
    scores = {name: 100 * score["accuracy"] for name, score in record["scores"].items()}
    return scores | {"mean": 100 * record["mean"]}


def compare(
    paper: Paper, published: pd.DataFrame, ours: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """One line per method and task: data, paper, ours, difference; NaN where not measured.

    The mean of ours is over the published columns, where there are any.
    """
    rows = {theirs: row for row, theirs in paper.methods.items()}
    table = published.rename(columns={"value": "paper"})
    row = table.method.map(lambda theirs: rows.get(theirs, theirs))
    if tasks := set(table.task) - {"mean"}:
        ours = {name: own | {"mean": _mean(own, tasks)} for name, own in ours.items()}
    pairs = zip(row, table.task, strict=True)
    table["ours"] = [ours.get(r, {}).get(task, math.nan) for r, task in pairs]
    table["difference"] = table.ours - table.paper
    table = table.assign(method=row, data=row.map(data_use))
    return table[["method", "data", "task", "paper", "ours", "difference", "source"]]


def _mean(figures: Mapping[str, float], tasks: set[str]) -> float:
    return fmean(figures[t] for t in tasks) if tasks <= set(figures) else math.nan


def data_use(row: str) -> str:
    """What the method of a row saw beside the checkpoints, as records put it.

    row: our name or the published one: a method's, then what was varied. "–" for rows that merge
        nothing, empty for methods that are not known here.
    """
    if row in UNMERGED:
        return "–"
    known = [name for name in merging.methods() if re.match(rf"{name}(?![a-z0-9])", row)]
    if not known:
        return ""
    needs = merging.create(max(known, key=len)).needs
    used = ["training inputs"] * bool(needs)
    used += ["validation"] * row.endswith(("selected)", "_tuned"))
    return ", ".join(used) or "none"


def cells(frame: pd.DataFrame, marks: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and text: lines paper, ours, difference of a method, or the first alone."""
    tasks = [*dict.fromkeys(frame.task[frame.task != "mean"]), "mean"]
    order = frame[frame.task == "mean"].sort_values("paper", ascending=False).method
    lines = []
    for method in order:
        part = frame[frame.method == method].set_index("task")
        shown = ["paper", "ours", "difference"] if part.ours.notna().any() else ["paper"]
        for kind in shown:
            sign = "+" if kind == "difference" else ""
            values = [part[kind].get(task, math.nan) for task in tasks]
            text = ["–" if pd.isna(value) else f"{value:{sign}.1f}" for value in values]
            if kind != "ours":
                text = [
                    x + " ‡" * (t in marks and x != "–") for x, t in zip(text, tasks, strict=True)
                ]
            first = [method, part.data.iloc[0]] if kind == "paper" else ["", ""]
            lines.append([*first, kind, *text])
    return ["method", "data", "", *tasks], lines

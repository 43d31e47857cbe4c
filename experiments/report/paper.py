"""A published table beside what was measured here: paper | ours | difference."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from merging.formats.disk import write_synced

NOT_MEASURED = "Methods without a line of ours were not measured here."
ERRORS = "±: the standard error that the size of our test sets leaves to our figure."
LATER = "later: what the same authors' result files say after the paper, where it differs."


@dataclass
class Later:
    """Where later figures of the same rows are, and what they call our rows."""

    published: str
    methods: dict[str, str] = field(default_factory=dict)


@dataclass
class Cost:
    """What a table takes, by estimate: said before it starts.

    gpu_minutes, cpu_minutes: of one row, on one GPU and on a few cores; null: no sensible time.
    once_minutes: before the first row: decoding, heads, statistics. images: that are decoded.
    gpu_gb: memory of the GPU that is needed; 0: it runs without one. memory_gb: of main memory.
    note: what else there is to know.
    """

    gpu_minutes: float | None = None
    cpu_minutes: float | None = None
    once_minutes: float = 0.0
    images: int = 0
    gpu_gb: float = 0.0
    memory_gb: float = 0.0
    note: str = ""


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
    later: where the authors corrected figures, `published`, and `methods` as above; shown where
        they differ.
    settings: overrides of `experiments.run` that all rows share. runs: the overrides of each row,
        or of several ("method=average,actmat"). cost: what they take.
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
    later: Later | None = None
    settings: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def render_paper(
    paper: Paper, published: Path, source: Path | Sequence[Record], output: Path
) -> Path:
    """Write <output>/paper/<name>.{md,csv,tex}; returns the Markdown.

    source: our records, or the folder that holds them, committed, as <suite>/records.jsonl.
    """
    found = committed(paper, source / paper.suite) if isinstance(source, Path) else source
    figures, ours = read_published(paper, published), summarised(paper, found)
    frame = compare(paper, figures, ours, errors(paper, found))
    frame = with_later(paper, frame, published)
    folder = output / "paper"
    write_synced(
        folder / f"{paper.name}.csv",
        frame.to_csv(index=False, float_format="%.4f", lineterminator="\n"),
    )
    table = cells(frame, paper.marks)
    notes = [f"‡ {task}: {reason}." for task, reason in paper.marks.items()]
    sources = "; ".join(frame.source.dropna().unique())
    text = f"# {paper.title}\n\nCheckpoints: {paper.family}. Figures in {paper.unit}. Data: what "
    text += "the method saw beside the checkpoints.\n\n"
    text += markdown(*table)
    notes += [NOT_MEASURED] * bool(frame.ours.isna().any())
    notes += [ERRORS] * bool(frame.standard_error.notna().any())
    notes += [LATER] * any(line[2] == "later" for line in table[1])
    text += "".join(f"\n{note}\n" for note in notes)
    path = folder / f"{paper.name}.md"
    write_synced(
        path, text + f"\nPublished figures: {sources} (results/published/{paper.published}).\n"
    )
    write_synced(path.with_suffix(".tex"), latex(*table))
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
    return summarised(paper, committed(paper, folder))


def committed(paper: Paper, folder: Path) -> list[Record]:
    """The records of a suite's folder that a table is about."""
    path = folder / "records.jsonl"
    found = records.load_lines(path) if path.exists() else []
    return [
        r
        for r in found
        if r["key"]["finetuning"] == paper.finetuning
        and paper.protocol in (None, r["key"].get("protocol", {}).get("name"))
    ]


def summarised(paper: Paper, found: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{row: {task or "mean": figure}}, means over seeds; InputError for other checkpoints."""
    for record in found:
        if record["family"] != paper.family:
            raise InputError(
                f"records of suite {record['key']['suite']} are of checkpoint family "
                f"{record['family']!r}, the published figures are of {paper.family!r}",
                hint="figures of different checkpoints are never compared",
            )
    if not found:
        return {}
    figures = pd.DataFrame([_figures(record, paper.unit) for record in found])
    return {
        row: part.dropna(axis=1, how="all").mean().to_dict()
        for row, part in figures.groupby(to_frame(found).row)
    }


def errors(paper: Paper, found: Sequence[Record]) -> dict[str, dict[str, float]]:
    """{row: {task or "mean": standard error in points that the test set's size leaves}}.

    A share p of n examples has sqrt(p (1 - p) / n); the tasks of a mean are independent. Seeds
    share the test set and so make it no smaller. Rows whose sizes are not known are left out.
    """
    if not found or paper.unit != "percent":
        return {}
    made = {}
    for row, record in zip(to_frame(found).row, found, strict=True):
        scores = record["scores"]
        if not all(score.get("count") for score in scores.values()):
            continue
        variance = {t: s["accuracy"] * (1 - s["accuracy"]) / s["count"] for t, s in scores.items()}
        own = {task: 100 * math.sqrt(value) for task, value in variance.items()}
        columns = [task for task in paper.columns or scores if task in variance]
        total = sum(variance[task] for task in columns)
        made[row] = own | {"mean": 100 * math.sqrt(total) / max(1, len(columns))}
    return made


def with_later(paper: Paper, frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """A column `later` with the authors' corrected figures; NaN where there is none."""
    if paper.later is None:
        return frame.assign(later=math.nan)
    own = replace(paper, published=paper.later.published, methods=paper.later.methods)
    table = read_published(own, folder)
    rows = {theirs: row for row, theirs in own.methods.items()}
    names = table.method.map(lambda theirs: rows.get(theirs, theirs))
    values = dict(zip(zip(names, table.task, strict=True), table.value, strict=True))
    pairs = zip(frame.method, frame.task, strict=True)
    return frame.assign(later=[values.get(pair, math.nan) for pair in pairs])


def _figures(record: Record, unit: str) -> dict[str, float]:
    if unit == "seconds":
        return {"mean": record["seconds"]["merge"] + record["seconds"]["statistics"]}
    scores = {name: 100 * score["accuracy"] for name, score in record["scores"].items()}
    return scores | {"mean": 100 * record["mean"]}


def compare(
    paper: Paper,
    published: pd.DataFrame,
    ours: Mapping[str, Mapping[str, float]],
    standard_errors: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """One line per method and task: data, paper, ours, difference; NaN where not measured, or not
    published.

    The mean of ours is over the published columns, where there are any.
    """
    rows = {theirs: row for row, theirs in paper.methods.items()}
    table = published.rename(columns={"value": "paper"})
    row = table.method.map(lambda theirs: rows.get(theirs, theirs))
    if tasks := set(table.task) - {"mean"}:
        ours = {name: own | {"mean": _mean(own, tasks)} for name, own in ours.items()}
    columns = list(dict.fromkeys(table.task))
    published_pairs = set(zip(row, table.task, strict=True))
    own = [
        (name, task)
        for name, figures in ours.items()
        for task in columns
        if (name, task) not in published_pairs and not math.isnan(figures.get(task, math.nan))
    ]
    table = pd.concat([table, pd.DataFrame(own, columns=["method", "task"])], ignore_index=True)
    row = pd.concat([row, pd.Series([name for name, _ in own], dtype=object)], ignore_index=True)
    pairs = list(zip(row, table.task, strict=True))
    table["ours"] = [ours.get(r, {}).get(task, math.nan) for r, task in pairs]
    table["difference"] = table.ours - table.paper
    known = standard_errors or {}
    table["standard_error"] = [known.get(r, {}).get(task, math.nan) for r, task in pairs]
    table = table.assign(method=row, data=row.map(data_use))
    columns = ["method", "data", "task", "paper", "ours", "difference", "standard_error", "source"]
    return table[columns]


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
        shown = {}
        if part.paper.notna().any():
            shown["paper"] = [_figure(part, "paper", task) for task in tasks]
        if "later" in part and ((part.later - part.paper).abs() >= 0.05).any():
            shown["later"] = [_figure(part, "later", task) for task in tasks]
        if part.ours.notna().any():
            shown["ours"] = [_figure(part, "ours", task) for task in tasks]
        if part.difference.notna().any():
            shown["difference"] = [_difference(part, task) for task in tasks]
        for kind, text in shown.items():
            if kind != "ours":
                text = [
                    x + " ‡" * (t in marks and x != "–") for x, t in zip(text, tasks, strict=True)
                ]
            first = [method, part.data.iloc[0]] if kind == next(iter(shown)) else ["", ""]
            lines.append([*first, kind, *text])
    return ["method", "data", "", *tasks], lines


def _figure(part: pd.DataFrame, kind: str, task: str) -> str:
    value = part[kind].get(task, math.nan)
    return "–" if pd.isna(value) else f"{value:.1f}"


def _difference(part: pd.DataFrame, task: str) -> str:
    value, error = part.difference.get(task, math.nan), math.nan
    if "standard_error" in part:
        error = part.standard_error.get(task, math.nan)
    if pd.isna(value):
        return "–"
    return f"{value:+.1f}" + ("" if pd.isna(error) else f" ± {error:.1f}")

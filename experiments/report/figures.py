"""Figures from summarised records: one colour per family of methods, readable in print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

import merging
from experiments.report.records import Record
from merging.formats.disk import write_synced

# Okabe and Ito's palette: told apart with any colour vision, and by lightness in grey print.
COLOURS = {
    "reference": "#999999",
    "averaging, sparsity": "#E69F00",
    "spectral": "#56B4E9",
    "interference, data-free": "#009E73",
    "with training data": "#D55E00",
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.bbox": "tight",
    "savefig.dpi": 150,
    "pdf.fonttype": 42,  # text stays text
}


def family(method: str, data: str) -> str:
    """The key of `COLOURS` for a row of a table."""
    if method not in merging.methods():
        return "reference"
    if data.startswith("training"):
        return "with training data"
    module = merging.create(method).function.__module__.rpartition(".")[2]
    families = dict.fromkeys(
        ("averages", "layered", "pcb", "sparse", "sphere"), "averaging, sparsity"
    )
    families |= dict.fromkeys(("spectral", "knots", "posthoc", "frames", "core_space"), "spectral")
    return families.get(module, "interference, data-free")


def save(figure: Figure, stem: Path) -> None:
    """Write stem.png and stem.pdf, without dates or versions: same figure, same bytes."""
    undated = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    for form, metadata in undated.items():
        buffer = BytesIO()
        with rc_context(STYLE):
            figure.savefig(buffer, format=form, metadata=metadata)
        write_synced(stem.with_name(f"{stem.name}.{form}"), buffer.getvalue())


def as_image(figure: Figure) -> Image.Image:
    """The figure as pixels."""
    buffer = BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="png")
    return Image.open(buffer)


def accuracy_bars(rows: pd.DataFrame) -> Figure:
    """Mean accuracy of every row of a table (`tables.summarise`), with standard errors."""
    rows = rows.iloc[::-1]
    families = [family(row.method, row.data) for row in rows.itertuples()]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.24 * len(rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            rows.row,
            rows["mean"],
            xerr=rows.mean_se.fillna(0),
            color=[COLOURS[f] for f in families],
            error_kw={"elinewidth": 1},
        )
        for y, value in enumerate(rows["mean"]):
            axes.text(0.3, y, f"{value:.1f}", va="center", fontsize=7, color="black")
        axes.set_xlim(0, min(100, 1.08 * rows["mean"].max()))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("mean accuracy over tasks, %")
        patches = [Patch(color=c, label=f) for f, c in COLOURS.items() if f in families]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return figure


def task_heatmap(rows: pd.DataFrame) -> Figure:
    """Accuracy of every row on every task, coloured by its distance to the experts'."""
    first = rows.columns.get_loc("constant") + 1
    accuracy = rows.set_index("row")[list(rows.columns[first:])].dropna(axis=1, how="all")
    gap = (accuracy - accuracy.loc["experts"]).to_numpy()
    with rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.62 * accuracy.shape[1], 0.9 + 0.24 * len(accuracy)))
        axes = figure.subplots()
        limit = max(1.0, float(np.nanmax(np.abs(gap))))
        image = axes.imshow(gap, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(accuracy.shape[1]), accuracy.columns, rotation=40, ha="right")
        axes.set_yticks(range(len(accuracy)), accuracy.index)
        for (i, j), value in np.ndenumerate(accuracy.to_numpy()):
            dark = abs(gap[i, j]) > 0.6 * limit
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, label="points from the expert", pad=0.02)
    return figure


def sweep_lines(points: pd.DataFrame) -> Figure:
    """Accuracy against one parameter, a line per method; points of `tables.curves`.

    Means over different task sets are not comparable, so the number of tasks is drawn against
    normalised accuracy.
    """
    parameter = points.parameter.iloc[0]
    measure = "normalised" if parameter == "tasks" else "mean"
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4))
        axes = figure.subplots()
        by_method = zip(points.groupby("method"), styles(), strict=False)
        for (method, part), (colour, marker) in by_method:
            by_value = part.groupby("value")[measure]
            mean, error = by_value.mean(), by_value.sem().fillna(0)
            axes.errorbar(mean.index, mean, error, label=method, color=colour, marker=marker,
                          markersize=4, linewidth=1.2, elinewidth=0.8)  # fmt: skip
        values = points.value.unique()
        if values.min() > 0 and values.max() > 30 * values.min():
            axes.set_xscale("log")
        axes.set_xlabel(parameter)
        axes.set_ylabel(f"{measure} accuracy, %")
        _legend_beside(axes)
    return figure


def selection_curves(found: Sequence[Record]) -> Figure:
    """Validation accuracy of every value that was tried, a line per method; rings: the chosen.

    found: records that selected one parameter; seeds are averaged, each seed's choice is ringed.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4))
        axes = figure.subplots()
        methods = dict.fromkeys(record["key"]["method"] for record in found)
        for method, (colour, marker) in zip(methods, styles(), strict=False):
            own = [r["selection"] for r in found if r["key"]["method"] == method]
            curves = 100 * np.array([selection["accuracy"] for selection in own])
            values = own[0]["values"]
            axes.plot(values, curves.mean(0), color=colour, marker=marker, markersize=3,
                      linewidth=1.2, label=method)  # fmt: skip
            for selection in own:
                at = values.index(selection["chosen"])
                axes.plot(values[at], curves.mean(0)[at], "o", markersize=9, markerfacecolor="none",
                          markeredgecolor=colour)  # fmt: skip
        axes.set_xlabel(found[0]["selection"]["parameter"])
        axes.set_ylabel("validation accuracy, %")
        _legend_beside(axes)
    return figure


def _legend_beside(axes: Axes) -> None:
    """A legend that cannot cover a line."""
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def accuracy_against_cost(rows: pd.DataFrame) -> Figure:
    """Mean accuracy of every merge against the seconds it takes, statistics included."""
    rows = rows[rows.method.isin(merging.methods())]
    seconds = rows.merge_seconds + rows.statistics_seconds
    families = [family(row.method, row.data) for row in rows.itertuples()]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.subplots()
        axes.scatter(seconds, rows["mean"], c=[COLOURS[f] for f in families], s=18)
        for x, y, name in zip(seconds, rows["mean"], rows.row, strict=True):
            axes.annotate(name, (x, y), (3, 2), textcoords="offset points", fontsize=6)
        axes.set_xscale("log")
        axes.set_xlabel("seconds to merge, statistics included")
        axes.set_ylabel("mean accuracy over tasks, %")
        patches = [Patch(color=c, label=f) for f, c in COLOURS.items() if f in families]
        axes.legend(handles=patches, frameon=False, fontsize=7, loc="lower right")
    return figure


def full_against_lora(rows: pd.DataFrame) -> Figure:
    """Normalised accuracy of every row after both kinds of fine-tuning, joined by a line."""
    table = rows.pivot(index="row", columns="finetuning", values="normalised").dropna()
    table = table.sort_values("full")
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.2 * len(table) + 1.0))
        axes = figure.subplots()
        axes.hlines(range(len(table)), table.full, table.lora, color="#BBBBBB", linewidth=1.2)
        for finetuning, (colour, marker) in zip(("full", "lora"), styles(), strict=False):
            axes.plot(table[finetuning], range(len(table)), marker, color=colour, markersize=4,
                      label=finetuning)  # fmt: skip
        axes.set_yticks(range(len(table)), table.index)
        axes.set_xlabel("normalised accuracy, %")
        axes.legend(frameon=False, fontsize=8)
    return figure


def styles() -> Iterator[tuple[str, str]]:
    """(colour, marker) pairs without end."""
    return cycle(zip(LINES, "osD^vPX*", strict=True))


def run_figure(record: Record, references: Mapping[str, Record]) -> Figure:
    """One run beside its references, a group of bars per task."""
    name = record["key"]["method"]
    columns = dict(references) | {name: record}
    tasks = list(record["scores"])
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 0.9 * len(tasks), 3.0))
        axes = figure.subplots()
        width = 0.8 / len(columns)
        shades = {"zero_shot": "#CCCCCC", "experts": "#777777"}
        for i, (column, run) in enumerate(columns.items()):
            heights = [100 * run["scores"][task]["accuracy"] for task in tasks]
            colour = shades.get(column, COLOURS[family(name, record["data"])])
            at = np.arange(len(tasks)) + (i - (len(columns) - 1) / 2) * width
            axes.bar(at, heights, width, color=colour, label=column)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_ylabel("accuracy, %")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure

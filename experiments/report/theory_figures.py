"""Figures of `experiments.analyse` and `experiments.factorial`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures import LINES, STYLE

TITLES = {
    "cross_term": "cross term",
    "correlation": "correlation",
    "drift": "drift",
    "alignment": "$D^T D$ with $E[zz^T]$",
}
SHADES = {"delta": "#009E73", "identity": "#BBBBBB", "random": "#777777"}


def draw(frames: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> dict[str, Figure]:
    """{file name: figure} of what was measured; frames as `analyse` makes them."""
    figures = {
        "estimates": estimates(frames["estimates"], published),
        "scale": scale(frames["scale"]),
    }
    if len(frames["conditions"]):
        figures["conditions"] = conditions(frames["conditions"], published)
        figures["training"] = training(frames["conditions"])
    if len(frames["interference"]):
        figures["interference"] = interference(frames["interference"])
    return figures


def _panels(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(2.6 * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def conditions(frame: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """A violin of the layers' cosines per task: both terms at the end, drift over all steps."""
    tasks = list(dict.fromkeys(frame.task))
    shown = ["cross_term", "correlation", "drift"]
    with rc_context(STYLE):
        figure, panels = _panels(len(shown), 2.8)
        for axes, quantity in zip(panels, shown, strict=True):
            part = frame[frame.quantity == quantity]
            if quantity != "drift":
                part = part[part.step == part.groupby("task").step.transform("max")]
            values = [part.cosine[part.task == task].to_numpy() for task in tasks]
            drawn = axes.violinplot(values, showmedians=True, widths=0.8)
            for body, colour in zip(drawn["bodies"], LINES * len(tasks), strict=False):
                body.set(facecolor=colour, alpha=0.7)
            for line in ("cmedians", "cbars", "cmins", "cmaxes"):
                drawn[line].set(color="black", linewidth=0.8)
            _paper_line(axes, published, quantity)
            axes.set_xticks(range(1, len(tasks) + 1), tasks, rotation=40, ha="right")
            axes.set(title=TITLES[quantity], ylim=(min(0, part.cosine.min()), 1.03))
        panels[0].set_ylabel("cosine")
    return figure


def _paper_line(axes: Axes, published: pd.DataFrame, quantity: str) -> None:
    if quantity in published.index:
        low, high, backbone = published.loc[quantity, ["low", "high", "backbone"]]
        label = f"paper, {backbone}"
        axes.axhspan(low - 0.004, high + 0.004, color="black", alpha=0.35, lw=0, label=label)
        axes.legend(frameon=False, fontsize=7)


def training(frame: pd.DataFrame) -> Figure:
    """Mean over layers at every snapshot, a line per task; the band holds half of the layers."""
    with rc_context(STYLE):
        figure, panels = _panels(len(TITLES), 2.6)
        for axes, (quantity, title) in zip(panels, TITLES.items(), strict=True):
            part = frame[frame.quantity == quantity]
            for (task, own), colour in zip(_tasks(part), LINES * len(part), strict=False):
                steps = own.groupby("step").cosine
                mean = steps.mean()
                axes.plot(mean.index, mean, color=colour, marker=".", linewidth=1.2, label=task)
                axes.fill_between(mean.index, steps.quantile(0.25), steps.quantile(0.75),
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            axes.set(title=title, xlabel="step", ylim=(0, 1.03))
        panels[0].set_ylabel("cosine")
        panels[0].legend(frameon=False, fontsize=7)
    return figure


def _tasks(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield from frame.groupby("task", sort=False)


def estimates(frame: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Bars by type of layer: each estimate's cosine with the true second moment."""
    table = frame.pivot_table("cosine", "type", "estimate", sort=False)
    spread = frame.pivot_table("cosine", "type", "estimate", aggfunc="std", sort=False)
    measured = [name for name in table if name not in SHADES]
    blues = colormaps["Blues"](np.linspace(0.25, 0.9, len(measured)))
    colours = SHADES | dict(zip(measured, blues, strict=True))
    width = 0.8 / len(table.columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 1.0 * len(table), 2.8), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(table):
            at = np.arange(len(table)) + (i - (len(table.columns) - 1) / 2) * width
            axes.bar(at, table[name], width, yerr=spread[name].fillna(0), color=colours[name],
                     edgecolor="black", linewidth=0.4, error_kw={"elinewidth": 0.7},
                     label=name.replace("_", ", n = "))  # fmt: skip
        axes.set_xticks(range(len(table)), table.index, rotation=25, ha="right")
        axes.set(ylabel="cosine with $E[zz^T]$", ylim=(0, 1.05))
        axes.legend(frameon=False, fontsize=7, ncols=4, loc="lower center",
                    bbox_to_anchor=(0.5, 1))  # fmt: skip
    return figure


def scale(frame: pd.DataFrame) -> Figure:
    """|D|^2 / tr C of each task, relative to the tasks' geometric mean, layer by layer."""
    table = frame.pivot_table("ratio", "layer", "task", sort=False)
    relative = table.div(np.exp(np.log(table).mean(axis=1)), axis=0)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        for task, colour in zip(relative, LINES * len(relative), strict=False):
            axes.plot(range(len(relative)), relative[task], color=colour, linewidth=1, label=task)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set(xlabel="layer", ylabel="scale of $D^T D$", yscale="log")
        axes.legend(frameon=False, fontsize=7, ncols=4)
    return figure


def interference(frame: pd.DataFrame) -> Figure:
    """Interference left after each merge, as a share of the base model's, layer by layer."""
    total = frame.groupby(["method", "layer"], sort=False)[["before", "after"]].sum()
    share = (total.after / total.before).unstack("method", sort=False)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.subplots()
        for method, colour in zip(share, LINES * share.shape[1], strict=False):
            axes.plot(range(len(share)), share[method], color=colour, marker=".", markersize=4,
                      linewidth=1.1, label=method)  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set(xlabel="layer", ylabel="interference / before merging", yscale="log")
        axes.legend(frameon=False, fontsize=7, ncols=3)
    return figure


def factorial(table: pd.DataFrame, baseline: str) -> Figure:
    """Paired difference of every cell to the baseline, with standard errors; colour: estimator."""
    rows = table.iloc[::-1].reset_index(drop=True)
    names = [name for name in dict.fromkeys(table.estimator.fillna("")) if name]
    colours = dict(zip(names, LINES, strict=False)) | {"": "#777777"}
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.21 * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots()
        for name, colour in colours.items():
            part = rows[rows.estimator.fillna("") == name]
            axes.errorbar(part.difference, part.index, xerr=part.difference_se, fmt="o",
                          color=colour, markersize=4, elinewidth=1,
                          label=name or "beside the grid")  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_yticks(rows.index, rows.row)
        axes.set_xlabel(f"validation accuracy, points over {baseline}")
        axes.legend(frameon=False, fontsize=7)
    return figure


def directions(frame: pd.DataFrame) -> Figure:
    """Gain and interference of each merge by eigen-direction of S, the smallest on the left."""
    with rc_context(STYLE):
        figure, (gain, share) = _panels(2, 2.8)
        figure.set_figwidth(7.2)
        for (method, own), colour in zip(frame.groupby("method"), cycle(LINES), strict=False):
            style = {"color": colour, "marker": ".", "linewidth": 1.2, "label": method}
            gain.plot(own.eigenvalue, own.gain, **style)
            share.plot(own.eigenvalue, own.interference, **style)
        gain.axhline(1, color="black", linewidth=0.6, linestyle=":")
        gain.set(xscale="log", yscale="log", ylabel="$|D v|^2$ / mean $|D_t v|^2$")
        share.set(xscale="log", ylabel="interference / before merging")
        for axes in (gain, share):
            axes.set_xlabel("eigenvalue of $S$, relative to the largest")
        gain.legend(frameon=False, fontsize=7)
    return figure

"""`python -m experiments.residuals suite=...`: does the residual of a merge predict its accuracy?

For every method, seed and task the residual r_t on both sides of the layers (`merging.diagnosis`)
stands beside what the merge kept of the expert's gain over the base, from the records of finished
runs. Spearman's rank correlation is taken within a task, over methods and seeds, then averaged: a
residual that predicts accuracy has a correlation near -1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from scipy.stats import spearmanr

import merging
from eval.suite import Suite
from experiments.differences import blocks
from experiments.hydra_run import Command
from experiments.report import records
from experiments.report.figures import LINES, save
from experiments.report.markup import markdown
from experiments.report.records import Record
from experiments.settings import check_choices
from experiments.suites import load_expert, load_suite
from merging.diagnosis import residual, shared_inputs
from merging.errors import InputError
from merging.formats.disk import write_synced
from merging.progress import track

SIDES = ("inputs", "outputs", "mean")


@dataclass
class Residuals:
    """The keys of configs/residuals.yaml."""

    suite: dict[str, Any]
    finetuning: str = "full"
    seeds: list[int] = field(default_factory=lambda: [0])
    methods: list[str] = field(default_factory=list)
    records: str = "results"
    output: str = "results"
    device: str = "auto"


def measure(settings: Residuals) -> None:
    """Compute residuals, set them beside measured retention, tabulate and draw."""
    check_choices(settings)
    suite = load_suite(settings.suite, settings.device)
    scores = _scores(Path(settings.records) / suite.name / "records.jsonl", settings, suite)
    lines: list[dict[str, Any]] = []
    for seed in settings.seeds:
        lines += _of_seed(settings, suite, seed, scores)
    stem = Path(settings.output) / suite.name / f"residuals_{settings.finetuning}"
    write_synced(
        stem.with_suffix(".csv"), pd.DataFrame(lines).to_csv(index=False, float_format="%.5g")
    )
    Console().print(Markdown(render(stem)))


def _scores(
    path: Path, settings: Residuals, suite: Suite
) -> dict[tuple[str, int], Mapping[str, float]]:
    """(row, seed) -> {task: accuracy}, of whole runs with default hyperparameters."""
    if not path.exists():
        raise InputError(f"there are no records at {path}", hint="run the methods first")
    found = {}
    for record in records.load_lines(path):
        key = record["key"]
        if key["finetuning"] == settings.finetuning and _plain(record, suite):
            accuracy = {t: score["accuracy"] for t, score in record["scores"].items()}
            found[key["method"], key["seed"]] = accuracy
    needed = ["zero_shot", "experts", *settings.methods]
    if missing := [(m, s) for m in needed for s in settings.seeds if (m, s) not in found]:
        method, seed = missing[0]
        raise InputError(
            f"{path} has no {settings.finetuning} record of {method} with seed {seed}"
            + (f", nor of {len(missing) - 1} more" if len(missing) > 1 else ""),
            hint="leave methods or seeds out, or run them first",
        )
    return found


def _plain(record: Record, suite: Suite) -> bool:
    """Whether a record is of all tasks and test examples, nothing being chosen."""
    key = record["key"]
    default = {}
    if key["method"] in merging.methods():
        default = dict(merging.create(key["method"]).hyperparameters)
    as_it_is = all(default.get(k) == v for k, v in key["hyperparameters"].items())
    whole = set(key["tasks"]) == set(suite.tasks) and key["limit"] is None
    return as_it_is and whole and key["split"] == "test" and not record["selection"]


def _of_seed(
    settings: Residuals, suite: Suite, seed: int, scores: Mapping[tuple[str, int], Any]
) -> Iterator[dict[str, Any]]:
    """A line per method and task: residuals, and the share of the expert's gain that is kept."""
    own = {"finetuning": settings.finetuning, "seed": seed}
    experts = {t: load_expert(suite.expert(t, **own)) for t in sorted(suite.tasks)}
    stacks = [deltas for _, _, deltas in blocks(suite.base(), experts, suite.layers())]
    below = torch.stack([shared_inputs(deltas).diagonal() for deltas in stacks]).sum(0)
    zero, best = scores["zero_shot", seed], scores["experts", seed]
    for name in track(settings.methods, f"residuals, seed {seed}"):
        above = _numerators(merging.create(name), stacks)
        for i, task in enumerate(experts):
            inputs, outputs = (above[:, i] / below[i]).tolist()
            kept = (scores[name, seed][task] - zero[task]) / (best[task] - zero[task])
            yield {"method": name, "seed": seed, "task": task, "inputs": inputs,
                   "outputs": outputs, "mean": (inputs + outputs) / 2, "kept": kept}  # fmt: skip


def _numerators(method: merging.Method, stacks: Sequence[torch.Tensor]) -> torch.Tensor:
    """(2, T), summed over all blocks."""
    context = method.prepare(lambda: ((str(i), deltas) for i, deltas in enumerate(stacks)))
    return torch.stack([residual(x, method(x, **context)) for x in stacks]).sum(0)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each residual with what was kept: a row a task, and their mean."""
    rows = {
        task: {side: spearmanr(part[side], part.kept).statistic for side in SIDES}
        for task, part in table.groupby("task")
    }
    found = pd.DataFrame(rows).T
    found.loc["mean"] = found.mean()
    return found


def render(stem: Path) -> str:
    """The page and the figure of a table that `measure` has written; returns the page."""
    table = pd.read_csv(stem.with_suffix(".csv"))
    found = correlations(table)
    seeds = ", ".join(map(str, sorted(table.seed.unique())))
    rows = [[task, *(f"{found.loc[task, side]:+.2f}" for side in SIDES)] for task in found.index]
    means = table.groupby("method")[[*SIDES, "kept"]].mean().sort_values("mean")
    lines = [[m, *(f"{means.loc[m, c]:.2f}" for c in (*SIDES, "kept"))] for m in means.index]
    text = "\n".join(
        [
            "# Does the residual predict what a merge keeps?\n",
            "Rank correlation, within a task, of the residual with the share of the expert's gain",
            "over the base that the merge kept on test examples; "
            f"{table.method.nunique()} methods, seeds {seeds}.",
            "-1 would be a perfect prediction, 0 none.\n",
            markdown(["task", *SIDES], rows),
            "Means over tasks and seeds:\n",
            markdown(["method", *SIDES, "kept"], lines),
        ]
    )
    write_synced(stem.with_suffix(".md"), text)
    save(_figure(table), stem)
    return text


def _figure(table: pd.DataFrame) -> Figure:
    """Kept against the mean residual, a colour a method, tasks averaged."""
    figure = Figure(figsize=(5, 3.2))
    axes = figure.subplots()
    for i, (name, part) in enumerate(table.groupby("method")):
        points = part.groupby("seed")[["mean", "kept"]].mean()
        marker = "o" if i < len(LINES) else "s"
        axes.scatter(points["mean"], points.kept, color=LINES[i % len(LINES)], marker=marker,
                     s=22, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("residual, mean of both sides")
    axes.set_ylabel("share of the experts' gain that is kept")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


COMMAND = Command("residuals", Residuals, measure)

"""`python -m experiments.residuals suite=...`: does the residual of a merge predict its accuracy?

For every method, seed and task the residual r_t on both sides of the layers (`merging.diagnosis`)
stands beside what the merge kept of the expert's gain over the base, from the records of finished
runs. Spearman's rank correlation is taken within a task, over methods and seeds, then averaged: a
residual that predicts accuracy has a correlation near -1. With `subsets=true` it is taken over
merges of fewer tasks as well: of all task lists that have a record of every method and seed.
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
    subsets: bool = False
    methods: list[str] = field(default_factory=list)
    records: str = "results"
    output: str = "results"
    device: str = "auto"


Scores = dict[tuple[str, int, tuple[str, ...]], Mapping[str, float]]


def measure(settings: Residuals) -> None:
    """Compute residuals, set them beside measured retention, tabulate and draw."""
    check_choices(settings)
    suite = load_suite(settings.suite, settings.device)
    scores = _scores(Path(settings.records) / suite.name / "records.jsonl", settings, suite)
    lines: list[dict[str, Any]] = []
    for seed in settings.seeds:
        lines += _of_seed(settings, suite, seed, scores)
    name = f"residuals_{settings.finetuning}" + "_subsets" * settings.subsets
    stem = Path(settings.output) / suite.name / name
    write_synced(
        stem.with_suffix(".csv"), pd.DataFrame(lines).to_csv(index=False, float_format="%.5g")
    )
    Console().print(Markdown(render(stem)))


def _scores(path: Path, settings: Residuals, suite: Suite) -> Scores:
    """(row, seed, tasks in the suite's order) -> {task: accuracy}, with default hyperparameters."""
    if not path.exists():
        raise InputError(f"there are no records at {path}", hint="run the methods first")
    found: Scores = {}
    for record in records.load_lines(path):
        key = record["key"]
        if key["finetuning"] == settings.finetuning and _plain(record):
            accuracy = {t: score["accuracy"] for t, score in record["scores"].items()}
            found[key["method"], key["seed"], tuple(key["tasks"])] = accuracy
    whole = tuple(suite.tasks)
    needed = ["zero_shot", "experts", *settings.methods]
    if missing := [(m, s) for m in needed for s in settings.seeds if (m, s, whole) not in found]:
        method, seed = missing[0]
        raise InputError(
            f"{path} has no {settings.finetuning} record of {method} with seed {seed}"
            + (f", nor of {len(missing) - 1} more" if len(missing) > 1 else ""),
            hint="leave methods or seeds out, or run them first",
        )
    return found


def _plain(record: Record) -> bool:
    """Whether a record is of all test examples and a method as it stands, nothing being chosen."""
    key = record["key"]
    default = {}
    if key["method"] in merging.methods():
        default = dict(merging.create(key["method"]).hyperparameters)
    as_it_is = all(default.get(k) == v for k, v in key["hyperparameters"].items())
    as_it_is &= not key.get("weights") and key.get("split_qkv", True)
    return as_it_is and key["limit"] is None and key["split"] == "test" and not record["selection"]


def _task_lists(settings: Residuals, suite: Suite, scores: Scores) -> list[tuple[str, ...]]:
    """All tasks, or every list that the records have for all methods and seeds, largest first."""
    whole = tuple(suite.tasks)
    if not settings.subsets:
        return [whole]
    lists = {
        tasks
        for _, _, tasks in scores
        if all((m, s, tasks) in scores for m in settings.methods for s in settings.seeds)
    }
    if lists == {whole}:
        raise InputError(
            "no merge of fewer tasks has a record of every method and seed",
            hint="fewer methods, or first: python -m experiments.run sweep=tasks",
        )
    return sorted(lists, key=lambda tasks: (-len(tasks), tasks))


def _of_seed(
    settings: Residuals, suite: Suite, seed: int, scores: Scores
) -> Iterator[dict[str, Any]]:
    """A line per task list, method and task: residuals, and the share of the expert's gain that is
    kept."""
    own = {"finetuning": settings.finetuning, "seed": seed}
    experts = {t: load_expert(suite.expert(t, **own)) for t in sorted(suite.tasks)}
    stacks = [deltas for _, _, deltas in blocks(suite.base(), experts, suite.layers())]
    below = torch.stack([shared_inputs(deltas).diagonal() for deltas in stacks]).sum(0)
    whole = tuple(suite.tasks)
    zero, best = scores["zero_shot", seed, whole], scores["experts", seed, whole]
    lists = _task_lists(settings, suite, scores)
    merges = [(tasks, name) for tasks in lists for name in settings.methods]
    for tasks, name in track(merges, f"residuals, seed {seed}"):
        at = [i for i, task in enumerate(experts) if task in tasks]
        above = _numerators(merging.create(name), [deltas[at] for deltas in stacks])
        for i, task in enumerate(sorted(tasks)):
            inputs, outputs = (above[:, i] / below[at[i]]).tolist()
            kept = scores[name, seed, tasks][task] - zero[task]
            yield {"method": name, "seed": seed, "task": task, "inputs": inputs,
                   "outputs": outputs, "mean": (inputs + outputs) / 2,
                   "kept": kept / (best[task] - zero[task])
                   } | ({"tasks": len(tasks)} if settings.subsets else {})  # fmt: skip


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
    sizes = table.groupby("tasks")[[*SIDES, "kept"]].mean() if "tasks" in table else None
    of = "" if sizes is None else f" merges of {sizes.index.min()} to {sizes.index.max()} tasks,"
    text = "\n".join(
        [
            "# Does the residual predict what a merge keeps?\n",
            "Rank correlation, within a task, of the residual with the share of the expert's gain",
            "over the base that the merge kept on test examples; "
            f"{table.method.nunique()} methods,{of} seeds {seeds}.",
            "-1 would be a perfect prediction, 0 none.\n",
            markdown(["task", *SIDES], rows),
            "Means over tasks and seeds:\n",
            markdown(["method", *SIDES, "kept"], lines),
            *([] if sizes is None else _by_size(table, sizes)),
        ]
    )
    write_synced(stem.with_suffix(".md"), text)
    save(_figure(table), stem)
    return text


def _by_size(table: pd.DataFrame, sizes: pd.DataFrame) -> list[str]:
    """How both depend on the number of tasks, and the correlation where nothing else differs."""
    lines = [[str(n), *(f"{sizes.loc[n, c]:.2f}" for c in (*SIDES, "kept"))] for n in sizes.index]
    within = []
    for name, part in table.groupby("method"):
        often = part.groupby(["seed", "task"]).filter(lambda own: len(own) > 2)
        alike = [correlations(own).loc["mean"] for _, own in often.groupby("seed")]
        if alike:
            mean = pd.DataFrame(alike).mean()
            within.append([str(name), *(f"{mean[side]:+.2f}" for side in SIDES)])
    return [
        "Means over methods, seeds and tasks, by the number of tasks that were merged:\n",
        markdown(["tasks", *SIDES, "kept"], lines),
        "Rank correlation within a method, a seed and a task, over the lists of tasks alone:\n",
        markdown(["method", *SIDES], within),
    ]


def _figure(table: pd.DataFrame) -> Figure:
    """Kept against the mean residual, a colour a method, tasks averaged."""
    figure = Figure(figsize=(5, 3.2))
    axes = figure.subplots()
    for i, (name, part) in enumerate(table.groupby("method")):
        points = part.groupby([c for c in ("seed", "tasks") if c in part])[["mean", "kept"]].mean()
        marker = "o" if i < len(LINES) else "s"
        axes.scatter(points["mean"], points.kept, color=LINES[i % len(LINES)], marker=marker,
                     s=22, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("residual, mean of both sides")
    axes.set_ylabel("share of the experts' gain that is kept")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


COMMAND = Command("residuals", Residuals, measure)
